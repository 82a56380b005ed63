"""Rules of the elementwise activations, with an optional dropout mask m: y = m * f(x).

``J = diag(m * f'(x))``.  Saved is ``x``, or ``y`` where the derivative needs no more, and the seed.
Derivatives exist to third order; a fourth raises.

Arguments of every op here: tensors, then ``seed`` (None for no dropout), ``f`` and ``params`` (a
function of csrc/math/activations.h), ``p`` and, for derivatives, ``order``.
"""

from __future__ import annotations

import torch

from .. import kernels
from ..kernels._arguments import result_like
from .rule import Rule, define, define_inplace, front

_PIECEWISE_LINEAR = {"identity", "relu", "leaky_relu", "hardtanh", "hardsigmoid"}


_OF_RESULT = {"relu": "relu", "sigmoid": "sigmoid_y", "tanh": "tanh_y"}


def from_result(f: str, p: float) -> str | None:
    """The function to differentiate at ``y`` instead of ``f`` at ``x``; None if x is kept.

    The same as native ops keep: a program may overwrite the other one of x and y.
    """
    return _OF_RESULT.get(f) if p == 0.0 else None


def survives_overwriting(f: str, params) -> bool:
    """Whether the derivative can be had where only ``y`` is left, in place of ``x``.

    leaky_relu keeps the sign, and hardtanh is flat where it has put a bound.
    """
    return f in _OF_RESULT or f == "hardtanh" or (f == "leaky_relu" and params[0] > 0)


def _act(f, params):
    return kernels.Activation(f, tuple(params))


def _fake(x, seed):
    return result_like(x, row_major=seed is not None)


def _along_x(x, g, seed, f, params, p, order):
    """``m * f^(order)(x) * g``, zero without a pass over memory where that derivative vanishes."""
    if order > 1 and f in _PIECEWISE_LINEAR:
        return torch.zeros_like(g)
    if order > kernels.MAX_ORDER:
        raise RuntimeError(
            f"activation: derivatives of {f} are available up to order {kernels.MAX_ORDER}; "
            f"order {order} was asked for"
        )
    return activation_vjp(x, g, seed, f, params, p, order)


class Activation(Rule):
    """y = m * f(x)."""

    schema = "activation(Tensor x, Tensor? seed, str f, float[] params, float p) -> Tensor"

    def kernel(x, seed, f, params, p, out=None):
        return kernels.activation(x, _act(f, params), seed=seed, p=p, out=out)

    def fake(x, seed, *_):
        return _fake(x, seed)

    def save(args, y, needs):
        x, seed, f, params, p = args
        return (y if from_result(f, p) else x), seed

    def vjp(saved, consts, needs, gy):
        (s, seed), (f, params, p) = saved, consts
        return activation_vjp(s, gy, seed, from_result(f, p) or f, params, p, 1), None

    def jvp(primals, y, tangents):
        x, *rest = primals
        return activation_vjp(x, tangents[0], *rest, 1)

    def dual(primals, tangents):
        x, *rest = primals
        return activation_jvp(x, tangents[0], *rest)


class ActivationVjp(Rule):
    """gx = m * f^(order)(x) * gy."""

    schema = (
        "activation_vjp(Tensor x, Tensor gy, Tensor? seed, str f, float[] params, float p,"
        " int order) -> Tensor"
    )

    def kernel(x, gy, seed, f, params, p, order):
        return kernels.activation_vjp(x, gy, _act(f, params), order=order, seed=seed, p=p)

    def fake(x, gy, seed, *_):
        return _fake(x, seed)

    def save(args, gx, needs):
        return args[:3]

    def vjp(saved, consts, needs, h):
        (x, gy, seed), (f, params, p, order) = saved, consts
        if needs[0] and needs[1] and order < kernels.MAX_ORDER and f not in _PIECEWISE_LINEAR:
            return *activation_vjp_vjp(x, gy, h, seed, *consts), None
        hx = _along_x(x, gy * h, seed, f, params, p, order + 1) if needs[0] else None
        return hx, activation_vjp(x, h, seed, *consts) if needs[1] else None, None

    def jvp(primals, gx, tangents):
        x, gy, seed, f, params, p, order = primals
        tx, tgy, _ = tangents
        tgx = None if tx is None else _along_x(x, gy * tx, seed, f, params, p, order + 1)
        if tgy is None:
            return tgx
        along_gy = activation_vjp(x, tgy, seed, f, params, p, order)
        return along_gy if tgx is None else tgx + along_gy

    def dual(primals, tangents):
        x, gy, seed, f, params, p, order = primals
        if order < kernels.MAX_ORDER and f not in _PIECEWISE_LINEAR:
            return activation_vjp_jvp(x, gy, *tangents[:2], seed, f, params, p, order)
        return activation_vjp(*primals), ActivationVjp.jvp(primals, None, tangents)


