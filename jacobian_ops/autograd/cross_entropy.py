"""Rules of cross_entropy, one loss a row.

Logits, target and class weights are saved, and neither the softmax nor its sums: they are
recomputed.  Four ops are closed under differentiation in the logits: the cotangents of
``cross_entropy_jvp`` and of ``cross_entropy_vjp`` are tangents of ``cross_entropy_vjp``, as the
second derivative is symmetric.  The loss is linear in probabilities: their derivatives are
log_softmax and its products.
"""

from __future__ import annotations

import torch

from .. import kernels
from ..kernels._arguments import result_like
from ..kernels.cross_entropy import losses_like, wide
from . import softmax as _softmax
from .rule import Rule, add, define


def _fake(x, *_):
    return result_like(x, row_major=True)


class _Loss(Rule):
    """Arguments are x, target, class weights, then others; dim, ignore_index, smoothing."""

    @classmethod
    def vmap(cls, info, dims, *args):
        n = cls.tensors
        if dims[2] is not None:  # class weights of each sample's own: one call for each
            results = [
                cls.op(
                    *(a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True))
                )
                for i in range(info.batch_size)
            ]
            if isinstance(results[0], tuple):
                return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
            return torch.stack(results), 0
        fronted = (
            a
            if a is None or i == 2
            else a.expand(info.batch_size, *a.shape)
            if d is None
            else a.movedim(d, 0)
            for i, (a, d) in enumerate(zip(args[:n], dims[:n], strict=True))
        )
        out = cls.op(*fronted, args[n] + 1, *args[n + 1 :])
        return out, (0,) * len(out) if isinstance(out, tuple) else 0


def _refuse(needed):
    """Class weights have no derivative, as in torch; nothing may pass for zero."""
    if needed:
        raise NotImplementedError(
            "cross_entropy: weight has no derivative; allowed: one that does not require grad and "
            "has no tangent"
        )


def _wide(t):
    return t.to(wide(t.dtype))


def _keep(weight, ndim, dim, smoothing):
    """What a probability's weight is in q, ready to be multiplied by something like x."""
    if weight is None:
        return 1.0 - smoothing
    return weight.reshape([-1 if i == dim else 1 for i in range(ndim)]) * (1.0 - smoothing)


class _Probabilities:
    """How losses depend on probabilities: ``dloss/dp = keep * -log s``, in float32 or wider."""

    def __init__(self, x, weight, dim, ignore_index, smoothing):
        self.dim = dim
        self.keep = _keep(weight, x.dim(), dim, smoothing)
        self.logs = _softmax.log_softmax(_wide(x), dim)

    def gradient(self, g):
        """Of <g, loss>."""
        return -g.unsqueeze(self.dim) * self.keep * self.logs

    def gradient_along(self, g, tx):
        """Of <g, tloss>."""
        tlogs = _softmax.log_softmax_tangent(self.logs, _wide(tx), self.dim)
        return -g.unsqueeze(self.dim) * self.keep * tlogs

    def tangent(self, tp):
        """Of the loss."""
        return -(self.keep * self.logs * _wide(tp)).sum(self.dim)

    def tangent_along(self, tp, tx):
        """Of tloss."""
        tlogs = _softmax.log_softmax_tangent(self.logs, _wide(tx), self.dim)
        return -(self.keep * tlogs * _wide(tp)).sum(self.dim)

    def tangent_of_gradient(self, g, tp):
        """Of gx."""
        tq = self.keep * _wide(tp)
        tgx = self.logs.exp() * tq.sum(self.dim, True) - tq
        return g.unsqueeze(self.dim) * tgx


class CrossEntropy(_Loss):
    """loss = A * logsumexp(x) - <q, x>."""

    schema = (
        "cross_entropy(Tensor x, Tensor target, Tensor? weight, int dim, int ignore_index, "
        "float smoothing) -> Tensor"
    )

    def fake(x, target, weight, dim, *_):
        return losses_like(x, dim)

    def kernel(*args):
        return kernels.cross_entropy(*args)

    def save(args, loss, needs):
        return args[:3]

    def vjp(saved, consts, needs, g):
        _refuse(needs[2])
        x, target, weight = saved
        gx = cross_entropy_vjp(*saved, g, *consts) if needs[0] else None
        gtarget = None
        if needs[1]:
            gtarget = _Probabilities(x, weight, *consts).gradient(g).to(target.dtype)
        return gx, gtarget, None

    def jvp(primals, loss, tangents):
        return CrossEntropy.dual(primals, tangents)[1]

    def dual(primals, tangents):
        (x, target, weight, *consts), (tx, ttarget, tweight) = primals, tangents
        _refuse(tweight is not None)
        tloss = None
        if tx is None:
            loss = cross_entropy(*primals)
        else:
            loss, tloss = cross_entropy_jvp(x, target, weight, tx, *consts)
        if ttarget is not None:
            tloss = add(tloss, _Probabilities(x, weight, *consts).tangent(ttarget))
        return loss, tloss


