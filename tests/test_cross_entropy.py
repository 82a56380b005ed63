"""cross_entropy beyond what tests/cases.py drives: sizes, kinds of target, errors, memory."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import jacobian_ops as jo
import jacobian_ops.functional as J
from jacobian_ops import kernels

from .cases import entropy_primitive

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
D = torch.float64
# Less than a vector, several blocks, of one warp and of many, and along another dimension.
SHAPES = [(1, 1), (7, 2), (5, 7), (4, 64), (3, 100), (3, 1000), (2, 1024), (2, 3001), (2, 20000)]
SHAPES += [(2, 1, 3), (2, 5, 3), (1, 21, 600), (2, 40, 5, 7), (1, 300, 33)]
close = torch.testing.assert_close


def wide(dtype):
    return D if dtype is D else torch.float32


def sample(shape, dtype, kind):
    """Logits, target, weight and smoothing; some rows are ignored where there are classes."""
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    rows, n = shape[:1] + shape[2:], shape[1]
    weight = None if kind == "plain" else torch.rand(n, dtype=wide(dtype)) + 0.5
    smoothing = 0.0 if kind in ("plain", "weighted") else 0.25
    if kind == "probabilities":
        return x, torch.rand(shape).to(dtype), weight, smoothing
    target = torch.randint(n, rows)
    target.view(-1)[1::3] = -100
    return x, target, weight, smoothing


KINDS = ["plain", "weighted", "smooth", "probabilities"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_many_sizes(ours, shape, dtype, kind):
    """Every kernel against float64, relative to the largest number of the result."""
    x, target, weight, smoothing = sample(shape, dtype, kind)
    tx = torch.randn(shape).to(dtype)
    g, tg = (torch.randn(shape[:1] + shape[2:], dtype=wide(dtype)) for _ in range(2))
    consts = 1, -100, smoothing
    options = dict(label_smoothing=smoothing, reduction="none")

    def f(x):
        p = target.double() if kind == "probabilities" else target
        return entropy_primitive(x, p, None if weight is None else weight.double(), **options)

    def vjp(x, g):
        return torch.func.vjp(f, x)[1](g)[0]

    exact = [t.double() for t in (x, tx, g, tg)]
    loss, tloss = torch.func.jvp(f, (exact[0],), (exact[1],))
    gx, tgx = torch.func.jvp(vjp, (exact[0], exact[2]), (exact[1], exact[3]))
    first = x, target, weight
    got = [
        (kernels.cross_entropy(*first, *consts), loss),
        *zip(kernels.cross_entropy_jvp(*first, tx, *consts), (loss, tloss), strict=True),
        (kernels.cross_entropy_vjp(*first, g, *consts), gx),
        *zip(kernels.cross_entropy_vjp_jvp(*first, g, tx, tg, *consts), (gx, tgx), strict=True),
    ]
    for i, (a, b) in enumerate(got):
        assert a.dtype == (wide(dtype) if i < 3 else dtype)
        eps = torch.finfo(dtype).eps if i >= 3 else torch.finfo(wide(dtype)).eps
        tolerance = 1e-13 if dtype is D else max(4e-6, eps)
        scale = b.abs().max().clamp(min=1)
        assert ((a.double() - b).abs() <= tolerance * scale).all(), i
    zero = torch.zeros_like(g)
    close(
        kernels.cross_entropy_vjp_jvp(*first, g, tx, None, *consts),
        kernels.cross_entropy_vjp_jvp(*first, g, tx, zero, *consts),
    )


@pytest.mark.parametrize("shape", [(6, 50), (2, 30, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_in_place(ours, kind, shape):
    """The gradient may overwrite the logits, and its tangent theirs."""
    x, target, weight, smoothing = sample(shape, torch.float32, kind)
    tx, g = torch.randn(shape), torch.randn(shape[:1] + shape[2:])
    rest = 1, -100, smoothing
    want = kernels.cross_entropy_vjp_jvp(x, target, weight, g, tx, g, *rest)
    z = x.clone()
    assert kernels.cross_entropy_vjp(z, target, weight, g, *rest, out=z) is z
    assert torch.equal(z, want[0])
    z, tz = x.clone(), tx.clone()
    kernels.cross_entropy_vjp_jvp(z, target, weight, g, tz, g, *rest, out=(z, tz))
    assert torch.equal(z, want[0]) and torch.equal(tz, want[1])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["classes", "ignored", "all ignored", "probabilities"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3, 2)])
def test_agrees_with_torch(shape, kind, weighted, smoothing, reduction):
    dim = min(1, len(shape) - 1)
    x = torch.randn(shape, dtype=D, requires_grad=True)
    weight = torch.rand(5, dtype=D) + 0.5 if weighted else None
    rows = shape[:dim] + shape[dim + 1 :]
    target, ignore_index = torch.randint(5, rows), -100
    if kind == "ignored":
        ignore_index = 2
    elif kind == "all ignored":
        target = torch.full_like(target, -100)
    elif kind == "probabilities":
        target = torch.rand(shape, dtype=D, requires_grad=True)
    options = dict(
        ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing, weight=weight
    )
    leaves = [t for t in (x, target) if t.requires_grad]
    got, want = J.cross_entropy(x, target, **options), F.cross_entropy(x, target, **options)
    close(got, want, equal_nan=True)
    v = torch.randn_like(want)
    close(torch.autograd.grad(got, leaves, v), torch.autograd.grad(want, leaves, v))


def test_uint8_classes_and_deprecated_arguments():
    x, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    close(J.cross_entropy(x, target.to(torch.uint8)), F.cross_entropy(x, target))
    with pytest.warns(UserWarning, match="deprecated"):
        assert J.cross_entropy(x, target, reduce=False).shape == (4,)


def test_weight_of_probabilities_is_differentiable():
    x, p, w = (torch.randn(s, dtype=D, requires_grad=True) for s in ((4, 3), (4, 3), (3,)))
    for f in (J.cross_entropy, F.cross_entropy):
        f(x, p, w, label_smoothing=0.1).backward()
    close(w.grad / 2, torch.autograd.grad(F.cross_entropy(x, p, w, label_smoothing=0.1), w)[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("along", ["last", "inner"])
def test_ignored_rows_may_hold_anything(ours, along, smoothing):
    inf, nan = float("inf"), float("nan")
    x, tx = torch.randn(2, 3, 4)
    x[0, :2], tx[1] = torch.tensor([nan, inf]), torch.tensor([inf, nan, 1.0, 2.0])
    target = torch.tensor([-1, -1, 2])
    if along == "inner":
        x, tx, target = (t.mT[None].contiguous() for t in (x, tx, target[:, None]))
        target = target[:, 0]
    rest = target, None, 1, -1, smoothing
    loss, tloss = kernels.cross_entropy_jvp(x, target, None, tx, *rest[2:])
    g = kernels.cross_entropy_vjp(x, target, None, torch.ones_like(loss), *rest[2:])
    ignored = target == -1
    for t in (loss[ignored], tloss[ignored], g.movedim(1, -1)[ignored]):
        assert (t == 0).all()
    assert all(t[~ignored].isfinite().all() for t in (loss, tloss, g.movedim(1, -1)))


@pytest.mark.parametrize("along", ["last", "inner"])
def test_special_logits(ours, along):
    """-inf logits that no class stands on cost nothing; what torch gives otherwise."""
    inf, nan = float("inf"), float("nan")
    rows = [[1.0, -inf, 2.0], [-inf] * 3, [inf, 1.0, 2.0], [nan, 1.0, 2.0], [3e38, -3e38, 1.0]]
    x = torch.tensor(rows)
    target = torch.tensor([0, 1, 1, 2, 0])
    if along == "inner":
        x, target = x.T.contiguous().unsqueeze(0), target.unsqueeze(0)
    run = dict(reduction="none")
    close(J.cross_entropy(x, target, **run), F.cross_entropy(x, target, **run), equal_nan=True)
    p = torch.full_like(x, 0.5)
    dim = 1
    p.select(dim, 1).zero_()
    loss = J.cross_entropy(x, p, **run)
    assert loss.reshape(-1)[0].isfinite()  # torch: 0 times infinity
    hit = J.cross_entropy(x, torch.full_like(target, 1), **run)
    assert hit.reshape(-1)[0] == inf
    assert J.cross_entropy(x, target, label_smoothing=0.1, **run).reshape(-1)[0] == inf


@pytest.mark.parametrize("shape", [(3, 4), (1, 4, 3)])
def test_ignored_rows_keep_nothing_of_bad_logits(ours, shape):
    x = torch.full(shape, float("nan")).requires_grad_()
    target = torch.full(shape[:1] + shape[2:], -100)
    loss = J.cross_entropy(x, target, reduction="sum", label_smoothing=0.1)
    (g,) = torch.autograd.grad(loss, x)
    assert loss == 0 and not g.any()


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_large_offsets(ours, dtype):
    """A common offset of the logits is no part of the loss."""
    x = torch.randn(4, 2000, dtype=dtype)
    p = torch.rand(4, 2000, dtype=dtype).softmax(1)
    moved = x + 4096
    close(J.cross_entropy(moved, p), J.cross_entropy(moved - 4096, p))


def test_empty(ours):
    x = torch.randn(0, 3, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64)
    assert J.cross_entropy(x, target).isnan()
    assert J.cross_entropy(x, target, reduction="sum") == 0
    assert J.cross_entropy(x, target, reduction="none").shape == (0,)
    (g,) = torch.autograd.grad(J.cross_entropy(x, target, reduction="sum"), x)
    assert g.shape == (0, 3)
    assert J.linear_cross_entropy(torch.randn(0, 4), torch.randn(3, 4), target).isnan()


def test_reduces_before_it_rounds(ours):
    """The mean of bfloat16 logits' losses is rounded once."""
    x, target = torch.randn(4000, 8).bfloat16(), torch.randint(8, (4000,))
    got, want = J.cross_entropy(x, target), F.cross_entropy(x.double(), target)
    assert got.dtype == torch.bfloat16 and got == want.bfloat16()


