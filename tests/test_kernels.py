"""The raw products on tensors and arrays, and the native module's own last line of checks."""

import inspect
import math

import numpy as np
import pytest
import torch

from jacobian_ops import _backend, _cpu, kernels

X = np.linspace(-2, 2, 12).reshape(3, 4)


def test_classic_calls():
    """vjp(x, weight, gy) as textbooks write it."""
    x, w, gy = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 5)
    gx, gw, gb = kernels.linear_vjp(x, w, gy)
    torch.testing.assert_close(gx, gy @ w)
    torch.testing.assert_close(gw, gy.T @ x)
    torch.testing.assert_close(gb, gy.sum(0))
    assert torch.equal(kernels.activation_vjp(x, x, "relu"), x * (x > 0))
    y, ty = kernels.softmax_jvp(x, x, -1)
    torch.testing.assert_close(y, x.softmax(-1))
    torch.testing.assert_close(ty, y * (x - (y * x).sum(-1, True)))


def test_arrays_in_arrays_out():
    results = {
        "activation": kernels.activation(X, "tanh"),
        "activation_vjp": kernels.activation_vjp(X, X, "tanh"),
        "softmax": kernels.softmax(X, 1),
        "softmax_vjp": kernels.softmax_vjp(X, X, 1),
        "log_softmax": kernels.log_softmax(X, 1),
        "dropout": kernels.dropout(X, 0.5, 1),
        "dropout_vjp": kernels.dropout_vjp(X, 0.5, 1),
        "linear": kernels.linear(X, X),
        "column_sum": kernels.column_sum(X),
    }
    for name, r in results.items():
        assert type(r) is np.ndarray and r.dtype == np.float64, name
    np.testing.assert_allclose(results["activation"], np.tanh(X))
    np.testing.assert_allclose(results["linear"], X @ X.T)
    y, ty = kernels.softmax_jvp(X, X, 1)
    np.testing.assert_allclose(y, np.exp(X) / np.exp(X).sum(1, keepdims=True))
    np.testing.assert_allclose(ty, y * (X - (y * X).sum(1, keepdims=True)))
    outs = (np.empty_like(X), np.empty_like(X))
    assert kernels.softmax_jvp(X, X, 1, out=outs)[0].ctypes.data == outs[0].ctypes.data
    np.testing.assert_array_equal(outs, (y, ty))
    y, z = kernels.linear_act_dropout(X, X, None, "relu")
    assert type(y) is np.ndarray and z is None
    np.testing.assert_allclose(kernels.activation(x=X, name="relu"), X.clip(0))


def test_arrays_are_not_copied(monkeypatch):
    seen = []
    buffer = _backend.buffer

    def spy(t):
        seen.append(t.data_ptr())
        return buffer(t)

    monkeypatch.setattr(_backend, "buffer", spy)
    out = np.empty_like(X)
    y = kernels.softmax(X, 1, out=out)
    assert seen == [X.ctypes.data, out.ctypes.data]
    assert y.ctypes.data == out.ctypes.data


def test_read_only_arrays(recwarn):
    x = X.copy()
    x.flags.writeable = False
    kernels.softmax(x, 1)
    assert not recwarn.list


def test_out():
    x = torch.randn(3, 4)
    out = torch.empty(3, 4)
    version = out._version
    assert kernels.softmax(x, 1, out=out) is out
    assert out._version > version  # autograd sees the write
    torch.testing.assert_close(out, x.softmax(1))
    y, ty = torch.empty(3, 4), torch.empty(3, 4)
    kernels.activation_jvp(x, x, "silu", out=(y, ty))
    torch.testing.assert_close(y, torch.nn.functional.silu(x))
    w = torch.randn(5, 4)
    torch.testing.assert_close(kernels.linear(x, w, out=torch.empty(3, 5)), x @ w.T)


