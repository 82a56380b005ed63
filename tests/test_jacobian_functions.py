"""Products of whole functions against the matrices that they avoid."""

import pytest
import torch
from torch import nn

import jacobian_ops
import jacobian_ops.functional as J
from jacobian_ops import jacobian

pytestmark = pytest.mark.cpu_only

close = torch.testing.assert_close


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def network(x, w):
    return J.softmax(J.gelu(J.linear(x, w)), -1)


def loss(y):
    return (y.square() * torch.arange(1, 4)).sum() + y.prod()


def test_full_jacobian():
    x, w = randn(2, 4), randn(3, 4)
    f = lambda x: network(x, w)  # noqa: E731
    close(jacobian.compute_full_jacobian(f, x), torch.func.jacrev(f)(x))
    each = jacobian.compute_full_jacobian(f, x, batch_dims=1)
    close(each, torch.func.vmap(torch.func.jacrev(f))(x))
    with pytest.raises(MemoryError, match="6 x 8 would take"):
        jacobian.compute_full_jacobian(f, x, max_bytes=6 * 8 * 8 - 1)


def test_vjp_and_jvp():
    primals = randn(2, 4), randn(3, 4)
    tangents, cotangent = (randn(2, 4), randn(3, 4)), randn(2, 3)
    Jx, Jw = torch.func.jacrev(network, (0, 1))(*primals)
    y, (gx, gw) = jacobian.vjp(network, primals, cotangent)
    close(y, network(*primals))
    close((gx, gw), tuple(torch.tensordot(cotangent, A, 2) for A in (Jx, Jw)))
    y, ty = jacobian.jvp(network, primals, tangents)
    close(y, network(*primals))
    close(ty, torch.tensordot(Jx, tangents[0], 2) + torch.tensordot(Jw, tangents[1], 2))
    assert jacobian_ops.jvp is jacobian.jvp


def test_hvp():
    primals, tangents = (randn(2, 4), randn(3, 4)), (randn(2, 4), randn(3, 4))
    f = lambda x, w: loss(network(x, w))  # noqa: E731
    gradient, product = jacobian.hvp(f, primals, tangents)
    close(gradient, torch.func.grad(f, (0, 1))(*primals))
    H = torch.func.hessian(f, (0, 1))(*primals)
    for row, found in zip(H, product, strict=True):
        close(found, sum(torch.tensordot(b, t, 2) for b, t in zip(row, tangents, strict=True)))


def test_ggnvp():
    primals, tangents = (randn(2, 4), randn(3, 4)), (randn(2, 4), randn(3, 4))
    value, product = jacobian.ggnvp(network, loss, primals, tangents)
    y = network(*primals)
    close(value, loss(y))
    jacobians = torch.func.jacrev(network, (0, 1))(*primals)
    H = torch.func.hessian(loss)(y).reshape(6, 6)
    A = torch.cat([A.reshape(6, -1) for A in jacobians], 1)
    G = A.T @ H @ A
    u = torch.cat([t.flatten() for t in tangents])
    close(torch.cat([p.flatten() for p in product]), G @ u)


def test_passes(monkeypatch):
    """What the docstrings say of evaluations."""
    calls = []

    def f(x):
        calls.append(1)
        return torch.tanh(x).sum()

    x = (randn(3),)
    for run, count in (
        (lambda: jacobian.vjp(f, x, torch.ones((), dtype=torch.float64)), 1),
        (lambda: jacobian.jvp(f, x, x), 1),
        (lambda: jacobian.hvp(f, x, x), 1),
        (lambda: jacobian.ggnvp(f, lambda y: y * y, x, x), 2),
        (lambda: jacobian.compute_full_jacobian(f, x[0]), 1),
    ):
        calls.clear()
        run()
        assert len(calls) == count


def test_hvp_of_a_vector_is_refused():
    with pytest.raises(RuntimeError, match="scalar"):
        jacobian.hvp(nn.Identity(), (randn(3),), (randn(3),))
