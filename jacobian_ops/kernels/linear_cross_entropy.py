"""Cross-entropy of a linear layer's logits ``z = x W^T + b``, which never exist all at once.

Rows are taken in chunks.  A chunk's logits are made by a matrix product into memory that all chunks
share, and overwritten by their gradient ``dz``, from which ``gx = dz W``, ``gW += dz^T x`` and
``gb += sum(dz)`` follow.  Targets are classes.

References: Hsu et al., Liger Kernel, 2024, arXiv:2410.10989; Wijmans et al., Cut your losses in
large-vocabulary language models, 2024, arXiv:2411.09009.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend
from . import _gemm
from ._arguments import arrays_too, check_dtype, check_same
from .cross_entropy import (
    cross_entropy,
    cross_entropy_jvp,
    cross_entropy_vjp,
    cross_entropy_vjp_jvp,
    wide,
)
from .linear import linear

# Bytes of a chunk's logits: of what the last cache of a processor holds, or what fills a GPU.
_BYTES, _DEVICE_BYTES = 32 << 20, 256 << 20
_LINES = 32  # rows that a matrix product takes together


class _Chunks:
    """The arguments, and the chunks of their rows."""

    def __init__(self, op, x, linear_weight, target, bias, weight, consts, **tangents):
        check_dtype(op, "x", x)
        others = {"linear_weight": linear_weight, "bias": bias, **tangents}
        shapes = {"x": x, "linear_weight": linear_weight, "bias": bias}
        if x.dim() != 2 or linear_weight.dim() != 2 or x.shape[1] != linear_weight.shape[1]:
            raise RuntimeError(
                f"{op}: x has shape {list(x.shape)}, linear_weight has "
                f"{list(linear_weight.shape)}; allowed: (N, K) and (C, K)"
            )
        for name, t in others.items():
            if t is None:
                continue
            check_same(op, "x", x, name, t)
            like = shapes[name.removeprefix("t")] if name.startswith("t") else None
            wanted = linear_weight.shape[:1] if like is None else like.shape
            if name in ("bias", "tbias"):
                wanted = linear_weight.shape[:1]
            if name != "linear_weight" and t.shape != wanted:
                raise RuntimeError(
                    f"{op}: {name} has shape {list(t.shape)}; it must be {list(wanted)}"
                )
        if target.dtype != torch.int64 or target.shape != x.shape[:1]:
            raise RuntimeError(
                f"{op}: target has dtype {target.dtype} and shape {list(target.shape)}; it must be "
                f"int64, one class for each of the {len(x)} rows"
            )
        *loss, chunk = consts
        self.x, self.linear_weight, self.bias = x, linear_weight, bias
        self.target, self.rest = target, (weight, loss)
        self.rows = chunk or chunk_rows(linear_weight.shape[0], x)

    def __iter__(self):
        for first in range(0, len(self.x), self.rows):
            yield slice(first, min(first + self.rows, len(self.x)))

    def room(self):
        """Memory for the logits of a chunk."""
        return self.x.new_empty(min(self.rows, len(self.x)), self.linear_weight.shape[0])

    def logits(self, part, room):
        """Of the rows of ``part``, in ``room``."""
        return _product(self.x[part], self.linear_weight, self.bias, room)


def chunk_rows(classes: int, x: Tensor) -> int:
    """Rows whose logits are about as large as they should be at a time."""
    most = _DEVICE_BYTES if _backend.on_device(x) else _BYTES
    rows = most // max(1, classes * x.element_size())
    return max(1, rows if rows < _LINES else rows // _LINES * _LINES)


def _product(x, weight, bias, room):
    """``x W^T + b`` in the first rows of ``room``."""
    out = room[: len(x)]
    if _gemm.torch_is_faster(x, weight):
        if bias is None:
            return torch.mm(x, weight.mT, out=out)
        return torch.addmm(bias, x, weight.mT, out=out)
    return linear(x, weight, bias, out=out)


class _Gradients:
    """gx, gW and gb, added up in the dtype that sums have; None where not needed."""

    def __init__(self, of: _Chunks, needs):
        def zeros(needed, shape):
            return of.x.new_zeros(shape, dtype=wide(of.x.dtype)) if needed else None

        self.of = of
        self.x = torch.empty_like(of.x, memory_format=torch.contiguous_format) if needs[0] else None
        self.weight = zeros(needs[1], of.linear_weight.shape)
        self.bias = zeros(needs[2], of.linear_weight.shape[:1])

    def add(self, part, dz, x, weight, first=True):
        """The terms of ``dz``; ``first`` says whether they are the first ones of gx."""
        if self.x is not None and weight is not None:
            if first:
                torch.mm(dz, weight, out=self.x[part])
            else:
                self.x[part].addmm_(dz, weight)
        if self.weight is not None and x is not None:
            if x.dtype == self.weight.dtype:
                self.weight.addmm_(dz.mT, x)
            else:
                self.weight += dz.mT @ x
        if self.bias is not None and first:
            self.bias += dz.sum(0, dtype=self.bias.dtype)

    def done(self):
        x = self.of.x
        made = self.x, self.weight, self.bias
        return tuple(x.new_empty(0) if g is None else g.to(x.dtype) for g in made)


@arrays_too
@_gemm.as_they_are()
def linear_cross_entropy(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    chunk: int = 0,
) -> Tensor:
    """The losses of all rows.

    Args:
        x: (N, K); float64, float32, bfloat16 or float16.
        linear_weight: (C, K).
        target: (N), int64 classes.
        bias: (C), or None.
        weight: Of the classes, (C): float64 for float64, else float32; or None for ones.
        ignore_index: The class of rows that do not count.
        smoothing: What part of the target is spread evenly over the classes.
        chunk: Rows at a time; 0 for as many as :func:`chunk_rows` says.

    Returns:
        (N): float64 for float64, else float32.

    Raises:
        IndexError: A class outside [0, C), as for :func:`cross_entropy`.
        RuntimeError: Shapes, dtypes or devices do not fit.
    """
    consts = ignore_index, smoothing, chunk
    of = _Chunks("linear_cross_entropy", x, linear_weight, target, bias, weight, consts)
    losses, room = x.new_empty(len(x), dtype=wide(x.dtype)), of.room()
    (weight, loss) = of.rest
    for part in of:
        z = of.logits(part, room)
        losses[part] = cross_entropy(z, target[part], weight, 1, *loss)
    return losses


@arrays_too
@_gemm.as_they_are()
def linear_cross_entropy_with_vjp(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
    ignore_index: int = -100,
    smoothing: float = 0.0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`linear_cross_entropy` and the gradients of the losses' sum, with one product less."""
    consts = ignore_index, smoothing, chunk
    op = "linear_cross_entropy_with_vjp"
    of = _Chunks(op, x, linear_weight, target, bias, weight, consts)
    gradients, room = _Gradients(of, needs), of.room()
    losses = x.new_empty(len(x), dtype=wide(x.dtype))
    one = torch.ones_like(losses)
    (weight, loss) = of.rest
    for part in of:
        z = of.logits(part, room)
        losses[part] = cross_entropy(z, target[part], weight, 1, *loss)
        dz = cross_entropy_vjp(z, target[part], weight, one[part], 1, *loss, out=z)
        gradients.add(part, dz, x[part], linear_weight)
    return losses, *gradients.done()


