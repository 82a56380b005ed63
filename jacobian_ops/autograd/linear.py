"""Rules of linear and of its fusion with activation and dropout.

Linear saves ``x`` and ``W``.  Its VJP and JVP are linear maps again with other strides, so the op
is closed under differentiation.  linear_act_dropout saves ``x``, ``W``, the seed and what its
activation's derivative needs: ``z = x W^T + b``, or ``y``.

Tensors are ``x (*batch, M, K)``, ``weight (*batch, N, K)``, ``bias (*batch, N)``.
"""

from __future__ import annotations

from .. import kernels
from ..kernels._arguments import linear_result
from ..kernels.linear import column_major
from .activation import activation_jvp, activation_vjp, from_result
from .dropout import dropout
from .rule import Rule, add, define, front, needed


def _product(x, weight):
    """``x W^T``, or None when either is absent."""
    return None if x is None or weight is None else linear(x, weight, None)


def _transposed(t):
    return None if t is None else t.mT


def _tangent(x, weight, tx, tweight, tbias):
    """``tx W^T + x tW^T + tb`` of the tangents that are there."""
    along_x = None if tx is None else linear(tx, weight, tbias)
    along_weight = None
    if tweight is not None:
        along_weight = linear(x, tweight, tbias if tx is None else None)
    if tx is None and tweight is None and tbias is not None:
        return tbias.unsqueeze(-2).expand(*x.shape[:-1], tbias.shape[-1]).clone()
    return add(along_x, along_weight)


class Linear(Rule):
    """y = x W^T + b."""

    schema = "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"

    def kernel(x, weight, bias):
        return kernels.linear(x, weight, bias)

    def fake(x, weight, bias):
        return linear_result(x, weight)

    def save(args, y, needs):
        x, weight, _ = args
        return x if needs[1] else None, weight if needs[0] else None

    def vjp(saved, consts, needs, gy):
        x, weight = saved
        x, weight = x if needs[1] else None, weight if needs[0] else None
        return needed(needs, linear_vjp(gy, x, weight, bool(needs[2])))

    def jvp(primals, y, tangents):
        return _tangent(*primals[:2], *tangents)

    def dual(primals, tangents):
        return linear_jvp(*primals, *tangents)

    @classmethod
    def vmap(cls, info, dims, x, weight, bias):
        if dims[0] is not None and dims[1] is None and dims[2] is None and weight.dim() == 2:
            # One weight for all: the batch joins the rows.
            x = x.movedim(dims[0], 0)
            y = linear(x.flatten(0, 1), weight, bias)
            return y.unflatten(0, x.shape[:2]), 0
        return super().vmap(info, dims, x, weight, bias)


class LinearVjp(Rule):
    """gx = gy W if W is given, gw = gy^T x if x is, gb = sums of gy over rows; empty if not wanted.

    All three in one call: a small layer's backward is as long as its way through Python.
    """

    schema = (
        "linear_vjp(Tensor gy, Tensor? x, Tensor? weight, bool bias) -> (Tensor, Tensor, Tensor)"
    )

    def kernel(gy, x, weight, bias):
        needs = weight is not None, x is not None, bias
        gradients = kernels.linear_vjp(x, weight, gy, needs)
        return tuple(gy.new_empty(0) if g is None else g for g in gradients)

    def fake(gy, x, weight, bias):
        if x is None:
            gweight = gy.new_empty(0)
        elif column_major(weight):
            gweight = linear_result(x.mT, gy.mT).mT
        else:
            gweight = linear_result(gy.mT, x.mT)
        return (
            gy.new_empty(0) if weight is None else linear_result(gy, weight.mT),
            gweight,
            ColumnSum.fake(gy) if bias else gy.new_empty(0),
        )

    def composite(gy, x, weight, bias):
        return (
            gy.new_empty(0) if weight is None else linear(gy, weight.mT, None),
            gy.new_empty(0) if x is None else linear(gy.mT, x.mT, None),
            column_sum(gy) if bias else gy.new_empty(0),
        )

    @classmethod
    def vmap(cls, info, dims, gy, x, weight, bias):
        out = cls.op(*front(info, dims[:3], (gy, x, weight)), bias)
        return out, cls.batched(x, weight, bias)

    def batched(x, weight, bias):
        return tuple(0 if there else None for there in (weight is not None, x is not None, bias))


