"""Rules of layer_norm and rms_norm.

``x`` and ``weight`` are saved, no statistics: they are recomputed from the row in cache, and a
formula that is differentiated again never takes them for constants.  Four ops are closed under
differentiation: the cotangents of ``norm_jvp`` and of ``norm_vjp`` are tangents of ``norm_vjp``, as
the second derivative is symmetric.
"""

from __future__ import annotations

import torch

from .. import kernels
from ..kernels._arguments import result_like
from .rule import Rule, define


def _fake(x, *_):
    return result_like(x, row_major=True)


def _fake_row(x, dims):
    return x.new_empty(x.shape[x.dim() - dims :])


def _apart(*results, sums):
    """An op's results: each sum a tensor of its own, as views of one break torch.compile."""
    return (*results, *(s.clone() for s in sums))


class _Norm(Rule):
    """``of_column`` are the arguments that have the shape of a row of ``x``."""

    of_column: tuple[int, ...]
    sums = False

    @classmethod
    def vmap(cls, info, dims, *args):
        n = cls.tensors
        if cls.sums or any(dims[i] is not None for i in cls.of_column):
            return cls.by_sample(info, dims, args)
        fronted = _rows_front(info, dims[:n], args[:n], cls.of_column)
        out = cls.op(*fronted, *args[n:])
        return out, (0,) * len(out) if isinstance(out, tuple) else 0

    @classmethod
    def by_sample(cls, info, dims, args):
        """Weights, or sums over rows, of each sample's own: one call for each."""
        results = [
            cls.op(*(a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], tuple):
            return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
        return torch.stack(results), 0


def _rows_front(info, dims, args, of_column):
    """Everything of the shape of ``x`` with its batch dimension first."""
    return tuple(
        a
        if a is None or i in of_column
        else a.expand(info.batch_size, *a.shape)
        if d is None
        else a.movedim(d, 0)
        for i, (a, d) in enumerate(zip(args, dims, strict=True))
    )


class _Primitive:
    """The pieces of the formulas in elementary ops, in float32 or wider."""

    def __init__(self, x, weight, dims, eps, centred):
        self.axes, self.centred = tuple(range(-dims, 0)), centred
        x = self.wide(x)
        c = x - self.mean(x) if centred else x
        self.r = (self.mean(c * c) + eps).rsqrt()
        self.x = c * self.r
        self.weight = None if weight is None else self.wide(weight)

    @staticmethod
    def wide(t):
        return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t

    def mean(self, q):
        return q.mean(self.axes, True)

    def weighted(self, q):
        return q if self.weight is None else self.weight * q

    def project(self, q):
        q = q - self.mean(q) if self.centred else q
        return q - self.x * self.mean(self.x * q)

    def over_rows(self, q):
        return q.sum(tuple(range(q.dim() - len(self.axes))))


class Norm(_Norm):
    """y = weight * x^ + bias."""

    schema = (
        "norm(Tensor x, Tensor? weight, Tensor? bias, int dims, float eps, bool centred) -> Tensor"
    )
    fake = _fake
    of_column = (1, 2)

    def kernel(*args):
        return kernels.norm(*args)

    def save(args, y, needs):
        return args[:2]

    def vjp(saved, consts, needs, gy):
        return _needed(needs, *norm_vjp(*saved, gy, *consts))

    def jvp(primals, y, tangents):
        return Norm.dual(primals, tangents)[1]

    def dual(primals, tangents):
        return norm_jvp(*primals[:3], *tangents, *primals[3:])


def _needed(needs, *gradients):
    return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=False))


class NormJvp(_Norm):
    """y and ty = weight * r * P(tx) + tweight * x^ + tbias.  Its VJP keeps a trained jvp fused."""

    schema = (
        "norm_jvp(Tensor x, Tensor? weight, Tensor? bias, Tensor? tx, Tensor? tweight, "
        "Tensor? tbias, int dims, float eps, bool centred) -> (Tensor, Tensor)"
    )
    of_column = (1, 2, 4, 5)

    def fake(x, *_):
        return _fake(x), _fake(x)

    def kernel(*args):
        return kernels.norm_jvp(*args)

    def save(args, out, needs):
        return args[0], args[1], args[3], args[4]

    def vjp(saved, consts, needs, gy, gty):
        x, weight, tx, tweight = saved
        if gty is None:
            return _needed(needs, *norm_vjp(x, weight, gy, *consts), None, None, None)
        gtx, gx, gtweight, gtbias, gweight, gbias = norm_vjp_jvp(
            x, weight, gty, tx, tweight, gy, *consts
        )
        return _needed(needs, gx, gweight, gbias, gtx, gtweight, gtbias)

    def jvp(primals, out, tangents):
        x, weight, bias, tx, tweight, _, *consts = primals
        dx, dweight, _ = tangents[:3]

        def along(*direction):
            if all(d is None for d in direction):
                return None
            return norm_jvp(x, weight, bias, *direction, *consts)[1]

        dy, dty = along(*tangents[:3]), along(*tangents[3:])
        at = _Primitive(x, weight, *consts)
        bent = None
        if tx is not None and dx is not None:
            u, w = at.wide(tx), at.wide(dx)
            pu, pw = at.project(u), at.project(w)
            terms = at.mean(at.x * w) * pu + at.mean(at.x * u) * pw + at.x * at.mean(u * pw)
            bent = -at.r * at.r * at.weighted(terms)
        for t, scale in ((tx, dweight), (dx, tweight)):
            if t is not None and scale is not None:
                term = at.r * at.wide(scale) * at.project(at.wide(t))
                bent = term if bent is None else bent + term
        if bent is not None:
            dty = bent.to(x.dtype) if dty is None else dty + bent.to(x.dtype)
        return dy, dty

    def dual(primals, tangents):
        out = norm_jvp(*primals)
        return out, NormJvp.jvp(primals, out, tangents)


