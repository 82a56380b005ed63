"""torch.compile(fullgraph=True): training, and functions that differentiate inside."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import jacobian_ops.functional as J

from .cases import CASES, NESTED

close = torch.testing.assert_close


def compiled(f, backend="aot_eager", **kwargs):
    return torch.compile(f, backend=backend, fullgraph=True, **kwargs)


def loss_of(case):
    return lambda *xs: case.ours(*xs).sin().sum()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(case):
    xs = case.inputs(requires_grad=True)
    f = loss_of(case)
    close(torch.autograd.grad(compiled(f)(*xs), xs), torch.autograd.grad(f(*xs), xs))


INSIDE = {
    "jvp": lambda f: lambda xs, ts: jvp(f, xs, ts),
    "grad": lambda f: lambda xs, ts: grad(f, tuple(range(len(xs))))(*xs),
    "hvp": lambda f: lambda xs, ts: jvp(grad(f), xs, ts)[1],
    "vmap(jvp)": lambda f: (
        lambda xs, ts: vmap(lambda *t: jvp(f, xs, t)[1])(*[torch.stack([t, 2 * t]) for t in ts])
    ),
}


@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE.keys())
@pytest.mark.parametrize("case", NESTED, ids=str)
def test_differentiates_inside(case, inside):
    xs = case.inputs()
    ts = tuple(torch.randn_like(x) for x in xs)
    f = inside(loss_of(case))
    close(compiled(f)(xs, ts), f(xs, ts))


@pytest.mark.parametrize("case", NESTED, ids=str)
def test_trained_jvp(case):
    """MeanFlow: the gradient of a loss of a jvp."""
    xs = case.inputs()
    ts = tuple(torch.randn_like(x) for x in xs)

    def loss(*xs):
        y, ty = jvp(case.ours, xs, ts)
        return ((y - ty) ** 2).sum()

    def run(f):
        zs = [x.clone().requires_grad_() for x in xs]
        return torch.autograd.grad(f(*zs), zs)

    close(run(compiled(loss)), run(loss))


def network(x, w, b):
    h = J.linear_act_dropout(x, w, b, "gelu")
    h = J.softmax(J.linear(h, w), -1) + J.silu(x)
    return J.log_softmax(h, -1)


@pytest.fixture
def tensors():
    return torch.randn(6, 4), torch.randn(4, 4), torch.randn(4)


def test_inductor_training(tensors):
    xs = [t.requires_grad_() for t in tensors]

    def f(*xs):
        return network(*xs).sin().sum()

    got = torch.autograd.grad(compiled(f, "inductor")(*xs), xs)
    close(got, torch.autograd.grad(f(*xs), xs), atol=1e-5, rtol=1e-4)


def test_inductor_differentiates_inside(tensors):
    ts = tuple(torch.randn_like(t) for t in tensors)

    def f(xs, ts):
        y, ty = jvp(network, xs, ts)
        hvp = jvp(grad(lambda *z: network(*z).sin().sum()), xs, ts)[1]
        return (
            y,
            ty,
            hvp,
            vmap(lambda t: jvp(network, xs, (t, *ts[1:]))[1])(torch.stack([ts[0], -ts[0]])),
        )

    close(compiled(f, "inductor")(tensors, ts), f(tensors, ts), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_meanflow_step(backend):
    """Attention, norms and an MLP, and a loss that stops the gradient of their jvp."""
    b, s, e = 2, 6, 8
    x, noise = torch.randn(2, b, s, e)
    r, t = torch.rand(2, b, 1, 1).sort(0).values
    shapes = (3 * e, e), (e, e), (4 * e, e), (e, 4 * e), (e,), (e,)
    weights = [(0.5 * torch.randn(shape)).requires_grad_() for shape in shapes]

    def network(z, r, t, qkv, project, up, down, scale, shift):
        h = J.layer_norm(z * (1 + t) - r, (e,), scale, shift)
        q, k, v = J.linear(h, qkv).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        a = J.scaled_dot_product_attention(q, k, v, is_causal=True)
        z = z + J.linear(a.transpose(1, 2).flatten(2), project)
        return z + J.linear_act_dropout(J.rms_norm(z, (e,), scale), up, None, "gelu") @ down.T

    def loss(*weights):
        velocity = noise - x
        u, dudt = jvp(
            lambda z, r, t: network(z, r, t, *weights),
            (torch.lerp(x, noise, t), r, t),
            (velocity, torch.zeros_like(r), torch.ones_like(t)),
        )
        return (u - (velocity - (t - r) * dudt).detach()).square().mean()

    got, expected = (
        torch.autograd.grad(f(*weights), weights) for f in (compiled(loss, backend), loss)
    )
    close(got, expected, atol=1e-5, rtol=1e-4)


def test_inductor_dropout_draws_anew_and_repeats():
    x = torch.ones(64, 8)
    f = compiled(lambda z: J.dropout(z, 0.5), "inductor")
    assert not torch.equal(f(x), f(x))
    torch.manual_seed(3)
    first = f(x)
    torch.manual_seed(3)
    assert torch.equal(f(x), first)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_dropout_mask_is_one(backend):
    """Forward, backward and jvp of one compiled call drop the same elements."""
    x = torch.ones(40, 8)

    def kept(f):
        z = x.clone().requires_grad_()
        y = f(z)
        y.sum().backward()
        return torch.equal(y != 0, z.grad != 0)

    assert kept(compiled(lambda z: J.dropout(z.sin() + 9, 0.5), backend))
    y, ty = compiled(lambda z: jvp(lambda a: J.dropout(a, 0.5), (z,), (z,)), backend)(x)
    assert torch.equal(y != 0, ty != 0)


def test_dynamic_shapes():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    f = torch.compile(lambda z: J.softmax(J.gelu(z), -1), backend=backend, dynamic=True)
    for n in (3, 5, 8):
        x = torch.randn(n, 7)
        close(f(x), J.softmax(J.gelu(x), -1))
    assert len(calls) == 1


def test_inplace():
    def f(z):
        return J.relu(z * 2, inplace=True) + J.silu(z * 3, inplace=True)

    x = torch.randn(3, 4, requires_grad=True)
    close(
        torch.autograd.grad(compiled(f)(x).sum(), x),
        torch.autograd.grad(f(x).sum(), x),
    )


def test_autocast():
    x, w, b = torch.randn(6, 4, requires_grad=True), torch.randn(4, 4), torch.randn(4)
    device = x.device.type

    def f(x):
        with torch.autocast(device, torch.bfloat16):
            return J.linear_act_dropout(x, w, b)

    y = compiled(f)(x)
    assert y.dtype == torch.bfloat16
    close(y, f(x))


def test_export():
    class Net(torch.nn.Module):
        def forward(self, x):
            return J.softmax(J.gelu(x), -1)

    x = torch.randn(3, 4)
    program = torch.export.export(Net(), (x,))
    close(program.module()(x), Net()(x))
    assert "jacobian_ops.softmax" in str(program.graph)


@pytest.mark.parametrize("form", [J.dropout, lambda z, p: J.linear_act_dropout(z, z, p=p)])
def test_vmap_of_dropout_with_dynamic_shapes(form):
    def f(x):
        return vmap(lambda z: form(z, 0.5), randomness="different")(x)

    y = compiled(f, dynamic=True)(torch.ones(6, 7, 7))
    assert y.shape == (6, 7, 7) and not torch.equal(y[0], y[1])