def test_saves_logits_and_target(ours):
    x, target = torch.randn(64, 32, requires_grad=True), torch.randint(32, (64,))
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        J.cross_entropy(x, target, reduction="sum")
    assert kept.keys() == {x.data_ptr(), target.data_ptr()}


@pytest.mark.parametrize("batched", list(itertools.product([0, None], repeat=3)))
def test_vmap_over_each_argument(batched):
    """Logits, classes and class weights, each of them shared or a sample's own."""
    if batched == (None, None, None):
        batched = (0, None, None)
    shapes = (3, 4), (3,), (4,)
    made = [torch.randn(shapes[0], dtype=D), torch.tensor([1, 3, 0]), torch.rand(4, dtype=D)]
    args = [
        torch.stack([t, t.flip(0), t]) if d == 0 else t for t, d in zip(made, batched, strict=True)
    ]

    def run(f):
        def hvp(x, t, w):
            first = torch.func.grad(lambda x: f(x, t, w, label_smoothing=0.1))
            return torch.func.jvp(first, (x,), (x,))

        return torch.func.vmap(hvp, batched)(*args)

    close(run(J.cross_entropy), run(entropy_primitive))


def test_autocast():
    x, target = torch.randn(4, 3).bfloat16(), torch.tensor([0, 2, 1, 1])
    w = torch.randn(5, 3)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert J.cross_entropy(x, target).dtype == F.cross_entropy(x, target).dtype == torch.float32
        loss = J.linear_cross_entropy(x.float(), w, target)
        assert loss.dtype == torch.float32


