"""Modules in a row, some of which run as one op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules import module as _torch_module

from .. import _backend, nn
from .. import functional as F
from .classes import FORMER, recipe_of

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
# Functions that torch.nn.Transformer's layers keep in place of a module.
_FUNCTIONS = {
    torch.nn.functional.relu: "relu",
    torch.relu: "relu",
    torch.nn.functional.gelu: "gelu",
    torch.nn.functional.silu: "silu",
}

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

    Fused are Linear -> activation -> Dropout, Linear -> activation, Linear -> Dropout where that
    drops, and Softmax -> Dropout.  The children stay what and where they are.  What to fuse is
    found at each call, so that a child that was exchanged or got a hook since is run as it should
    be.
    """

    def __getitem__(self, idx):
        """A child, or a slice; restore undoes the slice as it does the whole."""
        item = super().__getitem__(idx)
        if isinstance(idx, slice) and FORMER in self.__dict__:
            item.__dict__[FORMER] = self.__dict__[FORMER]
        return item

    def forward(self, input: Tensor) -> Tensor:
        """Run the children in order, some of them in one."""
        return run(list(self._modules.values()), input)


def run(modules, input, residual: Tensor | None = None):
    """The modules one after the other, some of them as one op, and ``residual`` added last."""
    i = 0
    while i < len(modules):
        count = fusable(modules, i)
        last = i + count == len(modules)
        # On its own a linear layer is worth it for the residual only.
        if count == 0 and residual is not None and i == len(modules) - 1:
            count, last = int(_is_linear(modules[i]) and _bare_calls(modules[i:])), True
        if count and has_kernels(input):
            added, residual = (residual, None) if last else (None, residual)
            input = _run(modules[i : i + count], input, added)
            i += count
        else:
            input = modules[i](input)
            i += 1
    return input if residual is None else input + residual


def has_kernels(input) -> bool:
    """Whether the fused ops take it."""
    return (
        isinstance(input, Tensor)
        and input.dtype in _backend.DTYPES
        and input.layout is torch.strided
    )


def _run(modules, input, residual):
    head, last = modules[0], modules[-1]
    p, training = (last.p, last.training) if type(last) is nn.Dropout else (0.0, False)
    if type(head) is nn.Softmax:
        y = F.softmax_dropout(input, head.dim, p, training)
        return y if residual is None else y + residual
    name = activation_name(modules[1]) if len(modules) > 1 else None
    return F.linear_act_dropout(
        *(input, _weight(head), head.bias, name or "identity", p, training), residual=residual
    )


def _weight(linear):
    """(out, in); that of transformers' Conv1D is the transpose, which kernels read in place."""
    return linear.weight if type(linear) is nn.Linear else linear.weight.t()


def _is_linear(module) -> bool:
    recipe = recipe_of(module)
    return type(module) is nn.Linear or recipe is not None and recipe.is_linear


def fusable(modules, i) -> int:
    """How many modules from ``i`` on run as one op; 0 for none."""
    count = 0
    if type(modules[i]) is nn.Softmax:
        if modules[i].dim is not None and _is_dropout(modules, i + 1):
            count = 2
    elif not _is_linear(modules[i]):
        return 0
    elif i + 1 < len(modules) and activation_name(modules[i + 1]) is not None:
        count = 3 if _is_dropout(modules, i + 2) and bare(modules[i + 2]) else 2
    elif _is_dropout(modules, i + 1) and modules[i + 1].training and modules[i + 1].p:
        count = 2
    return count if count and _bare_calls(modules[i : i + count]) else 0


def _bare_calls(modules) -> bool:
    hooked = any(getattr(_torch_module, name) for name in _GLOBAL_HOOKS)
    return not hooked and all(bare(module) for module in modules)


def _is_dropout(modules, i) -> bool:
    return i < len(modules) and type(modules[i]) is nn.Dropout


def activation_name(module) -> str | None:
    """What linear_act_dropout calls this activation; None where it has no name for it."""
    if not isinstance(module, torch.nn.Module):
        return _FUNCTIONS.get(module)
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    recipe = recipe_of(module)
    if recipe is not None:
        return recipe.activation
    name, params = _ACTIVATIONS.get(type(module), (None, {}))
    return name if all(getattr(module, k) == v for k, v in params.items()) else None


def bare(module) -> bool:
    """Whether calling the module is no more than running the forward of its class."""
    if not isinstance(module, torch.nn.Module):  # a function, as an activation
        return True
    state = module.__dict__
    return "forward" not in state and not any(state.get(name) for name in _HOOKS)


def gated(activation, gate: Tensor, up: Tensor) -> Tensor:
    """``activation(gate) * up``, as one op where there is one."""
    name = activation_name(activation)
    if has_kernels(gate) and has_kernels(up) and _bare_calls([activation]):
        if name == "silu":
            return F.swiglu(gate, up)
        if name in ("gelu", "gelu_tanh"):
            return F.geglu(gate, up, "none" if name == "gelu" else "tanh")
    return activation(gate) * up
