"""Linear systems and singular values where the Jacobian is too large for its matrix."""

import pytest
import torch

from jacobian_ops import jacobian
from jacobian_ops.jacobian import Chain, Dense, Diagonal, Identity, Permutation, solve

pytestmark = pytest.mark.cpu_only

close = torch.testing.assert_close


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def cubic(x):
    """|x|^2 times x shifted, by an op that no structure is known of; J is not symmetric."""
    return torch.einsum("...i,...i,...j->...j", x, x, x.roll(1, -1))


def smooth(x, w):
    """Near the identity: a diffusion and a nonlinear term."""
    return x + 0.1 * w * (x.roll(1) - 2 * x + x.roll(-1)) + 1e-3 * cubic(x)


def test_gmres_above_the_size_of_dense_solves():
    x, b = torch.rand(600, dtype=torch.float64), randn(600, 2)
    J = jacobian(lambda x: smooth(x, 0.5), x)
    found = J.solve(b)
    close(J @ found, b, rtol=1e-9, atol=1e-9)
    close(found, torch.linalg.solve(J.dense(), b), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_gmres_derivatives(batch):
    """The implicit function theorem: by b, by x and by a parameter."""
    x, b = torch.rand(*batch, 3, dtype=torch.float64), randn(2, *batch, 3)
    w = torch.tensor(0.7, dtype=torch.float64)
    x, b, w = (t.requires_grad_() for t in (x, b, w))

    def f(x, b, w):
        return solve.gmres(jacobian(lambda x: x + w * cubic(x), x, len(batch)), b, rtol=1e-12)

    assert torch.autograd.gradcheck(f, (x, b, w))
    A = jacobian(lambda x: x + w * cubic(x), x, len(batch)).dense()
    close(f(x, b, w), torch.linalg.solve(A, b.movedim(0, -1)).movedim(-1, 0))


def test_gmres_keeps_the_dtype():
    J = Dense(torch.eye(4) + 0.1)
    found = solve.gmres(J, torch.ones(1, 4))
    assert found.dtype is torch.float32
    close(found[0], torch.full((4,), 1 / 1.4))
    with torch.no_grad():
        assert not solve.gmres(J, torch.ones(1, 4)).requires_grad


def test_gmres_fails_on_singular_jacobians():
    J = Dense(torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)))
    with pytest.raises(torch.linalg.LinAlgError, match="GMRES did not converge: relative resid"):
        solve.gmres(J, torch.ones(1, 3, dtype=torch.float64))


SINGULAR = [
    Diagonal(torch.tensor([1.0, 0.0])),
    0 * Identity((2,), torch.ones(1)),
    jacobian(lambda x: torch.ones(2), torch.zeros(2)),
    Chain([Dense(torch.ones(2, 1)), Dense(torch.ones(1, 2))]),
    Dense(torch.zeros(2, 2)),
    jacobian(torch.nn.Softmax(-1), torch.zeros(2)),
]


@pytest.mark.parametrize("J", SINGULAR, ids=lambda J: J.label)
def test_singular(J):
    with pytest.raises(torch.linalg.LinAlgError):
        J.solve(torch.ones(2))
    assert not J.is_invertible() and J.cond() > 1e6


def test_lanczos_above_the_size_of_dense_decompositions():
    """svds of a matrix-free operator, and its derivative against a difference."""
    x = torch.rand(600, dtype=torch.float64)
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    d = 0.9 ** torch.arange(600)  # a spectrum that Lanczos steps resolve soon

    def dense_values(w):
        return torch.linalg.svdvals(jacobian(lambda x: d * smooth(x, w), x).dense())[:2]

    J = jacobian(lambda x: d * smooth(x, w), x)
    values = J.svdvals(2)
    close(values, dense_values(w))
    close(J.norm(), values[0])
    (derivative,) = torch.autograd.grad(values.sum(), w)
    with torch.no_grad():
        difference = (dense_values(w + 1e-4) - dense_values(w - 1e-4)).sum() / 2e-4
    close(derivative, difference, rtol=1e-5, atol=1e-8)


def test_condition_and_inverse_function_theorem():
    d = torch.tensor([[4.0, -2.0, 1.0], [4.0, 0.0, 1.0]])
    J = Diagonal(d, batch_dims=1)
    close(J.cond(), torch.tensor([4.0, torch.inf]))
    assert J.is_invertible().tolist() == [True, False]
    assert J.is_invertible(rtol=0.3).tolist() == [False, False]
    assert J.is_invertible(rtol=0.2).tolist() == [True, False]
    assert not Dense(torch.ones(2, 3)).is_invertible()
    # f(x, y) = (x^2 - y^2, 2 x y) has an inverse near every point but 0.
    f = lambda x: torch.stack([x[0] ** 2 - x[1] ** 2, 2 * x[0] * x[1]])  # noqa: E731
    J = jacobian(f, torch.tensor([1.5, 0.5], dtype=torch.float64))
    close(J.svdvals(), torch.tensor([10.0, 10.0], dtype=torch.float64).sqrt())
    close(J.slogdet().logabsdet.exp(), torch.tensor(10.0, dtype=torch.float64))
    assert J.is_invertible() and not jacobian(f, torch.zeros(2)).is_invertible()


def test_orthogonal_ones_read_their_values_off():
    J = Permutation(torch.tensor([2, 0, 1]), (3,), (3,), torch.ones(1))
    close((-3 * J).svdvals(2), torch.tensor([3.0, 3.0]))
    assert J.cond() == 1 and J.norm() == 1
