"""Low precision against float64, special values, tails.

The yardstick is the native op: our error is at most twice its error plus one rounding of the
largest value, in the dtype.
"""

import pytest
import torch
import torch.nn.functional as F

import jacobian_ops.functional as J
from jacobian_ops import kernels

from .cases import ATTENTION, CASES, LINEAR_ENTROPY, POINTWISE, SOFTMAX

LOW = [torch.float32, torch.bfloat16, torch.float16]


def name(dtype):
    return str(dtype).removeprefix("torch.")


def grown(case, rows=37):
    """The case's inputs with more rows or elements, so that errors have many chances."""
    if case in LINEAR_ENTROPY:
        x, *weights = case.inputs()
        return torch.randn(rows, x.shape[1], dtype=torch.float64) * 1.5, *weights
    if case not in POINTWISE + SOFTMAX:
        return case.inputs()
    (shape,) = case.shapes
    dim = int(case.name.split("dim")[1]) if "dim" in case.name else 0
    shape = tuple(rows if i == dim % len(shape) else n + 8 for i, n in enumerate(shape))
    return (torch.randn(shape, dtype=torch.float64) * 3,)


def products(f, xs, v, ts):
    """Value, VJP and JVP."""
    y, pull = torch.func.vjp(f, *xs)
    return y, *pull(v), torch.func.jvp(f, xs, ts)[1]


# Weights that are recomputed from the logarithm of their sum have its rounding too, in every fused
# attention: tests/test_attention.py says how much.
@pytest.mark.parametrize("dtype", LOW, ids=name)
@pytest.mark.parametrize("case", [c for c in CASES if c not in ATTENTION], ids=str)
def test_against_float64(case, dtype):
    xs = tuple(x.to(dtype) for x in grown(case))
    ts = tuple(torch.randn_like(x) for x in xs)
    v = torch.randn_like(case.ours(*xs))
    ours = products(case.ours, xs, v, ts)
    native = products(case.native, xs, v, ts)
    exact = products(
        case.native, tuple(x.double() for x in xs), v.double(), tuple(t.double() for t in ts)
    )
    for got, other, want in zip(ours, native, exact, strict=True):
        assert got.dtype == dtype
        allowed = 2 * (other.double() - want).abs().max()
        allowed += torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed


def grid(dtype):
    return torch.cat([torch.linspace(-12, 12, 4001), torch.randn(4000)]).to(dtype)


@pytest.mark.parametrize("dtype", LOW, ids=name)
@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_grid(case, dtype):
    """Values and derivatives over the range in which activations bend."""
    (x,) = (grid(dtype),)
    ones = torch.ones_like(x)
    ours = products(case.ours, (x,), ones, (ones,))
    native = products(case.native, (x,), ones, (ones,))
    exact = products(case.native, (x.double(),), ones.double(), (ones.double(),))
    for got, other, want in zip(ours, native, exact, strict=True):
        allowed = 2 * (other.double() - want).abs().max()
        allowed += torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed


def test_gelu_keeps_its_negative_tail(ours):
    """x (1 + erf) / 2 cancels to nothing there."""
    x = torch.linspace(-10, -2, 200)
    exact = 0.5 * x.double() * torch.erfc(-x.double() / 2**0.5)
    assert ((J.gelu(x).double() - exact) / exact).abs().max() < 1e-5
    native = ((F.gelu(x).double() - exact) / exact).abs().max()
    assert native > 1e-3  # what the test is for


INF, NAN = float("inf"), float("nan")
SPECIAL = [-INF, INF, NAN, 0.0, -0.0, 1e30, -1e30, 3e38, -3e38, 1e-40, -1e-40]
SPECIAL += [3.0, -3.0, 6.0, 1.0, -1.0]
# Native gelu, silu, mish and hardswish are NaN or infinite where intermediate results overflow.
FINITE_LIMITS = {"silu", "gelu", "gelu-tanh", "mish", "hardswish"}
# Native rounds 1/6 and 1/alpha to float32 in the derivative.
FLOAT_CONSTANTS = {"hardsigmoid", "celu-alpha"}


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=name)
@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_special_values(case, dtype):
    """Infinities, NaN, huge and denormal numbers and the kinks, in value and derivative."""
    x = torch.tensor(SPECIAL, dtype=dtype)

    def native(z):  # one by one: its vectorised derivatives at NaN differ from its scalar ones
        return torch.cat([case.native(element) for element in z.split(1)])

    ones = torch.ones_like(x)
    eps = torch.finfo(torch.float32 if case.name in FLOAT_CONSTANTS else dtype).eps
    eps = max(eps, torch.finfo(dtype).eps)
    for got, want in zip(
        products(case.ours, (x,), ones, (ones,)), products(native, (x,), ones, (ones,)), strict=True
    ):
        if case.name in FINITE_LIMITS:
            both = want.isfinite() | x.isnan()
            got, want = got[both], want[both]
        torch.testing.assert_close(got, want, rtol=4 * eps, atol=4 * eps, equal_nan=True)