class CrossEntropyJvp(_Loss):
    """loss and tloss = A * <s, tx> - <q, tx>.  Its VJP keeps a trained jvp fused."""

    schema = (
        "cross_entropy_jvp(Tensor x, Tensor target, Tensor? weight, Tensor tx, int dim, "
        "int ignore_index, float smoothing) -> (Tensor, Tensor)"
    )
    tangent_outputs = (1,)

    def fake(x, target, weight, tx, dim, *_):
        return losses_like(x, dim), losses_like(x, dim)

    def kernel(*args):
        return kernels.cross_entropy_jvp(*args)

    def save(args, out, needs):
        return args[:4]

    def vjp(saved, consts, needs, g, gt):
        _refuse(needs[2])
        x, target, weight, tx = saved
        gx = gtx = gtarget = None
        if gt is None:
            gx = cross_entropy_vjp(x, target, weight, g, *consts) if needs[0] else None
        elif needs[0]:
            gtx, gx = cross_entropy_vjp_jvp(x, target, weight, gt, tx, g, *consts)
        elif needs[3]:
            gtx = cross_entropy_vjp(x, target, weight, gt, *consts)
        if needs[1]:
            of = _Probabilities(x, weight, *consts)
            gtarget = None if g is None else of.gradient(g)
            gtarget = add(gtarget, None if gt is None else of.gradient_along(gt, tx))
            gtarget = gtarget.to(target.dtype)
        return gx, gtarget, None, gtx if needs[3] else None

    def jvp(primals, out, tangents):
        (x, target, weight, tx, *consts), (dx, dtarget, dweight, dtx) = primals, tangents
        _refuse(dweight is not None)

        def along(direction):
            return cross_entropy_jvp(x, target, weight, direction, *consts)[1]

        dloss = dtloss = None
        if dtx is not None:
            dtloss = along(dtx)
        if dx is not None:
            dloss = along(dx)
            one = torch.ones_like(dloss)
            bent = cross_entropy_vjp_jvp(x, target, weight, one, tx, None, *consts)[1]
            dtloss = add(dtloss, (_wide(bent) * _wide(dx)).sum(consts[0]))
        if dtarget is not None:
            of = _Probabilities(x, weight, *consts)
            dloss = add(dloss, of.tangent(dtarget))
            dtloss = add(dtloss, of.tangent_along(dtarget, tx))
        return dloss, dtloss

    def dual(primals, tangents):
        out = cross_entropy_jvp(*primals)
        return out, CrossEntropyJvp.jvp(primals, out, tangents)


class CrossEntropyVjp(_Loss):
    """gx = g * (A * s - q)."""

    schema = (
        "cross_entropy_vjp(Tensor x, Tensor target, Tensor? weight, Tensor g, int dim, "
        "int ignore_index, float smoothing) -> Tensor"
    )
    fake = _fake

    def kernel(*args):
        return kernels.cross_entropy_vjp(*args)

    def save(args, gx, needs):
        return args[:4]

    def vjp(saved, consts, needs, h):
        _refuse(needs[2])
        x, target, weight, g = saved
        gx = gtarget = gg = None
        if needs[0]:
            gx = cross_entropy_vjp_jvp(x, target, weight, g, h, None, *consts)[1]
        if needs[1]:
            gtarget = _Probabilities(x, weight, *consts).gradient_along(g, h).to(target.dtype)
        if needs[3]:
            gg = cross_entropy_jvp(x, target, weight, h, *consts)[1]
        return gx, gtarget, None, gg

    def jvp(primals, gx, tangents):
        return CrossEntropyVjp.dual(primals, tangents)[1]

    def dual(primals, tangents):
        (x, target, weight, g, *consts), (tx, ttarget, tweight, tg) = primals, tangents
        _refuse(tweight is not None)
        tgx = None
        if tx is not None:
            gx, tgx = cross_entropy_vjp_jvp(x, target, weight, g, tx, tg, *consts)
        else:
            gx = cross_entropy_vjp(*primals)
            if tg is not None:
                tgx = cross_entropy_vjp(x, target, weight, tg, *consts)
        if ttarget is not None:
            more = _Probabilities(x, weight, *consts).tangent_of_gradient(g, ttarget)
            tgx = add(tgx, more.to(x.dtype))
        return gx, tgx


class CrossEntropyVjpJvp(_Loss):
    """cross_entropy_vjp and its tangent along (tx, tg), in one pass."""

    schema = (
        "cross_entropy_vjp_jvp(Tensor x, Tensor target, Tensor? weight, Tensor g, Tensor tx, "
        "Tensor? tg, int dim, int ignore_index, float smoothing) -> (Tensor, Tensor)"
    )

    def fake(x, *_):
        return _fake(x), _fake(x)

    def kernel(*args):
        return kernels.cross_entropy_vjp_jvp(*args)

    def composite(x, target, weight, g, tx, tg, dim, ignore_index, smoothing):
        s = _softmax.softmax(_wide(x), dim, 1.0)
        q = _wanted(s, target, weight, dim, ignore_index, smoothing)
        total = q.sum(dim, True)
        gx, g, tx = total * s - q, g.unsqueeze(dim), _wide(tx)
        tgx = g * total * s * (tx - (s * tx).sum(dim, True))
        if tg is not None:
            tgx = tgx + tg.unsqueeze(dim) * gx
        return (g * gx).to(x.dtype), tgx.to(x.dtype)


def _wanted(s, target, weight, dim, ignore_index, smoothing):
    """q, in the dtype of ``s``."""
    even = smoothing / s.shape[dim]
    keep = _keep(weight, s.dim(), dim, 0.0)
    if target.is_floating_point():
        return keep * ((1 - smoothing) * target.to(s.dtype) + even)
    line = [-1 if i == dim else 1 for i in range(s.dim())]
    target = target.unsqueeze(dim)
    here = torch.arange(s.shape[dim], device=s.device).reshape(line) == target
    q = keep * ((1 - smoothing) * here.to(s.dtype) + even)
    return torch.where(target == ignore_index, torch.zeros_like(q), q)


cross_entropy = define(CrossEntropy)
cross_entropy_jvp = define(CrossEntropyJvp)
cross_entropy_vjp = define(CrossEntropyVjp)
cross_entropy_vjp_jvp = define(CrossEntropyVjpJvp)
