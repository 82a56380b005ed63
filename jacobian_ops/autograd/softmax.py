"""Rules of softmax, log_softmax and softmax_dropout.

Softmax saves ``y``; ``J = scale * (diag(y) - y y^T)`` is symmetric, so VJP and tangent-only JVP are
one op.  log_softmax saves ``y``; ``J = I - 1 s^T``, ``s = exp(y)``.  softmax_dropout saves ``x``
and the seed: its VJP recomputes the probabilities in cache, so the forward writes one tensor.
"""

from __future__ import annotations

from .. import kernels
from ..kernels._arguments import result_like
from .dropout import dropout
from .rule import Rule, add, define, front


class _Rows(Rule):
    """An op along one dimension: ``dim`` is counted from the front, first of the constants."""

    @classmethod
    def vmap(cls, info, dims, *args):
        n = cls.tensors
        args = front(info, dims[:n], args[:n]) + (args[n] + 1, *args[n + 1 :])
        out = cls.op(*args)
        return out, (0,) * len(out) if isinstance(out, tuple) else 0


def _fake(x, *_):
    return result_like(x, row_major=True)


def _fake2(x, *_):
    return _fake(x), _fake(x)


class Softmax(_Rows):
    """y = softmax(scale * x)."""

    schema = "softmax(Tensor x, int dim, float scale) -> Tensor"
    fake = _fake

    def kernel(x, dim, scale):
        return kernels.softmax(x, dim, scale=scale)

    def save(args, y, needs):
        return (y,)

    def vjp(saved, consts, needs, gy):
        return (softmax_vjp(saved[0], gy, *consts),)

    def jvp(primals, y, tangents):
        return softmax_vjp(y, tangents[0], *primals[1:])

    def dual(primals, tangents):
        return softmax_jvp(primals[0], tangents[0], *primals[1:])


class SoftmaxVjp(_Rows):
    """gx = scale * y * (gy - <y, gy>)."""

    schema = "softmax_vjp(Tensor y, Tensor gy, int dim, float scale) -> Tensor"
    fake = _fake

    def kernel(y, gy, dim, scale):
        return kernels.softmax_vjp(y, gy, dim, scale=scale)

    def save(args, gx, needs):
        return args[:2]

    def along_y(y, gy, h, dim, scale):
        """The gradient of <h, gx> in y."""
        hy = h * (gy - (y * gy).sum(dim, True)) - gy * (y * h).sum(dim, True)
        return hy if scale == 1.0 else scale * hy

    def vjp(saved, consts, needs, h):
        y, gy = saved
        if needs[0]:
            return softmax_vjp_vjp(y, gy, h, *consts)
        return None, softmax_vjp(y, h, *consts)

    def jvp(primals, gx, tangents):
        y, gy, dim, scale = primals
        ty, tgy = tangents
        along_y = None
        if ty is not None:
            along_y = ty * (gy - (y * gy).sum(dim, True)) - y * (ty * gy).sum(dim, True)
            along_y = along_y if scale == 1.0 else scale * along_y
        return add(along_y, None if tgy is None else softmax_vjp(y, tgy, dim, scale))

    def dual(primals, tangents):
        y, gy, *consts = primals
        return softmax_vjp_jvp(y, gy, *tangents, *consts)


class SoftmaxJvp(_Rows):
    """y = softmax(scale * x) and ty = scale * y * (tx - <y, tx>).

    Its own VJP keeps a trained jvp fused.
    """

    schema = "softmax_jvp(Tensor x, Tensor tx, int dim, float scale) -> (Tensor, Tensor)"
    tangent_outputs = (1,)
    fake = _fake2

    def kernel(x, tx, dim, scale):
        return kernels.softmax_jvp(x, tx, dim, scale=scale)

    def save(args, out, needs):
        return out[0], args[1]

    def vjp(saved, consts, needs, gy, gty):
        y, tx = saved
        gtx = None
        if gty is not None:
            hy, gtx = SoftmaxVjp.vjp(saved, consts, needs, gty)
            gy = add(gy, hy)
        return softmax_vjp(y, gy, *consts) if needs[0] and gy is not None else None, gtx

    def jvp(primals, out, tangents):
        (_, tx, *consts), (dx, dtx), y = primals, tangents, out[0]
        dy = None if dx is None else softmax_vjp(y, dx, *consts)
        return dy, SoftmaxVjp.jvp((y, tx, *consts), None, (dy, dtx))

    def dual(primals, tangents):
        (x, tx, *consts), (dx, dtx) = primals, tangents
        if dx is None:
            y, ty = softmax_jvp(*primals)
            return (y, ty), (None, softmax_vjp(y, dtx, *consts))
        y, dy = softmax_jvp(x, dx, *consts)
        ty, dty = softmax_vjp_jvp(y, tx, dy, dtx, *consts)
        return (y, ty), (dy, dty)

    @classmethod
    def vmap(cls, info, dims, x, tx, dim, scale):
        if dims[0] is None:  # many tangents at one point (jacfwd): the primal once
            y = softmax(x, dim, scale)
            batched = front(info, (None, dims[1]), (y, tx))
            return (y, softmax_vjp(*batched, dim + 1, scale)), (None, 0)
        return super().vmap(info, dims, x, tx, dim, scale)