class NormVjp(_Norm):
    """gx = r * P(weight * gy), and the cotangents of weight and bias."""

    schema = (
        "norm_vjp(Tensor x, Tensor? weight, Tensor gy, int dims, float eps, bool centred) "
        "-> (Tensor, Tensor, Tensor)"
    )
    of_column = (1,)
    sums = True

    def fake(x, weight, gy, dims, *_):
        return _fake(x), _fake_row(x, dims), _fake_row(x, dims)

    def kernel(*args):
        gx, sums = kernels.norm_vjp(*args)
        return _apart(gx, sums=sums)

    def save(args, out, needs):
        return args[:3]

    def vjp(saved, consts, needs, hx, hweight, hbias):
        x, weight, gy = saved
        ggy = norm_jvp(x, weight, None, hx, hweight, hbias, *consts)[1] if needs[2] else None
        gx = gweight = None
        if needs[0] or needs[1]:
            _, gx, _, _, gweight, _ = norm_vjp_jvp(x, weight, gy, hx, hweight, None, *consts)
        return _needed(needs, gx, gweight, ggy)

    def jvp(primals, out, tangents):
        return NormVjp.dual(primals, tangents)[1]

    def dual(primals, tangents):
        gx, tgx, gw, gb, tgw, tgb = norm_vjp_jvp(*primals[:3], *tangents, *primals[3:])
        return (gx, gw, gb), (tgx, tgw, tgb)

    @classmethod
    def vmap(cls, info, dims, x, weight, gy, ndims, eps, centred):
        if dims[1] is not None:
            return cls.by_sample(info, dims, (x, weight, gy, ndims, eps, centred))
        # One call for all rows; the sums over each sample's own from the normalized input.
        x, weight, gy = _rows_front(info, dims[:3], (x, weight, gy), cls.of_column)
        gx, _, _ = norm_vjp(x, weight, gy, ndims, eps, centred)
        wide = _Primitive.wide(gy)
        normalized = norm(_Primitive.wide(x), None, None, ndims, eps, centred)
        rows = tuple(range(1, x.dim() - ndims))
        sums = (t.sum(rows) if rows else t for t in (normalized * wide, wide))
        return (gx, *(s.to(x.dtype) for s in sums)), (0, 0, 0)


class NormVjpJvp(_Norm):
    """norm_vjp and its tangent along (tx, tweight, tgy), in one pass."""

    schema = (
        "norm_vjp_jvp(Tensor x, Tensor? weight, Tensor gy, Tensor? tx, Tensor? tweight, "
        "Tensor? tgy, int dims, float eps, bool centred) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    of_column = (1, 4)
    sums = True

    def fake(x, weight, gy, tx, tweight, tgy, dims, *_):
        return _fake(x), _fake(x), *(_fake_row(x, dims) for _ in range(4))

    def kernel(*args):
        gx, tgx, sums = kernels.norm_vjp_jvp(*args)
        return _apart(gx, tgx, sums=sums)

    def composite(x, weight, gy, tx, tweight, tgy, dims, eps, centred):
        if x.numel() == 0:
            sums = (_fake_row(x, dims).zero_() for _ in range(4))
            return _fake(x), _fake(x), *sums
        at = _Primitive(x, weight, dims, eps, centred)
        gy = at.wide(gy)
        p = at.weighted(gy)
        pp = at.project(p)
        zero = torch.zeros_like(gy)
        dp, tgweight, tgbias = zero, zero, zero
        if tgy is not None:
            tgy = at.wide(tgy)
            dp, tgweight, tgbias = at.weighted(tgy), at.x * tgy, tgy
        if tweight is not None:
            dp = dp + at.wide(tweight) * gy
        tgx = at.r * at.project(dp)
        if tx is not None:
            tx = at.wide(tx)
            ptx = at.project(tx)
            bent = at.x * at.mean(p * ptx) + at.mean(at.x * tx) * pp + at.mean(at.x * p) * ptx
            tgx = tgx - at.r * at.r * bent
            tgweight = tgweight + at.r * ptx * gy
        sums = map(at.over_rows, (at.x * gy, gy, tgweight, tgbias))
        return tuple(t.to(x.dtype) for t in (at.r * pp, tgx, *sums))


norm = define(Norm)
norm_jvp = define(NormJvp)
norm_vjp = define(NormVjp)
norm_vjp_jvp = define(NormVjpJvp)
