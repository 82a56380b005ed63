"""Rules of norms: :func:`family` makes the four of a kind, here those of layer_norm and rms_norm.

``x`` and ``weight`` are saved, no statistics: they are recomputed from the row in cache, and a
formula that is differentiated again never takes them for constants.  Four ops are closed under
differentiation: the cotangents of ``norm_jvp`` and of ``norm_vjp`` are tangents of ``norm_vjp``, as
the second derivative is symmetric.
"""

from __future__ import annotations

import torch

from .. import kernels
from ..kernels._arguments import result_like
from .rule import Rule, by_sample, define, needed, plain


def fake(x, *_):
    """The result of a norm: its strides."""
    return result_like(x, row_major=True)


class Primitive:
    """The pieces of the formulas in elementary ops, in float32 or wider.

    ``along`` and ``columns`` bring tensors of the shape of ``x``, or of ``weight``, into shapes
    that go together; ``back`` undoes the former.
    """

    def prepare(self, x, weight, eps, centred, axes):
        """Normalize ``x`` over ``axes``."""
        self.axes, self.centred = axes, centred
        c = x - self.mean(x) if centred else x
        self.r = (self.mean(c * c) + eps).rsqrt()
        self.x = c * self.r
        self.weight = None if weight is None else self.columns(weight)

    @staticmethod
    def wide(t):
        """``t`` in the type that kernels compute in."""
        return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t

    along = columns = wide

    def back(self, t):
        """``t`` in the shape of ``x``."""
        return t

    def mean(self, q):
        """Over what is normalized together."""
        return q.mean(self.axes, True)

    def weighted(self, q):
        """``weight * q``."""
        return q if self.weight is None else self.weight * q

    def project(self, q):
        """``P(q)``: ``r`` times it is the tangent of ``x^`` along ``q``."""
        q = q - self.mean(q) if self.centred else q
        return q - self.x * self.mean(self.x * q)


def _apart(*results, sums):
    """An op's results: each sum a tensor of its own, as views of one break torch.compile."""
    return (*results, *(s.clone() for s in sums))


