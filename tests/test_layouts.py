"""Strides, shapes, empties: what a tensor looks like must not matter."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings

import jacobian_ops.functional as J
from jacobian_ops import kernels

from .cases import CASES, POINTWISE, SOFTMAX

close = torch.testing.assert_close


def layouts(x):
    """Tensors equal to ``x`` with other strides."""
    yield x.clone()
    yield x.mT.contiguous().mT if x.dim() > 1 else x.clone()
    yield torch.stack([x, x], -1)[..., 0]
    yield torch.cat([x, x])[: x.shape[0]] if x.dim() else x.clone()
    yield torch.stack([x, x], 1).select(1, 1) if x.dim() else x.clone()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_strided_inputs_and_cotangents(case):
    xs = case.inputs(requires_grad=True)
    y = case.ours(*xs)
    v = torch.randn_like(y)
    want = torch.autograd.grad(y, xs, v)
    for which in range(5):
        zs = [list(layouts(x.detach()))[which].requires_grad_() for x in xs]
        for w in layouts(v):
            out = case.ours(*zs)
            close(out, y)
            close(torch.autograd.grad(out, zs, w), want)
    expanded = torch.ones((), dtype=y.dtype).expand(y.shape)
    close(
        torch.autograd.grad(case.ours(*xs), xs, expanded),
        torch.autograd.grad(case.ours(*xs), xs, torch.ones_like(y)),
    )


@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_pointwise_keeps_the_layout(ours, case):
    x = torch.randn(2, 3, 4, 5)
    for z in (x, x.contiguous(memory_format=torch.channels_last), x.permute(3, 0, 2, 1)):
        assert case.ours(z).stride() == z.stride()


@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_zero_dimensional(case):
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = case.ours(x)
    assert y.shape == ()
    close(y, case.native(x))
    close(torch.autograd.grad(y, x), torch.autograd.grad(case.native(x), x))


@pytest.mark.parametrize("op", ["softmax", "log_softmax", "softmin"])
def test_zero_dimensional_softmax(op):
    for dim in (0, -1):
        x = torch.tensor(0.7, requires_grad=True)
        y = getattr(J, op)(x, dim)
        close(y, getattr(F, op)(x, dim))
        y.backward()
        assert x.grad.item() == 0
        f = getattr(J, op)
        close(torch.vmap(lambda z: f(z, dim))(torch.randn(3)), f(torch.tensor([0.7]), 0).expand(3))  # noqa: B023
        assert torch.func.hessian(lambda z: f(z, dim))(x.detach()).item() == 0  # noqa: B023
        assert torch.func.jacfwd(lambda z: f(z, dim))(x.detach()).item() == 0  # noqa: B023


EMPTY = [(0,), (0, 3), (3, 0), (2, 0, 4)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("case", POINTWISE + SOFTMAX, ids=str)
def test_empty(case, shape):
    dim = int(case.name.split("dim")[1]) if "dim" in case.name else 0
    if dim >= len(shape):
        shape = (0, 2, 3)
    x = torch.randn(shape, requires_grad=True)
    y = case.ours(x)
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    assert torch.func.jvp(case.ours, (x.detach(),), (x.detach(),))[1].shape == x.shape


@pytest.mark.parametrize("m,n,k", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0), (0, 3, 0)])
@pytest.mark.parametrize("op", ["linear", "linear_act_dropout"])
def test_empty_linear(op, m, n, k):
    args = [torch.randn(s, requires_grad=True) for s in ((m, k), (n, k), (n,))]
    y = getattr(J, op)(*args)
    want = F.linear(*args)
    want = F.gelu(want) if op != "linear" else want
    close(y, want)
    close(torch.autograd.grad(y.sum(), args), torch.autograd.grad(want.sum(), args))


def test_empty_inner_dimension_of_batches():
    x, w = torch.randn(2, 3, 4, 0), torch.randn(2, 3, 5, 0)
    close(torch.vmap(torch.vmap(J.linear))(x, w), torch.zeros(2, 3, 4, 5))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2, 3)])
def test_empty_dropout(shape):
    x = torch.randn(shape, requires_grad=True)
    for f in (
        lambda z: J.dropout(z, 0.5),
        lambda z: J.dropout_add(z, z, 0.5),
        lambda z: J.softmax_dropout(z, -1, 0.5),
    ):
        y = f(x)
        assert y.shape == shape
        y.sum().backward()


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@st.composite
def strided(draw):
    """A float64 tensor with permuted, sliced or size-1 dimensions."""
    shape = draw(shapes)
    steps = [draw(st.integers(1, 2)) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    full = [n * s for n, s in zip(shape, steps, strict=True)]
    x = torch.linspace(-2, 2, int(torch.tensor(full).prod()), dtype=torch.float64).view(full)
    return x[tuple(slice(None, None, s) for s in steps)].permute(order)


@given(strided(), st.data())
def test_softmax_of_anything(x, data):
    dim = data.draw(st.integers(-x.dim(), x.dim() - 1))
    close(J.softmax(x, dim), x.softmax(dim))
    close(J.log_softmax(x, dim), x.log_softmax(dim))
    t = x.flip(0) * 2
    y, ty = torch.func.jvp(lambda z: J.softmax(z, dim), (x,), (t,))
    close(ty, y * (t - (y * t).sum(dim, True)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=strided(), case=st.sampled_from([c for c in POINTWISE if "-" not in c.name]))
def test_activation_of_anything(ours, x, case):
    y = case.ours(x)
    close(y, case.primitive(x))
    assert y.stride() == torch.empty_like(x).stride()


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 20), st.integers(0, 3), st.data())
def test_linear_of_anything(m, n, k, batch, data):
    lead = (batch,) if batch else ()
    x = torch.randn(*lead, m, k, dtype=torch.float64)
    w = torch.randn(n, k, dtype=torch.float64)
    if data.draw(st.booleans()):
        x = x.mT.contiguous().mT
    if data.draw(st.booleans()):
        w = w.mT.contiguous().mT
    close(J.linear(x, w), x @ w.T)
    close(J.linear(x, w, w.sum(1)), x @ w.T + w.sum(1))


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_dual_products_agree(batch, m, n, k):
    """<v, J u> = <J^T v, u> for the raw products of batched linear maps."""
    shapes = ((batch, m, k), (batch, n, k), (batch, n))
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in shapes)
    tx, tw, tb = (torch.randn(s, dtype=torch.float64) for s in shapes)
    y, ty = kernels.linear_jvp(x, w, b, tx, tw, tb)
    gy = torch.randn_like(y)
    gx, gw, gb = kernels.linear_vjp(x, w, gy)
    close((gy * ty).sum(), (gx * tx).sum() + (gw * tw).sum() + (gb * tb).sum())


@pytest.mark.parametrize("f", [J.linear, J.linear_act_dropout], ids=lambda f: f.__name__)
def test_a_transposed_weight_gets_a_transposed_gradient(f):
    # A parameter (in, out) then gets its gradient without a copy.
    x, gy = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    weight = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def gradients(f, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x, weight.t(), bias), (x, weight, bias), gy)

    native = F.linear if f is J.linear else lambda *args: F.gelu(F.linear(*args))
    want = gradients(native, x)
    for ours in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        got = gradients(ours, x)
        close(got, want)
        assert got[1].is_contiguous()
    assert kernels.linear_vjp(x, weight.detach().t(), gy)[1].mT.is_contiguous()


def test_views_share_nothing():
    """Results never alias their inputs."""
    x = torch.randn(4)
    for y in (J.relu(x), J.hardtanh(x, -9, 9), J.softmax(x, 0), J.dropout(x, 0.1)):
        assert y.data_ptr() != x.data_ptr()


def test_negative_and_zero_tensors():
    """Lazily negated memory and gradients without storage are read as what they mean."""
    x = torch.randn(3, dtype=torch.complex64).conj().imag  # is_neg
    assert x.is_neg()
    close(kernels.softmax(x, 0), x.clone().softmax(0))
    close(J.gelu(x), F.gelu(x))
    zero = torch._efficientzerotensor((3,))
    close(J.softmax(zero, 0), torch.full((3,), 1 / 3))
