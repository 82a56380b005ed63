"""Implicit layers: a fixed point, differentiated by the implicit function theorem.

x = f(x, p) defines x(p) where I - J is invertible, J = df/dx at the fixed point, and

    JVP:  tx = J tx + df/dp tp,                    VJP:  w = J^T w + gx,  gp = (df/dp)^T w:

each is a fixed point again, of an affine function, found by the same iteration and differentiated
by the same rule, so that derivatives of every order and mode follow (Bai, Kolter and Koltun 2019,
arXiv:1909.01377; Krantz and Parks, The Implicit Function Theorem).  No step of an iteration is
kept for backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["fixed_point"]

_HISTORY = 5  # steps that Anderson's method combines


def fixed_point(
    f: Callable[..., Tensor],
    x0: Tensor,
    *params: Any,
    tol: float | None = None,
    max_iter: int = 500,
) -> Tensor:
    """The x with ``x = f(x, *params)``, as a differentiable function of ``params``.

    Found by Anderson's method (Anderson 1965; Walker and Ni 2011), which converges where
    x <- f(x) does, and often elsewhere.  VJP and JVP solve a linear system with I - J the same way,
    to the same tolerance, from products of f alone; f must have those that are asked for, of one
    order more than x.

    Args:
        f: From (x, *params) to a tensor of x's shape and dtype, without randomness.
        x0: Where to start; floating point, not differentiated.
        *params: All that x is to be differentiated by: tensors, or pytrees of them, such as
            ``dict(module.named_parameters())`` for torch.func.functional_call.  What f takes from
            elsewhere must not need derivatives.
        tol: The largest |f(x) - x| / (1 + |x|) that is a fixed point; default eps^(3/4) of the
            dtype, 1.8e-12 in float64 and 6.4e-6 in float32.
        max_iter: Calls of f, at most.

    Returns:
        x, of the shape and dtype of ``x0``.

    Raises:
        TypeError: ``x0`` is no floating-point tensor.
        ValueError: f(x) has another shape or dtype, ``tol`` or ``max_iter`` is not positive, or f
            depends on a tensor that needs derivatives and is not among ``params``.
        RuntimeError: The iteration did not converge.
    """
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        given = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"fixed_point: x0 must be a floating-point tensor, got {given}")
    tol = torch.finfo(x0.dtype).eps ** 0.75 if tol is None else tol
    if not tol > 0 or max_iter < 1:
        raise ValueError(
            f"fixed_point: tol is {tol} and max_iter {max_iter}; allowed: tol > 0, max_iter >= 1"
        )
    leaves, spec = tree_flatten(params)
    places = [i for i, leaf in enumerate(leaves) if _is_floating(leaf)]

    def of_tensors(x, *tensors):
        full = list(leaves)
        for i, t in zip(places, tensors, strict=True):
            full[i] = t
        return f(x, *tree_unflatten(full, spec))

    tensors = [leaves[i] for i in places]
    _check(of_tensors, x0, tensors)
    return _FixedPoint.apply(_Problem(of_tensors, tol, max_iter), x0.detach(), *tensors)


def _is_floating(t):
    return isinstance(t, Tensor) and t.is_floating_point()


def _check(f, x0, tensors):
    """Raise unless f has a result like x0 that depends on nothing but its arguments."""
    with torch.enable_grad():
        y = f(x0.detach(), *(t.detach() for t in tensors))
    if not isinstance(y, Tensor) or y.shape != x0.shape or y.dtype != x0.dtype:
        given = f"shape {list(y.shape)} and dtype {y.dtype}" if isinstance(y, Tensor) else type(y)
        raise ValueError(
            f"fixed_point: f(x) has {given}; allowed: those of x0, {list(x0.shape)} and {x0.dtype}"
        )
    if y.requires_grad or forward_ad.unpack_dual(y).tangent is not None:
        raise ValueError(
            "fixed_point: f depends on a tensor that needs derivatives and is not among params; "
            "pass it there, or detach it"
        )


@dataclasses.dataclass(frozen=True)
class _Problem:
    """x = f(x, *params), and when it counts as solved."""

    f: Callable[..., Tensor]
    tol: float
    max_iter: int
    affine: bool = False  # of a derivative: its size is whatever it is, with no 1 to add
    batch: int = 0  # leading dimensions, whose samples are problems of their own

    def derivative(self, f: Callable[..., Tensor]) -> _Problem:
        return dataclasses.replace(self, f=f, affine=True)


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(problem, x0, *params):
        return _solve(problem, lambda x: problem.f(x, *params), x0)

    @staticmethod
    def setup_context(ctx, inputs, x):
        ctx.problem, _, *params = inputs
        ctx.save_for_backward(x, *params)
        ctx.save_for_forward(x, *params)

    @staticmethod
    def backward(ctx, gx):
        f, (x, *params) = ctx.problem.f, ctx.saved_tensors

        def adjoint(w, gx, x, *params):
            _, vjp = torch.func.vjp(lambda x: f(x, *params), x)
            return vjp(w)[0] + gx

        problem = ctx.problem.derivative(adjoint)
        w = _FixedPoint.apply(problem, torch.zeros_like(gx), gx, x, *params)
        _, vjp = torch.func.vjp(lambda *params: f(x, *params), *params)
        return None, None, *(vjp(w) if params else ())

    @staticmethod
    def jvp(ctx, _, tx0, *tangents):
        f = ctx.problem.f
        # Primals of this level; the engine has turned forward mode off for the levels outside too.
        x, *params = (forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors)
        live = [i for i, t in enumerate(tangents) if t is not None]
        if not live:
            return torch.zeros_like(x)

        def of_live(*chosen):
            full = list(params)
            for i, p in zip(live, chosen, strict=True):
                full[i] = p
            return f(x, *full)

        def along(t, b, x, *params):
            return _jvp(lambda x: f(x, *params), (x,), (t,)) + b

        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            b = _jvp(of_live, tuple(params[i] for i in live), tuple(tangents[i] for i in live))
            problem = ctx.problem.derivative(along)
            return _FixedPoint.apply(problem, torch.zeros_like(b), b, x, *params)

    @staticmethod
    def vmap(info, dims, problem, x0, *params):
        _, d, *dims = dims
        x0 = x0.expand(info.batch_size, *x0.shape) if d is None else x0.movedim(d, 0)
        f = torch.func.vmap(problem.f, (0, *dims))
        batched = dataclasses.replace(problem, f=f, batch=problem.batch + 1)
        return _FixedPoint.apply(batched, x0, *params), 0


def _jvp(f, primals, tangents):
    """A VJP is linear in its cotangent, and its own VJP is the JVP.

    torch.func.jvp cannot be entered at every place where the engine asks for a JVP.
    """
    y, vjp = torch.func.vjp(f, *primals)
    _, transposed = torch.func.vjp(lambda gy: vjp(gy), torch.zeros_like(y))
    return transposed(tangents)[0]


def _solve(problem, g, x):
    """Anderson's method: the step that would be best if g were affine, from the last few."""
    batch = x.shape[: problem.batch]

    def rows(t):
        return t.reshape(batch.numel(), -1).to(torch.promote_types(t.dtype, torch.float32))

    xs, rs = [], []  # iterates and residuals, (batch, n)
    for _ in range(problem.max_iter):
        y = g(x)
        old, new = rows(x), rows(y)
        r = new - old
        size = new.norm(dim=1) + (not problem.affine)
        if not r.isfinite().all():
            break
        if (r.norm(dim=1) <= problem.tol * size).all():
            return y
        xs, rs = [*xs[-_HISTORY:], old], [*rs[-_HISTORY:], r]
        if len(rs) > 1:
            steps = torch.stack([b - a for a, b in zip(xs, xs[1:], strict=False)], 2)
            changes = torch.stack([b - a for a, b in zip(rs, rs[1:], strict=False)], 2)
            weights = _least_squares(changes, r)
            new = new - ((steps + changes) @ weights).squeeze(2)
        x = new.to(x.dtype).reshape(x.shape)
    relative = (r.norm(dim=1) / size).max().item()
    raise RuntimeError(
        f"fixed_point: after {problem.max_iter} steps |f(x) - x| is {relative:.1e} of |x|, more "
        f"than tol = {problem.tol:.1e}{', in a derivative' if problem.affine else ''}"
    )


def _least_squares(a, b):
    """The small w that minimise |a w - b|, (batch, k, 1): by normal equations with a small ridge.

    Their error matters little: the next step sees what is left.
    """
    scale = a.norm(dim=1, keepdim=True)
    a = a / scale.clamp(min=torch.finfo(a.dtype).tiny)
    gram = a.mT @ a
    ridge = 10 * torch.finfo(a.dtype).eps * torch.eye(gram.shape[-1]).to(gram)
    w = torch.linalg.solve(gram + ridge, a.mT @ b.unsqueeze(2))
    return w / scale.mT.clamp(min=torch.finfo(a.dtype).tiny)
