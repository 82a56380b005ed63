"""The rule of rotary position embedding.

It is linear in ``x``, and in ``(cos, sin)``.  The VJP of ``x`` is the inverse rotation; that of
``cos`` and ``sin``, which are seldom learnt, is made of native ops.
"""

from __future__ import annotations

import torch

from .. import kernels
from ..kernels.rotary import rotary_result
from .rule import Rule, define


def _pairs(x, half, interleaved):
    """The two elements of every pair, in float32 or wider."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def _of_table(g, table):
    """A cotangent of what ``table`` was broadcast to, as one of ``table``."""
    dims = [d for d in range(table.dim() - 1) if table.shape[d] == 1 != g.shape[d]]
    return (g.sum(dims, True) if dims else g).to(table.dtype)


class Rotary(Rule):
    """Pairs (a, b) of ``x`` become (a cos - b sin, b cos + a sin); ``inverse`` negates sin."""

    schema = "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor"

    def fake(x, *_):
        return rotary_result(x)

    def kernel(*args):
        return kernels.rotary(*args)

    def save(args, y, needs):
        x, cos, sin, *_ = args
        return x if needs[1] or needs[2] else None, cos, sin

    def vjp(saved, consts, needs, gy):
        (x, cos, sin), (interleaved, inverse) = saved, consts
        gx = rotary(gy, cos, sin, interleaved, not inverse) if needs[0] else None
        gcos = gsin = None
        if needs[1] or needs[2]:
            half = cos.shape[-1]
            (a, b), (ga, gb) = (_pairs(t, half, interleaved) for t in (x, gy))
            gcos = _of_table(ga * a + gb * b, cos)
            gsin = _of_table(ga * b - gb * a if inverse else gb * a - ga * b, sin)
        return gx, gcos if needs[1] else None, gsin if needs[2] else None

    def jvp(primals, y, tangents):
        x, cos, sin, *consts = primals
        tx, tcos, tsin = tangents
        along_x = None if tx is None else rotary(tx, cos, sin, *consts)
        if tcos is None and tsin is None:
            return along_x
        tcos = torch.zeros_like(cos) if tcos is None else tcos
        tsin = torch.zeros_like(sin) if tsin is None else tsin
        rotated = 2 * cos.shape[-1]
        along_tables = torch.nn.functional.pad(
            rotary(x[..., :rotated], tcos, tsin, *consts), (0, x.shape[-1] - rotated)
        )
        return along_tables if along_x is None else along_x + along_tables

    def dual(primals, tangents):
        return rotary(*primals), Rotary.jvp(primals, None, tangents)


rotary = define(Rotary)
