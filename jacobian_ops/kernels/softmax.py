"""Softmax and log_softmax over one dimension, with their products; the Jacobian is never formed.

``s = softmax(scale * x)``; ``scale=-1`` is softmin.  ``<a, b>`` sums along ``dim``.  All results
are contiguous, sums run in float32 or wider.

Reference: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018,
arXiv:1805.02867.
"""

from __future__ import annotations

from torch import Tensor

from .. import _backend
from ._arguments import (
    arrays_too,
    check_dtype,
    check_seed,
    normalize_dim,
    operands,
    output,
    rows,
    seed_tensor,
)


def _run(op, names, tensors, out, dim, scale=1.0, seed=None, p=None):
    """Check, allocate ``out`` (a tuple, possibly of None) and call the kernel named ``op``.

    Kernels with a mask get a ``p``, which may be 0.
    """
    check_dtype(op, names[0], tensors[0])
    dim = normalize_dim(op, dim, tensors[0].dim())
    masks = ()
    if p is not None:
        seed = seed_tensor(op, seed, p, tensors[0])
        seed = None if seed is None else check_seed(op, seed, tensors[0])
        masks = (_backend.mask(seed, p),)
    tensors = operands(op, names, tensors, row_major=True)
    out = tuple(output(op, o, tensors[0]) for o in out)
    if tensors[0].numel():
        _backend.run(
            op,
            names[0],
            tensors[0],
            op,
            rows(tensors[0].shape, dim, scale),
            *(None if t is None else _backend.buffer(t) for t in (*tensors, *out)),
            *masks,
        )
    return out


@arrays_too
def softmax(x: Tensor, dim: int, *, scale: float = 1.0, out=None) -> Tensor:
    """``y = exp(scale * x - max) / sum``.

    Args:
        x: Logits of any shape; float64, float32, bfloat16 or float16.
        dim: The dimension that sums to one.
        scale: Factor of ``x``; -1 gives softmin.
        out: Where to write, contiguous.

    Returns:
        Contiguous tensor of the shape and dtype of ``x``.
    """
    return _run("softmax", ("x",), (x,), (out,), dim, scale)[0]


@arrays_too
def softmax_vjp(y: Tensor, gy: Tensor, dim: int, *, scale: float = 1.0, out=None) -> Tensor:
    """``gx = scale * y * (gy - <y, gy>)``.  ``J`` is symmetric: the tangent-only JVP as well."""
    return _run("softmax_vjp", ("y", "gy"), (y, gy), (out,), dim, scale)[0]


@arrays_too
def softmax_jvp(
    x: Tensor, tx: Tensor, dim: int, *, scale: float = 1.0, out=(None, None)
) -> tuple[Tensor, Tensor]:
    """``y = softmax(scale * x)`` and ``ty = scale * y * (tx - <y, tx>)`` in one visit."""
    return _run("softmax_jvp", ("x", "tx"), (x, tx), out, dim, scale)


@arrays_too
def softmax_vjp_vjp(
    y: Tensor, gy: Tensor, h: Tensor, dim: int, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """VJP of :func:`softmax_vjp` along ``h``: the cotangents ``hy`` of ``y`` and ``hgy`` of ``gy``.

    ``hy = scale * (h * (gy - <y, gy>) - gy * <y, h>)``, ``hgy = scale * y * (h - <y, h>)``.
    """
    return _run("softmax_vjp_vjp", ("y", "gy", "h"), (y, gy, h), (None, None), dim, scale)


@arrays_too
def softmax_vjp_jvp(
    y: Tensor,
    gy: Tensor,
    ty: Tensor | None,
    tgy: Tensor | None,
    dim: int,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`softmax_vjp` and its tangent along ``(ty, tgy)``; an absent one is None.

    ``tgx = scale * (y * (tgy - <y, tgy>) + ty * (gy - <y, gy>) - y * <ty, gy>)``.
    """
    op = "softmax_vjp_jvp"
    return _run(op, ("y", "gy", "ty", "tgy"), (y, gy, ty, tgy), (None, None), dim, scale)


@arrays_too
def log_softmax(x: Tensor, dim: int, *, out=None) -> Tensor:
    """``y = x - logsumexp(x)``; contiguous, of the shape and dtype of ``x``."""
    return _run("log_softmax", ("x",), (x,), (out,), dim)[0]


@arrays_too
def log_softmax_vjp(y: Tensor, gy: Tensor, dim: int, *, out=None) -> Tensor:
    """``gx = gy - exp(y) * sum(gy)``."""
    return _run("log_softmax_vjp", ("y", "gy"), (y, gy), (out,), dim)[0]


@arrays_too
def log_softmax_tangent(y: Tensor, tx: Tensor, dim: int, *, out=None) -> Tensor:
    """``ty = tx - <exp(y), tx>``: the JVP where the primal output is already there."""
    return _run("log_softmax_tangent", ("y", "tx"), (y, tx), (out,), dim)[0]


@arrays_too
def log_softmax_jvp(x: Tensor, tx: Tensor, dim: int, *, out=(None, None)) -> tuple[Tensor, Tensor]:
    """``y = log_softmax(x)`` and its tangent ``ty = tx - <exp(y), tx>`` in one visit."""
    return _run("log_softmax_jvp", ("x", "tx"), (x, tx), out, dim)


@arrays_too
def log_softmax_vjp_vjp(y: Tensor, gy: Tensor, h: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """VJP of :func:`log_softmax_vjp` along ``h``: the cotangents of ``y`` and of ``gy``.

    ``hy = -exp(y) * h * sum(gy)``, ``hgy = h - <exp(y), h>``.
    """
    return _run("log_softmax_vjp_vjp", ("y", "gy", "h"), (y, gy, h), (None, None), dim)


@arrays_too
def log_softmax_vjp_jvp(
    y: Tensor, gy: Tensor, ty: Tensor | None, tgy: Tensor | None, dim: int
) -> tuple[Tensor, Tensor]:
    """:func:`log_softmax_vjp` and its tangent along ``(ty, tgy)``; an absent one is None.

    ``tgx = tgy - exp(y) * (sum(tgy) + ty * sum(gy))``.
    """
    return _run(
        "log_softmax_vjp_jvp", ("y", "gy", "ty", "tgy"), (y, gy, ty, tgy), (None, None), dim
    )


@arrays_too
def softmax_dropout(x: Tensor, dim: int, p: float, seed, *, out=None) -> Tensor:
    """``y = m * softmax(x)`` in one pass; ``seed`` as in :func:`jacobian_ops.kernels.dropout`."""
    return _run("softmax_dropout", ("x",), (x,), (out,), dim, seed=seed, p=p)[0]


@arrays_too
def softmax_dropout_vjp(x: Tensor, gy: Tensor, dim: int, p: float, seed, *, out=None) -> Tensor:
    """``gx = s * (m * gy - <s, m * gy>)``, with ``s = softmax(x)`` recomputed in cache."""
    return _run("softmax_dropout_vjp", ("x", "gy"), (x, gy), (out,), dim, seed=seed, p=p)[0]


@arrays_too
def softmax_dropout_jvp(
    x: Tensor, tx: Tensor, dim: int, p: float, seed, *, out=(None, None)
) -> tuple[Tensor, Tensor]:
    """``y = m * s`` and its tangent ``ty = m * s * (tx - <s, tx>)`` with ``s = softmax(x)``."""
    return _run("softmax_dropout_jvp", ("x", "tx"), (x, tx), out, dim, seed=seed, p=p)
