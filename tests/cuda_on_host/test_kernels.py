"""The project's kernels on the host: bits that no order of threads changes, bytes that are moved.

The suite checks their numbers; here is what only the host can see.
"""

import pytest
import torch

from jacobian_ops import _backend, kernels

from ..conftest import ON_HOST

if not ON_HOST:
    pytest.skip(
        "the CUDA kernels run on the host in make test-cuda-on-host", allow_module_level=True
    )
HOST = _backend.BACKENDS["cpu"]


def tensors(*shape, count=3, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(count)]


# Products of rows: the numbers of inputs and of sums. Of vjp_jvp with both tangents, and with one.
ROWS = {
    ("softmax", 1): 1,
    ("softmax_vjp", 2): 1,
    ("softmax_jvp", 2): 2,
    ("softmax_vjp_vjp", 3): 2,
    ("softmax_vjp_jvp", 3): 2,
    ("softmax_vjp_jvp", 4): 2,
    ("log_softmax", 1): 1,
    ("log_softmax_vjp", 2): 1,
    ("log_softmax_tangent", 2): 1,
    ("log_softmax_jvp", 2): 2,
    ("log_softmax_vjp_vjp", 3): 2,
    ("log_softmax_vjp_jvp", 3): 2,
    ("log_softmax_vjp_jvp", 4): 2,
    ("softmax_dropout", 1): 1,
    ("softmax_dropout_vjp", 2): 2,
    ("softmax_dropout_jvp", 2): 2,
}
rows = pytest.mark.parametrize("name, count", ROWS)


def room(name, count):
    """The inputs that a kernel has room for: the tangent that may be absent counts."""
    return 4 if name.endswith("vjp_jvp") else count


def run_rows(name, inputs, dim):
    """A product of rows as a tuple."""
    absent = [None] if name.endswith("vjp_jvp") and len(inputs) == 3 else []
    mask = (0.1, 1) if "dropout" in name else ()
    out = getattr(kernels, name)(*inputs, *absent, dim, *mask)
    return out if isinstance(out, tuple) else (out,)


def exact_rows(name, inputs, dim):
    """The same in float64, by torch's transforms."""
    log = name.startswith("log")
    x, *rest = (t.double() for t in inputs)
    m = kernels.dropout(torch.ones_like(x), 0.1, 1) if "dropout" in name else 1

    def value(x):
        return m * (x.log_softmax(dim) if log else x.softmax(dim))

    def vjp(y, gy):
        return gy - y.exp() * gy.sum(dim, True) if log else y * (gy - (y * gy).sum(dim, True))

    match name.removeprefix("log_").removeprefix("softmax_").removeprefix("dropout_"):
        case "jvp":
            return torch.func.jvp(value, (x,), tuple(rest))
        case "vjp":
            return torch.func.vjp(value, x)[1](*rest) if "dropout" in name else (vjp(x, *rest),)
        case "tangent":
            return (rest[0] - (x.exp() * rest[0]).sum(dim, True),)
        case "vjp_vjp":
            return torch.func.vjp(vjp, x, rest[0])[1](rest[1])
        case "vjp_jvp":
            gy, ty, tgy = (*rest, torch.zeros_like(x))[:3]
            return torch.func.jvp(vjp, (x, gy), (ty, tgy))
    return (value(x),)


