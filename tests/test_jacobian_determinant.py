"""Log-determinants: values, derivatives, singular Jacobians, and the stochastic series."""

import itertools

import pytest
import torch
from torch import nn

from jacobian_ops import jacobian
from jacobian_ops.jacobian import Dense, Identity, Permutation, Triangular, logdet_series

pytestmark = pytest.mark.cpu_only

close = torch.testing.assert_close
F = nn.functional


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def coupling(x, w):
    """RealNVP: the second half scaled and shifted by functions of the first."""
    a, b = x.chunk(2)
    return torch.cat([a, b * (w @ a).tanh().exp() + (w @ a).sin()])


W = torch.randn(4, 4, dtype=torch.float64) / 3
MAPS = {
    # f(x, w), shape of x, shape of w, what its Jacobian is
    "diagonal": (lambda x, w: (w * x).sinh(), (4,), (4,), "Diagonal"),
    "blocks": (lambda x, w: F.silu(x @ w) @ W, (3, 4), (4, 4), "BlockDiagonal"),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w, 0.1), (4,), (4,), "DiagonalPlusLowRank"),
    "low rank plus": (
        lambda x, w: w * x + F.softmax(x, -1),
        (4,),
        (4,),
        "DiagonalPlusLowRank",
    ),
    "batch_norm": (
        lambda x, w: x + F.batch_norm(x, None, None, w, training=True, eps=0.1),
        (4, 3),
        (3,),
        "Sum",
    ),
    "chain": (lambda x, w: F.softplus((x.flip(0) * w) @ W), (4,), (4,), "Chain"),
    "residual": (lambda x, w: x + F.tanh(x @ w) @ w.T, (4,), (4, 4), "Sum"),
    "bottleneck": (lambda x, w: x.exp() + F.tanh(x @ w.T) @ w, (4,), (2, 4), "Sum"),
    "coupling": (coupling, (4,), (2, 2), "Sum"),
    "matrix-free": (lambda x, w: torch.einsum("i,i,j->j", x, w, x), (4,), (4,), "MatrixFree"),
}


@pytest.mark.parametrize("name", MAPS)
def test_derivatives(name):
    """By x and by parameters, in reverse and forward mode."""
    f, shape, weights, kind = MAPS[name]
    x, w = randn(*shape).requires_grad_(), (randn(*weights) / 2).requires_grad_()

    def logabsdet(x, w):
        J = jacobian(lambda x: f(x, w), x)
        assert type(J).__name__ == kind, J.structure
        return J.slogdet().logabsdet

    A = torch.func.jacrev(f)(x, w).reshape(x.numel(), x.numel())
    close(logabsdet(x, w), torch.linalg.slogdet(A).logabsdet)
    assert torch.autograd.gradcheck(logabsdet, (x, w))


@pytest.mark.parametrize("name", ["diagonal", "blocks", "rms_norm", "residual"])
def test_batched(name):
    f, shape, weights, _ = MAPS[name]
    x, w = randn(5, *shape), randn(*weights) / 2
    J = jacobian(lambda x: f(x, w), x, batch_dims=1)
    each = [torch.func.jacrev(f)(s, w).reshape(J.shape[1:]) for s in x]
    expected = torch.linalg.slogdet(torch.stack(each))
    close(J.slogdet().sign, expected.sign)
    close(J.slogdet().logabsdet, expected.logabsdet)


SINGULAR = {
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, 0),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "relu": F.relu,
    "bottleneck": lambda x: F.tanh(x @ W[:, :2]) @ W[:2],
    "constant": lambda x: torch.ones_like(x.detach()),
    "after others": lambda x: F.softmax((x @ W).tanh(), -1) * 2,
}


@pytest.mark.parametrize("name", SINGULAR)
def test_singular(name):
    """Exactly, where the layer's structure says so, not a logarithm of rounding errors."""
    J = jacobian(SINGULAR[name], -randn(3, 4).abs() if name == "relu" else randn(3, 4))
    assert J.slogdet() == J.T.slogdet() == (0, -torch.inf)
    assert J.logdet() == -torch.inf
    with pytest.raises(torch.linalg.LinAlgError):
        J.solve(randn(3, 4))


