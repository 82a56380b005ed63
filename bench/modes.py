"""The ways to call an op: forward, its products, and the bytes that it saves for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MODES = ("forward", "vjp", "forward+vjp", "jvp", "hvp", "saved bytes")
TIMED = MODES[:-1]

Arguments = tuple[Tensor, ...]


def jvp(f: Callable) -> Callable:
    """``(inputs, tangents, gy) -> (y, ty)``."""
    return lambda inputs, tangents, gy: torch.func.jvp(f, inputs, tangents)


def hvp(f: Callable) -> Callable:
    """``(inputs, tangents, gy) ->`` gradient of ``<gy, f>`` and its derivative along tangents."""

    def gradient(gy):
        return lambda *inputs: torch.func.vjp(f, *inputs)[1](gy)

    return lambda inputs, tangents, gy: torch.func.jvp(gradient(gy), inputs, tangents)


def callable_for(
    mode: str,
    f: Callable,
    inputs: Arguments,
    tangents: Arguments,
    gy: Tensor,
    wrap: Callable = lambda f: f,
) -> Callable[[], object]:
    """What to call, without arguments, for one mode of ``f``.

    Args:
        mode: One of ``TIMED``.
        f: The op.
        inputs: Its arguments.
        tangents: One for each input.
        gy: Cotangent of the result.
        wrap: Compiles a function, or does nothing.

    Returns:
        A function that runs the mode and returns its results.
    """
    if mode == "forward":
        f = wrap(f)

        def run():
            with torch.no_grad():
                return f(*inputs)

        return run
    if mode in ("jvp", "hvp"):
        product = wrap((jvp if mode == "jvp" else hvp)(f))
        return lambda: product(inputs, tangents, gy)
    f = wrap(f)
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    if mode == "forward+vjp":
        return lambda: torch.autograd.grad(f(*leaves), leaves, gy)
    # Called at the first run, after the seed is set.
    y = []

    def backward():
        if not y:
            y.append(f(*leaves))
        return torch.autograd.grad(y[0], leaves, gy, retain_graph=True)

    return backward


def flatten(results) -> list[Tensor]:
    """The tensors of nested tuples."""
    if isinstance(results, Tensor):
        return [results]
    return [t for r in results for t in flatten(r)]


def saved_bytes(f: Callable, inputs: Arguments) -> int:
    """Bytes of the distinct tensors that ``f`` keeps for backward, its inputs too."""
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return t

    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f(*leaves)
    del y
    return sum(storage.nbytes() for storage in kept.values())
