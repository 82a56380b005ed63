"""Rules of attention.

The inputs, ``o`` and ``lse`` are saved; weights are recomputed in tiles.  Four ops are closed under
differentiation, as in :mod:`.norm`: the cotangents of ``attention_jvp`` and of ``attention_vjp``
are tangents of ``attention_vjp``.  ``o``, ``lse`` and their tangents enter the products as results
that are at hand, not as variables: the VJPs are those of the products as functions of q, k, v, the
bias, cotangents and tangents, and forward mode brings the tangents of the results along.
"""

from __future__ import annotations

import torch

from .. import kernels
from ..kernels.attention import laid_out_as, result_shape, wide
from .dropout import dropout
from .rule import Rule, add, define, needed

_QKV = "Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? bias, Tensor? seed"
_TANGENTS = "Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tbias"
_CONSTS = "float scale, bool causal, float p"
_GIVEN = 6  # arguments in _QKV


def _named(scale, causal, p):
    return dict(scale=scale, causal=causal, p=p)


def _fake_o(q, v):
    return laid_out_as(q, result_shape(q, v))


def _fake_row(q):
    return q.new_empty(q.shape[:-1], dtype=wide(q))


# ------------------------------------------------------------------- in elementary ops


class _Explicit:
    """Attention of some of the queries with its matrix of scores, in float32 or wider."""

    def __init__(self, q, k, v, keep, bias, seed, scale, causal, p, queries=slice(None)):
        self.scale, self.queries, self.multipliers = scale, queries, 1.0
        self.group = q.shape[-3] // max(k.shape[-3], 1)
        self.q, self.k, self.v = self.rows(q), self.keys(k), self.keys(v)
        s = scale * self.q @ self.k.mT
        if bias is not None:
            s = s + self.mask(bias)
        hidden = torch.zeros((), dtype=torch.bool, device=q.device)
        if keep is not None:
            hidden = ~self.mask(keep)
        if causal:
            seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            hidden = hidden | ~seen[queries]
        self.hidden = hidden | (s == -torch.inf)
        s = s.masked_fill(self.hidden, -torch.inf)
        none = self.hidden.all(-1, True)
        self.weights = s.masked_fill(none, 0).softmax(-1).masked_fill(none, 0)
        self.dropped = self.weights
        if seed is not None and p:
            ones = torch.ones((*q.shape[:-1], k.shape[-2]), dtype=s.dtype, device=q.device)
            self.multipliers = self.some(dropout(ones, seed, p))
            self.dropped = self.weights * self.multipliers
        self.o = self.dropped @ self.v

    @staticmethod
    def wide(t):
        return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t

    def rows(self, t):
        return self.some(self.wide(t))

    def some(self, t):
        # The older vmap has no rule for a view of everything.
        return t if self.queries == slice(None) else t[..., self.queries, :]

    def keys(self, t):
        return self.wide(t.repeat_interleave(self.group, -3) if self.group > 1 else t)

    def shared(self, g):
        """The cotangent of k or v, from that of every head's own."""
        return g.unflatten(-3, (-1, self.group)).sum(-3) if self.group > 1 else g

    def mask(self, t):
        return self.wide(t if t.shape[-2] == 1 else self.some(t))

    def score_tangent(self, tq, tk, tbias=None):
        ts = torch.zeros_like(self.weights)
        if tq is not None:
            ts = ts + self.scale * self.rows(tq) @ self.k.mT
        if tk is not None:
            ts = ts + self.scale * self.q @ self.keys(tk).mT
        if tbias is not None:
            ts = ts + self.mask(tbias)
        return ts.masked_fill(self.hidden, 0)

    def centred(self, ts):
        return ts - (self.weights * ts).sum(-1, True)

    def tangent(self, tq, tk, tv, tbias):
        to = (self.dropped * self.centred(self.score_tangent(tq, tk, tbias))) @ self.v
        return to if tv is None else to + self.dropped @ self.keys(tv)

    def weight_cotangent(self, go):
        return self.multipliers * (self.wide(go) @ self.v.mT)

    def score_cotangent(self, go):
        gp = self.weight_cotangent(go)
        return self.weights * self.centred(gp)

    def score_cotangent_tangent(self, go, tgo, tq, tk, tv, tbias):
        gp = self.weight_cotangent(go)
        tp = self.weights * self.centred(self.score_tangent(tq, tk, tbias))
        tgp = torch.zeros_like(gp) if tgo is None else self.weight_cotangent(tgo)
        if tv is not None:
            tgp = tgp + self.multipliers * (self.wide(go) @ self.keys(tv).mT)
        return tp * self.centred(gp) + self.weights * (self.centred(tgp) - (tp * gp).sum(-1, True))

    def of_bias(self, gs, bias):
        """Summed over what the bias was broadcast to."""
        dims = [i for i in range(-bias.dim(), 0) if bias.shape[i] == 1 and gs.shape[i] != 1]
        return (gs.sum(dims, True) if dims else gs).to(bias.dtype)

    def second(self, a, b):
        """The second derivative of o along the tangents a and b of (q, k, v, bias)."""
        (aq, ak, av, abias), (bq, bk, bv, bbias) = a, b
        ta = self.centred(self.score_tangent(aq, ak, abias))
        tb = self.centred(self.score_tangent(bq, bk, bbias))
        both = ta * tb
        for first, other in ((aq, bk), (bq, ak)):
            if first is not None and other is not None:
                term = self.scale * self.rows(first) @ self.keys(other).mT
                both = both + term.masked_fill(self.hidden, 0)
        result = (self.dropped * self.centred(both)) @ self.v
        for ts, values in ((ta, bv), (tb, av)):
            if values is not None:
                result = result + (self.dropped * ts) @ self.keys(values)
        return result