PRODUCTS = {
    "activation": lambda a, b, c: kernels.activation(a, "gelu"),
    "activation_vjp": lambda a, b, c: kernels.activation_vjp(a, b, "gelu"),
    "activation_jvp": lambda a, b, c: kernels.activation_jvp(a, b, "gelu"),
    "activation_vjp_vjp": lambda a, b, c: kernels.activation_vjp_vjp(a, b, c, "gelu"),
    "activation_vjp_sum": lambda a, b, c: kernels.activation_vjp_sum(a, b, "gelu"),
    "dropout": lambda a, b, c: kernels.dropout(a, 0.1, 1),
    "dropout_add": lambda a, b, c: kernels.dropout_add(a, b, 0.1, 1),
    "column_sum": lambda a, b, c: kernels.column_sum(a),
    "linear": lambda a, b, c: kernels.linear(a, b),
    "linear_vjp": lambda a, b, c: kernels.linear_vjp(a, b, a @ b.T),
    "linear_act_dropout_jvp": lambda a, b, c: kernels.linear_act_dropout_jvp(
        a, b, None, c, c[: len(b)], None, "gelu", 0.1, 1
    ),
    "linear_act_dropout": lambda a, b, c: kernels.linear_act_dropout(
        a, b, None, "gelu", 0.1, 1, residual=a @ b.T
    )[0],
    "linear_act_dropout_vjp": lambda a, b, c: kernels.linear_act_dropout_vjp(
        a, b, a @ b.T, c @ b.T, "gelu", 0.1, 1
    ),
}


@pytest.fixture
def seeds():
    yield range(5)
    HOST.set_seed(0)


def same_bits(run, inputs, seeds):
    results = []
    for seed in seeds:
        HOST.set_seed(seed)
        out = run(*inputs)
        results.append(out if isinstance(out, tuple) else (out,))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_bits_do_not_depend_on_the_order_of_threads(name, dtype, seeds):
    same_bits(PRODUCTS[name], tensors(70, 45, dtype=dtype), seeds)


@pytest.mark.parametrize(
    "shape, dim",
    [
        *(((5, 100), 1), ((2, 3000), 1), ((2, 8400), 1), ((2, 8401), 1), ((1, 26000), 1)),
        *(((70, 40), 0), ((70, 41), 0), ((400, 40), 0)),
    ],
)
@rows
def test_bits_of_rows(name, count, shape, dim, seeds):
    same_bits(lambda *t: run_rows(name, t, dim), tensors(*shape, count=count), seeds)


SHARED = 99 << 10  # of a block: machine.h
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=[str(t)[6:] for t in DTYPES])


def check_rows(name, count, shape, dim, dtype, offset, kernel, *arguments):
    """A product's numbers, of inputs that begin ``offset`` elements late, and the kernel it ran."""
    inputs = tensors(*shape, count=count, dtype=dtype)
    if name.startswith(("softmax_vjp", "log_softmax_vjp", "log_softmax_tangent")):  # of an output
        inputs[0] = run_rows(name.split("_vjp")[0].split("_tangent")[0], inputs[:1], dim)[0]
    size = inputs[0].numel()
    inputs = [torch.empty(size + offset, dtype=dtype)[offset:].view(shape).copy_(t) for t in inputs]
    HOST.reset_counters()
    results = run_rows(name, inputs, dim)
    ((launched, _, _),) = HOST.launches()
    assert launched.startswith(f"softmax::{kernel}<")
    assert launched.removesuffix(">").endswith(arguments)
    eps = torch.finfo(dtype).eps
    sums = 1e-14 if dtype == torch.float64 else 2e-6
    for got, want in zip(results, exact_rows(name, inputs, dim), strict=True):
        error = (got.double() - want).abs()
        assert (error <= eps * want.abs() + sums * want.abs().max() + torch.finfo(dtype).tiny).all()


@dtypes
@rows
def test_tiers_of_rows(name, count, dtype):
    """The longest row of each tier and the next one, whole packs or not, aligned or not."""
    sum_bytes = 16 * max(4, dtype.itemsize) * (1 + ROWS[name, count])  # where warps meet
    pack = 16 // dtype.itemsize
    held = room(name, count)
    block = 512 * (4 if held + 2 * ("dropout" in name) < 4 else 2) * pack
    staged = (SHARED - sum_bytes) // (16 * held) * pack
    for n, offset, kernel in (
        (block, 0, "block"),
        (block + 1, 0, "staged"),
        (block + pack, 0, "staged"),
        (block + pack, 1, "staged"),
        (staged, 0, "staged"),
        (staged + 1, 0, "sweep"),
    ):
        check_rows(name, count, (1, n), 1, dtype, offset, kernel, "")


