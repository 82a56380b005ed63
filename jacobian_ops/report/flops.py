"""Count the floating-point operations of what runs, ours and native ones."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from .calls import is_floating

_NO_FLOPS = ("clone", "copy_", "_to_copy", "zero_", "fill_", "empty", "zeros", "ones", "new_")


def flops_of(run: Callable) -> tuple[object, int]:
    """The result of a call of ``run``, and what it took.

    Two for a multiply-add of a matrix product or convolution, one for each element of the largest
    tensor of any other op that computes.
    """
    with _Flops() as flops:
        result = run()
    return result, flops.count


class _Flops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        name = func._schema.name.split("::")[1]
        if packet in flop_registry:
            self.count += flop_registry[packet](*args, **kwargs, out_val=result)
        elif func.namespace == "jacobian_ops" and name in _PRODUCTS:
            self.count += 2 * _PRODUCTS[name](*args)
        elif not func.is_view and not name.startswith(_NO_FLOPS):
            sizes = [t.numel() for t in tree_iter((args, kwargs, result)) if is_floating(t)]
            self.count += max(sizes, default=0)
        return result


def _products(*pairs):
    """Multiply-adds of ``a b^T`` for the pairs of matrices (*batch, M, K) that are there."""
    return sum(
        a.numel() * b.shape[-2] for a, b in pairs if a is not None and b is not None and b.dim() > 1
    )


def _linear(x, weight, *_):
    return _products((x, weight))


def _linear_jvp(x, weight, bias, tx, tweight, *_):
    return _products((x, weight), (tx, weight), (x, tweight))


def _linear_vjp(gy, x, weight):
    return _products(
        (gy, None if weight is None else weight.mT), (gy.mT, None if x is None else x.mT)
    )


def _scores(q, k, v):
    """Multiply-adds of q k^T, and of the scores with v."""
    rows = q.numel() // q.shape[-1] if q.shape[-1] else 0
    return rows * k.shape[-2] * q.shape[-1], rows * k.shape[-2] * v.shape[-1]


def _attention(of_scores: int, of_values: int) -> Callable:
    def count(q, k, v, *_):
        scores, values = _scores(q, k, v)
        return of_scores * scores + of_values * values

    return count


def _linear_cross_entropy_vjp(x, weight, target, bias, class_weight, g, needs, *_):
    """The logits once more, and their cotangent with ``weight`` and ``x``."""
    return (1 + needs[0] + needs[1]) * _products((x, weight))


# Multiply-adds of our own ops; torch knows those of native ones.
_PRODUCTS = {
    "linear": _linear,
    "linear_jvp": _linear_jvp,
    "linear_vjp": lambda gy, x, weight, *_: _linear_vjp(gy, x, weight),
    "linear_act_dropout": _linear,
    "linear_act_dropout_jvp": lambda x, w, b, residual, tx, tw, *_: _linear_jvp(x, w, b, tx, tw),
    "linear_act_dropout_vjp": lambda gy, s, x, weight, *_: _linear_vjp(gy, x, weight),
    "linear_cross_entropy": _linear,
    "linear_cross_entropy_jvp": lambda x, w, target, b, c, tx, tw, *_: _linear_jvp(x, w, b, tx, tw),
    "linear_cross_entropy_vjp": _linear_cross_entropy_vjp,
    "attention": _attention(1, 1),
    "attention_jvp": _attention(3, 2),
    "attention_vjp": _attention(3, 2),
}
