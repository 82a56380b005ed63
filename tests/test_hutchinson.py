"""Hutchinson's estimates against the exact trace, within their own standard error."""

import pytest
import torch

import jacobian_ops.functional as J
from jacobian_ops.jacobian.hutchinson import divergence, trace

close = torch.testing.assert_close
A = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
W1 = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
W2 = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def field(x):
    return J.linear(J.tanh(J.linear(x, W1)), W2)


def exact(f, x):
    return torch.autograd.functional.jacobian(f, x).reshape(x.numel(), x.numel()).trace()


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_trace(distribution):
    """The mean within four standard errors, and the error as the formula of the variance says."""
    x = torch.randn(7, dtype=torch.float64)
    value, error = trace(lambda x: J.linear(x, A), x, samples=4000, distribution=distribution)
    assert abs(value - A.trace()) < 4 * error
    s = (A + A.T) / 2
    squares = s.square().sum() - (distribution == "rademacher") * s.diagonal().square().sum()
    close(error, (2 * squares / 4000).sqrt(), rtol=0.1, atol=0)


def test_trace_of_nonlinear():
    """Of a function of a matrix, by every element."""
    x = torch.randn(3, 5, dtype=torch.float64)
    value, error = trace(field, x, samples=2000)
    assert abs(value - exact(field, x)) < 4 * error < 4


def test_diagonal_is_exact():
    x = torch.randn(4, 6)
    value, error = trace(J.silu, x, samples=2)
    close(value, exact(J.silu, x))
    close(error, torch.zeros(()), rtol=0, atol=1e-5)


def test_divergence():
    """One estimate for each sample, of the same vectors' means."""
    x = torch.randn(6, 5, dtype=torch.float64)
    value, error = divergence(field, x, samples=2000)
    expected = torch.stack([exact(field, row) for row in x])
    assert value.shape == error.shape == (6,)
    assert (abs(value - expected) < 4.5 * error).all()
    single = divergence(field, x)
    assert single.value.shape == (6,) and single.standard_error.isnan().all()
    points = torch.randn(9)
    close(divergence(J.tanh, points).value, 1 - points.tanh().square())


def test_derivatives():
    """The estimate is trained through: its gradient is that of w^T J w."""
    x = torch.randn(3, 5, dtype=torch.float64)
    w = W1.clone().requires_grad_()

    def estimate(w):
        f = lambda x: J.linear(J.tanh(J.linear(x, w)), W2)  # noqa: E731
        generator = torch.Generator(x.device).manual_seed(0)
        return divergence(f, x, samples=3, generator=generator).value

    assert torch.autograd.gradcheck(estimate, (w,))


def test_reproducible_and_one_mask():
    x = torch.randn(50)
    one, two = (
        trace(J.gelu, x, samples=5, distribution="normal", generator=g)
        for g in (torch.Generator(x.device).manual_seed(1) for _ in range(2))
    )
    assert torch.equal(one.value, two.value)
    value, error = trace(lambda x: J.dropout(x, 0.5), x, samples=8)
    assert value.item() % 2 == 0 and error == 0  # twice the number of kept elements


@pytest.mark.parametrize(
    "function,x,options,error,words",
    [
        (trace, 3.0, {}, TypeError, "x must be a floating-point tensor, got float"),
        (trace, torch.ones(2, dtype=torch.int32), {}, TypeError, "got torch.int32"),
        (trace, torch.ones(2), dict(samples=1), ValueError, "samples is 1; .* at least 2"),
        (divergence, torch.ones(2), dict(samples=0), ValueError, "samples is 0; .* at least 1"),
        (divergence, torch.ones(()), {}, ValueError, "x has no dimensions"),
        (trace, torch.ones(2), dict(distribution="cauchy"), ValueError, "'cauchy'; allowed: rad"),
    ],
)
def test_errors(function, x, options, error, words):
    with pytest.raises(error, match=f"{function.__name__}: .*{words}"):
        function(J.relu, x, **options)


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"trace: f\(x\) has shape \[2\], x has \[3\]"):
        trace(lambda x: x[:2], torch.ones(3))