def test_norms_without_cancellation():
    """1 - mean(xhat^2) = eps r^2 is far below float32's rounding of 1."""
    x = torch.randn(512) * 100
    J = jacobian(lambda x: F.rms_norm(x, (512,), eps=1e-6), x)
    n, r = 512, (x.double().square().mean() + 1e-6).rsqrt()
    expected = (n + 2) * r.log() + torch.tensor(1e-6, dtype=torch.float64).log()
    close(J.slogdet().logabsdet.double(), expected, rtol=1e-6, atol=0)


def test_signs_of_permutations():
    """All of 4 elements: +1 for the 12 even ones."""
    units = torch.eye(4)
    signs = []
    for order in itertools.permutations(range(4)):
        J = Permutation(torch.tensor(order), (4,), (2, 2), units)
        assert J.slogdet() == torch.linalg.slogdet(units[list(order)])
        signs.append(J.slogdet().sign)
    assert signs.count(1) == signs.count(-1) == 12


def test_logdet():
    J = Dense(torch.diag(torch.tensor([2.0, -3.0])))
    assert J.slogdet().sign == -1 and J.logdet().isnan()
    close((-1 * J @ J).slogdet().logabsdet, torch.tensor(36.0).log())
    close((J @ J).logdet(), torch.tensor(36.0).log())


def test_triangle_of_a_coupling():
    """Told that a Jacobian is triangular, nothing but its diagonal is needed."""
    x = randn(4)
    J = jacobian(lambda x: coupling(x, W[:2, :2]), x)
    d = torch.cat([torch.ones(2).double(), (W[:2, :2] @ x[:2]).tanh().exp()])
    for T in (Triangular(J, diagonal=d), Triangular(J)):
        close(T.slogdet().logabsdet, J.slogdet().logabsdet)
        close(T.solve(x), J.solve(x))


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_series(batch):
    """Within its standard error and truncation of the value; and it is differentiable."""
    x, A = randn(*batch, 6), 0.1 * randn(6, 6)
    A.requires_grad_()
    J = jacobian(lambda x: torch.tanh(x @ A), x, len(batch))
    estimate = logdet_series(J, terms=12, probes=2000)
    exact = (Identity.of(J) + J).slogdet().logabsdet
    assert estimate.value.shape == batch
    error = (estimate.value - exact).abs()
    assert (error < 4 * estimate.standard_error + estimate.truncation).all()
    assert (estimate.standard_error < 0.02).all() and (estimate.truncation < 1e-3).all()
    (gradient,) = torch.autograd.grad(estimate.value.sum(), A, retain_graph=True)
    (expected,) = torch.autograd.grad(exact.sum(), A)
    close(gradient, expected, atol=0.1, rtol=0.1)


def test_series_by_hand():
    """For one unknown every probe is exact: a a = log(1 + a) up to the terms left out."""
    J = Dense(torch.tensor([[-0.5]], dtype=torch.float64))
    estimate = logdet_series(J, terms=3, probes=2)
    close(estimate.value.item(), -0.5 - 0.125 - 0.125 / 3)
    close(estimate.standard_error.item(), 0.0)
    close(estimate.truncation.item(), 0.5**4 / (4 * 0.5))
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    K = Dense(0.2 * randn(4, 4))
    a, b, c = (logdet_series(K, generator=g).value for g in seeds)
    assert a == b != c


ERRORS = [
    (Dense(torch.ones(2, 3)), {}, "logdet_series: the Jacobian is 2 x 3"),
    (Dense(torch.eye(2)), {}, "the Jacobian's norm is 1; allowed: below 1"),
    (Dense(torch.eye(2) / 2), {"terms": 0}, "terms is 0 and probes is 64; allowed: at least 1"),
    (Dense(torch.eye(2) / 2), {"probes": 1}, "probes is 1; allowed: at least 1 and 2"),
]


@pytest.mark.parametrize("J, arguments, match", ERRORS)
def test_series_errors(J, arguments, match):
    with pytest.raises(ValueError, match=match):
        logdet_series(J, **arguments)
