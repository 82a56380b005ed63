"""Elementwise activations and their products, m * f(x), with m an optional dropout mask.

``name`` is one of :data:`NAMES`, with that activation's parameters as keywords, or an
:class:`Activation` that :func:`resolve` returned.
"""

from __future__ import annotations

import functools
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backend
from ._arguments import (
    arrays_too,
    check_dtype,
    check_seed,
    operands,
    output,
    result_like,
    rows,
    seed_tensor,
)


class Activation(NamedTuple):
    """A function of ``csrc/math/activations.h`` with the values of its parameters."""

    function: str
    params: tuple[float, ...] = ()


# Parameters are those of torch.nn.functional, with its defaults.
_MAKERS = {
    "identity": lambda: Activation("identity"),
    "relu": lambda: Activation("relu"),
    "leaky_relu": lambda negative_slope=0.01: Activation("leaky_relu", (negative_slope,)),
    "elu": lambda alpha=1.0: Activation("elu", (alpha, 1.0, 1.0)),
    "selu": lambda: Activation("elu", (1.6732632423543772848, 1.0507009873554804934, 1.0)),
    "celu": lambda alpha=1.0: Activation("elu", (alpha, 1.0, 1.0 / alpha)),
    "relu6": lambda: Activation("hardtanh", (0.0, 6.0)),
    "hardtanh": lambda min_val=-1.0, max_val=1.0: Activation("hardtanh", (min_val, max_val)),
    "sigmoid": lambda: Activation("sigmoid"),
    "tanh": lambda: Activation("tanh"),
    "gelu": lambda: Activation("gelu"),
    "gelu_tanh": lambda: Activation("gelu_tanh"),
    "silu": lambda: Activation("silu"),
    "softplus": lambda beta=1.0, threshold=20.0: Activation("softplus", (beta, threshold)),
    "mish": lambda: Activation("mish"),
    "hardswish": lambda: Activation("hardswish"),
    "hardsigmoid": lambda: Activation("hardsigmoid"),
    "logsigmoid": lambda: Activation("logsigmoid"),
}
NAMES = tuple(_MAKERS)
_NUMBERS = (numbers.Real, torch.SymFloat, torch.SymInt)
MAX_ORDER = 3


def resolve(op: str, name: str | Activation, **params: float) -> Activation:
    """The function and parameters behind a public name."""
    if isinstance(name, Activation):
        return name
    maker = _MAKERS.get(name) if isinstance(name, str) else None
    if maker is None:
        raise ValueError(f"{op}: unknown activation {name!r}; allowed: {', '.join(NAMES)}")
    if name == "celu" and params.get("alpha") == 0:
        raise RuntimeError(f"{op}: ZeroDivisionError: alpha is 0; celu divides by it")
    for key, value in params.items():
        if type(value) is not float and not isinstance(value, _NUMBERS):
            raise TypeError(f"{op}: {key} must be Number, not {type(value).__name__}")
    try:
        return maker(**params)
    except TypeError as e:
        raise TypeError(f"{op}: {name}: {e}") from None


@functools.lru_cache(maxsize=256)
def native_act(f: Activation):
    """An activation as the backend takes it."""
    code = _backend.ACTIVATION_CODES.get(f.function)
    if code is None:
        allowed = ", ".join(_backend.ACTIVATION_CODES)
        raise ValueError(f"activation: unknown function {f.function!r}; allowed: {allowed}")
    return code, *f.params, *(0.0,) * (3 - len(f.params))


def _act(op, name, params):
    return native_act(resolve(op, name, **params))


def _run(op, names, tensors, out, name, params, seed, p, order=None):
    """Check, allocate ``out`` (a tuple, possibly of None) in the common layout, run ``op``."""
    act = _act(op, name, params)
    mask = None
    if p != 0.0:
        check_dtype(op, names[0], tensors[0])
        seed = check_seed(op, seed_tensor(op, seed, p, tensors[0]), tensors[0])
        mask = _backend.mask(seed, p)
    tensors = operands(op, names, tensors, row_major=mask is not None)
    x = tensors[0]
    out = [output(op, o, x) for o in out]
    if x.numel():
        buffers = [None if t is None else _backend.buffer(t) for t in (*tensors, *out)]
        orders = () if order is None else (order,)
        _backend.run(op, names[0], x, op, act, *orders, *buffers, mask)
    return tuple(out)


