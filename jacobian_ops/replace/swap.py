"""replace and restore."""

from __future__ import annotations

import contextlib

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .. import nn
from . import transformers
from .classes import FORMER, derived
from .recipes import RECIPES, Row
from .sequence import FusedSequential, fusable

_CLASSES = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if hasattr(torch.nn, name)
}
# Quantized layers have parameters of other classes.
_TENSORS = ("Parameter", "Tensor", "Buffer", "DTensor", "UninitializedParameter")
_FUSED = {torch.nn.Sequential: FusedSequential}


def replace(model: torch.nn.Module) -> torch.nn.Module:
    """Swap the layers of a model for ours, in place, where results are known to stay.

    Of torch.nn the layers that :mod:`jacobian_ops.nn` has: exact classes, never subclasses, nor
    SyncBatchNorm.  Of other libraries activations and linear layers of transformers and timm,
    RMSNorms and LayerNorms of any, known by what they do.  Layers in a row run as one op: Linear ->
    activation -> Dropout, Linear -> Dropout -> residual, Softmax -> Dropout, activation times gate;
    in a Sequential or a subclass that runs as it does, and in blocks that are known by their code:
    the MLPs of GPT-2, BERT, T5, ViT and the Llama family, timm's Mlp and Attention, torch.nn's
    transformer layers.  A layer that has hooks, or was exchanged since, runs by itself.

    A model of transformers gets ``attn_implementation="jacobian_ops"`` if it can take that of sdpa
    and has it or eager, in a config of its own, and its causal-LM loss runs on our cross_entropy.

    Results are those of before to rounding; dropout draws other masks.
    :func:`jacobian_ops.replacements` tells what was done and what was left, and why.

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
            cls = plan(m)
            if isinstance(cls, type):
                _become(m, cls)
        for m in modules:
            if _fuses(m):
                _become(m, _FUSED.get(type(m)) or derived(type(m), Row))
        transformers.copy_configs(modules)
        for m in modules:
            if transformers.is_model(m):
                transformers.adopt(m)
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
            if FORMER in m.__dict__:
                _revert(m)
            if transformers.is_model(m):
                transformers.leave(m)
    return model


def plan(module: torch.nn.Module) -> type | str | None:
    """The class that a layer gets; why it stays what it is; None if it is ours or none of a kind.

    A Sequential is looked at when its children are ours.
    """
    cls = type(module)
    if FORMER in module.__dict__ or cls.__module__.startswith("jacobian_ops"):
        return None
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if parametrize.is_parametrized(module):
        return "it was parametrized before"
    for name, p in module._parameters.items():
        if p is not None and type(p).__name__ not in _TENSORS:
            return f"its {name} is of class {type(p).__name__}, which our ops do not know"
    if cls in _CLASSES:
        return _CLASSES[cls]
    recipe = next((recipe for recipe in RECIPES if recipe.fits(module)), None)
    if recipe is not None:
        return derived(cls, recipe)
    if isinstance(module, LazyModuleMixin):
        return "it has no parameters yet"
    known = next((base for base in cls.__mro__ if base in _CLASSES), None)
    if known is not None:
        return f"a subclass of {known.__name__}, which may do something else"
    if module._modules or cls is torch.nn.Identity:
        return None
    return "there is no op of ours for it"


def _fuses(module) -> bool:
    """Whether it is a Sequential whose children are ours, some to run as one op."""
    if FORMER in module.__dict__ or "forward" in module.__dict__ or not Row.fits(module):
        return False
    children = list(module)
    return any(fusable(children, i) for i in range(len(children)))


def _check(model, function):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _become(module, cls):
    former = module.__class__
    module.__class__ = cls
    module.__dict__[FORMER] = former


def _revert(module):
    former, cls = module.__dict__[FORMER], type(module)
    if not _is_ours(cls, former):
        if not (parametrize.is_parametrized(module) and _is_ours(cls.__bases__[0], former)):
            return  # another class since, which is not for us to undo
        # A parametrized module has a class of its own, derived from ours.
        body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        former = type(cls.__name__, (former,), body)
    module.__class__ = former
    del module.__dict__[FORMER]


def _is_ours(cls, former) -> bool:
    """Whether ``cls`` is what ``former`` becomes."""
    if cls is (_CLASSES | _FUSED).get(former):
        return True
    return cls.__dict__.get("_made_of", (None,))[0] is former


@contextlib.contextmanager
def _all_or_none(modules):
    """Give the modules their classes and attributes back when the body fails."""
    before = [(m, m.__class__, dict(m.__dict__)) for m in modules]
    attention = transformers.implementations(modules)
    try:
        yield
    except BaseException:
        for m, cls, attributes in before:
            m.__class__ = cls
            m.__dict__.clear()
            m.__dict__.update(attributes)
        for config, name in attention:
            config._attn_implementation_internal = name
        raise
