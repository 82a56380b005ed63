"""swiglu, geglu and linear_swiglu beyond what tests/cases.py drives: sizes, strides, errors."""

import pytest
import torch
import torch.nn.functional as F

import jacobian_ops as jo
import jacobian_ops.functional as J
from jacobian_ops import kernels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# Of less than a vector; of whole packs and not; of several pieces and of several tasks.
LENGTHS = [1, 7, 64, 1001, 5000, 40000]
close = torch.testing.assert_close


def operands(shape, dtype=torch.float64):
    """gate, up, gy, tgate, tup, tgy."""
    return [(torch.randn(shape, dtype=torch.float64) * 2).to(dtype) for _ in range(6)]


def products(f, gate, up, gy, tgate, tup, tgy):
    """What the kernels return, from native ops in float64."""

    def y(gate, up):
        return FUNCTIONS[f](gate) * up

    def vjp(gate, up, gy):
        s = gate.sigmoid() if f == "silu" else None
        if f == "silu":
            d = s * (1 + gate * (1 - s))
        else:
            d = torch.func.jvp(FUNCTIONS[f], (gate,), (torch.ones_like(gate),))[1]
        return d * up * gy, FUNCTIONS[f](gate) * gy

    value, ty = torch.func.jvp(y, (gate, up), (tgate, tup))
    g, tg = torch.func.jvp(vjp, (gate, up, gy), (tgate, tup, tgy))
    h = torch.func.vjp(vjp, gate, up, gy)[1]((tgate, tup))
    return {
        "gated": (value,),
        "gated_jvp": (value, ty),
        "gated_vjp": g,
        "gated_vjp_vjp": h,
        "gated_vjp_jvp": (*g, *tg),
    }


def run(f, gate, up, gy, tgate, tup, tgy):
    return {
        "gated": (kernels.gated(gate, up, f),),
        "gated_jvp": kernels.gated_jvp(gate, up, tgate, tup, f),
        "gated_vjp": kernels.gated_vjp(gate, up, gy, f),
        "gated_vjp_vjp": kernels.gated_vjp_vjp(gate, up, gy, tgate, tup, f),
        "gated_vjp_jvp": kernels.gated_vjp_jvp(gate, up, gy, tgate, tup, tgy, f),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("f", kernels.GATES)
def test_products_of_many_sizes(ours, f, n, dtype):
    """Every kernel against float64, relative to the largest number of the result."""
    tensors = operands((2, n) if n < 5000 else n, dtype)
    want = products(f, *(t.double() for t in tensors))
    tolerance = 1e-13 if dtype is torch.float64 else max(2e-6, torch.finfo(dtype).eps)
    for name, results in run(f, *tensors).items():
        for a, b in zip(results, want[name], strict=True):
            assert a.dtype == dtype and a.is_contiguous()
            assert ((a.double() - b).abs() <= tolerance * b.abs().max().clamp(min=1)).all(), name


def layouts(shape):
    """One tensor's values as a half of a wider one, with its rows turned, and negated lazily."""
    x = torch.randn(*shape[:-1], 2 * shape[-1])
    return {
        "halves": lambda: x.chunk(2, -1),
        "every other": lambda: (x[..., ::2], x[..., 1::2]),
        "turned": lambda: tuple(
            t.transpose(0, 1).contiguous().transpose(0, 1) for t in x.chunk(2, -1)
        ),
        "broadcast": lambda: (x[:1, ..., : shape[-1]].expand(shape), x[..., shape[-1] :]),
        "negated": lambda: tuple(torch._neg_view(t) for t in x.chunk(2, -1)),
    }


@pytest.mark.parametrize("n", [3, 64, 72, 100])
@pytest.mark.parametrize("layout", layouts((2, 3, 8)))
def test_layouts(ours, layout, n):
    gate, up = layouts((4, 3, n))[layout]()
    rest = operands((4, 3, n), torch.float32)[2:]
    want = run("silu", gate.contiguous(), up.contiguous(), *rest)
    assert run("silu", gate, up, *rest).keys() == want.keys()
    close(run("silu", gate, up, *rest), want)


def test_halves_are_not_copied(ours, monkeypatch):
    x = torch.randn(8, 256)
    seen = []
    matrix = jo._backend.matrix
    monkeypatch.setattr(jo._backend, "matrix", lambda t: seen.append(t.data_ptr()) or matrix(t))
    gate, up = x.chunk(2, -1)
    J.swiglu(gate, up)
    assert seen[:2] == [gate.data_ptr(), up.data_ptr()]


def test_absent_operands(ours):
    """None is zero."""
    gate, up, gy, tgate, tup, tgy = operands((3, 80))
    zero = torch.zeros_like(gate)
    for a in (tgate, None):
        for b in (tup, None):
            full = [zero if t is None else t for t in (a, b)]
            close(
                kernels.gated_jvp(gate, up, a, b, "gelu"),
                kernels.gated_jvp(gate, up, *full, "gelu"),
            )
            close(
                kernels.gated_vjp_vjp(gate, up, gy, a, b, "gelu"),
                kernels.gated_vjp_vjp(gate, up, gy, *full, "gelu"),
            )
            for c in (tgy, None):
                close(
                    kernels.gated_vjp_jvp(gate, up, gy, a, b, c, "gelu"),
                    kernels.gated_vjp_jvp(gate, up, gy, *full, zero if c is None else c, "gelu"),
                )


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), ()])
def test_empty_and_scalar(ours, shape):
    gate, up = (torch.randn(shape, requires_grad=True) for _ in range(2))
    y = J.swiglu(gate, up)
    close(y, F.silu(gate) * up)
    y.sum().backward()
    assert gate.grad.shape == up.grad.shape == shape


