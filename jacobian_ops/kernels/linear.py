"""Linear maps: y = x W^T + b, its products, and the fusion with activation and dropout.

Matrices are ``x (*batch, M, K)``, ``weight (*batch, N, K)``, ``bias (*batch, N)`` with the same
batch dimensions (usually none) and any strides: a transposed weight is read in place.  Results are
contiguous.  Products accumulate in float32 or wider and are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend
from . import _gemm
from ._arguments import (
    arrays_too,
    check_dtype,
    check_same,
    check_seed,
    linear_result,
    operands,
    output,
    rows,
    seed_tensor,
)
from .activation import (
    activation,
    activation_jvp,
    activation_vjp,
    activation_vjp_sum,
    native_act,
    resolve,
)

_IDENTITY = resolve("linear_jvp", "identity")


def _check(op, names, x, weight, bias):
    """Raise unless dtype, device and shapes of a linear map's three arguments fit together."""
    x_name, weight_name, bias_name = names.split()
    check_dtype(op, x_name, x)
    check_same(op, x_name, x, weight_name, weight)
    if x.dim() < 2 or weight.dim() != x.dim() or weight.shape[:-2] != x.shape[:-2]:
        raise RuntimeError(
            f"{op}: {x_name} has shape {list(x.shape)} and {weight_name} {list(weight.shape)}; "
            "allowed: (*batch, M, K) and (*batch, N, K) with the same batch dimensions"
        )
    if weight.shape[-1] != x.shape[-1]:
        raise RuntimeError(
            f"{op}: mat1 and mat2 shapes cannot be multiplied: {x_name} has shape {list(x.shape)}, "
            f"{weight_name} has {list(weight.shape)}; their last dimensions must be the same"
        )
    if bias is not None:
        check_same(op, x_name, x, bias_name, bias)
        if bias.shape != weight.shape[:-1]:
            raise RuntimeError(
                f"{op}: {bias_name} has shape {list(bias.shape)}; allowed: "
                f"{list(weight.shape[:-1])}, as {weight_name} has shape {list(weight.shape)}"
            )


def _matrix(t):
    """``t`` with at most one batch dimension and strides that native code takes; None stays."""
    if t is None:
        return None
    if t.is_neg():
        t = t.resolve_neg()
    return t.flatten(0, -3) if t.dim() > 3 else t


def _line(t):
    """``t`` as one run of memory; None stays."""
    if t is None or (t.is_contiguous() and not t.is_neg()):
        return t
    return t.resolve_neg().contiguous()


def _rows(t):
    """What is added to a result, as a matrix of contiguous rows; None stays."""
    return _matrix(_line(t))


def _check_residual(op, x, weight, name, t):
    """Raise unless ``t`` can be added to ``x W^T``."""
    if t is None:
        return
    check_same(op, "x", x, name, t)
    shape = (*x.shape[:-1], weight.shape[-2])
    if t.shape != shape:
        raise RuntimeError(
            f"{op}: {name} has shape {list(t.shape)}; allowed: {list(shape)}, the shape of the "
            "result"
        )


def _described(t, describe):
    return None if t is None else describe(t)


def _mask_seed(op, seed, p, x):
    """The seeds of the matrices of ``x``, or None where nothing is dropped."""
    seed = seed_tensor(op, seed, p, x)
    if seed is None or p == 0.0:
        return None
    if seed.shape != x.shape[:-2]:
        raise RuntimeError(
            f"{op}: seed has shape {list(seed.shape)}; it must be {list(x.shape[:-2])}, "
            "one for each matrix"
        )
    return check_seed(op, seed, x)


def column_major(weight: Tensor | None) -> bool:
    """Whether ``weight`` is the transpose of a contiguous matrix, as of transformers' Conv1D."""
    return weight is not None and weight.mT.is_contiguous() and not weight.is_contiguous()


def _overlap(a, b):
    """Whether two tensors may share memory, by the ranges that they reach."""

    def reach(t):
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    (a0, a1), (b0, b1) = reach(a), reach(b)
    return a.numel() > 0 and b.numel() > 0 and a0 < b1 and b0 < a1


