"""jacobian_ops.jvp: torch.func.jvp's values, and a tangent that can go without a graph."""

import pytest
import torch

import jacobian_ops
import jacobian_ops.functional as J
from jacobian_ops.autograd import rule

from .cases import NESTED

close = torch.testing.assert_close


def inputs_of(case):
    xs = case.inputs(requires_grad=True)
    return xs, tuple(torch.randn_like(x) for x in xs)


def product(f, xs, ts, graph):
    """y, ty and the gradients of a loss that stops the tangent's."""
    y, ty = jacobian_ops.jvp(f, xs, ts, tangent_graph=graph)
    loss = (y.sin() * ty.detach()).sum()
    return y, ty, torch.autograd.grad(loss, xs, allow_unused=True)


@pytest.mark.parametrize("case", NESTED, ids=str)
def test_constant_tangent(case):
    xs, ts = inputs_of(case)
    y, ty, gradients = product(case.ours, xs, ts, False)
    expected_y, expected_ty, expected = product(case.ours, xs, ts, True)
    assert not ty.requires_grad
    close((y, ty), (expected_y, expected_ty))
    close(gradients, expected)


def mlp(x, w1, w2, scale):
    h = J.gelu(J.linear(x, w1))
    return J.softmax(J.rms_norm(J.linear(h, w2) + x, x.shape[-1:], scale), -1)


def mlp_inputs(rows=3, width=4):
    shapes = (rows, width), (4 * width, width), (width, 4 * width), (width,)
    xs = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    return xs, tuple(torch.randn_like(x) for x in xs)


def test_levels_outside():
    """What torch.func's transforms outside make of it is what they make of a detached tangent."""
    xs, ts = mlp_inputs()

    def loss(graph):
        def f(*xs):
            y, ty = jacobian_ops.jvp(mlp, xs, ts, tangent_graph=graph)
            return (y.sin() * ty.detach()).sum()

        return f

    everywhere = tuple(range(len(xs)))
    for transform in (
        lambda f: torch.func.grad(f, everywhere)(*xs),
        lambda f: torch.func.jvp(f, xs, ts),
        lambda f: torch.func.hessian(f)(*xs),
        lambda f: torch.func.vmap(torch.func.grad(f), (0, None, None, None))(
            torch.stack([xs[0], 2 * xs[0]]), *xs[1:]
        ),
    ):
        close(transform(loss(False)), transform(loss(True)))


def test_levels_inside():
    """A derivative that the function takes itself has its graph: only the outer tangent is cut."""
    x, t = torch.randn(2, 4, dtype=torch.float64)
    x.requires_grad_()

    def inner(z):
        return torch.func.jvp(lambda z: J.gelu(z) * J.softmax(z, -1), (z,), (t,))[1].square().sum()

    def f(z):
        return J.tanh(torch.func.grad(inner)(z))

    _, ty, (gradient,) = product(f, (x,), (t,), False)
    _, expected_ty, (expected,) = product(f, (x,), (t,), True)
    close((ty, gradient), (expected_ty, expected))


@pytest.mark.parametrize("case", NESTED, ids=str)
def test_jvp_inside(case):
    """A tangent that the function takes itself is a part of its result."""
    xs, ts = inputs_of(case)

    def f(*xs):
        y, ty = torch.func.jvp(case.ours, xs, ts)
        return y.sin() * ty

    _, ty, gradients = product(f, xs, ts, False)
    _, expected_ty, expected = product(f, xs, ts, True)
    close((ty, gradients), (expected_ty, expected))


def test_keeps_what_the_result_needs():
    """Without a graph of the tangent no more is kept than without a tangent."""
    xs, ts = mlp_inputs(256, 64)
    own = {x.untyped_storage().data_ptr() for x in xs}

    def kept(run):
        sizes = {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in own:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            results = run()
        del results
        return sum(s.nbytes() for s in sizes.values())

    plain = kept(lambda: mlp(*xs))
    assert kept(lambda: jacobian_ops.jvp(mlp, xs, ts, tangent_graph=False)) == plain
    assert kept(lambda: jacobian_ops.jvp(mlp, xs, ts)) > 1.8 * plain


def test_aux_and_trees():
    x, t = torch.randn(2, 5, requires_grad=True).unbind()

    def f(tree):
        return {"y": J.silu(tree["x"])}, tree["x"].detach()

    for graph in (True, False):
        y, ty, aux = jacobian_ops.jvp(
            f, ({"x": x},), ({"x": t},), has_aux=True, tangent_graph=graph
        )
        close(ty["y"], torch.func.jvp(J.silu, (x,), (t,))[1], check_stride=False)
        close((y["y"], aux), (J.silu(x), x))
        assert y["y"].requires_grad and ty["y"].requires_grad == graph


def test_an_error_leaves_nothing_behind():
    x = torch.randn(3, requires_grad=True)

    def fails(x):
        raise ValueError("from inside")

    with pytest.raises(ValueError, match="from inside"):
        jacobian_ops.jvp(fails, (x,), (x,), tangent_graph=False)
    assert rule._tangents.level is None and not rule._tangents.constant
    assert jacobian_ops.jvp(J.silu, (x,), (x,))[1].requires_grad


def test_compiled():
    xs, ts = mlp_inputs()

    def run(*xs):
        y, ty = jacobian_ops.jvp(mlp, xs, ts, tangent_graph=False)
        return (y.sin() * ty).sum()

    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True)(*xs), xs)
    close(compiled, torch.autograd.grad(run(*xs), xs))