def test_large_gates_stay_finite(ours):
    """silu and its derivatives have finite limits, at infinity too."""
    gate = torch.tensor([-1e30, -200.0, 200.0, 1e4])
    one = torch.ones(4)
    for f in kernels.GATES:
        for results in run(f, gate, one, one, one, one, one).values():
            assert all(t.isfinite().all() for t in results)


def test_broadcast_and_promotion(ours):
    gate, up = torch.randn(3, 5), torch.randn(5, dtype=torch.float64)
    y = J.swiglu(gate, up)
    assert y.dtype == torch.float64
    close(y, F.silu(gate) * up)


def test_linear_swiglu(ours):
    """One layer's gradients, with weights that need none left out."""
    x, w, v = torch.randn(2, 6, 4), torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    y = J.linear_swiglu(x, w, v)
    want = F.silu(F.linear(x, w)) * F.linear(x, v)
    close(y, want)
    close(*(torch.autograd.grad(t.sin().sum(), w)[0] for t in (y, want)))


def test_numpy():
    gate, up = (torch.randn(7).numpy() for _ in range(2))
    y = kernels.gated(gate, up, "silu")
    close(torch.from_numpy(y), F.silu(torch.from_numpy(gate)) * torch.from_numpy(up))


def test_modules():
    x = torch.randn(3, 8, requires_grad=True)
    a, b = x.chunk(2, -1)
    close(jo.nn.SwiGLU()(x), F.silu(a) * b)
    close(jo.nn.GeGLU()(x), F.gelu(a) * b)
    close(jo.nn.GeGLU("tanh")(x), F.gelu(a, approximate="tanh") * b)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: J.swiglu([1.0], x), TypeError, "gate must be Tensor, not list"),
        (lambda x: J.swiglu(x, 1.0), TypeError, "up must be Tensor, not float"),
        (lambda x: J.swiglu(x.long(), x.long()), NotImplementedError, "gate has dtype int64"),
        (lambda x: J.geglu(x, x, "erf"), RuntimeError, "approximate is 'erf'; allowed"),
        (lambda x: J.linear_swiglu(x, x, x[:2]), RuntimeError, r"up_weight has shape \[2, 5\]"),
        (lambda x: jo.nn.SwiGLU()(x), RuntimeError, r"SwiGLU: input has shape \[3, 5\]; allowed"),
        (lambda x: kernels.gated(x, x[:2], "silu"), RuntimeError, r"up has shape \[2, 5\]"),
        (lambda x: kernels.gated(x, x, "relu"), ValueError, "unknown activation 'relu'; allowed"),
        (
            lambda x: kernels.gated_vjp(x, x, x.double(), "silu"),
            RuntimeError,
            "gy has dtype float64, gate has float32",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 5))