class SoftmaxVjpVjp(_Rows):
    """The cotangents of y and gy in softmax_vjp, in one pass."""

    schema = (
        "softmax_vjp_vjp(Tensor y, Tensor gy, Tensor h, int dim, float scale) -> (Tensor, Tensor)"
    )
    fake = _fake2

    def kernel(y, gy, h, dim, scale):
        return kernels.softmax_vjp_vjp(y, gy, h, dim, scale=scale)

    def composite(y, gy, h, dim, scale):
        return SoftmaxVjp.along_y(y, gy, h, dim, scale), softmax_vjp(y, h, dim, scale)


class SoftmaxVjpJvp(_Rows):
    """softmax_vjp and its tangent along (ty, tgy), in one pass."""

    schema = (
        "softmax_vjp_jvp(Tensor y, Tensor gy, Tensor? ty, Tensor? tgy, int dim, float scale)"
        " -> (Tensor, Tensor)"
    )
    fake = _fake2

    def kernel(y, gy, ty, tgy, dim, scale):
        return kernels.softmax_vjp_jvp(y, gy, ty, tgy, dim, scale=scale)

    def composite(y, gy, ty, tgy, dim, scale):
        primals = (y, gy, dim, scale)
        return softmax_vjp(*primals), SoftmaxVjp.jvp(primals, None, (ty, tgy))


class LogSoftmax(_Rows):
    """y = x - logsumexp(x)."""

    schema = "log_softmax(Tensor x, int dim) -> Tensor"
    fake = _fake

    def kernel(x, dim):
        return kernels.log_softmax(x, dim)

    def save(args, y, needs):
        return (y,)

    def vjp(saved, consts, needs, gy):
        return (log_softmax_vjp(saved[0], gy, *consts),)

    def jvp(primals, y, tangents):
        return log_softmax_tangent(y, tangents[0], primals[1])

    def dual(primals, tangents):
        return log_softmax_jvp(primals[0], tangents[0], primals[1])


class LogSoftmaxVjp(_Rows):
    """gx = gy - exp(y) * sum(gy)."""

    schema = "log_softmax_vjp(Tensor y, Tensor gy, int dim) -> Tensor"
    fake = _fake

    def kernel(y, gy, dim):
        return kernels.log_softmax_vjp(y, gy, dim)

    def save(args, gx, needs):
        return args[:2]

    def vjp(saved, consts, needs, h):
        y, gy = saved
        if needs[0]:
            return log_softmax_vjp_vjp(y, gy, h, *consts)
        return None, log_softmax_tangent(y, h, *consts)

    def jvp(primals, gx, tangents):
        (y, gy, dim), (ty, tgy) = primals, tangents
        along_y = None if ty is None else -y.exp() * ty * gy.sum(dim, True)
        return add(along_y, None if tgy is None else log_softmax_vjp(y, tgy, dim))

    def dual(primals, tangents):
        y, gy, dim = primals
        return log_softmax_vjp_jvp(y, gy, *tangents, dim)


class LogSoftmaxTangent(_Rows):
    """ty = tx - <exp(y), tx>: the transpose of log_softmax_vjp in its second argument."""

    schema = "log_softmax_tangent(Tensor y, Tensor tx, int dim) -> Tensor"
    fake = _fake

    def kernel(y, tx, dim):
        return kernels.log_softmax_tangent(y, tx, dim)

    def composite(y, tx, dim):
        return tx - (y.exp() * tx).sum(dim, True)


class LogSoftmaxJvp(_Rows):
    """y = log_softmax(x), ty = tx - <exp(y), tx>.  Its VJP keeps a trained jvp fused."""

    schema = "log_softmax_jvp(Tensor x, Tensor tx, int dim) -> (Tensor, Tensor)"
    tangent_outputs = (1,)
    fake = _fake2

    def kernel(x, tx, dim):
        return kernels.log_softmax_jvp(x, tx, dim)

    def save(args, out, needs):
        return out[0], args[1]

    def vjp(saved, consts, needs, gy, gty):
        (y, tx), (dim,) = saved, consts
        gtx = None
        if gty is not None:
            gtx = log_softmax_vjp(y, gty, dim) if needs[1] else None
            if needs[0]:
                gy = add(gy, -y.exp() * tx * gty.sum(dim, True))
        return log_softmax_vjp(y, gy, dim) if needs[0] and gy is not None else None, gtx

    def jvp(primals, out, tangents):
        (_, tx, dim), (dx, dtx), y = primals, tangents, out[0]
        dy = None if dx is None else log_softmax_tangent(y, dx, dim)
        dty = None if dtx is None else log_softmax_tangent(y, dtx, dim)
        along_y = None if dy is None else -(y.exp() * dy * tx).sum(dim, True).expand_as(y)
        return dy, add(dty, along_y)

    def dual(primals, tangents):
        (x, tx, dim), dx = primals, tangents[0]
        if dx is None:
            out = log_softmax_jvp(*primals)
        else:
            y, dy = log_softmax_jvp(x, dx, dim)
            out = y, log_softmax_tangent(y, tx, dim)
        return out, LogSoftmaxJvp.jvp(primals, out, tangents)

    @classmethod
    def vmap(cls, info, dims, x, tx, dim):
        if dims[0] is None:  # many tangents at one point (jacfwd): the primal once
            y = log_softmax(x, dim)
            batched = front(info, (None, dims[1]), (y, tx))
            return (y, log_softmax_tangent(*batched, dim + 1)), (None, 0)
        return super().vmap(info, dims, x, tx, dim)