@arrays_too
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out=None) -> Tensor:
    """``y = x W^T + b``.

    Args:
        x: (*batch, M, K); float64, float32, bfloat16 or float16.
        weight: (*batch, N, K).
        bias: (*batch, N).
        out: Where to write, contiguous.

    Returns:
        Contiguous (*batch, M, N).
    """
    _check("linear", "x weight bias", x, weight, bias)
    if out is None and _gemm.torch_is_faster(x, weight):
        return _gemm.linear(x, weight, bias)
    y = linear_result(x, weight)
    if out is not None:
        y = output("linear", out, y)
        for name, t in (("x", x), ("weight", weight), ("bias", bias)):
            if t is not None and _overlap(y, t):
                raise RuntimeError(
                    f"linear: out overlaps {name}, which is read while it is written"
                )
    if y.numel():
        x, weight, bias = _matrix(x), _matrix(weight), _line(bias)
        _backend.run(
            "linear",
            "x",
            x,
            "linear",
            _backend.matrix(x),
            _backend.matrix(weight),
            _described(bias, _backend.buffer),
            _backend.matrix(_matrix(y)),
        )
    return y


@arrays_too
def column_sum(x: Tensor) -> Tensor:
    """``(*batch, M, N) -> (*batch, N)``: sums over rows in a fixed order, in float32 or wider."""
    op = "column_sum"
    check_dtype(op, "x", x)
    if x.dim() < 2:
        raise RuntimeError(f"{op}: x has shape {list(x.shape)}; allowed: (*batch, M, N)")
    y = x.new_empty((*x.shape[:-2], x.shape[-1]))
    if y.numel():
        extents, x = rows(x.shape, x.dim() - 2), _matrix(x)
        _backend.run(op, "x", x, op, _backend.matrix(x), _backend.buffer(y), sums=extents)
    return y


def _check_factor(op, gy, name, t, lines):
    """Raise unless ``t`` is a factor of a product with ``gy``, of lines that fit it."""
    check_same(op, "gy", gy, name, t)
    if t.dim() != gy.dim() or t.shape[:-1] != lines:
        raise RuntimeError(
            f"{op}: gy has shape {list(gy.shape)} and {name} {list(t.shape)}; allowed: gy of shape "
            "(*batch, M, N), x (*batch, M, K) and weight (*batch, N, K)"
        )