def family(name, base, primitive, constants, of_weight):
    """The four ops of a norm.

    Args:
        name: Of the first op; it begins the others' names.
        base: A subclass of Rule with a ``vmap``, which can ask for ``of_column``, the places of the
            arguments that have the shape of ``weight``, and ``sums``, the kinds of sums that come
            last.
        primitive: A subclass of :class:`Primitive`, made from x, weight and what follows.
        constants: What follows in every schema.  Tensors there, which come first, are constants.
        of_weight: The shape of ``weight``, from x and what follows.
    """
    fixed = constants.count("Tensor")

    def fake_sums(kinds, x, *rest):
        return (x.new_empty(of_weight(x, *rest)) for _ in range(kinds))

    class Norm(base):
        """y = weight * x^ + bias."""

        schema = f"{name}(Tensor x, Tensor? weight, Tensor? bias, {constants}) -> Tensor"
        of_column = (1, 2)

        def fake(x, *_):
            return fake(x)

        def kernel(*args):
            return getattr(kernels, name)(*args)

        def save(args, y, needs):
            return (*args[:2], *args[3 : 3 + fixed])

        def vjp(saved, consts, needs, gy):
            x, weight, *rest = saved
            return needed(needs, norm_vjp(x, weight, gy, *rest, *consts), rest)

        def jvp(primals, y, tangents):
            return Norm.dual(primals, tangents)[1]

        def dual(primals, tangents):
            return norm_jvp(*primals[:3], *tangents[:3], *primals[3:])

    class NormJvp(base):
        """y and its tangent.  Its VJP keeps a trained jvp fused."""

        schema = (
            f"{name}_jvp(Tensor x, Tensor? weight, Tensor? bias, Tensor? tx, Tensor? tweight, "
            f"Tensor? tbias, {constants}) -> (Tensor, Tensor)"
        )
        tangent_outputs = (1,)
        of_column = (1, 2, 4, 5)

        def fake(x, *_):
            return fake(x), fake(x)

        def kernel(*args):
            return getattr(kernels, f"{name}_jvp")(*args)

        def save(args, out, needs):
            return (args[0], args[1], args[3], args[4], *args[6 : 6 + fixed])

        def vjp(saved, consts, needs, gy, gty):
            x, weight, tx, tweight, *rest = saved
            if gty is None:
                gradients = norm_vjp(x, weight, gy, *rest, *consts)
                return needed(needs, (*gradients, None, None, None), rest)
            gtx, gx, gtweight, gtbias, gweight, gbias = norm_vjp_jvp(
                x, weight, gty, tx, tweight, gy, *rest, *consts
            )
            return needed(needs, (gx, gweight, gbias, gtx, gtweight, gtbias), rest)

        def jvp(primals, out, tangents):
            x, weight, bias, tx, tweight, _, *rest = primals
            dx, dweight, _ = tangents[:3]

            def tangent(*direction):
                if all(d is None for d in direction):
                    return None
                return norm_jvp(x, weight, bias, *direction, *rest)[1]

            dy, dty = tangent(*tangents[:3]), tangent(*tangents[3:6])
            at = primitive(x, weight, *rest)
            bent = None
            if tx is not None and dx is not None:
                u, w = at.along(tx), at.along(dx)
                pu, pw = at.project(u), at.project(w)
                terms = at.mean(at.x * w) * pu + at.mean(at.x * u) * pw + at.x * at.mean(u * pw)
                bent = -at.r * at.r * at.weighted(terms)
            for t, scale in ((tx, dweight), (dx, tweight)):
                if t is not None and scale is not None:
                    term = at.r * at.columns(scale) * at.project(at.along(t))
                    bent = term if bent is None else bent + term
            if bent is not None:
                bent = at.back(bent).to(x.dtype)
                dty = bent if dty is None else dty + bent
            return dy, dty

        def dual(primals, tangents):
            out = norm_jvp(*primals)
            return out, NormJvp.jvp(primals, out, tangents)

    class NormVjp(base):
        """gx = r * P(weight * gy), and the cotangents of weight and bias."""

        schema = (
            f"{name}_vjp(Tensor x, Tensor? weight, Tensor gy, {constants}) "
            "-> (Tensor, Tensor, Tensor)"
        )
        of_column = (1,)
        sums = 2

        def fake(x, weight, gy, *rest):
            return fake(x), *fake_sums(2, x, *rest)

        def kernel(*args):
            gx, sums = getattr(kernels, f"{name}_vjp")(*args)
            return _apart(gx, sums=sums)

        def save(args, out, needs):
            return args[: 3 + fixed]

        def vjp(saved, consts, needs, hx, hweight, hbias):
            x, weight, gy, *rest = saved
            more = *rest, *consts
            ggy = norm_jvp(x, weight, None, hx, hweight, hbias, *more)[1] if needs[2] else None
            gx = gweight = None
            if needs[0] or needs[1]:
                _, gx, _, _, gweight, _ = norm_vjp_jvp(x, weight, gy, hx, hweight, None, *more)
            return needed(needs, (gx, gweight, ggy), rest)

        def jvp(primals, out, tangents):
            return NormVjp.dual(primals, tangents)[1]

        def dual(primals, tangents):
            gx, tgx, gw, gb, tgw, tgb = norm_vjp_jvp(*primals[:3], *tangents[:3], *primals[3:])
            return (gx, gw, gb), (tgx, tgw, tgb)

    class NormVjpJvp(base):
        """The VJP and its tangent along (tx, tweight, tgy), in one pass."""

        schema = (
            f"{name}_vjp_jvp(Tensor x, Tensor? weight, Tensor gy, Tensor? tx, Tensor? tweight, "
            f"Tensor? tgy, {constants}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
        )
        of_column = (1, 4)
        sums = 4

        def fake(x, weight, gy, tx, tweight, tgy, *rest):
            return fake(x), fake(x), *fake_sums(4, x, *rest)

        def kernel(*args):
            gx, tgx, sums = getattr(kernels, f"{name}_vjp_jvp")(*args)
            return _apart(gx, tgx, sums=sums)

        def composite(x, weight, gy, tx, tweight, tgy, *rest):
            if x.numel() == 0:
                sums = (t.zero_() for t in fake_sums(4, x, *rest))
                return fake(x), fake(x), *sums
            at = primitive(x, weight, *rest)
            gy = at.along(gy)
            p = at.weighted(gy)
            pp = at.project(p)
            zero = torch.zeros_like(gy)
            dp, tgweight, tgbias = zero, zero, zero
            if tgy is not None:
                tgy = at.along(tgy)
                dp, tgweight, tgbias = at.weighted(tgy), at.x * tgy, tgy
            if tweight is not None:
                dp = dp + at.columns(tweight) * gy
            tgx = at.r * at.project(dp)
            if tx is not None:
                tx = at.along(tx)
                ptx = at.project(tx)
                bent = at.x * at.mean(p * ptx) + at.mean(at.x * tx) * pp + at.mean(at.x * p) * ptx
                tgx = tgx - at.r * at.r * bent
                tgweight = tgweight + at.r * ptx * gy
            sums = map(at.sums, (at.x * gy, gy, tgweight, tgbias))
            return tuple(t.to(x.dtype) for t in (at.back(at.r * pp), at.back(tgx), *sums))

    rules = Norm, NormJvp, NormVjp, NormVjpJvp
    for rule in rules:
        title = name.title().replace("_", "") + rule.__name__.removeprefix("Norm")
        rule.__name__ = rule.__qualname__ = title
    norm, norm_jvp, norm_vjp, norm_vjp_jvp = map(define, rules)
    return norm, norm_jvp, norm_vjp, norm_vjp_jvp


class _Rows(Rule):
    of_column: tuple[int, ...]
    sums = 0

    @classmethod
    def vmap(cls, info, dims, *args):
        n = cls.tensors
        if any(dims[i] is not None for i in cls.of_column) or cls.sums == 4:
            # Weights, or sums over rows, of each sample's own.
            return by_sample(cls.op, info, dims, args)
        fronted = _rows_front(info, dims[:n], args[:n], cls.of_column)
        if cls.sums:
            return _vjp_of_samples(*fronted, *args[n:])
        out = cls.op(*fronted, *args[n:])
        return out, (0,) * len(out) if isinstance(out, tuple) else 0


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


