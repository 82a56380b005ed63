"""Jacobian products of whole functions.

A pass is one evaluation of the function in one direction; a tangent, or a backward pass, costs up
to two more of the size of the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..autograd.rule import constant_tangents
from .linearize import jacobian
from .operator import MAX_BYTES


def compute_full_jacobian(
    f: Callable[[Tensor], Tensor], x: Tensor, batch_dims: int = 0, max_bytes: int = MAX_BYTES
) -> Tensor:
    """The Jacobian of ``f`` as a tensor, like torch.func.jacrev's.

    Cost: one forward pass, and for a function without structure min(m, n) backward passes or JVPs,
    vectorised; a chain of known layers is multiplied out in its cheapest order.

    Args:
        f: As for :func:`jacobian_ops.jacobian`.
        x: As there.
        batch_dims: As there.
        max_bytes: What the matrix may take.

    Returns:
        (*batch, *out_shape, *in_shape).

    Raises:
        MemoryError: It would take more.
        TypeError, ValueError: As :func:`jacobian_ops.jacobian`.
    """
    J = jacobian(f, x, batch_dims)
    return J.dense(max_bytes).reshape(*J.batch_shape, *J.out_shape, *J.in_shape)


def jvp(
    f: Callable,
    primals: tuple,
    tangents: tuple,
    *,
    has_aux: bool = False,
    tangent_graph: bool = True,
) -> tuple[Any, ...]:
    """``f(*primals)`` and its derivative along ``tangents``: :func:`torch.func.jvp` with a switch.

    A loss that stops the gradient of the tangent, as those of consistency models and MeanFlow do,
    has no use for what a VJP of the tangent needs: about half of all that is kept for backward.

    Cost: one forward pass that carries the tangent along.

    Args:
        f: A function of tensors, or of pytrees of them.
        primals: Its arguments, a tuple.
        tangents: Of the same structure and shapes.
        has_aux: Whether ``f`` returns (result, auxiliary data).
        tangent_graph: False for a tangent that is a constant for everything outside, as
            ``.detach()`` would make it: our ops then keep only what the derivative of the result
            needs.  The result itself has its graph.

    Returns:
        (result, tangent), or (result, tangent, aux).

    Raises:
        TypeError, ValueError, RuntimeError: As torch.func.jvp.
    """
    if tangent_graph:
        return torch.func.jvp(f, primals, tangents, has_aux=has_aux)
    if torch.compiler.is_compiling():  # a compiled graph keeps no more than it uses
        y, ty, *aux = torch.func.jvp(f, primals, tangents, has_aux=has_aux)
    else:

        def constant(*args):
            with constant_tangents():
                return f(*args)

        y, ty, *aux = torch.func.jvp(constant, primals, tangents, has_aux=has_aux)
    return y, tree_map_only(torch.Tensor, torch.Tensor.detach, ty), *aux


def vjp(f: Callable, primals: tuple, cotangents: Any) -> tuple[Any, tuple]:
    """``f(*primals)`` and the cotangents of the primals: ``J^T v``.

    Cost: one forward and one backward pass.

    Args:
        f: A function of tensors, or of pytrees of them.
        primals: Its arguments, a tuple.
        cotangents: Of the structure and shapes of the result.

    Returns:
        (result, cotangents of the primals).

    Raises:
        TypeError, ValueError, RuntimeError: As torch.func.vjp.
    """
    y, pull = torch.func.vjp(f, *primals)
    return y, pull(cotangents)


def hvp(f: Callable, primals: tuple, tangents: tuple) -> tuple[Tensor, tuple]:
    """The gradient of a scalar function and its Hessian times ``tangents``.

    Forward over reverse: the JVP of the gradient, ``H u = d/de grad f(x + e u)`` at 0 (Pearlmutter,
    Neural Computation 1994).

    Cost: one forward and one backward pass, both of which carry the tangent along.

    Args:
        f: A function of tensors, or of pytrees of them, whose result has no dimensions.
        primals: Its arguments, a tuple.
        tangents: Of the same structure and shapes.

    Returns:
        (gradient, product), each a tuple as ``primals`` is.

    Raises:
        RuntimeError: The result of ``f`` has dimensions.
        TypeError, ValueError: As torch.func.jvp.
    """
    return torch.func.jvp(torch.func.grad(f, tuple(range(len(primals)))), primals, tangents)


def ggnvp(f: Callable, loss: Callable, primals: tuple, tangents: tuple) -> tuple[Tensor, tuple]:
    """The Gauss-Newton matrix of ``loss(f(x))`` times ``tangents``: ``J^T H J u``.

    ``J`` is the Jacobian of ``f``, ``H`` the Hessian of the loss at ``f(x)``; positive
    semi-definite for a convex loss (Schraudolph, Neural Computation 2002).

    Cost: two forward passes of ``f``, one of which carries the tangent along, and one backward
    pass, besides :func:`hvp` of the loss.

    Args:
        f: A function of tensors whose result is a tensor.
        loss: From that result to a tensor without dimensions.
        primals: The arguments of ``f``, a tuple.
        tangents: Of the same structure and shapes.

    Returns:
        (loss, product), the product a tuple as ``primals`` is.

    Raises:
        TypeError, ValueError, RuntimeError: As torch.func.jvp and torch.func.vjp.
    """
    y, pull = torch.func.vjp(f, *primals)
    _, ty = torch.func.jvp(f, primals, tangents)
    _, (curved,) = hvp(loss, (y,), (ty,))
    return loss(y), pull(curved)
