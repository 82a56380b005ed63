"""Attention and its products, in tiles: no matrix of scores is ever stored.

``o = dropout(softmax(s)) v`` with ``s = scale * q k^T + bias``, and ``-inf`` where ``keep`` is
False or, with ``causal``, where the key's index is above the query's.  A query that sees no key
gives 0, with derivatives of 0.

q is (*batch, heads, queries, d), k (*batch, kv_heads, keys, d), v (*batch, kv_heads, keys, dv), of
any strides; ``kv_heads`` divides ``heads``, and each of them serves ``heads / kv_heads`` adjacent
heads of q.  ``keep`` (bool) and ``bias`` have as many dimensions as q, and broadcast to (*batch,
heads, queries, keys).  Dropout's element numbers are those of that shape; ``seed`` is an int or an
int64 tensor of a leading part of ``batch``.

``lse`` and ``mu`` are (*batch, heads, queries), float64 for float64 and float32 otherwise: the
logarithm of the sum of each row's exponentials (+inf where there are none) and its tangent.

References: Dao et al., FlashAttention, 2022, arXiv:2205.14135; Lu and Song, 2024, arXiv:2410.11081.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _backend
from . import _gemm
from ._arguments import arrays_too, check_dtype, check_same, check_seed, name_of, seed_tensor


def wide(t: Tensor) -> torch.dtype:
    """The dtype of a row's statistics."""
    return torch.promote_types(t.dtype, torch.float32)


def result_shape(q: Tensor, v: Tensor) -> tuple:
    """The shape of attention's result."""
    return (*q.shape[:-1], v.shape[-1])


def laid_out_as(t: Tensor, shape) -> Tensor:
    """A new tensor; heads inside rows, (*batch, rows, heads, width), where those of ``t`` are.

    Kernels and the fake rules of torch.compile share it, so that strides agree.
    """
    if t.dim() > 2 and t.stride(-3) < t.stride(-2):
        *batch, heads, rows, width = shape
        return t.new_empty((*batch, rows, heads, width)).transpose(-3, -2)
    return t.new_empty(tuple(shape))


