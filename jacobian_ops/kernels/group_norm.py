"""group_norm and batch_norm with their products.

``x`` is (N, C) or (N, C, *).  ``groups`` of C / groups channels are normalized in each sample, or,
where it is 0, a channel of all samples (batch_norm); ``weight`` and ``bias`` have one number a
channel.  The formulas are those of :mod:`.norm`, with means over a group.  With given statistics
``stats``, constants, ``x^ = (x - mean) / sqrt(var + eps)`` and ``P(q) = q``.

References: Wu and He, Group normalization, 2018, arXiv:1803.08494; Ioffe and Szegedy, Batch
normalization, 2015, arXiv:1502.03167.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _backend
from ._arguments import arrays_too, check_dtype, check_same, name_of, operands, result_like


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``x`` is computed in, and that statistics have."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def new_stats(x: Tensor) -> Tensor:
    """Memory for mean and variance of every channel."""
    return x.new_empty((2, x.shape[1]), dtype=wide_dtype(x))


def _run(op, x, stats, groups, eps, along, of_channel, order, results, kinds=0, put_stats=False):
    """Check and run the kernel ``op``.

    Args:
        op: A name of ``csrc/bindings.cpp``.
        x: The input.
        stats: Given statistics, or None.
        groups: Of the channels of a sample, or 0.
        eps: Added to the variance.
        along: Other tensors of the shape of ``x``, or None, by name.
        of_channel: Tensors with a number for each channel, or None, by name.
        order: The names of all of them as the kernel takes them.
        results: How many tensors like ``x`` come out.
        kinds: How many sums over channels come out, in one tensor.
        put_stats: Whether the statistics come out, last.
    """
    check_dtype(op, "x", x)
    if x.dim() < 2:
        raise RuntimeError(f"{op}: x has shape {list(x.shape)}; allowed: (N, C) or (N, C, *)")
    n, channels, *rest = x.shape
    if groups < 0 or (groups > 0 and channels % groups):
        raise RuntimeError(
            f"{op}: groups is {groups}; allowed: a divisor of {channels}, the channels of x, or 0"
        )
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}; it must be at least 0")
    ready = {}
    for name, t in of_channel.items():
        if t is not None:
            check_same(op, "x", x, name, t)
            if t.shape != (channels,):
                raise RuntimeError(
                    f"{op}: {name} has shape {list(t.shape)}; it must have a number for each "
                    f"channel of x, {[channels]}"
                )
            t = t.resolve_neg().contiguous()
        ready[name] = t
    fixed = stats is not None
    if fixed:
        stats = _checked_stats(op, x, stats, groups)
    elif put_stats:
        stats = new_stats(x)
    x, *others = operands(op, ("x", *along), (x, *along.values()), row_major=True)
    ready |= {"x": x, **dict(zip(along, others, strict=True))}
    out = [result_like(x) for _ in range(results)]
    if kinds:
        out.append(x.new_empty((kinds, channels)))
    shape = (n, channels, math.prod(rest), groups, eps, fixed)
    if x.numel():
        _backend.run(
            op,
            "x",
            x,
            op,
            shape,
            *(None if t is None else _backend.buffer(t) for t in (*map(ready.get, order), stats)),
            *map(_backend.buffer, out),
            groups=(shape, kinds),
        )
    elif kinds:
        out[-1].zero_()
    return (*out, stats) if put_stats else tuple(out)


def _checked_stats(op, x, stats, groups):
    wide = wide_dtype(x)
    if stats.shape != (2, x.shape[1]) or stats.dtype != wide or stats.device != x.device:
        raise RuntimeError(
            f"{op}: stats has shape {list(stats.shape)} and dtype {name_of(stats.dtype)}; it must "
            f"be mean and variance of each channel, {[2, x.shape[1]]}, in {name_of(wide)}, where x "
            "is"
        )
    if groups:
        raise RuntimeError(f"{op}: groups is {groups} and stats are given; these are for 0 groups")
    return stats.resolve_neg().contiguous()


@arrays_too
def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor | None,
    groups: int,
    eps: float,
) -> Tensor:
    """``y = weight * x^ + bias``.

    Args:
        x: (N, C) or (N, C, *); float64, float32, bfloat16 or float16.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        stats: None for those of ``x``; for ``groups`` 0 also (2, C) of given mean and variance, in
            float64 for a float64 ``x``, else float32.
        groups: A divisor of C, or 0 for batch_norm.
        eps: Added to the variance.

    Returns:
        Contiguous tensor of the shape and dtype of ``x``.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit.
        ValueError: ``eps`` is negative.
    """
    channels = {"weight": weight, "bias": bias}
    order = ("x", "weight", "bias")
    return _run("group_norm", x, stats, groups, eps, {}, channels, order, 1)[0]


@arrays_too
def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`group_norm` with ``groups`` 0, and (2, C) of mean and unbiased variance.

    Statistics of an empty ``x`` are not defined.
    """
    channels = {"weight": weight, "bias": bias}
    order = ("x", "weight", "bias")
    return _run("group_norm", x, None, 0, eps, {}, channels, order, 1, put_stats=True)


@arrays_too
def group_norm_jvp(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tx: Tensor | None,
    tweight: Tensor | None,
    tbias: Tensor | None,
    stats: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``y`` and ``ty = weight * r * P(tx) + tweight * x^ + tbias``; absent tangents are None."""
    channels = {"weight": weight, "bias": bias, "tweight": tweight, "tbias": tbias}
    order = ("x", "weight", "bias", "tx", "tweight", "tbias")
    return _run("group_norm_jvp", x, stats, groups, eps, {"tx": tx}, channels, order, 2)


@arrays_too
def group_norm_vjp(
    x: Tensor,
    weight: Tensor | None,
    gy: Tensor,
    stats: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``gx = r * P(weight * gy)``, and the cotangents of weight and bias, stacked.

    Returns:
        ``gx``, and a tensor (2, C): the sums of ``x^ * gy`` and of ``gy`` over each channel.
    """
    channels = {"weight": weight}
    order = ("x", "weight", "gy")
    return _run("group_norm_vjp", x, stats, groups, eps, {"gy": gy}, channels, order, 1, 2)


@arrays_too
def group_norm_vjp_jvp(
    x: Tensor,
    weight: Tensor | None,
    gy: Tensor,
    tx: Tensor | None,
    tweight: Tensor | None,
    tgy: Tensor | None,
    stats: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`group_norm_vjp` and its tangent along ``(tx, tweight, tgy)``, which may be None.

    Returns:
        ``gx``, ``tgx`` and a tensor (4, C), by the formulas of
        :func:`~jacobian_ops.kernels.norm_vjp_jvp`.
    """
    channels = {"weight": weight, "tweight": tweight}
    along = {"gy": gy, "tx": tx, "tgy": tgy}
    order = ("x", "weight", "gy", "tx", "tweight", "tgy")
    return _run("group_norm_vjp_jvp", x, stats, groups, eps, along, channels, order, 2, 4)