@arrays_too
def activation(
    x: Tensor,
    name,
    *,
    residual: Tensor | None = None,
    seed=None,
    p: float = 0.0,
    out=None,
    **params,
) -> Tensor:
    """``y = m * f(x)``, plus a residual.

    Args:
        x: Input of any shape; float64, float32, bfloat16 or float16.
        name: One of :data:`NAMES`; its parameters are keywords, as in torch.nn.functional.
        residual: What is added, of the shape and dtype of ``x``.
        seed: Dropout seed, int or int64 tensor of shape (*batch); None for no dropout.
        p: Dropout probability.
        out: Where to write, laid out as the result.
        params: Parameters of the activation.

    Returns:
        Tensor of the shape and dtype of ``x``.
    """
    tensors = x, residual
    return _run("activation", ("x", "residual"), tensors, (out,), name, params, seed, p)[0]


@arrays_too
def activation_vjp(
    x: Tensor,
    gy: Tensor,
    name,
    *,
    order: int = 1,
    seed=None,
    p: float = 0.0,
    out=None,
    **params,
) -> Tensor:
    """``gx = m * f^(order)(x) * gy``.  The Jacobian is diagonal: also the JVP along ``gy``."""
    op = "activation_vjp"
    return _run(op, ("x", "gy"), (x, gy), (out,), name, params, seed, p, order)[0]


@arrays_too
def activation_vjp_sum(
    x: Tensor,
    gy: Tensor,
    name,
    *,
    seed=None,
    p: float = 0.0,
    **params,
) -> tuple[Tensor, Tensor]:
    """:func:`activation_vjp` and its sums over rows, the bias gradient of a linear layer beneath.

    Args:
        x: (*batch, M, N); float64, float32, bfloat16 or float16.
        gy: Of the shape and dtype of ``x``.
        name: As for :func:`activation`.
        seed: As for :func:`activation`.
        p: Dropout probability.
        params: Parameters of the activation.

    Returns:
        ``gx``, contiguous, and the sums (*batch, N), in float32 or wider before they are rounded.
    """
    op = "activation_vjp_sum"
    act = _act(op, name, params)
    x, gy = operands(op, ("x", "gy"), (x, gy), row_major=True)
    if x.dim() < 2:
        raise RuntimeError(f"{op}: x has shape {list(x.shape)}; allowed: (*batch, M, N)")
    mask = None
    if p != 0.0:
        seed = check_seed(op, seed_tensor(op, seed, p, x), x)
        mask = _backend.mask(seed, p)
    gx, total = result_like(x, row_major=True), x.new_empty((*x.shape[:-2], x.shape[-1]))
    if total.numel():
        extents = rows(x.shape, x.dim() - 2)
        buffers = map(_backend.buffer, (x, gy, gx, total))
        _backend.run(op, "x", x, op, act, extents, *buffers, mask, sums=extents)
    return gx, total


@arrays_too
def activation_jvp(
    x: Tensor,
    tx: Tensor,
    name,
    *,
    residual: Tensor | None = None,
    tresidual: Tensor | None = None,
    seed=None,
    p: float = 0.0,
    out=(None, None),
    **params,
) -> tuple[Tensor, Tensor]:
    """``y = m * f(x)`` and its tangent ``ty = m * f'(x) * tx`` in one pass, plus residuals."""
    op = "activation_jvp"
    names, tensors = ("x", "tx", "residual", "tresidual"), (x, tx, residual, tresidual)
    return _run(op, names, tensors, out, name, params, seed, p)


@arrays_too
def activation_vjp_vjp(
    x: Tensor,
    gy: Tensor,
    h: Tensor,
    name,
    *,
    order: int = 1,
    seed=None,
    p: float = 0.0,
    **params,
) -> tuple[Tensor, Tensor]:
    """VJP of :func:`activation_vjp` along ``h``: cotangents of ``x`` and of ``gy``.

    ``hx = m * f^(order+1)(x) * gy * h`` and ``hgy = m * f^(order)(x) * h``.
    """
    op = "activation_vjp_vjp"
    return _run(op, ("x", "gy", "h"), (x, gy, h), (None, None), name, params, seed, p, order)


@arrays_too
def activation_vjp_jvp(
    x: Tensor,
    gy: Tensor,
    tx: Tensor | None,
    tgy: Tensor | None,
    name,
    *,
    order: int = 1,
    seed=None,
    p: float = 0.0,
    **params,
) -> tuple[Tensor, Tensor]:
    """:func:`activation_vjp` and its tangent along ``(tx, tgy)``; an absent one is None.

    ``gx = m * f^(order) * gy`` and ``tgx = m * (f^(order+1) * gy * tx + f^(order) * tgy)``.
    """
    op = "activation_vjp_jvp"
    names = ("x", "gy", "tx", "tgy")
    return _run(op, names, (x, gy, tx, tgy), (None, None), name, params, seed, p, order)