class _Call:
    """One call's checks, and its arguments as kernels take them."""

    def __init__(self, op, q, k, v, keep, bias, seed, scale, causal, p):
        self.op, self.q, self.v = op, q, v
        check_dtype(op, "q", q)
        check_same(op, "q", q, "k", k)
        check_same(op, "q", q, "v", v)
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.dim() < 3 or t.dim() != q.dim():
                raise RuntimeError(
                    f"{op}: {name} has shape {list(t.shape)}; allowed: (*batch, heads, rows, "
                    f"width), with as many dimensions for q, k and v"
                )
        *batch, heads, queries, width = q.shape
        kv_heads, keys = k.shape[-3:-1]
        for name, t, shape in (
            ("k", k, (*batch, kv_heads, keys, width)),
            ("v", v, (*batch, kv_heads, keys, v.shape[-1])),
        ):
            if t.shape != shape:
                raise RuntimeError(f"{op}: {name} has shape {list(t.shape)}; allowed: {[*shape]}")
        if heads % kv_heads if kv_heads else heads:
            raise RuntimeError(
                f"{op}: k has {kv_heads} heads; allowed: a divisor of the {heads} heads of q"
            )
        if not math.isfinite(scale):
            raise ValueError(f"{op}: scale is {scale}; it must be finite")
        self.scores = (*batch, heads, queries, keys)
        self.rows = q.shape[:-1]
        keep = None if keep is None else self._mask("keep", keep)
        self.bias = None if bias is None else self._mask("bias", bias)
        seed = seed_tensor(op, seed, p, q)
        if seed is not None:
            if seed.dim() > len(batch):
                raise RuntimeError(
                    f"{op}: seed has shape {list(seed.shape)}; allowed: a leading part of {batch}"
                )
            seed = check_seed(op, seed, q)
        self.mask = _backend.mask(seed, p) if p else None
        self.keeps = [seed]  # memory that only addresses are left of
        self.head = (scale, causal, self.heads(keep), self.heads(self.bias))
        self.qkv = tuple(map(self.heads, (q, k, v)))

    def _mask(self, name, t):
        if name == "keep" and t.dtype != torch.bool:
            raise RuntimeError(f"{self.op}: keep has dtype {name_of(t.dtype)}; allowed: bool")
        if name != "keep":
            check_same(self.op, "q", self.q, name, t)
        fits = t.dim() == len(self.scores) and all(
            n in (1, m) for n, m in zip(t.shape, self.scores, strict=True)
        )
        if not fits:
            raise RuntimeError(
                f"{self.op}: {name} has shape {list(t.shape)}; allowed: what broadcasts to "
                f"{list(self.scores)}, with as many dimensions"
            )
        return t.expand(self.scores)

    def heads(self, t):
        """(address, extent, dtype, sizes, strides) of a tensor with one batch dimension."""
        if t is None:
            return None
        t = t.resolve_neg().reshape(math.prod(t.shape[:-3]), *t.shape[-3:])
        self.keeps.append(t)
        return _backend.heads(t)

    def optional(self, name, t, shape):
        """A tensor of the dtype of q and of that shape, or None."""
        if t is None:
            return None
        check_same(self.op, "q", self.q, name, t)
        if t.shape != shape:
            raise RuntimeError(
                f"{self.op}: {name} has shape {list(t.shape)}; it must be {list(shape)}"
            )
        return self.heads(t)

    def tangents(self, k, tq, tk, tv, tbias):
        if tbias is not None:
            if self.bias is None:
                raise RuntimeError(f"{self.op}: tbias is given; allowed: None without a bias")
            tbias = self._mask("tbias", tbias)
        return (
            self.optional("tq", tq, self.q.shape),
            self.optional("tk", tk, k.shape),
            self.optional("tv", tv, self.v.shape),
            self.heads(tbias),
        )

    def statistic(self, name, t):
        """A number a query, as computed before."""
        if t.shape != self.rows or t.dtype != wide(self.q):
            raise RuntimeError(
                f"{self.op}: {name} has shape {list(t.shape)} and dtype {name_of(t.dtype)}; it "
                f"must be {list(self.rows)} and {name_of(wide(self.q))}"
            )
        t = t.contiguous()
        self.keeps.append(t)
        return _backend.buffer(t)

    def result(self, like, shape=None):
        """A new tensor, and its description."""
        t = laid_out_as(like, like.shape if shape is None else shape)
        flat = t.view(math.prod(t.shape[:-3]), *t.shape[-3:])
        return t, _backend.heads(flat)

    def statistics(self, kinds=()):
        t = self.q.new_empty((*kinds, *self.rows), dtype=wide(self.q))
        return t, _backend.buffer(t)

    def run(self, *args):
        _backend.run(self.op, "q", self.q, self.op, self.head, *self.qkv, *args, self.mask)

    @property
    def empty(self):
        return math.prod(self.rows) == 0


def _torch_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's kernel is to run, whose products use AMX; in a VJP ours is ahead."""
    return (
        _gemm.torch_is_faster_for_attention(q)
        and q.dim() == 4
        and q.shape[:2] == k.shape[:2]
        and q.shape[-1] == v.shape[-1] > 0
        and k.shape[-2] > 0
        and all(t.stride(-1) == 1 and not t.is_neg() for t in (q, k, v))
    )


def _by_torch(q, k, v, scale, causal):
    with _gemm.as_they_are():
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, causal, scale=scale
        )
        result = laid_out_as(q, o.shape)
        return (o if o.stride() == result.stride() else result.copy_(o)), lse.contiguous()