class ActivationJvp(Rule):
    """y = m * f(x), ty = m * f'(x) * tx.  Its own VJP keeps a trained jvp fused."""

    schema = (
        "activation_jvp(Tensor x, Tensor tx, Tensor? seed, str f, float[] params, float p)"
        " -> (Tensor, Tensor)"
    )
    tangent_outputs = (1,)

    def kernel(x, tx, seed, f, params, p):
        return kernels.activation_jvp(x, tx, _act(f, params), seed=seed, p=p)

    def fake(x, tx, seed, *_):
        return _fake(x, seed), _fake(x, seed)

    def save(args, out, needs):
        return args[:3]

    def vjp(saved, consts, needs, gy, gty):
        x, tx, seed = saved
        gx = activation_vjp(x, gy, seed, *consts, 1) if gy is not None and needs[0] else None
        if gty is None:
            return gx, None, None
        hx, gtx, _ = ActivationVjp.vjp(saved, (*consts, 1), needs, gty)
        return hx if gx is None else gx if hx is None else gx + hx, gtx, None

    def jvp(primals, out, tangents):
        x, tx, seed, *f = primals
        dx, dtx, _ = tangents
        dy = None if dx is None else activation_vjp(x, dx, seed, *f, 1)
        return dy, ActivationVjp.jvp((*primals, 1), None, tangents)

    def dual(primals, tangents):
        x, tx, seed, *f = primals
        dx, dtx, _ = tangents
        ty, dty = ActivationVjp.dual((*primals, 1), tangents)
        y, dy = (activation(x, seed, *f), None) if dx is None else activation_jvp(x, dx, seed, *f)
        return (y, ty), (dy, dty)

    def vmap(info, dims, x, tx, seed, *f):
        if dims[0] is None and dims[2] is None and seed is None:
            # Many tangents at one point (jacfwd): the primal once.
            y = activation(x, seed, *f)
            (x, tx) = front(info, dims[:2], (x, tx))
            return (y, activation_vjp(x, tx, seed, *f, 1)), (None, 0)
        return activation_jvp(*front(info, dims, (x, tx, seed, *f))), (0, 0)


class ActivationVjpVjp(Rule):
    """hx = m * f^(order+1)(x) * gy * h and hgy = m * f^(order)(x) * h in one pass."""

    schema = (
        "activation_vjp_vjp(Tensor x, Tensor gy, Tensor h, Tensor? seed, str f, float[] params,"
        " float p, int order) -> (Tensor, Tensor)"
    )

    def kernel(x, gy, h, seed, f, params, p, order):
        return kernels.activation_vjp_vjp(x, gy, h, _act(f, params), order=order, seed=seed, p=p)

    def fake(x, gy, h, seed, *_):
        return _fake(x, seed), _fake(x, seed)

    def composite(x, gy, h, seed, f, params, p, order):
        hx = _along_x(x, gy * h, seed, f, params, p, order + 1)
        return hx, activation_vjp(x, h, seed, f, params, p, order)


class ActivationVjpJvp(Rule):
    """gx = m * f^(order)(x) * gy and its tangent along (tx, tgy) in one pass."""

    schema = (
        "activation_vjp_jvp(Tensor x, Tensor gy, Tensor? tx, Tensor? tgy, Tensor? seed, str f,"
        " float[] params, float p, int order) -> (Tensor, Tensor)"
    )

    def kernel(x, gy, tx, tgy, seed, f, params, p, order):
        f = _act(f, params)
        return kernels.activation_vjp_jvp(x, gy, tx, tgy, f, order=order, seed=seed, p=p)

    def fake(x, gy, tx, tgy, seed, *_):
        return _fake(x, seed), _fake(x, seed)

    def composite(x, gy, tx, tgy, seed, f, params, p, order):
        primals = (x, gy, seed, f, params, p, order)
        return activation_vjp(*primals), ActivationVjp.jvp(primals, None, (tx, tgy, None))


activation = define(Activation)
activation_inplace = define_inplace(Activation)
activation_vjp = define(ActivationVjp)
activation_jvp = define(ActivationJvp)
activation_vjp_vjp = define(ActivationVjpVjp)
activation_vjp_jvp = define(ActivationVjpJvp)