def test_module_and_replace():
    x, target = torch.randn(40, 6, requires_grad=True), torch.randint(6, (40,))
    options = dict(weight=torch.rand(6), ignore_index=2, label_smoothing=0.1)
    native, ours = torch.nn.CrossEntropyLoss(**options), jo.nn.CrossEntropyLoss(**options)
    close(ours(x, target), native(x, target))
    assert type(jo.replace(native)) is jo.nn.CrossEntropyLoss
    close(native(x, target), ours(x, target))
    assert type(jo.restore(native)) is torch.nn.CrossEntropyLoss


# ------------------------------------------------------------------------- linear_cross_entropy


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_in_chunks(dtype, bias, chunk_size):
    n, k, c = 10, 6, 7
    x, w, b = (torch.randn(s).to(dtype).requires_grad_() for s in ((n, k), (c, k), (c,)))
    b = b if bias else None
    target = torch.randint(c, (n,))
    target[3] = -100
    weight = (torch.rand(c) + 0.5).to(dtype)
    options = dict(weight=weight, label_smoothing=0.1)
    leaves = [x, w, b] if bias else [x, w]
    loss = J.linear_cross_entropy(x, w, target, b, chunk_size=chunk_size, **options)
    got = torch.autograd.grad(loss, leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    z = F.linear(exact[0], exact[1], exact[2] if bias else None)
    want = F.cross_entropy(z, target, weight=weight.double(), label_smoothing=0.1)
    tolerance = {D: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    close(loss.double(), want, rtol=tolerance, atol=tolerance)
    for a, e in zip(got, torch.autograd.grad(want, exact), strict=True):
        assert a.dtype == dtype
        close(a.double(), e, rtol=tolerance, atol=tolerance)


def test_linear_shapes_and_targets():
    x, w = torch.randn(2, 3, 4), torch.randn(5, 4)
    target = torch.randint(5, (2, 3))
    z = (x @ w.T).reshape(6, 5)
    want = F.cross_entropy(z, target.reshape(-1), reduction="none").reshape(2, 3)
    close(J.linear_cross_entropy(x, w, target, reduction="none"), want)
    close(J.linear_cross_entropy(x[0, 0], w, target[0, 0], reduction="none"), want[0, 0])
    p = torch.rand(6, 5)
    close(J.linear_cross_entropy(x.reshape(6, 4), w, p), F.cross_entropy(z, p))
    rows = F.cross_entropy(z, p, reduction="none").reshape(2, 3)
    close(J.linear_cross_entropy(x, w, p.reshape(2, 3, -1)), rows.mean())
    close(J.linear_cross_entropy(x, w, p.reshape(2, 3, -1), reduction="none"), rows)
    close(J.linear_cross_entropy(x[0, 0], w, p[0]), rows[0, 0])


def test_linear_with_all_targets_ignored(ours):
    """The mean of nothing is nan, and has no gradient."""
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((6, 4), (5, 4), (5,)))
    loss = J.linear_cross_entropy(x, w, torch.full((6,), -100), b)
    assert loss.isnan()
    for g in torch.autograd.grad(loss, (x, w, b)):
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_made_with_the_loss(dtype, reduction):
    """Scaled by the first backward pass; made anew by others, and where more is to follow."""
    x, w, b = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((6, 4), (5, 4), (5,)))
    target = torch.tensor([0, 4, -100, 2, 2, 1])
    options = dict(reduction=reduction, label_smoothing=0.1)

    def loss():
        return J.linear_cross_entropy(x, w, target, b, chunk_size=4, **options)

    native = F.cross_entropy(F.linear(x, w, b), target, **options)
    y = loss()
    names, node = [], y.grad_fn
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    assert "LinearCrossEntropyTotalBackward" in names
    scales = torch.tensor([3.0, -2.0, 0.5], dtype=dtype)
    for scale in scales[:2]:
        got = torch.autograd.grad(y, (x, w, b), scale, retain_graph=True)
        want = torch.autograd.grad(native, (x, w, b), scale, retain_graph=True)
        close(got, want)
    again = torch.autograd.grad(y, (x, w, b), scale)
    assert all(map(torch.equal, again, got))  # made anew to the same bits
    got = torch.autograd.grad(loss(), (x, w, b), scales, is_grads_batched=True)
    want = torch.autograd.grad(native, (x, w, b), scales, is_grads_batched=True, retain_graph=True)
    close(got, want)

    def second(loss):
        g = torch.autograd.grad(loss, (x, w, b), create_graph=True)
        return torch.autograd.grad(sum(t.pow(2).sum() for t in g), (x, w, b))

    close(second(loss()), second(native))
    with torch.autograd.graph.save_on_cpu():  # hooks decide what is kept
        assert loss().grad_fn.next_functions[0][0].name() != "LinearCrossEntropyTotalBackward"


