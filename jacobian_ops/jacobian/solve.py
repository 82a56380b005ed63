"""Linear systems with a Jacobian of which only the products are known."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .operator import Operator


class _Inverse(torch.autograd.Function):
    """``J^-1 r`` for the residual ``r`` of a solution, 0 to its tolerance: only derivatives count.

    With ``x = x0 + J^-1 (b - J x0)`` and x0 a constant, the derivatives of x by b and by whatever
    J depends on are those of the implicit function theorem, of first order.
    """

    @staticmethod
    def forward(r, J):
        return torch.zeros_like(r).reshape(len(r), *J.batch_shape, *J.in_shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.J = inputs

    @staticmethod
    @once_differentiable
    def backward(ctx, gx):
        return gmres(ctx.J.T, gx), None


def gmres(J: Operator, v: Tensor, rtol: float | None = None) -> Tensor:
    """``J^-1 v`` by scipy's GMRES, a column at a time; differentiable.

    Saad and Schultz, SIAM J. Sci. Stat. Comput. 1986.

    Args:
        J: Square.  With a batch, its samples are solved as one block-diagonal system.
        v: Columns (K, *batch, *out_shape).
        rtol: Of the residual, relative to the column; None for the dtype's epsilon to the 2/3.

    Returns:
        (K, *batch, *in_shape).

    Raises:
        torch.linalg.LinAlgError: It did not converge, as for a singular Jacobian.
        ImportError: scipy is not installed.
    """
    import numpy
    from scipy.sparse.linalg import LinearOperator, gmres

    n = J.rows * math.prod(J.batch_shape)
    rtol = torch.finfo(J.dtype).eps ** (2 / 3) if rtol is None else rtol

    @torch.no_grad()
    def product(u):
        u = torch.from_numpy(numpy.array(u)).to(J.device, J.dtype)
        return J._apply(u.reshape(1, *J.batch_shape, *J.in_shape)).flatten().cpu().double().numpy()

    A = LinearOperator((n, n), product, dtype=numpy.float64)
    columns = []
    for column in v.detach():
        b = column.flatten().cpu().double().numpy()
        # As many steps as there are unknowns solve any regular system but for rounding.
        x, failed = gmres(A, b, rtol=rtol, restart=min(n, 200), maxiter=max(10, n // 20))
        if failed:
            residual = numpy.linalg.norm(product(x) - b) / numpy.linalg.norm(b)
            raise torch.linalg.LinAlgError(
                f"solve: GMRES did not converge: relative residual {residual:.2g}, allowed "
                f"{rtol:.2g}; the Jacobian may be singular"
            )
        columns.append(torch.from_numpy(x))
    x = torch.stack(columns).to(v).reshape(len(v), *J.batch_shape, *J.in_shape)
    if not torch.is_grad_enabled():
        return x
    r = v - J._apply(x)
    return x + _Inverse.apply(r, J) if r.requires_grad else x
