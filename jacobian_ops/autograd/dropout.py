"""Rules of dropout and dropout_add: linear maps, so that VJP and JVP are the op itself.

Only the seed is saved; the mask is drawn again wherever it is needed.
"""

from __future__ import annotations

from .. import kernels
from ..kernels._arguments import result_like
from .activation import activation_jvp
from .rule import Rule, define, define_inplace, reverse_may_follow


def _fake(x, *_):
    return result_like(x, row_major=True)


class Dropout(Rule):
    """y = m * x."""

    schema = "dropout(Tensor x, Tensor seed, float p) -> Tensor"
    fake = _fake

    def kernel(x, seed, p, out=None):
        return kernels.dropout(x, p, seed, out=out)

    def save(args, y, needs):
        return (args[1],)

    def vjp(saved, consts, needs, gy):
        return dropout(gy, saved[0], *consts), None

    def jvp(primals, y, tangents):
        return dropout(tangents[0], *primals[1:])

    def dual(primals, tangents):
        (x, seed, p), tx = primals, tangents[0]
        if reverse_may_follow((x, tx)):  # which then keeps no more than the seed
            return dropout(*primals), dropout(tx, seed, p)
        return activation_jvp(x, tx, seed, "identity", (), p)


class DropoutAdd(Rule):
    """y = residual + m * x, the residual block's J = I + diag(m)."""

    schema = "dropout_add(Tensor x, Tensor residual, Tensor seed, float p) -> Tensor"
    fake = _fake

    def kernel(x, residual, seed, p):
        return kernels.dropout_add(x, residual, p, seed)

    def save(args, y, needs):
        return (args[2],)

    def vjp(saved, consts, needs, gy):
        gx = dropout(gy, saved[0], *consts) if needs[0] else None
        return gx, gy if needs[1] else None, None

    def jvp(primals, y, tangents):
        tx, tresidual, _ = tangents
        if tx is None:
            # A copy: a tangent may not be the very tensor that came in.
            return tresidual.clone()
        if tresidual is None:
            return dropout(tx, *primals[2:])
        return dropout_add(tx, tresidual, *primals[2:])

    def dual(primals, tangents):
        return dropout_add(*primals), DropoutAdd.jvp(primals, None, tangents)


dropout = define(Dropout)
dropout_inplace = define_inplace(Dropout)
dropout_add = define(DropoutAdd)