class LinearJvp(Rule):
    """y = x W^T + b and its tangent; absent tangents cost nothing."""

    schema = (
        "linear_jvp(Tensor x, Tensor weight, Tensor? bias, Tensor? tx, Tensor? tweight,"
        " Tensor? tbias) -> (Tensor, Tensor)"
    )
    tangent_outputs = (1,)
    kernel = kernels.linear_jvp

    def fake(x, weight, *_):
        return linear_result(x, weight), linear_result(x, weight)

    def save(args, out, needs):
        x, weight, _, tx, tweight, _ = args
        return (
            x if needs[1] or needs[4] else None,
            weight if needs[0] or needs[3] else None,
            tx if needs[1] else None,
            tweight if needs[0] else None,
        )

    def vjp(saved, consts, needs, gy, gty):
        x, weight, tx, tweight = saved
        gyT, gtyT, weightT, tweightT, xT, txT = map(_transposed, (gy, gty, weight, tweight, x, tx))
        return (
            add(_product(gy, weightT), _product(gty, tweightT)) if needs[0] else None,
            add(_product(gyT, xT), _product(gtyT, txT)) if needs[1] else None,
            column_sum(gy) if needs[2] and gy is not None else None,
            _product(gty, weightT) if needs[3] else None,
            _product(gtyT, xT) if needs[4] else None,
            column_sum(gty) if needs[5] and gty is not None else None,
        )

    def jvp(primals, out, tangents):
        x, weight, _, tx, tweight, _ = primals
        dx, dweight, dbias, dtx, dtweight, dtbias = tangents
        dy = _tangent(x, weight, dx, dweight, dbias)
        mixed = add(_product(tx, dweight), _product(dx, tweight))
        return dy, add(_tangent(x, weight, dtx, dtweight, dtbias), mixed)

    def dual(primals, tangents):
        return linear_jvp(*primals), LinearJvp.jvp(primals, None, tangents)


class ColumnSum(Rule):
    """Sums over rows, the bias gradient: (*batch, M, N) -> (*batch, N)."""

    schema = "column_sum(Tensor x) -> Tensor"
    kernel = kernels.column_sum

    def fake(x):
        return x.new_empty((*x.shape[:-2], x.shape[-1]))

    def composite(x):
        return x.sum(-2)


def _kept(f, p, keep_z, residual, out):
    """What the activation is differentiated at, and as what function of it.

    z if it was kept, the result if that is enough; else None, and z is to be computed again.
    """
    y, z = out
    if keep_z or f == "identity":
        return z if f != "identity" else None, f
    of_result = None if residual is not None else from_result(f, p)
    return (y, of_result) if of_result else (None, f)


def _through(g, s, seed, f, params, p):
    """``m * f'(s) * g``."""
    if f == "identity":
        return g if seed is None else dropout(g, seed, p)
    return activation_vjp(s, g, seed, f, params, p, 1)


class LinearActDropout(Rule):
    """y = residual + m * f(z) and z = x W^T + b, which is empty unless kept for the derivative.

    A derivative that needs a ``z`` that was not kept computes it again.
    """

    schema = (
        "linear_act_dropout(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? seed,"
        " str f, float[] params, float p, bool keep_z) -> (Tensor, Tensor)"
    )

    def kernel(x, weight, bias, residual, seed, f, params, p, keep_z):
        act = kernels.Activation(f, tuple(params))
        y, z = kernels.linear_act_dropout(
            x, weight, bias, act, p, seed, residual=residual, keep_z=keep_z
        )
        return y, x.new_empty(0) if z is None else z

    def fake(x, weight, bias, residual, seed, f, params, p, keep_z):
        return linear_result(x, weight), linear_result(x, weight) if keep_z else x.new_empty(0)

    def save(args, out, needs):
        x, weight, bias, residual, seed, f, params, p, keep_z = args
        if not any(needs[:3]):  # the residual's cotangent is that of the result
            return None, None, None, None, None
        s, _ = _kept(f, p, keep_z, residual, out)
        if s is None and f != "identity":
            return x, weight, bias, seed, None
        return x if needs[1] else None, weight if needs[0] else None, None, seed, s

    def vjp(saved, consts, needs, gy, gz):
        (x, weight, bias, seed, s), (f, params, p, keep_z) = saved, consts
        gresidual = gy if needs[3] else None
        if not any(needs[:3]):
            return None, None, None, gresidual, None
        if s is None and f != "identity":
            s = linear(x, weight, bias)
        elif not keep_z:  # s is the result
            f = from_result(f, p) or f
        gz = gz if keep_z else None
        if f == "identity" and seed is None:
            gy, gz = None, add(gy, gz)
        if gy is None and gz is None:
            return None, None, None, gresidual, None
        factors = x if needs[1] else None, weight if needs[0] else None
        if gz is None:
            rest = seed, bool(needs[2]), f, params, p
            gradients = linear_act_dropout_vjp(gy, s, *factors, *rest)
        else:
            through = None if gy is None else _through(gy, s, seed, f, params, p)
            gradients = linear_vjp(add(gz, through), *factors, bool(needs[2]))
        return *needed(needs, gradients), gresidual, None

    def jvp(primals, out, tangents):
        x, weight, bias, residual, seed, f, params, p, keep_z = primals
        tx, tweight, tbias, tresidual, _ = tangents
        tz = _tangent(x, weight, tx, tweight, tbias)
        if tz is None:  # a copy: a tangent may not be the very tensor that came in
            return tresidual.clone(), None
        s, at = _kept(f, p, keep_z, residual, out)
        if s is None and f != "identity":
            s = linear(x, weight, bias)
        ty = add(_through(tz, s, seed, at, params, p), tresidual)
        return ty, tz if keep_z else None

    def dual(primals, tangents):
        x, weight, bias, residual, seed, f, params, p, keep_z = primals
        tresidual = tangents[3]
        if keep_z:
            z, tz = linear_jvp(x, weight, bias, *tangents[:3])
            y, ty = activation_jvp(z, tz, seed, f, params, p)
            return (add(y, residual), z), (add(ty, tresidual), tz)
        rest = seed, f, params, p
        y, ty = linear_act_dropout_jvp(x, weight, bias, residual, *tangents[:4], *rest)
        return (y, x.new_empty(0)), (ty, None)

    @classmethod
    def vmap(cls, info, dims, *args):
        y, z = cls.op(*front(info, dims, args))
        return (y, z), (0, 0 if args[-1] else None)


