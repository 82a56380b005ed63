"""Dropout: y = m * x, m in {0, 1/(1-p)} recomputed from a seed wherever it is needed.

Element i of a sample, counted in logical (row-major) order, takes word i mod 4 of Philox4x32-10
with counter i/4 and the sample's seed as key: the same mask for every layout, thread count and
device. ``seed`` is an int or an int64 tensor of shape (*batch), one for each sample in the leading
dimensions of ``x``.

Reference: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

from torch import Tensor

from .. import _backend
from ._arguments import arrays_too, check_dtype, check_seed, operands, output, seed_tensor
from .activation import activation_jvp


@arrays_too
def dropout(x: Tensor, p: float, seed, *, out=None) -> Tensor:
    """``y = m * x``; contiguous, of the shape and dtype of ``x``."""
    op = "dropout"
    check_dtype(op, "x", x)
    seed = check_seed(op, seed_tensor(op, seed, p, x), x)
    (x,) = operands(op, ("x",), (x,), row_major=True)
    y = output(op, out, x)
    if x.numel():
        _backend.run(op, "x", x, op, _backend.buffer(x), _backend.buffer(y), _backend.mask(seed, p))
    return y


@arrays_too
def dropout_vjp(gy: Tensor, p: float, seed, *, out=None) -> Tensor:
    """``gx = m * gy``: the Jacobian is diagonal, so VJP, JVP and the op itself are one kernel."""
    return dropout(gy, p, seed, out=out)


@arrays_too
def dropout_jvp(x: Tensor, tx: Tensor, p: float, seed) -> tuple[Tensor, Tensor]:
    """``y = m * x`` and its tangent ``ty = m * tx``: the mask is drawn once."""
    x, tx = operands("dropout_jvp", ("x", "tx"), (x, tx), row_major=True)
    return activation_jvp(x, tx, "identity", seed=seed, p=p)


@arrays_too
def dropout_add(x: Tensor, residual: Tensor, p: float, seed, *, out=None) -> Tensor:
    """``y = residual + m * x`` in one pass: the Jacobian of a residual block, ``I + diag(m)``."""
    op = "dropout_add"
    check_dtype(op, "x", x)
    seed = check_seed(op, seed_tensor(op, seed, p, x), x)
    x, residual = operands(op, ("x", "residual"), (x, residual), row_major=True)
    y = output(op, out, x)
    if x.numel():
        buffers = map(_backend.buffer, (x, residual, y))
        _backend.run(op, "x", x, op, *buffers, _backend.mask(seed, p))
    return y
