"""Rotary position embedding.

Reference: Su et al., RoFormer, 2021, arXiv:2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend
from ._arguments import arrays_too, check_dtype, check_same, result_like


def rotary_result(x: Tensor) -> Tensor:
    """A new tensor for a result: laid out as ``x``, but with vectors in one piece."""
    y = result_like(x)
    return y if y.stride(-1) == 1 else result_like(x, row_major=True)


def _grid(tensors, shape):
    """The sizes of at most 3 dimensions that all tensors share, and each one's strides.

    In the order in which the last tensor, the result, lies in memory.  Dimensions that are one in
    all of them are joined.  None where more than 3 are left.
    """
    joined = []
    dims = zip(shape, *(t.stride()[:-1] for t in tensors), strict=True)
    for size, *strides in sorted(dims, key=lambda dim: -dim[-1]):
        if size == 1:
            continue
        if joined and all(a == b * size for a, b in zip(joined[-1][1:], strides, strict=True)):
            joined[-1] = joined[-1][0] * size, *strides
        else:
            joined.append((size, *strides))
    if len(joined) > 3:
        return None
    sizes, *strides = zip(*((1, *(0 for _ in tensors)),) * (3 - len(joined)), *joined, strict=True)
    return sizes, strides


@arrays_too
def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inverse: bool = False
) -> Tensor:
    """Pairs ``(a, b)`` of every vector become ``(a cos - b sin, b cos + a sin)``.

    Args:
        x: (..., D) of any strides; float64, float32, bfloat16 or float16.
        cos: (..., R/2) with R <= D, of as many dimensions as ``x`` and broadcasting to them; of its
            dtype.
        sin: Of the shape of ``cos``.
        interleaved: Whether a pair are elements (2i, 2i + 1), and not (i, i + R/2).
        inverse: Whether ``sin`` is negated, which gives the inverse and the VJP.

    Returns:
        Tensor of the shape of ``x``, with elements from R on unchanged.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit.
    """
    check_dtype("rotary", "x", x)
    half = 0
    for name, t in (("cos", cos), ("sin", sin)):
        check_same("rotary", "x", x, name, t)
        fits = t.dim() == x.dim() > 0 and t.shape == cos.shape
        half = t.shape[-1] if fits else 0
        fits = fits and 2 * half <= x.shape[-1]
        if not fits or any(
            n not in (1, m) for n, m in zip(t.shape[:-1], x.shape[:-1], strict=True)
        ):
            raise RuntimeError(
                f"rotary: {name} has shape {list(t.shape)}, x has {list(x.shape)}; allowed: what "
                "broadcasts to the leading dimensions of x, and at most half of its last one"
            )
    y = rotary_result(x)
    if x.numel() == 0:
        return y

    def in_pieces(t):
        t = t.resolve_neg()
        return t if t.stride(-1) == 1 else t.contiguous()

    x, *tables = map(in_pieces, (x, cos, sin))
    tensors = x, *(t.expand(*x.shape[:-1], half) for t in tables), y
    grid = _grid(tensors, x.shape[:-1])
    if grid is None:
        tensors = *(t.contiguous() for t in tensors[:-1]), torch.empty_like(x.contiguous())
        grid = _grid(tensors, x.shape[:-1])
    sizes, strides = grid
    described = [_backend.grid(t, sizes, s) for t, s in zip(tensors, strides, strict=True)]
    _backend.run("rotary", "x", x, "rotary", (interleaved, inverse), *described)
    return y if tensors[-1] is y else y.copy_(tensors[-1])
