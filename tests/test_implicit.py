"""fixed_point: its value, derivatives of every mode and order, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import jacobian_ops.functional as J
from jacobian_ops.jacobian.implicit import fixed_point

close = torch.testing.assert_close
DTYPE = torch.float64


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)  # so small tensors gain nothing from more


def layer(z, w, b):
    return J.tanh(J.linear(z, w, b))


def solved(w, b):
    return fixed_point(layer, torch.zeros_like(b), w, b)


def unrolled(w, b):
    """The same by many steps of native ops, differentiated through."""
    z = torch.zeros_like(b)
    for _ in range(120):
        z = torch.tanh(w @ z + b)
    return z


def parameters(n=3):
    w = torch.randn(n, n, dtype=DTYPE)
    return 0.6 * w / torch.linalg.matrix_norm(w, 2), torch.randn(n, dtype=DTYPE)


def test_value_and_cost():
    w, b = parameters(20)
    calls = []

    def f(z, w, b):
        calls.append(z)
        return layer(z, w, b)

    z = fixed_point(f, torch.zeros(20, dtype=DTYPE), w, b)
    close(z, unrolled(w, b), rtol=1e-11, atol=1e-11)
    assert (z - layer(z, w, b)).norm() < 1e-11
    assert len(calls) < 20  # plain iteration takes some 50
    z = fixed_point(layer, torch.zeros(20), w.float(), b.float())
    close(z.double(), unrolled(w, b), rtol=1e-4, atol=1e-5)


def test_converges_where_plain_iteration_does_not():
    a = torch.diag(torch.tensor([-3.0, 0.5, 0.2], dtype=DTYPE))
    b = torch.ones(3, dtype=DTYPE)
    z = fixed_point(lambda z, b: a @ z + b, torch.zeros(3, dtype=DTYPE), b)
    close(z, torch.linalg.solve(torch.eye(3, dtype=DTYPE) - a, b))


@pytest.mark.parametrize("forward_ad", [False, True])
def test_gradcheck(forward_ad):
    xs = tuple(t.requires_grad_() for t in parameters())
    assert torch.autograd.gradcheck(solved, xs, check_forward_ad=forward_ad)


def test_second_order():
    xs = tuple(t.requires_grad_() for t in parameters(2))
    assert torch.autograd.gradgradcheck(solved, xs, check_fwd_over_rev=True, fast_mode=True)


TRANSFORMS = {
    "jacrev": lambda s, w, b: jacrev(s, (0, 1))(w, b),
    "jacfwd": lambda s, w, b: jacfwd(s, (0, 1))(w, b),
    "hessian": lambda s, w, b: hessian(lambda b: s(w, b).sin().sum())(b),
    "reverse over reverse": lambda s, w, b: jacrev(jacrev(s, 1), 1)(w, b),
    "reverse over forward": lambda s, w, b: jacrev(jacfwd(s, 1), 1)(w, b),
    "forward over forward": lambda s, w, b: jacfwd(jacfwd(s, 1), 0)(w, b),
    "third order": lambda s, w, b: jacfwd(jacrev(jacrev(lambda b: s(w, b).sum())))(b),
    "vmap": lambda s, w, b: vmap(s, (None, 0))(w, torch.stack((b, 100 * b, -b))),
    "vmap of grad": lambda s, w, b: vmap(grad(lambda w, b: s(w, b).sum()), (0, None))(
        torch.stack((w, w / 2)), b
    ),
    "jvp along one": lambda s, w, b: jvp(lambda b: s(w, b), (b,), (b.cos(),)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    w, b = parameters()
    transform = TRANSFORMS[name]
    close(transform(solved, w, b), transform(unrolled, w, b), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cotangent_of_any_size(scale):
    """The linear system is solved to a relative tolerance: a small gradient is as exact."""
    w, b = parameters()
    b.requires_grad_()
    (expected,) = torch.autograd.grad(unrolled(w, b).sum(), b)
    (given,) = torch.autograd.grad(scale * solved(w, b).sum(), b)
    close(given / scale, expected)


def test_module():
    """A deep equilibrium layer: parameters as a dict, an integer and an input among the rest."""
    cell = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    with torch.no_grad():
        cell[0].weight.mul_(0.5)
    u = torch.randn(5, 4, dtype=DTYPE, requires_grad=True)

    def f(z, params, u, which):
        return 0.5 * functional_call(cell, params, (z,)) + u[which]

    which, params = torch.tensor([4, 3, 2, 1, 0]), dict(cell.named_parameters())
    z = fixed_point(f, torch.zeros(5, 4, dtype=DTYPE), params, u, which)
    z.square().sum().backward()
    given = [cell[0].weight.grad.clone(), u.grad.clone()]
    cell.zero_grad()
    u.grad = None
    z = torch.zeros(5, 4, dtype=DTYPE)
    for _ in range(80):
        z = f(z, params, u, which)
    z.square().sum().backward()
    close(given, [cell[0].weight.grad, u.grad])


def test_keeps_no_steps():
    """For backward: the fixed point and the parameters."""
    w, b = (t.requires_grad_() for t in parameters(30))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        solved(w, b)
    assert sorted(t.numel() for t in kept) == [30, 30, 900]


def test_captured_tensors_raise():
    """Nothing is silently left without a derivative."""
    w, b = parameters()
    z0 = torch.zeros(3, dtype=DTYPE)

    def hidden(w, b):
        return fixed_point(lambda z, b: layer(z, w, b), z0, b)

    close(hidden(w, b), solved(w, b))
    words = "depends on a tensor that needs derivatives and is not among params"
    for run in (
        lambda: hidden(w.clone().requires_grad_(), b),
        lambda: grad(lambda w: hidden(w, b).sum())(w),
        lambda: jvp(lambda w: hidden(w, b), (w,), (w,)),
    ):
        with pytest.raises(ValueError, match=words):
            run()


def test_no_convergence():
    x0 = torch.ones(2, dtype=DTYPE)
    with pytest.raises(RuntimeError, match=r"after 30 steps .* tol = 1.8e-12"):
        fixed_point(lambda x: x + 1, x0, max_iter=30)
    with pytest.raises(RuntimeError, match="fixed_point: after"):
        fixed_point(lambda x: x.exp().exp(), x0, max_iter=30)  # overflows


@pytest.mark.parametrize(
    "f,x0,options,error,words",
    [
        (torch.cos, 1.0, {}, TypeError, "x0 must be a floating-point tensor, got float"),
        (torch.cos, torch.ones(2, dtype=torch.int64), {}, TypeError, "got torch.int64"),
        (torch.cos, torch.ones(2), dict(tol=0.0), ValueError, "tol is 0.0 and max_iter 500"),
        (torch.cos, torch.ones(2), dict(max_iter=0), ValueError, "max_iter 0; allowed"),
        (lambda x: x[:1], torch.ones(2), {}, ValueError, r"shape \[1\] and dtype torch.float32"),
        (lambda x: x.double(), torch.ones(2), {}, ValueError, "dtype torch.float64; allowed"),
    ],
)
def test_errors(f, x0, options, error, words):
    with pytest.raises(error, match=f"fixed_point: .*{words}"):
        fixed_point(f, x0, **options)
