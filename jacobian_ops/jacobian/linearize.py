"""``jacobian(f, x)``: from a function or a module to the operator of its Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import rules  # noqa: F401  fills the table of ops that tracing knows
from .operator import Operator
from .structures import Identity, Linearisation, MatrixFree, Zero
from .tracing import IN_PLACE, Refused, Traced, check_independent, product


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor, batch_dims: int = 0) -> Operator:
    """The Jacobian of ``f`` at ``x`` as a linear operator that knows its structure.

    ``f`` is evaluated once; products, determinants, singular values and the matrix itself are
    computed when they are asked for, and are differentiable by ``x`` and the parameters of ``f``.

    Args:
        f: A function or module from one tensor to one tensor.
        x: (*batch, *in_shape), floating point.
        batch_dims: How many first dimensions of ``x`` are a batch, each sample of which ``f`` maps
            by itself: the operator then has one Jacobian a sample.

    Returns:
        An :class:`jacobian_ops.jacobian.Operator` of shape (*batch, m, n).  ``J @ u`` is a JVP,
        ``v @ J`` and ``J.T @ v`` a VJP, ``J.structure`` what was recognised.

    Raises:
        TypeError: ``f`` is not callable, ``x`` is no floating-point tensor, or ``f(x)`` is not one
            of the same dtype.
        ValueError: ``batch_dims`` does not fit, ``f`` changes its input in place, or its result
            lacks the batch or mixes the samples.
    """
    if not callable(f):
        raise TypeError(f"jacobian: f must be callable, got {type(f).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"jacobian: x must be a Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"jacobian: x has dtype {x.dtype}; allowed: floating-point dtypes")
    if not 0 <= batch_dims <= x.dim():
        raise ValueError(
            f"jacobian: batch_dims is {batch_dims} and x has shape {list(x.shape)}; "
            f"allowed: 0 to {x.dim()}"
        )
    recorded = torch.is_grad_enabled()
    # Torch's fused attention has a VJP alone: neither forward mode nor a VJP of the VJP.
    with sdpa_kernel(SDPBackend.MATH):
        try:
            with torch.enable_grad():  # tracing takes its absence for a no_grad of f's
                y = f(Traced(x.clone(), (), batch_dims, recorded))
        except Refused as e:
            raise ValueError(str(e)) from None
        except Exception:
            # Whatever tracing cannot follow, or an error of f's own, which comes again from here.
            return _matrix_free(f, x, batch_dims)
    value = y.value if isinstance(y, Traced) else y
    _check_result(value, x, batch_dims)
    batch, shape = x.shape[:batch_dims], x.shape[batch_dims:]
    if not isinstance(y, Traced):
        return Zero(shape, y.shape[batch_dims:], y, batch)
    return product(y.factors) if y.factors else Identity(shape, x, batch)


def _check_result(y, x, batch_dims):
    if not isinstance(y, Tensor):
        raise TypeError(f"jacobian: f(x) must be a Tensor, got {type(y).__name__}")
    if y.dtype != x.dtype:
        raise TypeError(f"jacobian: f(x) has dtype {y.dtype}; allowed: that of x, {x.dtype}")
    if y.shape[:batch_dims] != x.shape[:batch_dims]:
        raise ValueError(
            f"jacobian: f(x) has shape {list(y.shape)}; allowed: the batch "
            f"{list(x.shape[:batch_dims])} of x first"
        )


def _matrix_free(f, x, batch_dims):
    label = getattr(f, "__name__", type(f).__name__)

    def run(x):
        z = x.clone()
        version = z._version
        y = f(z)
        if z._version != version:
            raise ValueError(IN_PLACE)
        _check_result(y, x, batch_dims)
        return y

    y, vjp = torch.func.vjp(run, x)
    check_independent(vjp, y, batch_dims, label)
    return MatrixFree(Linearisation(vjp, y, label), x, y, batch_dims)