@arrays_too
def linear_vjp(
    x: Tensor | None,
    weight: Tensor | None,
    gy: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``gx = gy W``, ``gweight = gy^T x`` and ``gbias = sum of gy over rows``.

    Args:
        x: (*batch, M, K); may be None where ``gweight`` is not needed.
        weight: (*batch, N, K); may be None where ``gx`` is not needed.
        gy: (*batch, M, N).
        needs: Which of the three to compute.

    Returns:
        Cotangents of ``x``, of ``weight`` and of the bias, (*batch, N); None for one not needed.
        Contiguous, but that of a transposed ``weight`` is a transpose too.
    """
    op = "linear_vjp"
    check_dtype(op, "gy", gy)
    batch, rows, cols = _cotangent_shape(op, gy)
    gx = gweight = gbias = None
    own = [None, None, None]  # what is left to our kernel
    if needs[0]:
        _check_factor(op, gy, "weight", weight, (*batch, cols))
        if _gemm.torch_is_faster_for_gx(gy, weight):
            gx = _gemm.matmul(gy, weight)
        else:
            gx = own[0] = gy.new_empty((*batch, rows, weight.shape[-1]))
    if needs[1]:
        _check_factor(op, gy, "x", x, (*batch, rows))
        if needs[0] and column_major(weight):
            gweight = linear(x.mT, gy.mT).mT
        elif _gemm.torch_is_faster_for_gweight(gy, x):
            gweight = _gemm.matmul(gy.mT, x)
        else:
            gweight = own[1] = gy.new_empty((*batch, cols, x.shape[-1]))
    if needs[2]:
        gbias = own[2] = gy.new_empty((*batch, cols))
    if any(t is not None for t in own):
        x = None if own[1] is None else x
        weight = None if own[0] is None else weight
        _run_vjp(op, x, weight, gy, *own)
    return gx, gweight, gbias


def _cotangent_shape(op, gy):
    """Batch, rows and columns of ``gy``: the rows of x and, as columns, the rows of W."""
    if gy.dim() < 2:
        raise RuntimeError(f"{op}: gy has shape {list(gy.shape)}; allowed: (*batch, M, N)")
    *batch, rows, cols = gy.shape
    return batch, rows, cols


def _run_vjp(op, x, weight, gy, gx, gweight, gbias, before_gy=(), after=()):
    """Run our kernel of a VJP; a factor is None where its product is not wanted."""
    # Held until the kernel has run: they may be copies.
    x, weight, gy = _matrix(x), _matrix(weight), _matrix(gy if gy.dim() > 2 else gy.unsqueeze(0))
    _backend.run(
        op,
        "gy",
        gy,
        op,
        _described(x, _backend.matrix),
        _described(weight, _backend.matrix),
        *before_gy,
        _backend.matrix(gy),
        _described(_matrix(gx), _backend.matrix),
        _described(_matrix(gweight), _backend.matrix),
        _described(gbias, _backend.buffer),
        *after,
        sums=None if gbias is None else (*gy.shape, 1.0),
    )


@arrays_too
def linear_jvp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tx: Tensor | None = None,
    tweight: Tensor | None = None,
    tbias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = x W^T + b`` and its tangent ``ty = tx W^T + x tW^T + tb``.

    An absent tangent is None and costs nothing; tangents have the shapes of their primals.
    """
    op = "linear_jvp"
    _check_dual(op, x, weight, bias, tx, tweight, tbias)
    if _gemm.torch_is_faster_for_tangents(x, weight, tx, tweight):
        return _gemm.dual(x, weight, bias, tx, tweight, tbias)
    return _dual(op, x, weight, bias, tx, tweight, tbias, _IDENTITY, 0.0, None)


@arrays_too
def linear_act_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    name="gelu",
    p: float = 0.0,
    seed=None,
    *,
    residual: Tensor | None = None,
    keep_z: bool = False,
    **params,
) -> tuple[Tensor, Tensor | None]:
    """``y = residual + m * f(z)``, ``z = x W^T + b``: one GEMM, and the rest on its tiles.

    Args:
        x: (*batch, M, K).
        weight: (*batch, N, K).
        bias: (*batch, N).
        name: An activation, see :func:`jacobian_ops.kernels.activation`.
        p: Dropout probability.
        seed: Dropout seed, int or int64 tensor of shape (*batch); None for no dropout.
        residual: (*batch, M, N).
        keep_z: Return ``z`` as well, which the derivatives need.
        params: Parameters of the activation.

    Returns:
        ``y`` and, if kept, ``z``, both contiguous (*batch, M, N).
    """
    op = "linear_act_dropout"
    _check(op, "x weight bias", x, weight, bias)
    _check_residual(op, x, weight, "residual", residual)
    f = resolve(op, name, **params)
    seed = _mask_seed(op, seed, p, x)
    if _gemm.torch_is_faster_unfused(x, weight):
        z = _gemm.linear(x, weight, bias)
        return activation(z, f, residual=residual, seed=seed, p=p), z if keep_z else None
    y = linear_result(x, weight)
    z = torch.empty_like(y) if keep_z else None
    if y.numel():
        x, weight, bias, residual = _matrix(x), _matrix(weight), _line(bias), _rows(residual)
        _backend.run(
            op,
            "x",
            x,
            op,
            _backend.matrix(x),
            _backend.matrix(weight),
            _described(bias, _backend.buffer),
            _described(residual, _backend.matrix),
            _backend.matrix(_matrix(y)),
            _described(_matrix(z), _backend.matrix),
            native_act(f),
            _backend.mask(seed, p),
        )
    return y, z


@arrays_too
def linear_act_dropout_jvp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tx: Tensor | None = None,
    tweight: Tensor | None = None,
    tbias: Tensor | None = None,
    name="gelu",
    p: float = 0.0,
    seed=None,
    *,
    residual: Tensor | None = None,
    tresidual: Tensor | None = None,
    **params,
) -> tuple[Tensor, Tensor]:
    """:func:`linear_act_dropout` and its tangent, each operand read and packed once.

    ``ty = tresidual + m * f'(z) * tz``, ``tz`` of :func:`linear_jvp`; an absent tangent is None.
    """
    op = "linear_act_dropout_jvp"
    f = resolve(op, name, **params)
    _check_dual(op, x, weight, bias, tx, tweight, tbias)
    _check_residual(op, x, weight, "residual", residual)
    _check_residual(op, x, weight, "tresidual", tresidual)
    seed = _mask_seed(op, seed, p, x)
    if _gemm.torch_is_faster_unfused(x, weight, tx, tweight):
        z, tz = _gemm.dual(x, weight, bias, tx, tweight, tbias)
        return activation_jvp(z, tz, f, residual=residual, tresidual=tresidual, seed=seed, p=p)
    return _dual(op, x, weight, bias, tx, tweight, tbias, f, p, seed, residual, tresidual)


