"""Rules of linear_cross_entropy, one loss a row.

Saved are the arguments alone.  As for cross_entropy, four ops are closed under differentiation; the
kernels run all but the last composition, and forward over forward, in chunks of rows.
"""

from __future__ import annotations

import torch

from .. import kernels
from ..kernels.cross_entropy import losses_like, wide
from .cross_entropy import cross_entropy_jvp, cross_entropy_vjp_jvp
from .linear import linear, linear_jvp
from .rule import Rule, add, by_sample, define, plain

_ARGUMENTS = "Tensor x, Tensor linear_weight, Tensor target, Tensor? bias, Tensor? weight"
_CONSTS = "int ignore_index, float smoothing, int chunk"
_TANGENTS = "Tensor? tx, Tensor? tlinear_weight, Tensor? tbias"
_ALL = [True, True, True]


def _refuse(needed):
    if needed:
        raise NotImplementedError(
            "linear_cross_entropy: weight has no derivative; allowed: one that does not require "
            "grad and has no tangent"
        )


def _fake_losses(x, *_):
    return losses_like(x, 1)


def _fake_gradients(x, linear_weight, needs):
    shapes = x.shape, linear_weight.shape, linear_weight.shape[:1]
    return tuple(x.new_empty(s if n else 0) for s, n in zip(shapes, needs, strict=True))


def _of_first(needs):
    """Which of x, linear_weight and bias need a gradient."""
    return [bool(needs[i]) for i in (0, 1, 3)]


def _gradients(needs, gx, gweight, gbias, *others):
    found = gx, gweight, None, gbias, None, *others
    return tuple(g if n else None for g, n in zip(found, needs, strict=False))


def _present(cotangents, needs):
    """Cotangents of the gradients that were asked for."""
    return [h if n else None for h, n in zip(cotangents, needs, strict=True)]


class _Chunked(Rule):
    @classmethod
    def vmap(cls, info, dims, *args):
        """One call for each sample, each of them large."""
        return by_sample(cls.op, info, dims, args)


class LinearCrossEntropy(_Chunked):
    """The losses of z = x W^T + b."""

    schema = f"linear_cross_entropy({_ARGUMENTS}, {_CONSTS}) -> Tensor"
    fake = _fake_losses

    def kernel(*args):
        return kernels.linear_cross_entropy(*args)

    def save(args, loss, needs):
        return args[:5]

    def vjp(saved, consts, needs, g):
        _refuse(needs[4])
        return _gradients(needs, *linear_cross_entropy_vjp(*saved, g, _of_first(needs), *consts))

    def jvp(primals, loss, tangents):
        return LinearCrossEntropy.dual(primals, tangents)[1]

    def dual(primals, tangents):
        tx, tlinear_weight, _, tbias, tweight = tangents
        _refuse(tweight is not None)
        return linear_cross_entropy_jvp(*primals[:5], tx, tlinear_weight, tbias, *primals[5:])


class LinearCrossEntropyJvp(_Chunked):
    """The losses and their tangents."""

    schema = f"linear_cross_entropy_jvp({_ARGUMENTS}, {_TANGENTS}, {_CONSTS}) -> (Tensor, Tensor)"
    tangent_outputs = (1,)

    def fake(x, *_):
        return _fake_losses(x), _fake_losses(x)

    def kernel(*args):
        return kernels.linear_cross_entropy_jvp(*args)

    def save(args, out, needs):
        return args[:8]

    def vjp(saved, consts, needs, g, gt):
        _refuse(needs[4])
        arguments, tangents = saved[:5], saved[5:]
        if gt is None:
            first = linear_cross_entropy_vjp(*arguments, g, _of_first(needs), *consts)
            return _gradients(needs, *first, None, None, None)
        out = linear_cross_entropy_vjp_jvp(*arguments, gt, *tangents, g, _ALL, *consts)
        return _gradients(needs, *out[3:], *out[:3])

    def jvp(primals, out, tangents):
        arguments, along, consts = primals[:5], primals[5:8], primals[8:]
        x, linear_weight, target, bias, weight = arguments
        tx, tlinear_weight, _ = along
        dx, dlinear_weight, _, dbias, dweight, *dalong = tangents
        _refuse(dweight is not None)
        loss = (1, *consts[:2])
        dloss = dtloss = None
        if any(d is not None for d in dalong):
            dtloss = linear_cross_entropy_jvp(*arguments, *dalong, *consts)[1]
        if any(d is not None for d in (dx, dlinear_weight, dbias)):
            # Of each row by itself: with all logits.
            z, tz = linear_jvp(x, linear_weight, bias, *along)
            dz = linear_jvp(x, linear_weight, bias, dx, dlinear_weight, dbias)[1]
            dloss = cross_entropy_jvp(z, target, weight, dz, *loss)[1]
            one = torch.ones_like(dloss)
            bent = cross_entropy_vjp_jvp(z, target, weight, one, tz, None, *loss)[1]
            dtype = wide(z.dtype)
            dtloss = add(dtloss, (bent.to(dtype) * dz.to(dtype)).sum(1))
            mixed = None
            for a, b in ((tx, dlinear_weight), (dx, tlinear_weight)):
                if a is not None and b is not None:
                    mixed = add(mixed, linear(a, b, None))
            if mixed is not None:
                dtloss = dtloss + cross_entropy_jvp(z, target, weight, mixed, *loss)[1]
        return dloss, dtloss

    def dual(primals, tangents):
        out = linear_cross_entropy_jvp(*primals)
        return out, LinearCrossEntropyJvp.jvp(primals, out, tangents)


