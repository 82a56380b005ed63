"""Rules of gated units, y = f(gate) * up.

Saved are ``gate`` and ``up``.  Five ops are closed under differentiation: the cotangents of
``gated_jvp`` are tangents of ``gated_vjp``, as the second derivative is symmetric.  Third
derivatives are made of those of the activation, which end there.
"""

from __future__ import annotations

import torch

from .. import kernels
from ..kernels._arguments import result_like
from .activation import activation, activation_vjp
from .rule import Rule, add, define, needed


def _fake(gate, *_):
    return result_like(gate, row_major=True)


def _times(a, b):
    """The product, or None when the second factor is absent."""
    return None if b is None else a * b


class _At:
    """f and its derivatives at ``gate``, times what is there, in float32 or wider."""

    def __init__(self, gate, f):
        self.dtype = gate.dtype
        self.gate, self.f = self.wide(gate), f

    @staticmethod
    def wide(t):
        return t.float() if t is not None and t.dtype in (torch.bfloat16, torch.float16) else t

    def value(self, g):
        return _times(activation(self.gate, None, self.f, (), 0.0), g)

    def along(self, g, order=1):
        return None if g is None else activation_vjp(self.gate, g, None, self.f, (), 0.0, order)

    def result(self, *terms):
        total = add(*terms)
        return (
            torch.zeros_like(self.gate, dtype=self.dtype) if total is None else total.to(self.dtype)
        )


class Gated(Rule):
    """y = f(gate) * up."""

    schema = "gated(Tensor gate, Tensor up, str f) -> Tensor"
    fake = _fake

    def kernel(*args):
        return kernels.gated(*args)

    def save(args, y, needs):
        return args[:2]

    def vjp(saved, consts, needs, gy):
        return needed(needs, gated_vjp(*saved, gy, *consts))

    def jvp(primals, y, tangents):
        return Gated.dual(primals, tangents)[1]

    def dual(primals, tangents):
        gate, up, f = primals
        return gated_jvp(gate, up, *tangents, f)


class GatedJvp(Rule):
    """y and ty = f'(gate) * up * tgate + f(gate) * tup.  Its VJP keeps a trained jvp fused."""

    schema = (
        "gated_jvp(Tensor gate, Tensor up, Tensor? tgate, Tensor? tup, str f) -> (Tensor, Tensor)"
    )
    tangent_outputs = (1,)

    def fake(gate, *_):
        return _fake(gate), _fake(gate)

    def kernel(*args):
        return kernels.gated_jvp(*args)

    def save(args, out, needs):
        return args[:4]

    def vjp(saved, consts, needs, gy, gty):
        gate, up, tgate, tup = saved
        if gty is None:
            return needed(needs, (*gated_vjp(gate, up, gy, *consts), None, None))
        gtgate, gtup, ggate, gup = gated_vjp_jvp(gate, up, gty, tgate, tup, gy, *consts)
        return needed(needs, (ggate, gup, gtgate, gtup))

    def jvp(primals, out, tangents):
        gate, up, tgate, tup, f = primals
        dgate, dup, dtgate, dtup = tangents

        def along(tgate, tup):
            absent = tgate is None and tup is None
            return None if absent else gated_jvp(gate, up, tgate, tup, f)[1]

        bent = None
        if dgate is not None and (tgate is not None or tup is not None):
            bent = gated_vjp_vjp(gate, up, dgate, tgate, tup, f)[0]
        if dup is not None and tgate is not None:
            bent = add(bent, activation_vjp(gate, tgate * dup, None, f, (), 0.0, 1))
        return along(dgate, dup), add(along(dtgate, dtup), bent)

    def dual(primals, tangents):
        out = gated_jvp(*primals)
        return out, GatedJvp.jvp(primals, out, tangents)


class GatedVjp(Rule):
    """ggate = f'(gate) * up * gy and gup = f(gate) * gy."""

    schema = "gated_vjp(Tensor gate, Tensor up, Tensor gy, str f) -> (Tensor, Tensor)"

    def fake(gate, *_):
        return _fake(gate), _fake(gate)

    def kernel(*args):
        return kernels.gated_vjp(*args)

    def save(args, out, needs):
        return args[:3]

    def vjp(saved, consts, needs, hggate, hgup):
        return needed(needs, gated_vjp_vjp(*saved, hggate, hgup, *consts))

    def jvp(primals, out, tangents):
        return GatedVjp.dual(primals, tangents)[1]

    def dual(primals, tangents):
        *primals, f = primals
        ggate, gup, *tangents = gated_vjp_jvp(*primals, *tangents, f)
        return (ggate, gup), tuple(tangents)


class GatedVjpVjp(Rule):
    """The cotangents of gate, up and gy in gated_vjp, in one pass."""

    schema = (
        "gated_vjp_vjp(Tensor gate, Tensor up, Tensor gy, Tensor? hggate, Tensor? hgup, str f)"
        " -> (Tensor, Tensor, Tensor)"
    )

    def fake(gate, *_):
        return _fake(gate), _fake(gate), _fake(gate)

    def kernel(*args):
        return kernels.gated_vjp_vjp(*args)

    def composite(gate, up, gy, hggate, hgup, f):
        at = _At(gate, f)
        up, gy, h, k = map(at.wide, (up, gy, hggate, hgup))
        bent = at.along(_times(up * gy, h), 2)
        return (
            at.result(bent, at.along(_times(gy, k))),
            at.result(at.along(_times(gy, h))),
            at.result(at.along(_times(up, h)), at.value(k)),
        )


class GatedVjpJvp(Rule):
    """gated_vjp and its tangent along (tgate, tup, tgy), in one pass."""

    schema = (
        "gated_vjp_jvp(Tensor gate, Tensor up, Tensor gy, Tensor? tgate, Tensor? tup, Tensor? tgy,"
        " str f) -> (Tensor, Tensor, Tensor, Tensor)"
    )

    def fake(gate, *_):
        return _fake(gate), _fake(gate), _fake(gate), _fake(gate)

    def kernel(*args):
        return kernels.gated_vjp_jvp(*args)

    def composite(gate, up, gy, tgate, tup, tgy, f):
        at = _At(gate, f)
        up, gy, tgate, tup, tgy = map(at.wide, (up, gy, tgate, tup, tgy))
        bent = at.along(_times(up * gy, tgate), 2)
        return (
            at.result(at.along(up * gy)),
            at.result(at.value(gy)),
            at.result(bent, at.along(add(_times(gy, tup), _times(up, tgy)))),
            at.result(at.along(_times(gy, tgate)), at.value(tgy)),
        )


gated = define(Gated)
gated_jvp = define(GatedJvp)
gated_vjp = define(GatedVjp)
gated_vjp_vjp = define(GatedVjpVjp)
gated_vjp_jvp = define(GatedVjpJvp)