@arrays_too
def linear_act_dropout_vjp(
    x: Tensor | None,
    weight: Tensor | None,
    s: Tensor | None,
    gy: Tensor,
    name="gelu",
    p: float = 0.0,
    seed=None,
    needs: tuple[bool, bool, bool] = (True, True, True),
    **params,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """VJP of :func:`linear_act_dropout`: :func:`linear_vjp` of ``gz = m * f'(s) * gy``.

    Args:
        x: (*batch, M, K); may be None where ``gweight`` is not needed.
        weight: (*batch, N, K); may be None where ``gx`` is not needed.
        s: What the activation is differentiated at, (*batch, M, N): ``z``.  None for the identity.
        gy: (*batch, M, N).
        name: As for :func:`linear_act_dropout`.
        p: Dropout probability.
        seed: As for :func:`linear_act_dropout`.
        needs: Which cotangents to compute.
        params: Parameters of the activation.

    Returns:
        Cotangents of ``x``, of ``weight`` and of the bias, (*batch, N); None for one not needed.
    """
    op = "linear_act_dropout_vjp"
    f = resolve(op, name, **params)
    if s is None and f.function != "identity":
        raise TypeError(f"{op}: s is None; only the identity is differentiated without it")
    gy, s = operands(op, ("gy", "s"), (gy, s), row_major=True)
    batch, rows, cols = _cotangent_shape(op, gy)
    seed = _mask_seed(op, seed, p, gy)
    if s is None and seed is None:
        return linear_vjp(x, weight, gy, needs)
    if needs[0]:
        _check_factor(op, gy, "weight", weight, (*batch, cols))
    if needs[1]:
        _check_factor(op, gy, "x", x, (*batch, rows))
    weight, x = weight if needs[0] else None, x if needs[1] else None
    transposed = x is not None and column_major(weight)
    if transposed or _gemm.torch_is_faster_for_vjp(gy, weight, x, needs[2]):
        at = gy if s is None else s
        gz, gbias = (
            activation_vjp_sum(at, gy, f, seed=seed, p=p)
            if needs[2]
            else (activation_vjp(at, gy, f, seed=seed, p=p), None)
        )
        return *linear_vjp(x, weight, gz, (*needs[:2], False))[:2], gbias
    gx = None if weight is None else gy.new_empty((*batch, rows, weight.shape[-1]))
    gweight = None if x is None else gy.new_empty((*batch, cols, x.shape[-1]))
    gbias = gy.new_empty((*batch, cols)) if needs[2] else None
    act, mask = native_act(f), _backend.mask(seed, p)
    _run_vjp(op, x, weight, gy, gx, gweight, gbias, (_described(s, _backend.buffer),), (act, mask))
    return gx, gweight, gbias


def _check_dual(op, x, weight, bias, tx, tweight, tbias):
    """Raise unless the primals fit together, and each tangent its primal."""
    _check(op, "x weight bias", x, weight, bias)
    for name, primal, t in (("tx", x, tx), ("tweight", weight, tweight), ("tbias", bias, tbias)):
        if t is not None:
            check_same(op, "x", x, name, t)
            shape = weight.shape[:-1] if primal is None else primal.shape
            if t.shape != shape:
                raise RuntimeError(
                    f"{op}: {name} has shape {list(t.shape)}; allowed: {list(shape)}, the shape of "
                    "its primal"
                )


def _dual(op, x, weight, bias, tx, tweight, tbias, f, p, seed, residual=None, tresidual=None):
    """Primal and tangent from checked arguments, in one kernel."""
    y, ty = linear_result(x, weight), linear_result(x, weight)
    if y.numel():
        x, weight, tx, tweight = map(_matrix, (x, weight, tx, tweight))
        bias, tbias = _line(bias), _line(tbias)
        residual, tresidual = _rows(residual), _rows(tresidual)
        _backend.run(
            op,
            "x",
            x,
            "linear_act_dropout_jvp",
            _backend.matrix(x),
            _backend.matrix(weight),
            _described(bias, _backend.buffer),
            _described(residual, _backend.matrix),
            _described(tx, _backend.matrix),
            _described(tweight, _backend.matrix),
            _described(tbias, _backend.buffer),
            _described(tresidual, _backend.matrix),
            _backend.matrix(_matrix(y)),
            _backend.matrix(_matrix(ty)),
            None,
            native_act(f),
            _backend.mask(seed, p),
        )
    return y, ty