@arrays_too
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    seed=None,
    *,
    scale: float,
    causal: bool = False,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse``.

    Args:
        q: (*batch, heads, queries, d); float64, float32, bfloat16 or float16.
        k: (*batch, kv_heads, keys, d).
        v: (*batch, kv_heads, keys, dv).
        keep: False hides a key from a query; bool.
        bias: Added to the scores.
        seed: Of the dropout mask.
        scale: A finite factor of the scores.
        causal: Whether a query sees only keys up to its own index.
        p: Dropout probability of the weights.

    Returns:
        ``o`` (*batch, heads, queries, dv), laid out as q, and ``lse``.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit.
        ValueError: ``p`` is outside [0, 1], or ``scale`` not finite.
    """
    call = _Call("attention", q, k, v, keep, bias, seed, scale, causal, p)
    if keep is bias is None and not p and not call.empty and _torch_is_faster(q, k, v):
        return _by_torch(q, k, v, scale, causal)
    (o, o_), (lse, lse_) = call.result(q, result_shape(q, v)), call.statistics()
    if not call.empty:
        call.run(o_, lse_)
    return o, lse


@arrays_too
def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    seed=None,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    tbias: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``o``, its tangent, ``lse`` and its tangent ``mu``, in one sweep; absent tangents are None.

    With the tangent of scores ``ts = scale * (tq k^T + q tk^T) + tbias``, the softmax ``P`` and
    what dropout makes of it, ``A``: ``to = (A * ts) v - mu * o + A tv``, ``mu = sum_j P * ts``.
    """
    call = _Call("attention_jvp", q, k, v, keep, bias, seed, scale, causal, p)
    tangents = call.tangents(k, tq, tk, tv, tbias)
    shape = result_shape(q, v)
    (o, o_), (to, to_) = call.result(q, shape), call.result(q, shape)
    (lse, lse_), (mu, mu_) = call.statistics(), call.statistics()
    if not call.empty:
        call.run(*tangents, o_, to_, lse_, mu_)
    return o, to, lse, mu


@arrays_too
def attention_vjp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    seed,
    o: Tensor,
    lse: Tensor,
    go: Tensor,
    *,
    scale: float,
    causal: bool = False,
    p: float = 0.0,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``gq, gk, gv`` from the results ``o`` and ``lse`` of :func:`attention`.

    With dropout's multipliers ``m``, ``gs = P * (m * (go v^T) - sum(go * o))``: ``gq = scale * gs
    k``, ``gk = scale * gs^T q``, ``gv = A^T go``.  What ``needs`` says no to is None.
    """
    call = _Call("attention_vjp", q, k, v, keep, bias, seed, scale, causal, p)
    shape = result_shape(q, v)
    inputs = (
        call.optional("o", o, shape),
        call.optional("go", go, shape),
        call.statistic("lse", lse),
    )
    delta, delta_ = call.statistics()
    results = [
        call.result(t) if need else (None, None) for t, need in zip((q, k, v), needs, strict=True)
    ]
    out = tuple(t for t, _ in results)
    if call.empty:
        return _zero(out)
    call.run(*inputs, delta_, *(description for _, description in results))
    return out


@arrays_too
def attention_vjp_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    seed,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    tbias: Tensor | None,
    o: Tensor,
    to: Tensor,
    lse: Tensor,
    mu: Tensor,
    go: Tensor,
    tgo: Tensor | None,
    *,
    scale: float,
    causal: bool = False,
    p: float = 0.0,
    primal: bool = True,
) -> tuple[Tensor | None, ...]:
    """:func:`attention_vjp` and its tangent, from the results of :func:`attention_jvp`.

    Returns:
        ``gq, gk, gv``, or None for each without ``primal``, and ``tgq, tgk, tgv``.
    """
    call = _Call("attention_vjp_jvp", q, k, v, keep, bias, seed, scale, causal, p)
    shape = result_shape(q, v)
    tangents = call.tangents(k, tq, tk, tv, tbias)
    inputs = (
        call.optional("o", o, shape),
        call.optional("to", to, shape),
        call.optional("go", go, shape),
        call.optional("tgo", tgo, shape),
        call.statistic("lse", lse),
        call.statistic("mu", mu),
    )
    delta, delta_ = call.statistics((2,))
    results = [call.result(t) if primal else (None, None) for t in (q, k, v)]
    results += [call.result(t) for t in (q, k, v)]
    out = tuple(t for t, _ in results)
    if call.empty:
        return _zero(out)
    call.run(*tangents, *inputs, delta_, *(description for _, description in results))
    return out


def _zero(results):
    return tuple(None if t is None else t.zero_() for t in results)