def test_every_activation_has_every_product():
    x, a, b = (torch.randn(7, dtype=torch.float64) for _ in range(3))
    for name in kernels.NAMES:
        f1, f2 = (kernels.activation_vjp(x, torch.ones_like(x), name, order=k) for k in (1, 2))
        hx, hgy = kernels.activation_vjp_vjp(x, a, b, name)
        torch.testing.assert_close(hx, f2 * a * b)
        torch.testing.assert_close(hgy, f1 * b)
        gx, tgx = kernels.activation_vjp_jvp(x, a, b, b, name)
        torch.testing.assert_close(gx, f1 * a)
        torch.testing.assert_close(tgx, f2 * a * b + f1 * b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (300, 7), (5, 1030), (2, 9, 64), (2, 2, 130, 33)])
def test_vjp_and_its_sums(shape, dtype):
    x, gy = (torch.randn(shape).to(dtype) for _ in range(2))
    for options in ({}, dict(seed=torch.arange(math.prod(shape[:-2])).view(shape[:-2]), p=0.3)):
        gx, total = kernels.activation_vjp_sum(x, gy.mT.contiguous().mT, "gelu", **options)
        assert torch.equal(gx, kernels.activation_vjp(x, gy, "gelu", **options))
        error = (total.double() - gx.double().sum(-2)).abs()
        assert (error <= 2 * torch.finfo(dtype).eps * gx.double().abs().sum(-2)).all()
    empty, zeros = kernels.activation_vjp_sum(x[..., :0, :], gy[..., :0, :], "gelu")
    assert empty.numel() == 0 and not zeros.any()
    with pytest.raises(RuntimeError, match=r"activation_vjp_sum: x has shape \[3\]"):
        kernels.activation_vjp_sum(torch.randn(3), torch.randn(3), "relu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (70, 33, 65), (9, 64, 136), (130, 8, 24)])
def test_vjp_of_a_fused_product(m, k, n, dtype):
    """Each cotangent alone and all of them, of any layout, against float64."""
    for batch in ((), (2,)):
        x, weight = (torch.randn(*batch, r, k).to(dtype) for r in (m, n))
        z, gy = (torch.randn(*batch, m, n).to(dtype) for _ in range(2))
        seed = torch.arange(3, 3 + math.prod(batch)).view(batch)
        given = z, gy.mT.contiguous().mT
        for name, p, s in (("silu", 0.3, z), ("gelu", 0.0, z), ("identity", 0.3, None)):
            gz = kernels.activation_vjp(z.double(), gy.double(), name, p=p, seed=seed)
            want = gz @ weight.double(), gz.mT @ x.double(), gz.sum(-2)
            a = gy.double().abs() / (1 - p)  # f' has an absolute error
            size = a @ weight.double().abs(), a.mT @ x.double().abs(), a.sum(-2)
            for needs in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)):
                factors = x if needs[1] else None, weight if needs[0] else None
                got = kernels.linear_act_dropout_vjp(
                    *factors, None if s is None else given[0], given[1], name, p, seed, needs
                )
                for g, w, a, needed in zip(got, want, size, needs, strict=True):
                    assert (g is not None) == bool(needed)
                    if needed:
                        assert g.shape == w.shape and g.dtype == dtype
                        assert ((g.double() - w).abs() <= 2 * torch.finfo(dtype).eps * a).all()


@pytest.mark.parametrize("n", [160, pytest.param(640, marks=pytest.mark.cpu_only)])
@pytest.mark.parametrize("copied", ["expanded", "negative"])
def test_operands_that_are_copied_live_until_the_kernel_has_run(copied, n):
    """Nothing but the wrapper holds the copy; its memory would be handed out again."""
    if copied == "expanded":
        x, weight, gy = (
            torch.randn(1, 2, n, n).transpose(0, 1).expand(2, 3, n, n) for _ in range(3)
        )
    else:
        x, weight, gy = (torch._neg_view(torch.randn(n, n)) for _ in range(3))
    z = torch.randn_like(gy)
    gz = kernels.activation_vjp(z, gy.resolve_neg(), "silu")
    for got, g in (
        (kernels.linear_vjp(x, weight, gy), gy),
        (kernels.linear_act_dropout_vjp(x, weight, z, gy, "silu"), gz),
    ):
        want = g @ weight, g.mT @ x, g.sum(-2)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(kernels.column_sum(gy), gy.sum(-2), rtol=1e-4, atol=1e-3)