@dtypes
@rows
def test_tiers_of_columns(name, count, dtype):
    """Strips up to half of the shared memory, whole packs or not, aligned or not."""
    sum_bytes = 8 * 32 * max(4, dtype.itemsize) * (1 + ROWS[name, count])  # where lines meet
    staged = ((SHARED - 1024) // 2 - sum_bytes) // (room(name, count) * 32 * dtype.itemsize)
    for n, inner, offset, staging in (
        (9, 3, 0, "true"),
        (40, 24, 0, "true"),
        (40, 24, 1, "true"),
        (staged, 16, 0, "true"),
        (staged + 1, 16, 0, "false"),
    ):
        check_rows(name, count, (2, n, inner), 1, dtype, offset, "columns", staging)


counted = pytest.mark.skipif(HOST.variant != "checked", reason="this variant does not count bytes")


def bytes_of(run, inputs):
    """Bytes read and written of global memory, an element of the first input."""
    HOST.reset_counters()
    run(*inputs)
    launches = HOST.launches()
    return tuple(sum(launch[i] for launch in launches) / inputs[0].numel() for i in (1, 2))


@counted
@pytest.mark.parametrize(
    "name, read, written",
    [
        ("activation", 4, 4),
        ("activation_vjp", 8, 4),
        ("activation_jvp", 8, 8),
        ("activation_vjp_vjp", 12, 8),
        ("dropout", 4, 4),
        ("dropout_add", 8, 4),
    ],
)
def test_each_number_is_moved_once(name, read, written):
    """The seeds of dropout are read besides, once a counter."""
    inputs = tensors(64, 256)
    seeds = 2 if name.startswith("dropout") else 0
    got_read, got_written = bytes_of(PRODUCTS[name], inputs)
    assert read <= got_read <= read + seeds
    assert got_written == written


@counted
def test_sums_move_little_beside_their_input():
    inputs = tensors(2048, 256)
    for name, read, written in (("activation_vjp_sum", 8, 4), ("column_sum", 4, 0)):
        got_read, got_written = bytes_of(PRODUCTS[name], inputs)
        assert read <= got_read <= read + 0.6 and written <= got_written <= written + 0.6


HELD = {
    "team": ((16, 64), 1),
    "warp": ((8, 512), 1),
    "block": ((4, 4096), 1),
    "staged": ((2, 8400), 1),
    "staged, of four": ((2, 6000), 1),
    "columns": ((64, 64), 0),
}
FITTING = [
    pytest.param(*row, *HELD[tier], id=f"{row[0]}-{row[1]}-{tier}")
    for row in ROWS
    for tier in HELD
    if tier != "staged" or room(*row) < 4
]


@counted
@pytest.mark.parametrize("name, count, shape, dim", FITTING)
def test_rows_that_are_held_are_moved_once(name, count, shape, dim):
    """The seeds of dropout are read besides, at each drawing of four elements' bits."""
    inputs = tensors(*shape, count=count)
    read, written = bytes_of(lambda *t: run_rows(name, t, dim), inputs)
    seeds = 16 if "dropout" in name else 0
    assert 4 * count <= read <= 4 * count + seeds
    assert written == (8 if name.endswith(("jvp", "vjp_vjp")) else 4)


@counted
@pytest.mark.parametrize("shape, dim", [((1, 26000), 1), ((400, 64), 0)], ids=["sweep", "columns"])
def test_longer_rows_are_read_twice(shape, dim):
    a, b = tensors(*shape, count=2)
    assert bytes_of(lambda *t: run_rows("softmax", t, dim), [a]) == (8, 4)
    assert bytes_of(lambda *t: run_rows("softmax_jvp", t, dim), [a, b]) == (16, 8)
