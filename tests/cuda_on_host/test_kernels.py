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


ROWS = {
    "softmax": lambda a, b, c, dim: kernels.softmax(a, dim),
    "softmax_vjp": lambda a, b, c, dim: kernels.softmax_vjp(a, b, dim),
    "softmax_jvp": lambda a, b, c, dim: kernels.softmax_jvp(a, b, dim),
    "softmax_vjp_vjp": lambda a, b, c, dim: kernels.softmax_vjp_vjp(a, b, c, dim),
    "log_softmax_jvp": lambda a, b, c, dim: kernels.log_softmax_jvp(a, b, dim),
    "softmax_dropout_vjp": lambda a, b, c, dim: kernels.softmax_dropout_vjp(a, b, dim, 0.1, 1),
}
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
    "shape, dim", [((5, 100), 1), ((2, 3000), 1), ((2, 9001), 1), ((70, 40), 0)]
)
@pytest.mark.parametrize("name", ROWS)
def test_bits_of_rows(name, shape, dim, seeds):
    same_bits(lambda *t: ROWS[name](*t, dim), tensors(*shape), seeds)


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


@counted
@pytest.mark.parametrize("shape", [(16, 64), (8, 512), (4, 8192)], ids=["team", "warp", "block"])
@pytest.mark.parametrize(
    "name, read, written",
    [
        ("softmax", 4, 4),
        ("softmax_vjp", 8, 4),
        ("softmax_jvp", 8, 8),
        ("softmax_vjp_vjp", 12, 8),
        ("log_softmax_jvp", 8, 8),
    ],
)
def test_rows_in_registers_are_moved_once(name, read, written, shape):
    inputs = tensors(*shape)
    assert bytes_of(lambda *t: ROWS[name](*t, 1), inputs) == (read, written)


@counted
@pytest.mark.parametrize("shape, dim", [((2, 20000), 1), ((64, 64), 0)], ids=["sweep", "columns"])
def test_longer_rows_are_read_twice(shape, dim):
    inputs = tensors(*shape)
    assert bytes_of(lambda *t: ROWS["softmax"](*t, dim), inputs) == (8, 4)
    assert bytes_of(lambda *t: ROWS["softmax_jvp"](*t, dim), inputs) == (16, 8)
