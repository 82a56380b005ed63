"""gradcheck in every mode, gradgradcheck in every mode, third order."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import jacobian_ops.functional as J

from .cases import CASES, POINTWISE, SOFTMAX


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case):
    assert gradcheck(
        case.ours,
        case.inputs(requires_grad=True),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


# check_fwd_over_rev is the only check that sees saved tensors unpacked at the wrong level.
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradgradcheck(case):
    assert gradgradcheck(
        case.ours,
        case.inputs(requires_grad=True),
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


def thrice(f, xs, us):
    """Gradients of the gradients of the gradients, weighted so that no term vanishes."""
    xs = [x.clone().requires_grad_() for x in xs]
    out = f(*xs).sin().sum()
    for _ in range(3):
        grads = torch.autograd.grad(out, xs, create_graph=True)
        out = sum((g * u).sin().sum() for g, u in zip(grads, us, strict=True))
    return grads


@pytest.mark.parametrize("case", [c for c in CASES if c.third], ids=str)
def test_third_order(case):
    xs = case.inputs()
    us = [torch.randn_like(x) for x in xs]
    for got, want in zip(thrice(case.ours, xs, us), thrice(case.primitive, xs, us), strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("case", POINTWISE + SOFTMAX, ids=str)
def test_third_order_forward(case):
    """jvp of jvp of jvp."""
    (x,) = case.inputs()
    t = torch.randn_like(x)

    def push(f):
        return lambda z: torch.func.jvp(f, (z,), (t,))[1]

    got, want = push(push(push(case.ours)))(x), push(push(push(case.primitive)))(x)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["gelu", "tanh", "elu", "softplus"])
def test_fourth_order_raises(ours, name):
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = getattr(J, name)(x).sum()
    with pytest.raises(RuntimeError, match="available up to order 3"):
        for _ in range(4):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.sum()


def test_fourth_order_of_softmax():
    """Softmax ends in native ops, which go on to any order."""
    x = torch.randn(2, 3, dtype=torch.float64)

    def fourth(f):
        z = x.clone().requires_grad_()
        y = (f(z) ** 2).sum()
        for _ in range(4):
            (g,) = torch.autograd.grad(y, z, create_graph=True)
            y = (g**2).sum()
        return g

    torch.testing.assert_close(
        fourth(lambda z: J.softmax(z, 1)), fourth(lambda z: z.exp() / z.exp().sum(1, True))
    )


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("op", ["linear", "linear_act_dropout"])
def test_some_inputs_need_no_gradient(op, needs):
    shapes = ((4, 3), (5, 3), (5,))
    args = [
        torch.randn(s, dtype=torch.float64).requires_grad_(n)
        for s, n in zip(shapes, needs, strict=True)
    ]
    f = getattr(J, op)
    assert gradcheck(lambda *a: f(*a), args, check_forward_ad=True)
    assert gradgradcheck(lambda *a: f(*a).sin(), args)
