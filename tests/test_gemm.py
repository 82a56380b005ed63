"""Plain linear maps through torch's matrix product, as through ours."""

import subprocess
import sys

import pytest
import torch

import jacobian_ops.functional as J
from jacobian_ops import kernels
from jacobian_ops.kernels import _gemm

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=("own", "torch"))
def choice(request, monkeypatch):
    monkeypatch.setattr(_gemm, "CHOICE", request.param)
    return request.param


def close(actual, expected, dtype):
    assert actual.dtype is dtype and actual.shape == expected.shape
    eps = torch.finfo(dtype).eps
    scale = max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=scale * (4 * eps + 1e-14))


def matrices(m, k, n, dtype, transposed):
    x, w, gy, tx, tw = (
        torch.randn(shape, dtype=torch.float64).to(dtype) / 4
        for shape in ((m, k), (n, k), (m, n), (m, k), (n, k))
    )
    if transposed:
        x, w, gy, tx, tw = (t.t().contiguous().t() for t in (x, w, gy, tx, tw))
    return x, w, gy, tx, tw


@pytest.mark.cpu_only
def test_linear_is_the_native_op_where_all_its_products_are(choice, monkeypatch):
    """Then nothing of ours would run but the way through Python."""
    monkeypatch.setattr(J, "NATIVE_BELOW", 0)
    x, w, b = torch.randn(3, 5), torch.randn(4, 5, requires_grad=True), torch.randn(4)
    native = choice == "torch"
    assert J.linear(x, w, b).grad_fn.name() == ("AddmmBackward0" if native else "LinearBackward")
    y = J.linear_act_dropout(x, w, b, "tanh", training=False)
    assert y.grad_fn.name() == ("ActivationBackward" if native else "LinearActDropoutBackward")
    torch.testing.assert_close(y, torch.tanh(torch.nn.functional.linear(x, w, b)))
    for wrong in (w[:, :4], w.double(), w[0, 0]):
        with pytest.raises(RuntimeError, match="^linear_act_dropout: "):
            J.linear_act_dropout(x, wrong, b, "tanh")


@pytest.mark.cpu_only  # on a GPU a large product is rounded before its activation
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_results_of_16_bits_are_rounded_once(choice, dtype):
    """Also where the native op adds the bias to a rounded product: rows that lie apart."""
    x = torch.randn(9, 4, 64).to(dtype).transpose(0, 1)
    w, b = (torch.randn(8, 64) / 8).to(dtype), torch.randn(8).to(dtype)
    z = torch.nn.functional.linear(x.double(), w.double(), b.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(J.linear(x, w, b).double(), z, rtol=eps / 2, atol=1e-5)
    y = J.linear_act_dropout(x.contiguous(), w, b, "tanh")
    torch.testing.assert_close(y.double(), z.tanh(), rtol=eps / 2, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (64, 33, 40), (3, 0, 2), (0, 4, 2)])
def test_products(choice, shape, transposed, dtype):
    x, w, gy, tx, tw = matrices(*shape, dtype, transposed)
    b, tb = torch.randn(2, shape[2], dtype=torch.float64).to(dtype)
    x_, w_, gy_, tx_, tw_, b_, tb_ = (t.double() for t in (x, w, gy, tx, tw, b, tb))
    for bias in (None, b):
        y = kernels.linear(x, w, bias)
        assert y.is_contiguous() and y.dtype is dtype
        close(y, x_ @ w_.T + (0 if bias is None else b_), dtype)
    gx, gw, gb = kernels.linear_vjp(x, w, gy)
    close(gx, gy_ @ w_, dtype)
    close(gw, gy_.T @ x_, dtype)
    close(gb, gy_.sum(0), dtype)
    for tangents, expected in (
        ((tx, tw, tb), tx_ @ w_.T + x_ @ tw_.T + tb_),
        ((tx, None, None), tx_ @ w_.T),
        ((None, tw, None), x_ @ tw_.T),
        ((None, None, tb), tb_.expand(y.shape)),
        ((None, None, None), torch.zeros(y.shape, dtype=torch.float64)),
    ):
        y, ty = kernels.linear_jvp(x, w, b, *tangents)
        close(y, x_ @ w_.T + b_, dtype)
        close(ty, expected, dtype)


