"""Swap the layers of a model for ours in place, and back.

A layer changes its class only: parameters, buffers, hooks, the training flag, names and state_dict
keys stay, and so does every reference to it.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn.modules import module as _torch_module
from torch.nn.utils import parametrize

from . import _backend, nn
from . import functional as F

__all__ = ["FusedSequential", "replace", "restore"]

_CLASSES = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if hasattr(torch.nn, name)
}

# The name of an activation in linear_act_dropout, and the parameters that the name stands for.
_ACTIVATIONS = {
    nn.ReLU: ("relu", {}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": 0.01}),
    nn.ELU: ("elu", {"alpha": 1.0}),
    nn.SELU: ("selu", {}),
    nn.CELU: ("celu", {"alpha": 1.0}),
    nn.ReLU6: ("relu6", {}),
    nn.Hardtanh: ("hardtanh", {"min_val": -1.0, "max_val": 1.0}),
    nn.Sigmoid: ("sigmoid", {}),
    nn.Tanh: ("tanh", {}),
    nn.SiLU: ("silu", {}),
    nn.Softplus: ("softplus", {"beta": 1.0, "threshold": 20.0}),
    nn.Mish: ("mish", {}),
    nn.Hardswish: ("hardswish", {}),
    nn.Hardsigmoid: ("hardsigmoid", {}),
    nn.LogSigmoid: ("logsigmoid", {}),
}

# Where a swapped layer keeps its former class, so that restore leaves alone what was built as ours.
_FORMER = "_jacobian_ops_former"

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_compiled_call_impl",
)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


class FusedSequential(torch.nn.Sequential):
    """A Sequential that runs what can be fused among its children as one op.

    Fused are Linear -> activation -> Dropout, Linear -> activation, and Softmax -> Dropout.  The
    children stay what and where they are.  What to fuse is found at each call, so that a child
    that was exchanged or got a hook since is run as it should be.
    """

    def __getitem__(self, idx):
        """A child, or a slice; restore undoes the slice as it does the whole."""
        item = super().__getitem__(idx)
        if isinstance(idx, slice) and _FORMER in self.__dict__:
            item.__dict__[_FORMER] = self.__dict__[_FORMER]
        return item

    def forward(self, input: Tensor) -> Tensor:
        """Run the children in order, some of them in one."""
        children = list(self._modules.values())
        i = 0
        while i < len(children):
            count = _fusable(children, i)
            if count and _has_kernels(input):
                input = _run(children[i : i + count], input)
                i += count
            else:
                input = children[i](input)
                i += 1
        return input


def _has_kernels(input) -> bool:
    return (
        isinstance(input, Tensor)
        and input.dtype in _backend.DTYPES
        and input.layout is torch.strided
    )


def _run(children, input):
    head, last = children[0], children[-1]
    p, training = (last.p, last.training) if type(last) is nn.Dropout else (0.0, False)
    if type(head) is nn.Softmax:
        return F.softmax_dropout(input, head.dim, p, training)
    name = _activation_name(children[1])
    return F.linear_act_dropout(input, head.weight, head.bias, name, p, training)


def _fusable(children, i) -> int:
    """How many children from ``i`` on run as one op; 0 for none."""
    head = type(children[i])
    if head is not nn.Linear and head is not nn.Softmax:
        return 0
    count = 0
    if head is nn.Softmax:
        if children[i].dim is not None and _is_dropout(children, i + 1):
            count = 2
    elif i + 1 < len(children) and _activation_name(children[i + 1]) is not None:
        count = 3 if _is_dropout(children, i + 2) and _bare(children[i + 2]) else 2
    if not count or any(getattr(_torch_module, name) for name in _GLOBAL_HOOKS):
        return 0
    return count if all(_bare(child) for child in children[i : i + count]) else 0


def _is_dropout(children, i) -> bool:
    return i < len(children) and type(children[i]) is nn.Dropout


def _activation_name(module) -> str | None:
    """What linear_act_dropout calls this activation; None where it has no name for it."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    name, params = _ACTIVATIONS.get(type(module), (None, {}))
    return name if all(getattr(module, k) == v for k, v in params.items()) else None


def _bare(module) -> bool:
    """Whether calling the module is no more than running the forward of its class."""
    state = module.__dict__
    return "forward" not in state and not any(state.get(name) for name in _HOOKS)


def replace(model: torch.nn.Module) -> torch.nn.Module:
    """Swap the layers of a model that :mod:`jacobian_ops.nn` has for ours, in place.

    Only exact torch.nn classes are swapped, never subclasses, nor SyncBatchNorm.  Where a
    Sequential has Linear -> activation -> Dropout, Linear -> activation or Softmax -> Dropout in a
    row, it runs them as one op, unless one of them has hooks.  Results are those of before to
    rounding; dropout draws other masks.

    Args:
        model: Any module; a bare layer too.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check(model, "replace")
    modules = list(model.modules())
    with _all_or_none(modules):
        for m in modules:
            if type(m) in _CLASSES and "forward" not in m.__dict__:
                _become(m, _CLASSES[type(m)])
        for m in modules:
            if type(m) is torch.nn.Sequential and "forward" not in m.__dict__:
                children = list(m)
                if any(_fusable(children, i) for i in range(len(children))):
                    _become(m, FusedSequential)
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`replace`, in place.  Modules that were built as ours stay.

    Args:
        model: Any module.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check(model, "restore")
    modules = list(model.modules())
    with _all_or_none(modules):
        for m in modules:
            if _FORMER in m.__dict__:
                _revert(m)
    return model


def _check(model, function):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _become(module, cls):
    former = module.__class__
    module.__class__ = cls
    module.__dict__[_FORMER] = former


def _revert(module):
    former, cls = module.__dict__[_FORMER], type(module)
    ours = _CLASSES.get(former, FusedSequential)
    if cls is not ours:
        if not (parametrize.is_parametrized(module) and cls.__bases__ == (ours,)):
            return  # another class since, which is not for us to undo
        # A parametrized module has a class of its own, derived from ours.
        body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        former = type(cls.__name__, (former,), body)
    module.__class__ = former
    del module.__dict__[_FORMER]


@contextlib.contextmanager
def _all_or_none(modules):
    """Give the modules their classes back when the body fails."""
    before = [(m, m.__class__, m.__dict__.get(_FORMER)) for m in modules]
    try:
        yield
    except BaseException:
        for m, cls, former in before:
            m.__class__ = cls
            m.__dict__.pop(_FORMER, None)
            if former is not None:
                m.__dict__[_FORMER] = former
        raise