class LinearCrossEntropyVjp(_Chunked):
    """The gradients of x, linear_weight and bias; empty where not needed."""

    schema = (
        f"linear_cross_entropy_vjp({_ARGUMENTS}, Tensor g, bool[] needs, {_CONSTS})"
        " -> (Tensor, Tensor, Tensor)"
    )

    def fake(x, linear_weight, target, bias, weight, g, needs, *_):
        return _fake_gradients(x, linear_weight, needs)

    def kernel(*args):
        return kernels.linear_cross_entropy_vjp(*args)

    def save(args, out, needs):
        return args[:6]

    def vjp(saved, consts, needs, *cotangents):
        _refuse(needs[4])
        *arguments, g = saved
        made, *consts = consts
        along = _present(cotangents, made)
        first, gg = (None, None, None), None
        if any(_of_first(needs)):
            first = linear_cross_entropy_vjp_jvp(
                *arguments, g, *along, None, _of_first(needs), *consts
            )[3:]
        if needs[5]:
            gg = linear_cross_entropy_jvp(*arguments, *along, *consts)[1]
        return _gradients(needs, *first, gg)

    def jvp(primals, out, tangents):
        return LinearCrossEntropyVjp.dual(primals, tangents)[1]

    def dual(primals, tangents):
        tx, tlinear_weight, _, tbias, tweight, tg = tangents
        _refuse(tweight is not None)
        along = tx, tlinear_weight, tbias, tg
        out = linear_cross_entropy_vjp_jvp(*primals[:6], *along, *primals[6:])
        return out[:3], out[3:]


class LinearCrossEntropyVjpJvp(_Chunked):
    """linear_cross_entropy_vjp and its tangents; the last one of the chain, and not in chunks."""

    schema = (
        f"linear_cross_entropy_vjp_jvp({_ARGUMENTS}, Tensor g, {_TANGENTS}, Tensor? tg, "
        f"bool[] needs, {_CONSTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def fake(x, linear_weight, target, bias, weight, g, tx, tw, tb, tg, needs, *_):
        return tuple(t for _ in range(2) for t in _fake_gradients(x, linear_weight, needs))

    def kernel(*args):
        return kernels.linear_cross_entropy_vjp_jvp(*args)

    def composite(x, linear_weight, target, bias, weight, g, tx, tw, tb, tg, needs, *consts):
        z, tz = linear_jvp(x, linear_weight, bias, tx, tw, tb)
        dz, tdz = cross_entropy_vjp_jvp(z, target, weight, g, tz, tg, 1, *consts[:2])
        gweight, tgx, tgweight = dz.mT @ x, tdz @ linear_weight, tdz.mT @ x
        if tw is not None:
            tgx = tgx + dz @ tw
        if tx is not None:
            tgweight = tgweight + dz.mT @ tx
        out = dz @ linear_weight, gweight, dz.sum(0), tgx, tgweight, tdz.sum(0)
        return tuple(t if n else x.new_empty(0) for t, n in zip(out, 2 * list(needs), strict=True))


class LinearCrossEntropyTotal(torch.autograd.Function):
    """The sum of the losses; its gradients are made with it, as a chunk's logits are there then.

    For the plain state.  A backward pass scales them in place, so that another one makes them anew,
    to the same bits; one that is to be differentiated runs the op for that.
    """

    @staticmethod
    def forward(ctx, x, linear_weight, target, bias, weight, *consts):
        arguments = x, linear_weight, target, bias, weight
        losses, *ctx.gradients = LinearCrossEntropyTotal.made(ctx, arguments, consts)
        ctx.consts = consts
        ctx.save_for_backward(*arguments)
        return losses.masked_fill_(target == consts[0], 0).sum()

    @staticmethod
    def backward(ctx, g):
        arguments, gradients = ctx.saved_tensors, ctx.gradients
        ctx.gradients = None
        counts = arguments[2] != ctx.consts[0]
        if plain((g,)) and not torch.is_grad_enabled():
            if gradients is None:
                _, *gradients = LinearCrossEntropyTotal.made(ctx, arguments, ctx.consts)
            g = g.masked_fill(~counts.any(), 0)  # infinite for the mean of nothing
            gradients = (t.mul_(g) for t in gradients)
        else:
            rows = g.expand(counts.shape).masked_fill(~counts, 0)
            needs = _of_first(ctx.needs_input_grad)
            gradients = linear_cross_entropy_vjp(*arguments, rows, needs, *ctx.consts)
        return _gradients(ctx.needs_input_grad, *gradients, *(None for _ in ctx.consts))

    @staticmethod
    def made(ctx, arguments, consts):
        """The losses, and the gradients of their sum."""
        needs = _of_first(ctx.needs_input_grad)
        return kernels.linear_cross_entropy_with_vjp(*arguments, needs, *consts)


_total = super(torch.autograd.Function, LinearCrossEntropyTotal).apply


def total_loss(*args):
    """The sum of the losses of the rows that count.

    With its gradients, where a backward pass may follow and nothing else: not where hooks decide
    what is kept for it, nor in 16 bits, where a sum over all rows might overflow before it is
    scaled.
    """
    tensors = x, _, target, _, weight = args[:5]
    if (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and x.dtype in (torch.float32, torch.float64)
        and plain(tensors)
        and any(t is not None and t.requires_grad for t in tensors)
        and not (weight is not None and weight.requires_grad)  # refused if it is differentiated
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    ):
        return _total(*args)
    losses = linear_cross_entropy(*args)
    return losses.masked_fill(target == args[5], 0).sum()


linear_cross_entropy = define(LinearCrossEntropy)
linear_cross_entropy_jvp = define(LinearCrossEntropyJvp)
linear_cross_entropy_vjp = define(LinearCrossEntropyVjp)
linear_cross_entropy_vjp_jvp = define(LinearCrossEntropyVjpJvp)