def _vjp_of_samples(x, weight, gy, ndims, eps, centred):
    """One call for all rows; the sums over each sample's own from the normalized input."""
    gx, _, _ = norm_vjp(x, weight, gy, ndims, eps, centred)
    wide = Primitive.wide(gy)
    normalized = norm(Primitive.wide(x), None, None, ndims, eps, centred)
    rows = tuple(range(1, x.dim() - ndims))
    sums = (t.sum(rows) if rows else t for t in (normalized * wide, wide))
    return (gx, *(s.to(x.dtype) for s in sums)), (0, 0, 0)


class _OfRows(Primitive):
    def __init__(self, x, weight, dims, eps, centred):
        self.prepare(self.wide(x), weight, eps, centred, tuple(range(-dims, 0)))

    def sums(self, q):
        return q.sum(tuple(range(q.dim() - len(self.axes))))


norm, norm_jvp, norm_vjp, norm_vjp_jvp = family(
    "norm",
    _Rows,
    _OfRows,
    "int dims, float eps, bool centred",
    lambda x, dims, *_: x.shape[x.dim() - dims :],
)


class NativeLayerNorm(torch.autograd.Function):
    """layer_norm of few elements in the plain state: native kernels, whose way is the shorter one.

    The native op's own graph would be wrong from the third derivative on; this one's is ours.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, shape, eps):
        y, mean, r = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, r)
        ctx.shape, ctx.eps = shape, eps
        return y

    @staticmethod
    def backward(ctx, gy):
        x, weight, bias, mean, r = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or not plain((gy,)):
            gradients = norm_vjp(x, weight, gy, len(ctx.shape), ctx.eps, True)
            return needed(needs, gradients, (ctx.shape, ctx.eps))
        gradients = torch.ops.aten.native_layer_norm_backward.default(
            gy, x, ctx.shape, mean, r, weight, bias, needs
        )
        return (*gradients, None, None)


native_layer_norm = super(torch.autograd.Function, NativeLayerNorm).apply


class AddNorm(_Rows):
    """y = norm(sum) and sum = x + residual.  The sum is all that is saved beside the weight."""

    schema = (
        "add_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, int dims, float eps, "
        "bool centred) -> (Tensor, Tensor)"
    )
    of_column = (2, 3)

    def fake(x, *_):
        return fake(x), fake(x)

    def kernel(*args):
        return kernels.add_norm(*args)

    def save(args, out, needs):
        return out[1], args[2]

    def vjp(saved, consts, needs, gy, gsum):
        total, weight = saved
        if gy is None:
            return needed(needs, (gsum, gsum, None, None))
        if gsum is None:
            gx, gweight, gbias = norm_vjp(total, weight, gy, *consts)
        else:
            gx, gweight, gbias = add_norm_vjp(total, weight, gy, gsum, *consts)
        return needed(needs, (gx, gx, gweight, gbias))

    def jvp(primals, out, tangents):
        weight, bias = primals[2:4]
        tx, tresidual, *of_column = tangents
        tsum = tx if tresidual is None else tresidual if tx is None else tx + tresidual
        return norm_jvp(out[1], weight, bias, tsum, *of_column, *primals[4:])[1], tsum

    def dual(primals, tangents):
        x, residual, weight, bias, *consts = primals
        tx, tresidual, *of_column = tangents
        total = x + residual
        tsum = tx if tresidual is None else tresidual if tx is None else tx + tresidual
        y, ty = norm_jvp(total, weight, bias, tsum, *of_column, *consts)
        return (y, total), (ty, tsum)


class AddNormVjp(_Rows):
    """norm_vjp at the sum, with the cotangent of the sum itself added in the same pass."""

    schema = (
        "add_norm_vjp(Tensor total, Tensor? weight, Tensor gy, Tensor gsum, int dims, float eps, "
        "bool centred) -> (Tensor, Tensor, Tensor)"
    )
    of_column = (1,)
    sums = 2

    def fake(total, weight, gy, gsum, dims, *_):
        row = total.shape[total.dim() - dims :]
        return fake(total), total.new_empty(row), total.new_empty(row)

    def kernel(*args):
        gx, sums = kernels.add_norm_vjp(*args)
        return _apart(gx, sums=sums)

    def composite(total, weight, gy, gsum, *consts):
        gx, *sums = norm_vjp(total, weight, gy, *consts)
        return gx + gsum, *sums

    @classmethod
    def vmap(cls, info, dims, *args):
        if dims[1] is not None:
            return by_sample(cls.op, info, dims, args)
        total, weight, gy, gsum = _rows_front(info, dims[:4], args[:4], cls.of_column)
        (gx, *sums), out = _vjp_of_samples(total, weight, gy, *args[4:])
        return (gx + gsum, *sums), out


add_norm = define(AddNorm)
add_norm_vjp = define(AddNormVjp)
