"""Cross-entropy of logits with its products, one number a row before any reduction.

Rows lie along dimension ``dim`` of ``x``, C logits each; ``s = softmax(x)``.  What is wanted of a
row are weights q of its classes:

* a class t, int64: ``q = (1 - smoothing) * weight_t * e_t + smoothing / C * weight``, and 0 where t
  is ``ignore_index``;
* probabilities p, a tensor like ``x``: ``q = weight * ((1 - smoothing) * p + smoothing / C)``.

With ``A = sum(q)``, ``loss = A * logsumexp(x) - <q, x>``.  Losses and their cotangents, and
``weight``, are float64 for float64 and float32 for the other dtypes.  Neither the softmax nor
anything else of the size of ``x`` is stored.

Reference: Szegedy et al., Rethinking the Inception architecture for computer vision, 2016,
arXiv:1512.00567, for the smoothing; Milakov and Gimelshein, Online normalizer calculation for
softmax, 2018, arXiv:1805.02867.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _backend
from ._arguments import (
    arrays_too,
    check_dtype,
    check_tensor,
    name_of,
    normalize_dim,
    operands,
    output,
    result_like,
    rows,
)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses, and of what belongs to a row or a class."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_shape(x: Tensor, dim: int):
    """The shape of a number for each row."""
    return (*x.shape[:dim], *x.shape[dim + 1 :])


def losses_like(x: Tensor, dim: int) -> Tensor:
    """A new tensor for a number of each row."""
    return x.new_empty(row_shape(x, dim), dtype=wide(x.dtype))


def _beside(op, name, t, x, shape, dtype, what):
    """``t`` made dense; raises unless it has this shape and dtype and is where ``x`` is."""
    check_tensor(op, name, t)
    if t.dtype != dtype:
        raise RuntimeError(
            f"{op}: {name} has dtype {name_of(t.dtype)}; it must be {name_of(dtype)}"
        )
    if t.device != x.device:
        raise RuntimeError(f"{op}: {name} is on {t.device}, x is on {x.device}")
    if tuple(t.shape) != tuple(shape):
        raise RuntimeError(f"{op}: {name} has shape {list(t.shape)}; {what} has {list(shape)}")
    return t.resolve_neg().contiguous()


def _run(op, x, target, weight, dim, ignore_index, smoothing, along, of_row, order, out):
    """Check and run the kernel ``op``.

    Args:
        op: A name of ``csrc/bindings.cpp``.
        x: The logits.
        target: Classes or probabilities.
        weight: Of the classes, or None.
        dim: Along which rows lie.
        ignore_index: The class of rows that do not count.
        smoothing: In [0, 1].
        along: Other tensors of the shape of ``x``, by name.
        of_row: Tensors of a number a row, or None, by name.
        order: The names of all of them as the kernel takes them.
        out: The results: tensors like ``x``, or None for a new number of each row.
    """
    check_dtype(op, "x", x)
    if x.dim() == 0:
        raise RuntimeError(f"{op}: x has no dimensions; allowed: 1 or more")
    dim = normalize_dim(op, dim, x.dim())
    if not 0 <= smoothing <= 1:
        raise RuntimeError(f"{op}: smoothing is {smoothing}; it must be between 0 and 1")
    shape, dtype = row_shape(x, dim), wide(x.dtype)
    ready = {
        name: None if t is None else _beside(op, name, t, x, shape, dtype, "a number of each row")
        for name, t in of_row.items()
    }
    check_tensor(op, "target", target)
    if weight is not None:
        weight = _beside(op, "weight", weight, x, (x.shape[dim],), dtype, "a number of each class")
    classes = target.dtype == torch.int64
    if classes:
        target = _beside(op, "target", target, x, shape, torch.int64, "a class of each row")
    else:
        along = {**along, "target": target}
    x, *others = operands(op, ("x", *along), (x, *along.values()), row_major=True)
    ready |= {"x": x, **dict(zip(along, others, strict=True))}
    results = [losses_like(x, dim) if o is None else output(op, o, result_like(x)) for o in out]
    if x.numel():
        probabilities = None if classes else _backend.buffer(ready["target"])
        _backend.run(
            op,
            "x",
            x,
            op,
            rows(x.shape, dim),
            (
                target.data_ptr() if classes else 0,
                target.numel() if classes else -1,
                probabilities,
                None if weight is None else _backend.buffer(weight),
                ignore_index,
                smoothing,
            ),
            *(None if ready[k] is None else _backend.buffer(ready[k]) for k in order),
            *map(_backend.buffer, results),
        )
    elif math.prod(shape):
        raise IndexError(f"{op}: x has no classes; its shape is {list(x.shape)}")
    return tuple(results)


@arrays_too
def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    dim: int = -1,
    ignore_index: int = -100,
    smoothing: float = 0.0,
) -> Tensor:
    """``loss = A * logsumexp(x) - <q, x>`` of each row.

    Args:
        x: Logits of any shape; float64, float32, bfloat16 or float16.
        target: int64 classes, of the shape of ``x`` without ``dim``, or probabilities like ``x``.
        weight: Of the classes, (C,), or None for ones.
        dim: Along which rows lie.
        ignore_index: The class of rows that do not count.
        smoothing: What part of q is spread evenly over the classes.

    Returns:
        Losses of the shape of ``x`` without ``dim``: float64 for float64, else float32.

    Raises:
        IndexError: A class outside [0, C) other than ``ignore_index``, or ``dim`` out of range.  On
            a GPU, where nobody waits for the kernel, the row's results are NaN instead.
        RuntimeError: Shapes, dtypes or devices do not fit, or ``smoothing`` is not in [0, 1].
    """
    consts = dim, ignore_index, smoothing
    return _run("cross_entropy", x, target, weight, *consts, {}, {}, ("x",), (None,))[0]


@arrays_too
def cross_entropy_jvp(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    tx: Tensor,
    dim: int = -1,
    ignore_index: int = -100,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``loss`` and ``tloss = A * <s, tx> - <q, tx>`` in one pass."""
    consts = dim, ignore_index, smoothing
    out = None, None
    return _run("cross_entropy_jvp", x, target, weight, *consts, {"tx": tx}, {}, ("x", "tx"), out)


@arrays_too
def cross_entropy_vjp(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    dim: int = -1,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``gx = g * (A * s - q)``, for a cotangent ``g`` of each row; ``out`` may be ``x`` itself."""
    consts = dim, ignore_index, smoothing
    out = (result_like(x, row_major=True) if out is None else out,)
    return _run("cross_entropy_vjp", x, target, weight, *consts, {}, {"g": g}, ("x", "g"), out)[0]


@arrays_too
def cross_entropy_vjp_jvp(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    tx: Tensor,
    tg: Tensor | None = None,
    dim: int = -1,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`cross_entropy_vjp` and its tangent along ``(tx, tg)``; None for a ``tg`` of zeros.

    ``tgx = tg * (A * s - q) + g * A * s * (tx - <s, tx>)``.  ``out`` may be ``(x, tx)`` themselves.
    """
    consts = dim, ignore_index, smoothing
    if out is None:
        out = result_like(x, row_major=True), result_like(x, row_major=True)
    order = "x", "g", "tx", "tg"
    of_row = {"g": g, "tg": tg}
    return _run("cross_entropy_vjp_jvp", x, target, weight, *consts, {"tx": tx}, of_row, order, out)