def test_frozen_parameters_cost_nothing(ours):
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    target = torch.randint(5, (4,))
    (got,) = torch.autograd.grad(J.linear_cross_entropy(x, w, target), x)
    close(got, torch.autograd.grad(F.cross_entropy(x @ w.T, target), x)[0])
    needs = True, False, False
    out = kernels.linear_cross_entropy_vjp(x.detach(), w, target, None, None, torch.ones(4), needs)
    assert [t.numel() for t in out] == [12, 0, 0]


PEAK = """
import re, sys, torch
import torch.nn.functional as F
import jacobian_ops.functional as J

def kib(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
x = torch.randn({n}, {k}, requires_grad=True)
w = torch.randn({c}, {k}, requires_grad=True)
target = torch.randint({c}, ({n},))
def run(x, w, target):
    if sys.argv[1] == "native":
        return torch.autograd.grad(F.cross_entropy(F.linear(x, w), target), (x, w))
    return torch.autograd.grad(J.linear_cross_entropy(x, w, target), (x, w))
run(x[:2], w[:2], target[:2] % 2)
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
gradients = run(x, w, target)
made = sum(g.numel() * g.element_size() for g in gradients) // 1024
print(kib("VmHWM") - before - made)
"""


@pytest.mark.cpu_only
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_large_vocabulary():
    """What forward and gradient take besides the gradients, of a process of its own."""
    code = PEAK.format(n=1024, k=512, c=32000)

    def peak(which):
        command = [sys.executable, "-c", code, which]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak("ours") < peak("native") / 8


# -------------------------------------------------------------------------------------- errors