@arrays_too
@_gemm.as_they_are()
def linear_cross_entropy_vjp(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    g: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, True),
    ignore_index: int = -100,
    smoothing: float = 0.0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gx = dz W``, ``gW = dz^T x`` and ``gb = sum(dz)``; empty where not in ``needs``."""
    consts = ignore_index, smoothing, chunk
    of = _Chunks("linear_cross_entropy_vjp", x, linear_weight, target, bias, weight, consts)
    gradients, room = _Gradients(of, needs), of.room()
    (weight, loss) = of.rest
    for part in of:
        z = of.logits(part, room)
        dz = cross_entropy_vjp(z, target[part], weight, g[part], 1, *loss, out=z)
        gradients.add(part, dz, x[part], linear_weight)
    return gradients.done()


def _tangents(of, part, room, tx, tweight, tbias):
    """``tz = tx W^T + x tW^T + tb`` of a chunk."""
    if tx is not None:
        tz = _product(tx[part], of.linear_weight, tbias, room)
        return tz if tweight is None else tz.addmm_(of.x[part], tweight.mT)
    if tweight is not None:
        return _product(of.x[part], tweight, tbias, room)
    tz = room[: part.stop - part.start]
    return tz.zero_() if tbias is None else tz.copy_(tbias)


@arrays_too
@_gemm.as_they_are()
def linear_cross_entropy_jvp(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    tx: Tensor | None,
    tlinear_weight: Tensor | None,
    tbias: Tensor | None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """The losses and their tangents, along the tangents that are there."""
    consts = ignore_index, smoothing, chunk
    tangents = dict(tx=tx, tlinear_weight=tlinear_weight, tbias=tbias)
    arguments = x, linear_weight, target, bias, weight
    of = _Chunks("linear_cross_entropy_jvp", *arguments, consts, **tangents)
    losses = x.new_empty(len(x), dtype=wide(x.dtype))
    tlosses, room, troom = torch.empty_like(losses), of.room(), of.room()
    (weight, loss) = of.rest
    for part in of:
        z, tz = of.logits(part, room), _tangents(of, part, troom, *tangents.values())
        results = cross_entropy_jvp(z, target[part], weight, tz, 1, *loss)
        losses[part], tlosses[part] = results
    return losses, tlosses


@arrays_too
@_gemm.as_they_are()
def linear_cross_entropy_vjp_jvp(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    g: Tensor,
    tx: Tensor | None,
    tlinear_weight: Tensor | None,
    tbias: Tensor | None,
    tg: Tensor | None,
    needs: tuple[bool, bool, bool] = (True, True, True),
    ignore_index: int = -100,
    smoothing: float = 0.0,
    chunk: int = 0,
) -> tuple[Tensor, ...]:
    """:func:`linear_cross_entropy_vjp` and its tangents, six tensors; with ``dz`` and ``tdz``.

    ``tgx = tdz W + dz tW``, ``tgW = tdz^T x + dz^T tx`` and ``tgb = sum(tdz)``.
    """
    consts = ignore_index, smoothing, chunk
    tangents = dict(tx=tx, tlinear_weight=tlinear_weight, tbias=tbias)
    arguments = x, linear_weight, target, bias, weight
    of = _Chunks("linear_cross_entropy_vjp_jvp", *arguments, consts, **tangents)
    gradients, along, room, troom = (
        _Gradients(of, needs),
        _Gradients(of, needs),
        of.room(),
        of.room(),
    )
    (weight, loss) = of.rest
    for part in of:
        z, tz = of.logits(part, room), _tangents(of, part, troom, *tangents.values())
        of_part = None if tg is None else tg[part]
        rest = (target[part], weight, g[part], tz, of_part, 1, *loss)
        dz, tdz = cross_entropy_vjp_jvp(z, *rest, out=(z, tz))
        gradients.add(part, dz, x[part], linear_weight)
        along.add(part, tdz, x[part], linear_weight)
        along.add(part, dz, None if tx is None else tx[part], tlinear_weight, first=False)
    return *gradients.done(), *along.done()