# Scores of a block of queries in the second forward derivative.
_BLOCK_ELEMENTS = 1 << 24


def _second(given, consts, a, b):
    """:meth:`_Explicit.second`, by blocks of queries: memory of O(keys)."""
    q, k = given[:2]
    rows = q.shape[-2]
    if given[5] is None:
        step = max(1, _BLOCK_ELEMENTS * rows // max(1, q[..., 0].numel() * k.shape[-2]))
    else:  # dropout's mask is drawn for all scores at once
        step = max(1, rows)
    parts = [
        _Explicit(*given, *consts, queries=slice(i, min(rows, i + step))).second(a, b)
        for i in range(0, max(1, rows), step)
    ]
    return torch.cat(parts, -2).to(q.dtype)


def _bias_gradients(given, tangents, consts, go, gto):
    """The gradients of (bias, tbias) in (o, to); without ``gto`` that of bias in o.

    A score's gradient is as large as the matrix of scores, and so is a bias.
    """
    bias = given[4]
    at = _Explicit(*given, *consts)
    if gto is None:
        return at.of_bias(at.score_cotangent(go), bias), None
    gbias = at.of_bias(at.score_cotangent_tangent(gto, go, *tangents), bias)
    return gbias, at.of_bias(at.score_cotangent(gto), bias)


def _zeros_like(t, other):
    return torch.zeros_like(other) if t is None else t


# --------------------------------------------------------------------------------- rules


class Attention(Rule):
    """o = dropout(softmax(scale * q k^T + bias)) v, and lse, for the products alone."""

    schema = f"attention({_QKV}, {_CONSTS}) -> (Tensor, Tensor)"

    def fake(q, k, v, *_):
        return _fake_o(q, v), _fake_row(q)

    def kernel(*args):
        return kernels.attention(*args[:_GIVEN], **_named(*args[_GIVEN:]))

    def save(args, out, needs):
        return *args[:_GIVEN], *out

    def vjp(saved, consts, needs, go, glse):
        given, (o, lse) = saved[:_GIVEN], saved[_GIVEN:]
        if go is None:
            return (None,) * _GIVEN
        gradients = attention_vjp(*given, o, lse, go, *consts)
        gbias = _bias_gradients(given, (), consts, go, None)[0] if needs[4] else None
        return needed(needs, (*gradients, None, gbias, None))

    def jvp(primals, out, tangents):
        return Attention.dual(primals, tangents)[1]

    def dual(primals, tangents):
        given, consts = primals[:_GIVEN], primals[_GIVEN:]
        tq, tk, tv, _, tbias, _ = tangents
        o, to, lse, mu = attention_jvp(*given, tq, tk, tv, tbias, *consts)
        return (o, lse), (to, mu)


class AttentionJvp(Rule):
    """o, its tangent, lse and its tangent.  Its VJP keeps a trained jvp in tiles."""

    schema = f"attention_jvp({_QKV}, {_TANGENTS}, {_CONSTS}) -> (Tensor, Tensor, Tensor, Tensor)"
    tangent_outputs = (1, 3)

    def fake(q, k, v, *_):
        return _fake_o(q, v), _fake_o(q, v), _fake_row(q), _fake_row(q)

    def kernel(*args):
        return kernels.attention_jvp(*args[:10], **_named(*args[10:]))

    def save(args, out, needs):
        return *args[:10], *out

    def vjp(saved, consts, needs, go, gto, glse, gmu):
        given, tangents, (o, to, lse, mu) = saved[:6], saved[6:10], saved[10:]
        if gto is not None:
            *gt, gq, gk, gv = attention_vjp_jvp(
                *given, *tangents, o, to, lse, mu, gto, go, *consts, True
            )
        elif go is not None:
            gq, gk, gv = attention_vjp(*given, o, lse, go, *consts)
            gt = None, None, None
        else:
            return (None,) * 10
        gbias = gtbias = None
        if needs[4] or needs[9]:
            gbias, gtbias = _bias_gradients(given, tangents, consts, go, gto)
        return needed(needs, (gq, gk, gv, None, gbias, None, *gt, gtbias))

    def jvp(primals, out, tangents):
        given, along, consts = primals[:6], primals[6:10], primals[10:]
        dq, dk, dv, _, dbias, _ = tangents[:6]

        def first(direction):
            if all(t is None for t in direction):
                return None
            return attention_jvp(*given, *direction, *consts)[1]

        direction = dq, dk, dv, dbias
        do = first(direction)
        dto = first(tangents[6:10])
        if do is not None and any(t is not None for t in along):
            dto = add(dto, _second(given, consts, along, direction))
        return do, dto, None, None

    def dual(primals, tangents):
        out = attention_jvp(*primals)
        return out, AttentionJvp.jvp(primals, out, tangents)


class AttentionVjp(Rule):
    """gq, gk and gv."""

    schema = (
        f"attention_vjp({_QKV}, Tensor o, Tensor lse, Tensor go, {_CONSTS}) "
        "-> (Tensor, Tensor, Tensor)"
    )

    def fake(q, k, v, *_):
        return tuple(laid_out_as(t, t.shape) for t in (q, k, v))

    def kernel(*args):
        return kernels.attention_vjp(*args[:9], **_named(*args[9:]))

    def save(args, out, needs):
        return args[:9]

    def vjp(saved, consts, needs, *h):
        given, go = saved[:6], saved[8]
        o, to, lse, mu = attention_jvp(*given, *h, None, *consts)
        gradients = (None, None, None)
        if any(needs[:3]):
            gradients = attention_vjp_jvp(
                *given, *h, None, o, to, lse, mu, go, None, *consts, False
            )[3:]
        gbias = None
        if needs[4]:
            gbias = _bias_gradients(given, (*h, None), consts, None, go)[0]
        return needed(needs, (*gradients, None, gbias, None, None, None, to))

    def jvp(primals, out, tangents):
        return AttentionVjp.dual(primals, tangents)[1]

    def dual(primals, tangents):
        given, (o, lse, go), consts = primals[:6], primals[6:9], primals[9:]
        tq, tk, tv, _, tbias, _, to, mu, tgo = tangents
        if tq is None and tk is None and tv is None and tbias is None:
            return attention_vjp(*primals), attention_vjp(*primals[:8], tgo, *consts)
        along = tq, tk, tv, tbias
        if to is None or mu is None:
            o, to, lse, mu = attention_jvp(*given, *along, *consts)
        out = attention_vjp_jvp(*given, *along, o, to, lse, mu, go, tgo, *consts, True)
        return out[:3], out[3:]


class AttentionVjpJvp(Rule):
    """attention_vjp and its tangent; without ``primal`` the former are empty."""

    schema = (
        f"attention_vjp_jvp({_QKV}, {_TANGENTS}, Tensor o, Tensor to, Tensor lse, Tensor mu, "
        f"Tensor go, Tensor? tgo, {_CONSTS}, bool primal) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    deferred = True

    def fake(q, k, v, *rest):
        tangents = [laid_out_as(t, t.shape) for t in (q, k, v)]
        primals = [torch.empty_like(t) if rest[-1] else q.new_empty(0) for t in tangents]
        return (*primals, *tangents)

    def kernel(*args):
        q, *_, primal = args
        out = kernels.attention_vjp_jvp(*args[:16], **_named(*args[16:19]), primal=primal)
        return tuple(q.new_empty(0) if t is None else t for t in out)

    def composite(*args):
        q, k, v, keep, bias, seed, tq, tk, tv, tbias, _, _, _, _, go, tgo, *consts, primal = args
        at = _Explicit(q, k, v, keep, bias, seed, *consts)
        go = at.wide(go)
        gs = at.score_cotangent(go)
        tgs = at.score_cotangent_tangent(go, tgo, tq, tk, tv, tbias)
        tgq, tgk = tgs @ at.k, tgs.mT @ at.q
        tgv = (at.dropped * at.centred(at.score_tangent(tq, tk, tbias))).mT @ go
        if tk is not None:
            tgq = tgq + gs @ at.keys(tk)
        if tq is not None:
            tgk = tgk + gs.mT @ at.rows(tq)
        if tgo is not None:
            tgv = tgv + at.dropped.mT @ at.wide(tgo)
        gradients = at.scale * tgq, at.scale * at.shared(tgk), at.shared(tgv)
        primals = (q.new_empty(0),) * 3
        if primal:
            gk, gv = at.shared(gs.mT @ at.q), at.shared(at.dropped.mT @ go)
            primals = at.scale * (gs @ at.k), at.scale * gk, gv
        return tuple(t.to(q.dtype) for t in (*primals, *gradients))

    @classmethod
    def vmap(cls, info, dims, *args):
        out, batched = super().vmap(info, dims, *args)
        return out, batched if args[-1] else (None,) * 3 + (0,) * 3


attention = define(Attention)
attention_jvp = define(AttentionJvp)
attention_vjp = define(AttentionVjp)
attention_vjp_jvp = define(AttentionVjpJvp)