def test_vjp_of_an_empty_fused_product():
    for m, k, n in ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)):
        x, weight, z = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        gx, gweight, gbias = kernels.linear_act_dropout_vjp(x, weight, z, z, "gelu", 0.5, 1)
        assert (gx.shape, gweight.shape, gbias.shape) == (x.shape, weight.shape, (n,))
        assert not gweight.any() and not gx.any() and (m or not gbias.any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (70, 33, 65), (9, 64, 136)])
def test_residuals(m, k, n, dtype):
    """Added before the one rounding: what float64 gives, rounded."""
    x, tx, weight = (torch.randn(r, k).to(dtype) for r in (m, m, n))
    r, tr = (torch.randn(n, m).to(dtype).mT for _ in range(2))
    bias = torch.randn(n).to(dtype)

    def wide(*tensors):
        return (t.double() for t in tensors)

    def close(got, want, residual, terms):
        """``terms``: what the errors before the residual are relative to."""
        eps = 1e-14 if dtype is torch.float64 else torch.finfo(dtype).eps
        add = torch.zeros_like(want) if residual is None else residual.double()
        assert got.dtype == dtype
        error = (got.double() - (want + add)).abs()
        assert (error <= 2 * eps * (want.abs() + add.abs() + terms + 1)).all()

    rest = "silu", 0.3, 5
    of_z, of_tz = (t.double().abs() @ weight.mT.double().abs() / 0.7 for t in (x, tx))
    y, _ = kernels.linear_act_dropout(x, weight, bias, *rest, residual=r)
    want, _ = kernels.linear_act_dropout(*wide(x, weight, bias), *rest)
    close(y, want, r, of_z)
    y, ty = kernels.linear_act_dropout_jvp(
        x, weight, bias, tx, None, None, *rest, residual=r, tresidual=tr
    )
    want, twant = kernels.linear_act_dropout_jvp(*wide(x, weight, bias, tx), None, None, *rest)
    tz = tx.double() @ weight.mT.double()
    close(y, want, r, of_z)
    close(ty, twant, tr, of_tz + of_z * tz.abs())  # f'(z) has the error of z too
    z, tz = torch.randn(m, n).to(dtype), torch.randn(m, n).to(dtype)
    options = dict(seed=5, p=0.3)
    want, twant = kernels.activation_jvp(*wide(z, tz), "silu", **options)
    close(kernels.activation(z, "silu", residual=r, **options), want, r, 0)
    for given in ((r, tr), (r, None), (None, tr)):
        y, ty = kernels.activation_jvp(
            z, tz, "silu", residual=given[0], tresidual=given[1], **options
        )
        close(y, want, given[0], 0)
        close(ty, twant, given[1], tz.double().abs() / 0.7)


def test_docstrings():
    for name in kernels.__all__:
        f = getattr(kernels, name)
        if inspect.isfunction(f):
            assert f.__doc__, name


# Native entry points, called as no Python code of ours calls them.
F32 = 0
MEMORY = torch.zeros(64)
PTR = MEMORY.data_ptr()
RELU = (_cpu.activations()["relu"], 0.0, 0.0, 0.0)


def matrix(rows, cols, extent=None, row_stride=None, ptr=PTR):
    row_stride = cols if row_stride is None else row_stride
    reach = 1 + (rows - 1) * row_stride + cols - 1
    extent = reach if extent is None else extent
    return (ptr, extent, F32, 1, rows, cols, 0, row_stride, 1)


