"""Rules of group_norm and batch_norm, of which :mod:`.norm` has the formulas.

``stats`` are given statistics (batch_norm that is not in training): constants, as in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..kernels.group_norm import new_stats
from .norm import Primitive, fake, family
from .rule import Rule, define, needed, plain


class _Grouped(Rule):
    of_column: tuple[int, ...]

    @classmethod
    def vmap(cls, info, dims, *args):
        """Samples side by side as further channels, each with its own numbers and sums."""
        n, batch = cls.tensors, info.batch_size
        merged = []
        for i, (a, d) in enumerate(zip(args[:n], dims[:n], strict=True)):
            if a is not None:
                at = 0 if i in cls.of_column else 1
                a = a.movedim(d, at) if d is not None else a.unsqueeze(at)
                a = a.expand(*a.shape[:at], batch, *a.shape[at + 1 :]).flatten(at, at + 1)
            merged.append(a)
        channels = merged[0].shape[1] // batch
        out = cls.op(*merged, *cls.of_batch(batch, args[n:]))
        if isinstance(out, Tensor):
            return out.unflatten(1, (batch, channels)), 1
        at = tuple(min(1, o.dim() - 1) for o in out)  # numbers of channels alone, or more
        return tuple(o.unflatten(d, (batch, channels)) for o, d in zip(out, at, strict=True)), at

    @staticmethod
    def of_batch(batch, consts):
        """The other arguments for ``batch`` samples."""
        groups, eps = consts
        return groups * batch, eps


class _OfGroups(Primitive):
    def __init__(self, x, weight, stats, groups, eps):
        n, c, *rest = self.shape = x.shape
        self.split = (groups, c // groups) if groups else (c,)
        self.view = (n, *self.split, *rest)
        self.of_channel = (*self.split, *(1 for _ in rest))
        self.fixed = stats is not None
        axes = range(2, len(self.view)) if groups else (0, *range(2, x.dim()))
        if not self.fixed:
            self.prepare(self.along(x), weight, eps, True, tuple(axes))
            return
        mean, variance = map(self.columns, stats)
        self.r = (variance + eps).rsqrt()
        self.x = (self.along(x) - mean) * self.r
        self.weight = None if weight is None else self.columns(weight)

    def along(self, t):
        return self.wide(t).reshape(self.view)

    def columns(self, t):
        return self.wide(t).reshape(self.of_channel)

    def back(self, t):
        return t.reshape(self.shape)

    def mean(self, q):
        return 0.0 if self.fixed else super().mean(q)

    def project(self, q):
        return q if self.fixed else super().project(q)

    def sums(self, q):
        return self.back(q).sum((0, *range(2, len(self.shape))))


group_norm, group_norm_jvp, group_norm_vjp, group_norm_vjp_jvp = family(
    "group_norm",
    _Grouped,
    _OfGroups,
    "Tensor? stats, int groups, float eps",
    lambda x, *_: (x.shape[1],),
)


class BatchNorm(_Grouped):
    """group_norm of whole channels, and their mean and unbiased variance, without derivative."""

    schema = "batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)"
    of_column = (1, 2)
    not_differentiable = (1,)

    def fake(x, *_):
        return fake(x), new_stats(x)

    def kernel(*args):
        return kernels.batch_norm(*args)

    def save(args, out, needs):
        return args[:2]

    def vjp(saved, consts, needs, gy, _):
        return needed(needs, group_norm_vjp(*saved, gy, None, 0, *consts))

    def jvp(primals, out, tangents):
        return group_norm_jvp(*primals[:3], *tangents, None, 0, *primals[3:])[1], None

    def dual(primals, tangents):
        y, ty = group_norm_jvp(*primals[:3], *tangents, None, 0, *primals[3:])
        return (y, _statistics(primals[0])), (ty, None)

    @staticmethod
    def of_batch(batch, consts):
        return consts


def _statistics(x):
    axes = (0, *range(2, x.dim()))
    return torch.stack(torch.var_mean(Primitive.wide(x), axes)[::-1])


batch_norm = define(BatchNorm)


@torch.library.custom_op("jacobian_ops::batch_norm_update", mutates_args=("mean", "var"))
def _update(stats: Tensor, mean: Tensor, var: Tensor, momentum: float) -> None:
    _move(stats, mean, var, momentum)


def _move(stats, mean, var, momentum):
    for running, new in zip((mean, var), stats, strict=True):
        running.copy_(running.to(new.dtype).lerp(new, momentum))


@_update.register_vmap
def _(info, dims, stats, mean, var, momentum):
    if None in dims[1:3]:
        raise RuntimeError(
            "batch_norm: running_mean or running_var is not batched, but input is, whose "
            "statistics would be written there; allowed: running statistics for each sample, or "
            "none (track_running_stats=False)"
        )
    stats = (
        stats.expand(info.batch_size, *stats.shape)
        if dims[0] is None
        else stats.movedim(dims[0], 0)
    )
    mean, var = (t.movedim(d, 0) for t, d in zip((mean, var), dims[1:3], strict=True))
    _update(stats.movedim(1, 0), mean, var, momentum)
    return None, None


def update(stats: Tensor, mean: Tensor, var: Tensor, momentum: float) -> None:
    """Move running statistics, in place, towards those of a batch: an op under transforms."""
    stats = stats.detach()
    if not torch.compiler.is_compiling() and plain((stats, mean, var)):
        _move(stats, mean, var, momentum)
    else:
        _update(stats, mean, var, momentum)
