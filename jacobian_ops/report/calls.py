"""The calls of a model's modules in one forward pass, and the gradients that reach them."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only


@dataclasses.dataclass
class Call:
    """A module that ran, and copies of what it was given."""

    name: str
    module: nn.Module
    args: tuple
    kwargs: dict
    calls_others: bool = False
    m: int = 0
    gradient: float | None = None
    dead: float | None = None
    saturated: float | None = None


def record(model, inputs) -> list[Call]:
    """Run the model forward and backward once; its calls in order, the model's own first."""
    calls, stack, counts = [], [], {}
    names = {module: name or "model" for name, module in model.named_modules()}

    def before(module, args, kwargs):
        if stack:
            stack[-1].calls_others = True
        name = names[module]
        counts[name] = counts.get(name, 0) + 1
        name = name if counts[name] == 1 else f"{name}#{counts[name]}"
        # Copies: a later module may work in place.
        copies = mapped(lambda t: t.detach().clone(), (args, kwargs))
        calls.append(Call(name, module, *copies))
        stack.append(calls[-1])

    def after(module, args, kwargs, result):
        call = stack.pop()
        y = first_floating(result)
        if y is None:
            return
        call.m = y.numel()
        _look_at(call, y.detach())
        if y.requires_grad:
            # A module in place hooks the same tensor anew, and gets the gradient by its result.
            y.register_hook(lambda g: setattr(call, "gradient", norm(g)))

    handles = [
        handle
        for module in names
        for handle in (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        )
    ]
    leaves = []

    def leaf(t):
        if not t.is_floating_point():
            return t.clone()
        leaves.append(t.detach().clone().requires_grad_())
        return leaves[-1].clone()

    try:
        y = first_floating(model(*mapped(leaf, inputs)))
    finally:
        for handle in handles:
            handle.remove()
    if y is None:
        raise ValueError("report: the model returns no floating-point tensor")
    leaves += [p for p in model.parameters() if p.requires_grad]
    if y.requires_grad and leaves:
        torch.autograd.grad(y, leaves, gy := torch.randn_like(y), allow_unused=True)
        scale = norm(gy)
        for call in calls:
            if call.gradient is not None:
                call.gradient = call.gradient / scale if scale else None
    return calls


def mapped(f, tree):
    """The tree with f of its tensors, one that is there twice mapped once."""
    results = {}

    def of(t):
        if id(t) not in results:
            results[id(t)] = f(t)
        return results[id(t)]

    return tree_map_only(Tensor, of, tree)


def _look_at(call, y):
    """Dead and saturated units."""
    module = call.module
    if isinstance(module, nn.ReLU) and y.dim() > 1 and y.numel():
        channel = -1 if y.dim() == 3 else 1
        call.dead = (y <= 0).movedim(channel, 0).flatten(1).all(1).float().mean().item()
    elif isinstance(module, nn.Sigmoid) and y.numel():
        call.saturated = (4 * y * (1 - y) < 0.05).float().mean().item()
    elif isinstance(module, nn.Tanh) and y.numel():
        call.saturated = (1 - y * y < 0.05).float().mean().item()
    elif isinstance(module, nn.Softmax) and y.numel():
        dim = module.dim if module.dim is not None else int(y.dim() not in (0, 1, 3))
        call.saturated = (y.amax(dim) > 0.99).float().mean().item()


@contextlib.contextmanager
def seeded(inputs, seed):
    """The same dropout masks in every run of a layer, and the generators put back behind."""
    devices = {t.device.index for t in tree_iter(inputs) if isinstance(t, Tensor) and t.is_cuda}
    # Not torch.manual_seed, which keeps a record of each call for devices yet to be used.
    generators = [torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def is_floating(t) -> bool:
    """Whether it is a tensor that a derivative can be taken by."""
    return isinstance(t, Tensor) and t.is_floating_point()


def first_floating(tree) -> Tensor | None:
    """The tensor that stands for all of a module's arguments, or results."""
    return next((t for t in tree_iter(tree) if is_floating(t)), None)


def _wide(t):
    return t.detach().flatten().to(torch.promote_types(t.dtype, torch.float32))


def norm(t) -> float:
    """The Euclidean norm of all elements."""
    return torch.linalg.vector_norm(_wide(t)).item()


def dot(a, b) -> float:
    """The inner product of all elements."""
    return torch.dot(_wide(a), _wide(b)).item()
