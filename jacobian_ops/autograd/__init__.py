"""The rules that make kernels differentiable, one file a family; :mod:`.rule` is the machinery."""

from . import activation, attention, dropout, linear, norm, softmax
from .rule import self_test

__all__ = ["activation", "attention", "dropout", "linear", "norm", "softmax"]

self_test(
    lambda z: softmax.softmax(z, 1, 1.0),
    lambda z: z.exp() / z.exp().sum(1, True),
)
