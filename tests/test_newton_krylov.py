"""newton_krylov: roots, how fast, and what it refuses."""

import math

import pytest
import torch

import jacobian_ops.functional as J
from jacobian_ops.jacobian.newton_krylov import newton_krylov

close = torch.testing.assert_close
A = torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)  # so small tensors gain nothing from more


def f(x):
    """A nonlinear system with the root 1."""
    ones = torch.ones_like(x)
    return 3 * (x - ones) + J.linear(J.tanh(x) - torch.tanh(ones), A.to(x) / 8)


@pytest.mark.parametrize("method", ["lgmres", "gmres", "bicgstab"])
def test_root(method):
    """Superlinear: the last steps gain more than a digit each, as those of Newton's method do."""
    residuals = []
    x = newton_krylov(
        f,
        torch.zeros(2, 30, dtype=torch.float64),
        tol=1e-12,
        method=method,
        callback=lambda x, r: residuals.append((x, r)),
    )
    close(x, torch.ones_like(x), rtol=1e-11, atol=1e-11)
    sizes = [r for _, r in residuals]
    assert sizes[-1] <= 1e-12 and len(sizes) < 12 and sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-2 * sizes[-2]
    assert torch.equal(residuals[-1][0], x) and not x.requires_grad


def test_float32():
    x = newton_krylov(f, torch.zeros(30))
    assert x.dtype == torch.float32 and f(x).abs().max() < torch.finfo(torch.float32).eps ** (1 / 3)


def test_line_search():
    """Newton's full steps for atan diverge from 3."""
    x = newton_krylov(torch.atan, torch.tensor([3.0, -4.0], dtype=torch.float64), tol=1e-12)
    assert x.abs().max() <= 1e-12


def test_preconditioner_saves_products():
    """With the inverse of the linear part, each system takes a few products."""
    scale = torch.logspace(0, 5, 60, dtype=torch.float64)
    calls = []

    def g(x):
        calls.append(1)
        return scale * x + x**3 - 1

    x0 = torch.zeros(60, dtype=torch.float64)
    x = newton_krylov(g, x0, preconditioner=lambda v: v / scale)
    assert g(x).abs().max() < 1e-5
    assert len(calls) < 60
    calls.clear()
    newton_krylov(g, x0)
    assert len(calls) > 120


def test_at_the_root():
    x0 = torch.ones(30, dtype=torch.float64, requires_grad=True)
    x = newton_krylov(f, x0, callback=lambda *_: pytest.fail("no step was needed"))
    assert torch.equal(x, x0) and x is not x0


@pytest.mark.parametrize(
    "g,x0,options,error,words",
    [
        (f, [1.0], {}, TypeError, "x0 must be a tensor of float64 or float32, got list"),
        (f, torch.ones(3, dtype=torch.bfloat16), {}, TypeError, "got torch.bfloat16"),
        (f, torch.ones(30), dict(method="cg"), ValueError, "method is 'cg'; allowed: lgmres, gm"),
        (f, torch.ones(30), dict(tol=0.0), ValueError, "tol is 0.0; it must be positive"),
        (f, torch.ones(30), dict(max_iter=0), ValueError, "max_iter is 0; it must be positive"),
        (f, torch.ones(30), dict(inner_max_iter=0), ValueError, "inner_max_iter is 0"),
        (lambda x: x[1:], torch.ones(3), {}, ValueError, r"f\(x\) has shape \[2\]; allowed: \[3\]"),
        (torch.log, -torch.ones(3), {}, RuntimeError, r"f\(x0\) is not finite"),
        (lambda x: x**2 + 1, torch.ones(3), {}, RuntimeError, "no step makes|after 50 steps"),
        (lambda x: x.exp(), torch.ones(3), dict(max_iter=3), RuntimeError, "after 3 steps"),
    ],
)
def test_errors(g, x0, options, error, words):
    with pytest.raises(error, match=f"newton_krylov: .*({words})"):
        newton_krylov(g, x0, **options)


def test_products_are_jvps():
    """Not differences of values: with a rule twice as steep as f, every step is half as long."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x - math.pi

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, tx):
            return 2 * tx

    residuals = []
    x0 = torch.zeros(1, dtype=torch.float64)
    newton_krylov(Doubled.apply, x0, tol=1e-3, callback=lambda x, r: residuals.append(r))
    close(torch.tensor(residuals), math.pi / 2.0 ** torch.arange(1, len(residuals) + 1))