BAD = {
    "too small an output": lambda: _cpu.activation(
        RELU, (PTR, 9, F32), None, (PTR, 8, F32), None, 1
    ),
    "null input": lambda: _cpu.activation(RELU, (0, 8, F32), None, (PTR, 8, F32), None, 1),
    "null output": lambda: _cpu.activation(RELU, (PTR, 8, F32), None, (0, 8, F32), None, 1),
    "dtypes differ": lambda: _cpu.activation(RELU, (PTR, 8, F32), None, (PTR, 8, 1), None, 1),
    "unknown dtype": lambda: _cpu.activation(RELU, (PTR, 8, 17), None, (PTR, 8, 17), None, 1),
    "negative size": lambda: _cpu.activation(RELU, (PTR, -1, F32), None, (PTR, -1, F32), None, 1),
    "unknown activation": lambda: _cpu.activation(
        (99, 0.0, 0.0, 0.0), (PTR, 8, F32), None, (PTR, 8, F32), None, 1
    ),
    "short residual": lambda: _cpu.activation(
        RELU, (PTR, 8, F32), (PTR, 7, F32), (PTR, 8, F32), None, 1
    ),
    "residual of a product": lambda: _cpu.linear_act_dropout(
        *(matrix(2, 3), matrix(4, 3), None, matrix(2, 3), matrix(2, 4), None, RELU, None, 1)
    ),
    "nothing to differentiate at": lambda: _cpu.linear_act_dropout_vjp(
        *(None, matrix(4, 3), None, matrix(2, 4), matrix(2, 3), None, None, RELU, None, 1)
    ),
    "cotangent with gaps": lambda: _cpu.linear_act_dropout_vjp(
        *(None, matrix(4, 3), (PTR, 8, F32), matrix(2, 4, row_stride=5), matrix(2, 3)),
        *(None, None, RELU, None, 1),
    ),
    "order": lambda: _cpu.activation_vjp(
        RELU, 4, (PTR, 8, F32), (PTR, 8, F32), (PTR, 8, F32), None, 1
    ),
    "no threads": lambda: _cpu.activation(RELU, (PTR, 8, F32), None, (PTR, 8, F32), None, 0),
    "rows do not fill": lambda: _cpu.softmax((2, 3, 1, 1.0), (PTR, 8, F32), (PTR, 8, F32), 1),
    "rows overflow": lambda: _cpu.softmax((2**40, 2**40, 1, 1.0), (PTR, 8, F32), (PTR, 8, F32), 1),
    "negative rows": lambda: _cpu.softmax((-2, -4, 1, 1.0), (PTR, 8, F32), (PTR, 8, F32), 1),
    "vjp: short cotangent": lambda: _cpu.softmax_vjp(
        (2, 4, 1, 1.0), (PTR, 8, F32), (PTR, 7, F32), (PTR, 8, F32), 1
    ),
    "p": lambda: _cpu.dropout((PTR, 8, F32), (PTR, 8, F32), (1.5, PTR, 1), 1),
    "null seed": lambda: _cpu.dropout((PTR, 8, F32), (PTR, 8, F32), (0.5, 0, 1), 1),
    "seeds do not divide": lambda: _cpu.dropout((PTR, 8, F32), (PTR, 8, F32), (0.5, PTR, 3), 1),
    "matrix beyond its memory": lambda: _cpu.linear(
        matrix(2, 3, extent=5), matrix(4, 3), None, matrix(2, 4), 1
    ),
    "strides beyond its memory": lambda: _cpu.linear(
        matrix(2, 3, extent=6, row_stride=100), matrix(4, 3), None, matrix(2, 4), 1
    ),
    "inner sizes differ": lambda: _cpu.linear(matrix(2, 3), matrix(4, 2), None, matrix(2, 4), 1),
    "wrong output": lambda: _cpu.linear(matrix(2, 3), matrix(4, 3), None, matrix(2, 5), 1),
    "short bias": lambda: _cpu.linear(matrix(2, 3), matrix(4, 3), (PTR, 3, F32), matrix(2, 4), 1),
    "null weight": lambda: _cpu.linear(matrix(2, 3), matrix(4, 3, ptr=0), None, matrix(2, 4), 1),
    "overlapping output rows": lambda: _cpu.linear(
        matrix(2, 3), matrix(4, 3), None, matrix(2, 4, extent=8, row_stride=0), 1
    ),
    "extents overflow": lambda: _cpu.column_sum(
        (PTR, 64, F32, (2**64 + 2) // 3, 0, 3, 0, 0, 0), (PTR, 2, F32), 1
    ),
    "inner size overflows": lambda: _cpu.linear(
        (PTR, 1, F32, 1, 2, 2**61, 0, 0, 0),
        (PTR, 1, F32, 1, 4, 2**61, 0, 0, 0),
        *(None, matrix(2, 4), 1),
    ),
    "activation_vjp_sum: short output": lambda: _cpu.activation_vjp_sum(
        RELU, (1, 4, 2, 1.0), *[(PTR, 8, F32)] * 3, (PTR, 1, F32), None, 1
    ),
    "column_sum: short output": lambda: _cpu.column_sum(matrix(2, 3), (PTR, 2, F32), 1),
}


@pytest.mark.parametrize("name", BAD)
def test_native_checks(name):
    before = MEMORY.clone()
    with pytest.raises(ValueError, match=r"^\w+: \w+"):
        BAD[name]()
    assert torch.equal(MEMORY, before)


def test_native_arguments_are_typed():
    with pytest.raises(TypeError):
        _cpu.activation(RELU, "x", (PTR, 8, F32), None, 1)
    with pytest.raises(TypeError):
        _cpu.softmax((2, 4), (PTR, 8, F32), (PTR, 8, F32), 1)


# Rows that are dotted or packed, depths of one or several passes, operands packed ahead in parts.
SIZES = [
    *((m, 37, 70) for m in (1, 3, 8, 11, 16, 17)),
    *((m, 50, k) for m in (9, 20, 130) for k in (1, 255, 257)),
    *((m, 50, 1025) for m in (9, 20)),
    *((700, n, 33) for n in (1, 31, 33, 129)),
    *(
        pytest.param(*size, marks=pytest.mark.cpu_only)
        for size in ((9, 50, 2600), (20, 50, 2600), (130, 50, 2600), (1100, 1050, 2100))
    ),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, n, k", SIZES)
def test_products_of_many_sizes(ours, m, n, k, dtype):
    """Primal and tangent, whichever operand is transposed, to the rounding of the dtype."""
    eps = torch.finfo(dtype).eps
    sums = 1e-14 if dtype is torch.float64 else 2e-6  # relative to the sum of absolute values
    for x_T, w_T in ((False, False), (True, False), (False, True)):
        x, tx = (torch.randn(m, k).to(dtype) for _ in range(2))
        w, tw = (torch.randn(n, k).to(dtype) for _ in range(2))
        b = torch.randn(n).to(dtype)
        wide = [t.double() for t in (x, tx, w, tw, b)]
        if x_T:
            x, tx = x.T.contiguous().T, tx.T.contiguous().T
        if w_T:
            w, tw = w.T.contiguous().T, tw.T.contiguous().T
        y, ty = kernels.linear_jvp(x, w, b, tx, tw, None)
        x64, tx64, w64, tw64, b64 = wide
        want = (x64 @ w64.T + b64, tx64 @ w64.T + x64 @ tw64.T)
        size = (x64.abs() @ w64.abs().T + b64.abs(), tx64.abs() @ w64.abs().T)
        size = (size[0], size[1] + x64.abs() @ tw64.abs().T)
        for got, right, total in zip((y, ty), want, size, strict=True):
            error = (got.double() - right).abs()
            assert (error <= eps * right.abs() + sums * total).all()
        torch.testing.assert_close(kernels.linear(x, w, b), y, rtol=0, atol=0)
        # With an absent tangent.
        torch.testing.assert_close(
            kernels.linear_jvp(x, w, b, None, tw)[1].double(),
            x64 @ tw64.T,
            rtol=2 * eps,
            atol=sums * total.max().item(),
        )