X, T = torch.randn(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.cpu_only
@pytest.mark.parametrize("bad", [4, -1, 2**40])
@pytest.mark.parametrize("shape", [(3, 4), (1, 4, 3)])
def test_class_out_of_range(ours, shape, bad):
    target = torch.tensor([0, bad, 2]).reshape(shape[:1] + shape[2:])
    text = (
        f"cross_entropy: target is {bad}; allowed: 0 to 3, .* -100.*Target {bad} is out of bounds"
    )
    with pytest.raises(IndexError, match=text):
        J.cross_entropy(torch.randn(shape), target)
    with pytest.raises(IndexError, match=text):
        J.linear_cross_entropy(torch.randn(3, 2), torch.randn(4, 2), target.reshape(-1))


ERRORS = [
    (lambda: J.cross_entropy(X, T[:2]), ValueError, r"target has shape \[2\]; it must be \[3\]"),
    (lambda: J.cross_entropy(X, T.int()), RuntimeError, "target has dtype int32; allowed: int64"),
    (lambda: J.cross_entropy(X, X.long()), RuntimeError, "target has dtype int64 and the shape"),
    (lambda: J.cross_entropy(X, X[0]), RuntimeError, r"target has dtype float32 and shape \[4\]"),
    (lambda: J.cross_entropy(X, [0, 1, 2]), TypeError, "target must be Tensor, not list"),
    (lambda: J.cross_entropy(X, T, torch.ones(5)), RuntimeError, r"weight has shape \[5\]"),
    (lambda: J.cross_entropy(X, T, torch.ones(4).double()), RuntimeError, "weight has dtype fl"),
    (lambda: J.cross_entropy(X, T, label_smoothing=1.5), RuntimeError, "label_smoothing is 1.5"),
    (lambda: J.cross_entropy(X, T, reduction="all"), ValueError, "reduction is 'all'; allowed"),
    (lambda: J.cross_entropy(X, X, ignore_index=1), RuntimeError, "ignore_index is 1; allowed"),
    (lambda: J.cross_entropy(X[0, 0], T[0]), RuntimeError, "input has no dimensions"),
    (lambda: J.linear_cross_entropy(X, X, T, chunk_size=0), ValueError, "chunk_size is 0"),
    (lambda: J.linear_cross_entropy(X, X[:, :3], T), RuntimeError, "shapes cannot be multiplied"),
    (lambda: J.linear_cross_entropy(X, X, X), RuntimeError, r"or probabilities \[3, 3\]"),
    (lambda: kernels.cross_entropy(X, T, None, 2), IndexError, "dim is 2"),
    (lambda: kernels.cross_entropy(X, T[:2]), RuntimeError, r"target has shape \[2\]"),
    (lambda: kernels.cross_entropy(X, X.double()), RuntimeError, "target has dtype float64"),
    (lambda: kernels.cross_entropy(X, T, X[0].double()), RuntimeError, "weight has dtype float64"),
    (lambda: kernels.cross_entropy_vjp(X, T, None, X[0]), RuntimeError, r"g has shape \[4\]"),
    (lambda: kernels.cross_entropy(X, T, smoothing=-1.0), RuntimeError, "smoothing is -1.0"),
    (
        lambda: kernels.linear_cross_entropy(X, X[:, :3], T),
        RuntimeError,
        r"x has shape \[3, 4\], linear_weight has \[3, 3\]",
    ),
]


@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors(ours, call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_weight_of_classes_has_no_derivative(ours):
    weight = torch.ones(4, requires_grad=True)
    loss = J.cross_entropy(X.clone().requires_grad_(), T, weight, reduction="sum")
    with pytest.raises(NotImplementedError, match="weight has no derivative"):
        loss.backward()


def test_weight_of_classes_that_requires_grad():
    """Only a derivative by it is refused."""
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    target, weight = torch.randint(5, (4,)), torch.rand(5) + 0.5
    loss = J.linear_cross_entropy(x, w, target, weight=weight.clone().requires_grad_())
    close(loss, F.cross_entropy(x @ w.T, target, weight=weight))
    with pytest.raises(NotImplementedError, match="^linear_cross_entropy: weight has no"):
        loss.backward()


def test_rows_of_one_class(ours):
    """The loss of a single class is 0, whatever its logit."""
    x = torch.randn(3, 1, requires_grad=True)
    loss = J.cross_entropy(x, torch.zeros(3, dtype=torch.int64), reduction="none")
    assert not loss.any() and math.isclose(loss.sum().item(), 0)
