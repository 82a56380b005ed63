"""torch.func in every nesting of two, compared with a composition of primitives."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import jacobian_ops.functional as J

from .cases import NESTED, OPS, SOFTMAX, softmax_primitive

close = torch.testing.assert_close


def weighted(f, case):
    """A scalar function with no vanishing derivative."""
    n = case.ours(*case.inputs()).numel()
    w = torch.linspace(1, 2, n, dtype=torch.float64)
    return lambda *xs: (f(*xs).reshape(-1) * w).sin().sum()


def push(f, ts):
    return lambda *xs: jvp(f, xs, ts)[1]


def few(f):
    """Some of the outputs: Jacobians of Jacobians of all of them are thousands of rows."""
    return lambda *xs: f(*xs).reshape(-1)[-2:]


def everywhere(case):
    return tuple(range(len(case.shapes)))


RUNS = {
    "jvp": lambda f, c, xs, ts: jvp(f, xs, ts),
    "vjp": lambda f, c, xs, ts: (lambda y, pull: pull(y.cos()))(*vjp(f, *xs)),
    "grad": lambda f, c, xs, ts: grad(weighted(f, c), everywhere(c))(*xs),
    "jacrev": lambda f, c, xs, ts: jacrev(f, everywhere(c))(*xs),
    "jacfwd": lambda f, c, xs, ts: jacfwd(f, everywhere(c))(*xs),
    "hessian": lambda f, c, xs, ts: hessian(weighted(f, c), everywhere(c))(*xs),
    "jacrev(jacrev)": lambda f, c, xs, ts: jacrev(jacrev(few(f)))(*xs),
    "jacrev(jacfwd)": lambda f, c, xs, ts: jacrev(jacfwd(few(f)))(*xs),
    "jacfwd(jacfwd)": lambda f, c, xs, ts: jacfwd(jacfwd(f))(*xs),
    "jvp(grad)": lambda f, c, xs, ts: jvp(grad(weighted(f, c), everywhere(c)), xs, ts)[1],
    "grad(jvp)": lambda f, c, xs, ts: grad(
        lambda *z: push(weighted(f, c), ts)(*z).sum(), everywhere(c)
    )(*xs),
    "grad(grad)": lambda f, c, xs, ts: grad(lambda *z: grad(weighted(f, c))(*z).sin().sum())(*xs),
    "jvp(jvp)": lambda f, c, xs, ts: push(push(f, ts), ts)(*xs),
    "grad(jvp), tangent depends on x": lambda f, c, xs, ts: grad(
        lambda *z: jvp(f, z, tuple(t * a for t, a in zip(ts, z, strict=True)))[1].sin().sum(),
        everywhere(c),
    )(*xs),
    "vmap": lambda f, c, xs, ts: vmap(f)(*stack(xs)),
    "vmap, batch last": lambda f, c, xs, ts: vmap(f, in_dims=-1)(*stack(xs, -1)),
    "vmap(grad)": lambda f, c, xs, ts: vmap(grad(weighted(f, c), everywhere(c)))(*stack(xs)),
    "vmap(jvp) over points": lambda f, c, xs, ts: vmap(push(f, ts))(*stack(xs)),
    "vmap(jvp) over tangents": lambda f, c, xs, ts: vmap(lambda *t: push(f, t)(*xs))(*stack(ts)),
    "jvp(vmap)": lambda f, c, xs, ts: jvp(vmap(f), stack(xs), stack(ts))[1],
    "grad(vmap)": lambda f, c, xs, ts: grad(lambda *z: vmap(f)(*z).sin().sum())(*stack(xs)),
    "vmap(vmap)": lambda f, c, xs, ts: vmap(vmap(f))(*stack(stack(xs))),
    "vmap(vmap(grad))": lambda f, c, xs, ts: vmap(vmap(grad(weighted(f, c))))(*stack(stack(xs))),
    "no_grad outside": lambda f, c, xs, ts: torch.no_grad()(RUNS["jvp(grad)"])(f, c, xs, ts),
}


def stack(xs, dim=0):
    return tuple(torch.stack([x, 0.7 * x, -1.1 * x], dim) for x in xs)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("case", NESTED, ids=str)
def test_matches_primitives(case, run):
    xs = case.inputs()
    ts = tuple(torch.randn_like(x) for x in xs)
    close(
        run(case.ours, case, xs, ts),
        run(case.primitive, case, xs, ts),
        atol=1e-9,
        rtol=1e-7,
    )


@pytest.mark.parametrize("case", [c for c in OPS if len(c.shapes) > 1], ids=str)
def test_vmap_over_each_argument(case):
    xs = case.inputs()
    for batched in range(len(xs)):
        dims = tuple(0 if i == batched else None for i in range(len(xs)))
        args = tuple(stack((x,))[0] if d == 0 else x for x, d in zip(xs, dims, strict=True))
        close(vmap(case.ours, dims)(*args), vmap(case.primitive, dims)(*args))
        close(
            vmap(grad(weighted(case.ours, case), batched), dims)(*args),
            vmap(grad(weighted(case.primitive, case), batched), dims)(*args),
        )


@pytest.mark.parametrize("case", OPS, ids=str)
def test_forward_ad_and_backward(case):
    """A dual tensor whose primal and tangent are trained, by the older interface."""

    def run(f):
        xs = [x.requires_grad_() for x in case.inputs()]
        torch.manual_seed(1)
        ts = [torch.randn_like(x) for x in xs]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(xs, ts, strict=True)]
            y = forward_ad.unpack_dual(f(*duals).sin())
            (y.primal.sum() + (y.tangent**2).sum()).backward()
        return [x.grad for x in xs]

    torch.manual_seed(0)
    ours = run(case.ours)
    torch.manual_seed(0)
    close(ours, run(case.primitive), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("case", OPS, ids=str)
def test_is_grads_batched(case):
    """The older vmap, over a backward that took the short way."""
    xs = case.inputs(requires_grad=True)
    y = case.ours(*xs)
    gs = torch.randn(3, *y.shape, dtype=y.dtype)
    got = torch.autograd.grad(y, xs, gs, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(y, xs, g, retain_graph=True) for g in gs]
    for i, g in enumerate(got):
        close(g, torch.stack([w[i] for w in want]))


@pytest.mark.parametrize("case", SOFTMAX, ids=str)
def test_symmetry(case):
    """<v, J u> = <J^T v, u>."""
    xs = case.inputs()
    y, pull = vjp(case.ours, *xs)
    u, v = torch.randn_like(xs[0]), torch.randn_like(y)
    close((v * jvp(case.ours, xs, (u,))[1]).sum(), (pull(v)[0] * u).sum())


def test_mixed_network():
    """Several ops in one function: saved tensors meet at different levels."""
    w, b = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def ours(x):
        h = J.linear_act_dropout(x, w, b, "tanh")
        return J.log_softmax(J.linear(J.softmax(h @ h.T, -1) @ h, w) + x, -1)

    def primitive(x):
        h = torch.tanh(x @ w.T + b)
        return torch.log(softmax_primitive(softmax_primitive(h @ h.T, -1) @ h @ w.T + x, -1))

    x, t = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)

    def scalar(f):
        return lambda z: f(z).sin().sum()

    close(jacrev(ours)(x), jacrev(primitive)(x))
    close(jacfwd(ours)(x), jacfwd(primitive)(x))
    close(hessian(scalar(ours))(x), hessian(scalar(primitive))(x))
    close(push(push(ours, (t,)), (t,))(x), push(push(primitive, (t,)), (t,))(x))