def test_derivatives(choice):
    x, w, b = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (3, 5), (3,))
    )
    checks = dict(check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradcheck(J.linear, (x, w, b), **checks)
    assert torch.autograd.gradgradcheck(J.linear, (x, w, b), check_fwd_over_rev=True)


def test_into_memory_that_is_there(choice):
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5)
    out = torch.empty(6, 4)
    y = kernels.linear(x, w, out=out)
    assert y is out and not y.requires_grad
    torch.testing.assert_close(y, x.detach() @ w.T)


def test_autocast_casts_no_product_of_a_kernel(choice):
    x, w = torch.randn(6, 5), torch.randn(4, 5)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y, ty = kernels.linear_jvp(x, w, None, x, w)
        products = kernels.linear(x, w), *kernels.linear_vjp(x, w, y), y, ty
    assert {t.dtype for t in products} == {torch.float32}
    torch.testing.assert_close(ty, 2 * x @ w.T)


def test_what_torch_is_never_given(monkeypatch):
    """Batches, negated views: ours takes them in place."""
    monkeypatch.setattr(_gemm, "CHOICE", "torch")
    x, w = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    torch.testing.assert_close(kernels.linear(x, w), x @ w.mT)
    negated = torch.randn(3, 4, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(kernels.linear(negated, w[0]), negated @ w[0].T)


@pytest.mark.cpu_only
def test_auto_is_ours_where_nothing_was_measured(monkeypatch):
    monkeypatch.setattr(_gemm, "CHOICE", "auto")
    monkeypatch.setattr(_gemm, "_LIBRARY", None)
    x, w = torch.randn(512, 512), torch.randn(512, 512)
    assert not _gemm.torch_is_faster(x, w)
    assert not _gemm.torch_is_faster_for_gx(x, w)
    assert not _gemm.torch_is_faster_for_gweight(x, w)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "library, dtype, m, k, n, classes",
    [
        ("amx", torch.float32, 2048, 1024, 4096, (True, True, True)),
        ("amx", torch.float32, 8, 4096, 4096, (False, True, False)),
        ("amx", torch.float64, 16384, 64, 256, (False, True, True)),
        ("amx", torch.bfloat16, 512, 512, 512, (False, False, False)),
        ("amx", torch.bfloat16, 8192, 32, 32, (True, True, True)),
        ("amx", torch.float16, 512, 512, 512, (True, True, True)),
        ("amx", torch.bfloat16, 4096, 1024, 4096, (True, True, True)),
        ("avx512bf16", torch.bfloat16, 64, 4096, 4096, (True, True, True)),
        ("avx512bf16", torch.bfloat16, 16, 4096, 4096, (False, False, False)),
        ("avx512bf16", torch.float32, 2048, 1024, 4096, (False, False, False)),
        ("avx512bf16", torch.float16, 512, 512, 512, (False, False, False)),
    ],
)
def test_classes(monkeypatch, library, dtype, m, k, n, classes):
    monkeypatch.setattr(_gemm, "CHOICE", "auto")
    monkeypatch.setattr(_gemm, "_LIBRARY", library)
    x, w, gy = (torch.empty(s, dtype=dtype) for s in ((m, k), (n, k), (m, n)))
    assert classes == (
        _gemm.torch_is_faster(x, w),
        _gemm.torch_is_faster_for_gx(gy, w),
        _gemm.torch_is_faster_for_gweight(gy, x),
    )


def test_the_variable_is_checked():
    run = subprocess.run(
        [sys.executable, "-c", "import jacobian_ops"],
        env={"JACOBIAN_OPS_GEMM": "mkl", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode and "JACOBIAN_OPS_GEMM: allowed auto, own, torch, got 'mkl'" in run.stderr
