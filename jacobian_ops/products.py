"""Jacobian products of whole functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .autograd.rule import constant_tangents


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
