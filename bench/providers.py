"""Who computes: ours, eager PyTorch, torch.compile, and a peer library where one is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
import torch._functorch.config
from torch import Tensor

from . import modes
from .cases import Case


class Provider:
    """Runs a case's function as it is written, under ``torch.func`` and autograd.

    Args:
        name: What rows call it.
        function: Whose way to write the op it takes.
    """

    def __init__(self, name: str, function: str):
        self.name = name
        self.function = function

    def prepare(self, case: Case, mode: str, inputs, tangents, gy) -> Callable | None:
        """What to call for this mode; None where the provider does not have it."""
        return modes.callable_for(mode, case.functions[self.function], inputs, tangents, gy)

    def into(self, case: Case, mode: str, inputs, gy) -> Callable | None:
        """The same writing into memory that is there already."""
        prepare = case.prepared.get(mode, {}).get(self.name)
        return prepare and prepare(inputs, gy)

    def saved_bytes(self, case: Case, inputs) -> int | None:
        """Bytes kept for backward."""
        return modes.saved_bytes(case.functions[self.function], inputs)

    def checkable(self, case: Case) -> bool:
        """Whether the provider's random mask can be known."""
        return True


class Compiled(Provider):
    """``torch.compile`` of the eager function, of the whole product where that is one function."""

    def __init__(self):
        super().__init__("compile", "eager")

    def prepare(self, case, mode, inputs, tangents, gy):
        """As the base class, compiled; nothing of an earlier case is kept."""
        torch._dynamo.reset()

        def wrap(f):
            return torch.compile(f, fullgraph=True, dynamic=False)

        f = case.functions[self.function]
        # Without donated buffers, so that a graph can be run backward again.
        with torch._functorch.config.patch(donated_buffer=False):
            call = modes.callable_for(mode, f, inputs, tangents, gy, wrap)
            call()
        return call

    def saved_bytes(self, case, inputs):
        """Counted on the compiled function."""
        torch._dynamo.reset()
        f = torch.compile(case.functions[self.function], fullgraph=True, dynamic=False)
        f(*(x.detach().requires_grad_() for x in inputs))
        return modes.saved_bytes(f, inputs)

    def checkable(self, case):
        """The compiler's generator draws masks of its own."""
        return not case.random


class Jax(Provider):
    """JAX, jit-compiled by XLA, on the CPU with as many threads as XLA takes."""

    def __init__(self):
        super().__init__("jax", "eager")
        import jax
        import jax.nn as nn
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        self.jax = jax
        self.functions = {
            "linear": lambda x, w, b: x @ w.T + b,
            **{name: getattr(nn, name) for name in ("relu", "relu6", "elu", "selu", "celu")},
            **{name: getattr(nn, name) for name in ("sigmoid", "silu", "mish", "softplus")},
            "leaky_relu": nn.leaky_relu,
            "hardtanh": nn.hard_tanh,
            "tanh": jnp.tanh,
            "gelu": lambda x: nn.gelu(x, approximate=False),
            "hardswish": nn.hard_swish,
            "hardsigmoid": nn.hard_sigmoid,
            "logsigmoid": nn.log_sigmoid,
            "softmin": lambda x: nn.softmax(-x, -1),
        }

    def _function(self, case):
        if case.op in ("softmax", "log_softmax"):
            dim = 1 if case.label.endswith("dim 1") else -1
            return lambda x: getattr(self.jax.nn, case.op)(x, dim)
        return self.functions.get(case.op)

    def prepare(self, case, mode, inputs, tangents, gy):
        """As the base class, on JAX's arrays."""
        f = self._function(case)
        if f is None or inputs[0].device.type != "cpu":
            return None
        jax = self.jax

        def array(t: Tensor):
            wide = t.float() if t.dtype is torch.bfloat16 else t
            return jax.numpy.asarray(np.asarray(wide), dtype=str(t.dtype).removeprefix("torch."))

        inputs, tangents, gy = tuple(map(array, inputs)), tuple(map(array, tangents)), array(gy)
        if mode == "forward":
            run, arguments = f, inputs
        elif mode == "vjp":
            pull = jax.vjp(f, *inputs)[1]
            run, arguments = (lambda pull, gy: pull(gy)), (pull, gy)
        elif mode == "forward+vjp":
            run, arguments = (lambda gy, *xs: jax.vjp(f, *xs)[1](gy)), (gy, *inputs)
        elif mode == "jvp":
            run, arguments = (lambda xs, ts: jax.jvp(f, xs, ts)), (inputs, tangents)
        else:

            def run(xs, ts, gy):
                return jax.jvp(lambda *xs: jax.vjp(f, *xs)[1](gy), xs, ts)

            arguments = (inputs, tangents, gy)
        run = jax.jit(run)
        return lambda: jax.block_until_ready(run(*arguments))

    def into(self, case, mode, inputs, gy):
        """JAX has no outputs of the caller's."""
        return None

    def saved_bytes(self, case, inputs):
        """Not counted."""
        return None

    def checkable(self, case):
        """Its arrays are not compared."""
        return False


PEERS = {"jax": Jax}


def installed() -> tuple[str, ...]:
    """Names of the providers that can run here, ours first."""
    peers = (name for name in PEERS if importlib.util.find_spec(name))
    return ("jacobian_ops", "eager", "compile", *peers)


def make(name: str) -> Provider:
    """The provider of a name."""
    if name == "jacobian_ops":
        return Provider(name, name)
    if name == "eager":
        return Provider(name, name)
    return Compiled() if name == "compile" else PEERS[name]()
