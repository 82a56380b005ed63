"""layer_norm and rms_norm with their products.

Rows are the last ``dims`` dimensions of ``x``, n numbers each; ``weight`` and ``bias`` have their
shape.  ``x^ = (x - mean) * r`` with ``r = 1 / sqrt(mean((x - mean)^2) + eps)``; where not
``centred`` (rms_norm), the mean is 0.  ``P(q) = q - mean(q) - x^ * mean(x^ * q)``, there without
``mean(q)``; ``r * P`` is the derivative of ``x^``, symmetric.  Statistics are never saved.

References: Ba, Kiros and Hinton, Layer normalization, 2016, arXiv:1607.06450; Zhang and Sennrich,
Root mean square layer normalization, 2019, arXiv:1910.07467.
"""

from __future__ import annotations

import math

from torch import Tensor

from .. import _backend
from ._arguments import arrays_too, check_dtype, check_same, result_like

_OF_ROW = ("weight", "bias", "tweight", "tbias")  # of the shape of a row; others are like x
_NORM, _VJP = ("x", "residual", "weight", "bias"), ("x", "weight", "gy", "gsum")


def _run(op, kernel, names, tensors, dims, eps, centred, results, kinds=0, unwanted=0):
    """Check and run a kernel.

    Args:
        op: For messages.
        kernel: A name of ``csrc/bindings.cpp``.
        names: Of the tensors, as the kernel takes them; the first one is the input.
        tensors: Those tensors; None for one that is absent.
        dims: How many of the last dimensions are a row.
        eps: Added to the variance.
        centred: Whether the mean is subtracted.
        results: How many tensors like the input come out.
        kinds: How many sums over the rows come out, in one tensor.
        unwanted: How many outputs after these the kernel is to leave out.
    """
    x = tensors[0]
    check_dtype(op, "x", x)
    if not 1 <= dims <= x.dim():
        raise RuntimeError(f"{op}: dims is {dims}; allowed: 1 to {x.dim()}, the dimensions of x")
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}; it must be at least 0")
    shape = x.shape
    row = shape[-dims:]
    held, buffers = [], []  # what is copied is held until the kernel has run
    for name, t in zip(names, tensors, strict=True):
        if t is None:
            buffers.append(None)
            continue
        wanted = row if name in _OF_ROW else shape
        check_same(op, "x", x, name, t)
        if t.shape != wanted:
            raise _mismatch(op, name, t, wanted, name in _OF_ROW)
        if not t.is_contiguous() or t.is_neg():
            t = t.resolve_neg().contiguous()
            held.append(t)
        buffers.append(_backend.buffer(t))
    out = [result_like(x, row_major=True) for _ in range(results)]
    n = math.prod(row)
    size = x.numel()
    rows = size // n if size else 0
    if kinds:
        out.append(x.new_empty((kinds, *row)))
    if size:
        buffers += map(_backend.buffer, out)
        buffers += (None,) * unwanted
        sums = (kinds, rows, n, 1.0) if kinds else None
        extents = (rows, n, 1, 1.0)
        _backend.run(op, "x", x, kernel, (eps, centred), extents, *buffers, sums=sums)
    elif kinds:
        out[-1].zero_()
    return tuple(out)


def _mismatch(op, name, t, wanted, of_row):
    found, wanted = list(t.shape), list(wanted)
    if of_row:
        return RuntimeError(f"{op}: {name} has shape {found}; it must be that of a row, {wanted}")
    return RuntimeError(
        f"{op}: {name} has shape {found}, x has shape {wanted}; they must be the same"
    )


@arrays_too
def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float, centred: bool
) -> Tensor:
    """``y = weight * x^ + bias``.

    Args:
        x: Of any shape with at least ``dims`` dimensions; float64, float32, bfloat16 or float16.
        weight: Of the shape of a row, or None for ones.
        bias: Of the shape of a row, or None for zeros.
        dims: How many of the last dimensions are a row.
        eps: Added to the variance.
        centred: Whether the mean is subtracted: layer_norm, else rms_norm.

    Returns:
        Contiguous tensor of the shape and dtype of ``x``.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit.
        ValueError: ``eps`` is negative.
    """
    tensors = x, None, weight, bias
    return _run("norm", "norm", _NORM, tensors, dims, eps, centred, 1, unwanted=1)[0]


@arrays_too
def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`norm` of ``sum = x + residual``, rounded to its dtype, and ``sum``, in one pass.

    Args:
        x: As for :func:`norm`.
        residual: Of the shape and dtype of ``x``.
        weight: As for :func:`norm`.
        bias: As for :func:`norm`.
        dims: As for :func:`norm`.
        eps: As for :func:`norm`.
        centred: As for :func:`norm`.

    Returns:
        The normalized sum, and the sum.
    """
    tensors = x, residual, weight, bias
    return _run("add_norm", "norm", _NORM, tensors, dims, eps, centred, 2)


@arrays_too
def norm_jvp(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tx: Tensor | None,
    tweight: Tensor | None,
    tbias: Tensor | None,
    dims: int,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """``y`` and its tangent in one visit; absent tangents are None.

    ``ty = weight * r * P(tx) + tweight * x^ + tbias``.
    """
    op, names = "norm_jvp", ("x", "weight", "bias", "tx", "tweight", "tbias")
    return _run(op, op, names, (x, weight, bias, tx, tweight, tbias), dims, eps, centred, 2)


@arrays_too
def norm_vjp(
    x: Tensor, weight: Tensor | None, gy: Tensor, dims: int, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """``gx = r * P(weight * gy)``, and the cotangents of weight and bias, stacked.

    Returns:
        ``gx``, and a tensor (2, row): the sums over rows of ``x^ * gy`` and of ``gy``.
    """
    tensors = x, weight, gy, None
    return _run("norm_vjp", "norm_vjp", _VJP, tensors, dims, eps, centred, 1, 2)


@arrays_too
def add_norm_vjp(
    total: Tensor,
    weight: Tensor | None,
    gy: Tensor,
    gsum: Tensor,
    dims: int,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """VJP of :func:`add_norm`: :func:`norm_vjp` at the sum, with ``gsum`` added in the same pass.

    Returns:
        The cotangent of ``x`` and of ``residual``, which is one, and that of weight and bias.
    """
    tensors = total, weight, gy, gsum
    return _run("add_norm_vjp", "norm_vjp", _VJP, tensors, dims, eps, centred, 1, 2)


@arrays_too
def norm_vjp_jvp(
    x: Tensor,
    weight: Tensor | None,
    gy: Tensor,
    tx: Tensor | None,
    tweight: Tensor | None,
    tgy: Tensor | None,
    dims: int,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`norm_vjp` and its tangent along ``(tx, tweight, tgy)``, any of which may be None.

    With ``p = weight * gy``, ``A = mean(x^ * p)``, ``B = mean(x^ * tx)`` and
    ``C = mean(p * tx) - mean(p) * mean(tx) - A * B`` (without the product of means for rms_norm),
    ``tgx = r * P(weight * tgy + tweight * gy) - r^2 * (x^ * C + B * P(p) + A * P(tx))``.

    Returns:
        ``gx``, ``tgx``, and a tensor (4, row): the cotangents of weight and bias, then their
        tangents, the sums over rows of ``x^ * tgy + gy * r * P(tx)`` and of ``tgy``.
    """
    op, names = "norm_vjp_jvp", ("x", "weight", "gy", "tx", "tweight", "tgy")
    return _run(op, op, names, (x, weight, gy, tx, tweight, tgy), dims, eps, centred, 2, 4)