class LinearActDropoutVjp(Rule):
    """linear_vjp of gz = m * f'(s) * gy; without s, f is the identity."""

    schema = (
        "linear_act_dropout_vjp(Tensor gy, Tensor? s, Tensor? x, Tensor? weight, Tensor? seed,"
        " bool bias, str f, float[] params, float p) -> (Tensor, Tensor, Tensor)"
    )

    def kernel(gy, s, x, weight, seed, bias, f, params, p):
        act, needs = kernels.Activation(f, tuple(params)), (weight is not None, x is not None, bias)
        gradients = kernels.linear_act_dropout_vjp(x, weight, s, gy, act, p, seed, needs)
        return tuple(gy.new_empty(0) if g is None else g for g in gradients)

    def fake(gy, s, x, weight, seed, bias, *_):
        return LinearVjp.fake(gy, x, weight, bias)

    def composite(gy, s, x, weight, seed, bias, f, params, p):
        return LinearVjp.composite(_through(gy, s, seed, f, params, p), x, weight, bias)

    @classmethod
    def vmap(cls, info, dims, gy, s, x, weight, seed, bias, *consts):
        out = cls.op(*front(info, dims[:5], (gy, s, x, weight, seed)), bias, *consts)
        return out, LinearVjp.batched(x, weight, bias)


class LinearActDropoutJvp(Rule):
    """linear_act_dropout and its tangent, the operands read and packed once."""

    schema = (
        "linear_act_dropout_jvp(Tensor x, Tensor weight, Tensor? bias, Tensor? residual,"
        " Tensor? tx, Tensor? tweight, Tensor? tbias, Tensor? tresidual, Tensor? seed, str f,"
        " float[] params, float p) -> (Tensor, Tensor)"
    )

    def kernel(x, weight, bias, residual, tx, tweight, tbias, tresidual, seed, f, params, p):
        act = kernels.Activation(f, tuple(params))
        residuals = dict(residual=residual, tresidual=tresidual)
        return kernels.linear_act_dropout_jvp(
            x, weight, bias, tx, tweight, tbias, act, p, seed, **residuals
        )

    fake = LinearJvp.fake

    def composite(x, weight, bias, residual, tx, tweight, tbias, tresidual, seed, f, params, p):
        z, tz = linear_jvp(x, weight, bias, tx, tweight, tbias)
        y, ty = activation_jvp(z, tz, seed, f, params, p)
        return add(y, residual), add(ty, tresidual)


linear = define(Linear)
linear_vjp = define(LinearVjp)
linear_jvp = define(LinearJvp)
column_sum = define(ColumnSum)
linear_act_dropout = define(LinearActDropout)
linear_act_dropout_vjp = define(LinearActDropoutVjp)
linear_act_dropout_jvp = define(LinearActDropoutJvp)
