"""Roots of large nonlinear systems without forming a Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["newton_krylov"]

_METHODS = ("lgmres", "gmres", "bicgstab")
_SHORTEST_STEP = 2.0**-12  # of Newton's


def newton_krylov(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    tol: float | None = None,
    max_iter: int = 50,
    method: str = "lgmres",
    inner_max_iter: int = 20,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[Tensor, float], object] | None = None,
) -> Tensor:
    """Solve f(x) = 0 by Newton's method, its linear systems by a Krylov method of scipy's.

    A step s solves J s = -f(x) to a relative residual that falls with |f|^2 (Eisenstat and Walker
    1996, choice 2), and is halved until |f| falls (Knoll and Keyes 2004).  The Krylov method sees J
    as JVPs by torch.func.jvp, exact to rounding where finite differences are to about eps^(1/2),
    and without a step length to choose.

    Args:
        f: From a tensor of x0's shape to the same.
        x0: Where to start, float64 or float32, on any device; the Krylov vectors are on the CPU.
        tol: The largest component of f(x) that is zero; default eps^(1/3) of the dtype, as in
            scipy.optimize.newton_krylov.
        max_iter: Newton steps, at most.
        method: "lgmres", "gmres" or "bicgstab" of scipy.sparse.linalg.
        inner_max_iter: Its ``maxiter`` in one Newton step: cycles of 30 products for lgmres and
            gmres, steps of two products for bicgstab.
        preconditioner: An approximation of v -> J^-1 v, from a tensor of x0's shape to the same.
        callback: Called as ``callback(x, residual)`` after each step, the residual as for ``tol``.

    Returns:
        x, of the shape, dtype and device of ``x0``, without a graph.

    Raises:
        TypeError: ``x0`` is no tensor of float64 or float32.
        ValueError: f(x) has another shape, or an option is not one of the allowed.
        RuntimeError: f(x) is not finite at the start, no step made it smaller, or it did not reach
            ``tol``.
    """
    _check_arguments(x0, tol, max_iter, method, inner_max_iter)
    tol = torch.finfo(x0.dtype).eps ** (1 / 3) if tol is None else tol
    with torch.no_grad():
        x, forcing = x0.detach().clone(), 0.1
        # LGMRES starts each system from the directions of the last one, as scipy's own does.
        options = {
            "lgmres": dict(outer_v=[], prepend_outer_v=True, store_outer_Av=False),
            "gmres": dict(restart=30),
        }.get(method, {})
        options["maxiter"] = inner_max_iter
        y = _value(f, x)
        if not y.isfinite().all():
            raise RuntimeError("newton_krylov: f(x0) is not finite")
        for _ in range(max_iter):
            if y.abs().max() <= tol:
                return x
            before = y.norm()
            options["rtol"] = max(forcing, 0.5 * tol / before.item())  # no more than tol asks for
            step = _newton_step(f, x, y, method, preconditioner, options)
            x, y = _search(f, x, y, step)
            forcing = _next_forcing(forcing, (y.norm() / before).item())
            if callback is not None:
                callback(x, y.abs().max().item())
        if y.abs().max() <= tol:
            return x
    raise RuntimeError(
        f"newton_krylov: after {max_iter} steps |f(x)| is {y.abs().max():.1e}, more than "
        f"tol = {tol:.1e}"
    )


def _check_arguments(x0, tol, max_iter, method, inner_max_iter):
    if not isinstance(x0, Tensor) or x0.dtype not in (torch.float64, torch.float32):
        given = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"newton_krylov: x0 must be a tensor of float64 or float32, got {given}")
    if method not in _METHODS:
        allowed = ", ".join(_METHODS)
        raise ValueError(f"newton_krylov: method is {method!r}; allowed: {allowed}")
    for name, value in (("tol", tol), ("max_iter", max_iter), ("inner_max_iter", inner_max_iter)):
        if value is not None and not value > 0:
            raise ValueError(f"newton_krylov: {name} is {value}; it must be positive")


def _value(f, x):
    y = f(x)
    if y.shape != x.shape:
        raise ValueError(
            f"newton_krylov: f(x) has shape {list(y.shape)}; allowed: {list(x.shape)}, that of x0"
        )
    return y


def _newton_step(f, x, y, method, preconditioner, options):
    """An approximate solution of J s = -f(x)."""
    from scipy.sparse import linalg

    def operator(product):
        def matvec(v):
            v = torch.as_tensor(v.reshape(x.shape)).to(x)
            return product(v).reshape(-1).cpu().numpy()

        n = x.numel()
        return linalg.LinearOperator((n, n), matvec, dtype=y.cpu().numpy().dtype)

    J = operator(lambda v: torch.func.jvp(f, (x,), (v,))[1])
    M = None if preconditioner is None else operator(preconditioner)
    step, _ = getattr(linalg, method)(J, -y.reshape(-1).cpu().numpy(), M=M, **options)
    return torch.as_tensor(step.reshape(x.shape)).to(x)


def _search(f, x, y, step):
    """The longest of the steps 1, 1/2, 1/4, ... that makes |f| smaller (Armijo's rule)."""
    size, length = y.norm(), 1.0
    while length >= _SHORTEST_STEP:
        x_new = x + length * step
        y_new = _value(f, x_new)
        if y_new.norm() <= (1 - 1e-4 * length) * size:  # false for NaN
            return x_new, y_new
        length /= 2
    raise RuntimeError(
        f"newton_krylov: no step makes |f(x)| smaller than {y.abs().max():.1e}; the Jacobian may "
        "be singular there, or the Krylov method needs a preconditioner or more iterations"
    )


def _next_forcing(forcing, ratio):
    """Eisenstat and Walker's choice 2, with their safeguard, gamma = 0.9 and alpha = 2."""
    new, old = 0.9 * ratio**2, 0.9 * forcing**2
    return min(0.5, max(new, old if old > 0.1 else 0.0, math.sqrt(torch.finfo(torch.float32).eps)))