class LogSoftmaxVjpVjp(_Rows):
    """The cotangents of y and gy in log_softmax_vjp, in one pass."""

    schema = "log_softmax_vjp_vjp(Tensor y, Tensor gy, Tensor h, int dim) -> (Tensor, Tensor)"
    fake = _fake2

    def kernel(y, gy, h, dim):
        return kernels.log_softmax_vjp_vjp(y, gy, h, dim)

    def composite(y, gy, h, dim):
        return -y.exp() * h * gy.sum(dim, True), log_softmax_tangent(y, h, dim)


class LogSoftmaxVjpJvp(_Rows):
    """log_softmax_vjp and its tangent along (ty, tgy), in one pass."""

    schema = (
        "log_softmax_vjp_jvp(Tensor y, Tensor gy, Tensor? ty, Tensor? tgy, int dim)"
        " -> (Tensor, Tensor)"
    )
    fake = _fake2

    def kernel(y, gy, ty, tgy, dim):
        return kernels.log_softmax_vjp_jvp(y, gy, ty, tgy, dim)

    def composite(y, gy, ty, tgy, dim):
        primals = (y, gy, dim)
        return log_softmax_vjp(*primals), LogSoftmaxVjp.jvp(primals, None, (ty, tgy))


class SoftmaxDropout(_Rows):
    """y = m * softmax(x)."""

    schema = "softmax_dropout(Tensor x, Tensor seed, int dim, float p) -> Tensor"
    fake = _fake

    def kernel(x, seed, dim, p):
        return kernels.softmax_dropout(x, dim, p, seed)

    def save(args, y, needs):
        return args[:2]

    def vjp(saved, consts, needs, gy):
        x, seed = saved
        return softmax_dropout_vjp(x, gy, seed, *consts), None

    def jvp(primals, y, tangents):
        return SoftmaxDropout.dual(primals, tangents)[1]

    def dual(primals, tangents):
        x, *rest = primals
        return softmax_dropout_jvp(x, tangents[0], *rest)


class SoftmaxDropoutVjp(_Rows):
    """gx = s * (m * gy - <s, m * gy>), s = softmax(x)."""

    schema = "softmax_dropout_vjp(Tensor x, Tensor gy, Tensor seed, int dim, float p) -> Tensor"
    fake = _fake

    def kernel(x, gy, seed, dim, p):
        return kernels.softmax_dropout_vjp(x, gy, dim, p, seed)

    def composite(x, gy, seed, dim, p):
        return softmax_vjp(softmax(x, dim, 1.0), dropout(gy, seed, p), dim, 1.0)


class SoftmaxDropoutJvp(_Rows):
    """y = m * s, ty = m * s * (tx - <s, tx>), s = softmax(x)."""

    schema = (
        "softmax_dropout_jvp(Tensor x, Tensor tx, Tensor seed, int dim, float p)"
        " -> (Tensor, Tensor)"
    )
    fake = _fake2

    def kernel(x, tx, seed, dim, p):
        return kernels.softmax_dropout_jvp(x, tx, dim, p, seed)

    def composite(x, tx, seed, dim, p):
        y, ty = softmax_jvp(x, tx, dim, 1.0)
        return dropout(y, seed, p), dropout(ty, seed, p)


softmax = define(Softmax)
softmax_vjp = define(SoftmaxVjp)
softmax_jvp = define(SoftmaxJvp)
softmax_vjp_vjp = define(SoftmaxVjpVjp)
softmax_vjp_jvp = define(SoftmaxVjpJvp)
log_softmax = define(LogSoftmax)
log_softmax_vjp = define(LogSoftmaxVjp)
log_softmax_tangent = define(LogSoftmaxTangent)
log_softmax_jvp = define(LogSoftmaxJvp)
log_softmax_vjp_vjp = define(LogSoftmaxVjpVjp)
log_softmax_vjp_jvp = define(LogSoftmaxVjpJvp)
softmax_dropout = define(SoftmaxDropout)
softmax_dropout_vjp = define(SoftmaxDropoutVjp)
softmax_dropout_jvp = define(SoftmaxDropoutJvp)
