"""Elementwise ops under Inductor: decomposed into native ones, which it fuses with what is around.

Inductor cannot look into our kernels, so one between other elementwise ops would cost a pass over
memory.  When it sees a graph, the rules of :mod:`.autograd` have done their part: derivatives of
every order are made as in eager mode.  Left alone is what draws a dropout mask, which has to be
the mask of every other kernel with that seed, and what has an order above the first.
"""

from __future__ import annotations

import sys

import torch

_aten = torch.ops.aten

# f(x, *params) and its VJP, f(gy, x, *params), by the name in csrc/math/activations.h.
_VALUES = {
    "relu": _aten.relu,
    "leaky_relu": _aten.leaky_relu,
    "elu": _aten.elu,
    "hardtanh": _aten.hardtanh,
    "sigmoid": _aten.sigmoid,
    "tanh": _aten.tanh,
    "gelu": _aten.gelu,
    "gelu_tanh": lambda x: _aten.gelu(x, approximate="tanh"),
    "silu": _aten.silu,
    "softplus": _aten.softplus,
    "mish": _aten.mish,
    "hardswish": _aten.hardswish,
    "hardsigmoid": _aten.hardsigmoid,
}
_VJPS = {
    "relu": lambda gy, x: _aten.threshold_backward(gy, x, 0),
    "leaky_relu": lambda gy, x, slope: _aten.leaky_relu_backward(gy, x, slope, False),
    "elu": lambda gy, x, *params: _aten.elu_backward(gy, *params, False, x),
    "hardtanh": _aten.hardtanh_backward,
    "sigmoid": lambda gy, x: _aten.sigmoid_backward(gy, _aten.sigmoid(x)),
    "sigmoid_y": _aten.sigmoid_backward,
    "tanh": lambda gy, x: _aten.tanh_backward(gy, _aten.tanh(x)),
    "tanh_y": _aten.tanh_backward,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda gy, x: _aten.gelu_backward(gy, x, approximate="tanh"),
    "silu": _aten.silu_backward,
    "softplus": _aten.softplus_backward,
    "mish": _aten.mish_backward,
    "hardswish": _aten.hardswish_backward,
    # The native one has 1/6 in float32, whatever the dtype.
    "hardsigmoid": lambda gy, x: torch.where((x > -3) & (x < 3), gy / 6, 0.0),
}


def _activation(x, seed, f, params, p):
    if seed is not None or f not in _VALUES:
        return NotImplemented
    return _VALUES[f](x, *params)


def _activation_vjp(x, gy, seed, f, params, p, order):
    if seed is not None or order != 1 or f not in _VJPS:
        return NotImplemented
    return _VJPS[f](gy, x, *params)


def _activation_jvp(x, tx, seed, f, params, p):
    if seed is not None or f not in _VALUES:
        return NotImplemented
    return _VALUES[f](x, *params), _VJPS[f](tx, x, *params)


def _gated(gate, up, f):
    if f not in _VALUES:
        return NotImplemented
    return _VALUES[f](gate) * up


def _gated_vjp(gate, up, gy, f):
    if f not in _VALUES:
        return NotImplemented
    return _VJPS[f](gy * up, gate), _VALUES[f](gate) * gy


DECOMPOSITIONS = {
    "activation": _activation,
    "activation_vjp": _activation_vjp,
    "activation_jvp": _activation_jvp,
    "gated": _gated,
    "gated_vjp": _gated_vjp,
}


def register() -> None:
    """Tell Inductor, if it is there and does not know yet; to be called when a graph is traced."""
    inductor = sys.modules.get("torch._inductor.decomposition")
    if inductor is None or torch.ops.jacobian_ops.gated.default in inductor.decompositions:
        return
    for name, decomposition in DECOMPOSITIONS.items():
        op = getattr(torch.ops.jacobian_ops, name).default
        inductor.decompositions[op] = decomposition
    inductor.fast_random_decomps.cache_clear()