ROWS = [
    [1.0, 2.0, 3.0],
    [-INF, 2.0, 3.0],
    [-INF, -INF, -INF],
    [INF, 1.0, 2.0],
    [NAN, 1.0, 2.0],
    [1e30, -1e30, 0.0],
    [3e38, 3e38, -3e38],
    [-INF, -INF, 5.0],
    [1e-40, -1e-40, 0.0],
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("op", ["softmax", "softmin", "log_softmax"])
@pytest.mark.parametrize("dim", [0, 1])
def test_special_rows(op, dim, dtype):
    x = torch.tensor(ROWS, dtype=dtype)
    x = x.T.contiguous() if dim == 0 else x
    ours, native = getattr(J, op), getattr(F, op)
    torch.testing.assert_close(ours(x, dim), native(x, dim), equal_nan=True)

    def vjp(f):
        z = x.clone().requires_grad_()
        f(z, dim).backward(torch.linspace(-1, 1, x.numel(), dtype=dtype).view_as(x))
        return z.grad

    torch.testing.assert_close(vjp(ours), vjp(native), equal_nan=True)


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_masked_logits_have_finite_tangents(op):
    """-inf entries give 0 (log: -inf) and add nothing to a tangent."""
    x = torch.tensor([[1.0, -INF, 2.0, -INF]])
    t = torch.tensor([[1.0, 5.0, -1.0, 2.0]])
    y, ty = torch.func.jvp(lambda z: getattr(J, op)(z, -1), (x,), (t,))
    s = x.softmax(-1)
    want = s * (t - (s * t).sum()) if op == "softmax" else t - (s * t).sum()
    torch.testing.assert_close(ty, want)


@pytest.mark.parametrize("case", SOFTMAX, ids=str)
def test_large_shift(case):
    """Rows far from zero, as logits are before training is stable."""
    (x,) = case.inputs(torch.float32)
    for shift in (1000.0, -1000.0):
        torch.testing.assert_close(case.ours(x + shift), case.native(x + shift))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 1000, 1024, 1025, 5000, 12000, 30000])
@pytest.mark.parametrize("dim", [-1, 0])
def test_softmax_row_lengths(n, dim):
    """Below a vector, vectors and tails, blocks and their tails; what a GPU cannot hold."""
    x = torch.randn(3, n) if dim == -1 else torch.randn(n, 3)
    for op in ("softmax", "log_softmax"):
        torch.testing.assert_close(getattr(J, op)(x, dim), getattr(F, op)(x, dim))
    t = torch.randn_like(x)
    y, ty = kernels.softmax_jvp(x, t, dim)
    exact = x.double().softmax(dim)
    exact = exact * (t - (exact * t).sum(dim, True))
    torch.testing.assert_close(ty.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("m", [1, 4, 5, 13, 14, 15, 29])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("k", [0, 1, 7, 255, 256, 257, 600])
def test_gemm_edges(m, n, k):
    """Around tiles, panels, depth blocks and the path for few rows, of all layouts."""
    x, w, b = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    want = x.double() @ w.double().T + b.double()
    for a in (x, x.T.contiguous().T):
        for c in (w, w.T.contiguous().T, torch.randn(n, 2 * k)[:, ::2].copy_(w)):
            torch.testing.assert_close(J.linear(a, c, b).double(), want, atol=1e-4, rtol=1e-5)


def check_long_sum(got, native, exact):
    """Rounding does not grow with the number of terms, which are all of one sign here."""
    allowed = 2 * (native.double() - exact).abs().max()
    allowed += torch.finfo(torch.float32).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("fill", [torch.full, lambda shape, _: torch.rand(shape)])
def test_long_sums_are_as_good_as_native(fill):
    x = fill((1 << 18, 3), 0.1)
    check_long_sum(kernels.column_sum(x), x.sum(0), x.double().sum(0))


@pytest.mark.cpu_only  # a GPU's kernel is for short sums, the others are cuBLAS's
@pytest.mark.parametrize("fill", [torch.full, lambda shape, _: torch.rand(shape)])
@pytest.mark.parametrize("rows", [1, 20])  # read in place, and packed
def test_long_products_are_as_good_as_native(fill, rows):
    n = 1 << 18
    a, w = fill((1, n), 0.1).expand(rows, n).contiguous(), torch.rand(40, n)
    native, exact = a @ w.T, a.double() @ w.double().T
    check_long_sum(kernels.linear(a, w), native, exact)
    check_long_sum(kernels.linear(a.T.contiguous().T, w), native, exact)


INFINITE = torch.tensor([INF, -INF, NAN, 1.0])


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "hardsigmoid"])
def test_nothing_passes_a_closed_gate(ours, name):
    """Where the derivative is 0, an infinite cotangent or tangent gives 0, not NaN."""
    x = torch.full((4,), -7.0)
    native, mine = getattr(F, name), getattr(J, name)
    for f in (native, mine):
        z = x.clone().requires_grad_()
        f(z).backward(INFINITE)
        assert torch.equal(z.grad, torch.zeros(4)), f
        assert torch.equal(torch.func.jvp(f, (x,), (INFINITE,))[1], torch.zeros(4))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name)
def test_bounds_between_two_numbers_of_the_dtype(dtype, inplace):
    """A saturated element equals its bound only where both are rounded to the same number."""
    x = torch.tensor([-2.0, 0.2, 3.0], dtype=dtype)
    for bound in (0.1, 0.3, 0.7, 0.9):
        grads = []
        for f in (F.hardtanh, J.hardtanh):
            z = x.clone().requires_grad_()
            y = f(z * 1, -bound, bound, inplace=inplace)
            y.sum().backward()
            grads += [y, z.grad]
        assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])


@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_long_sums_do_not_drift(dtype):
    """Sums run in float32 or wider: a bfloat16 sum would stop growing at 256."""
    ones = torch.ones(4096, 3, dtype=dtype)
    assert torch.equal(kernels.column_sum(ones), torch.full((3,), 4096.0, dtype=dtype))
    assert torch.equal(J.linear(ones.T, ones.T), torch.full((3, 3), 4096.0, dtype=dtype))
