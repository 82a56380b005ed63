"""Hand-written, fused Jacobian products of neural network layers: VJP, JVP and their derivatives.

``jacobian_ops.functional`` and ``jacobian_ops.nn`` are drop-ins for torch.nn.functional and
torch.nn, ``jacobian_ops.kernels`` are the raw products without autograd, and
``jacobian_ops.replace`` swaps the layers of a model in place.
"""

import torch  # noqa: F401  first: the native module shares the OpenMP runtime that torch loads

from . import functional, jacobian, kernels, nn
from .checkpointing import checkpoint
from .info import __version__, build_info
from .jacobian import jvp
from .memory import release_host_memory, retain_host_memory
from .replace import causal_lm_loss, register_transformers, replace, replacements, restore
from .report import report
from .tuning import autotune

__all__ = [
    "__version__",
    "autotune",
    "build_info",
    "causal_lm_loss",
    "checkpoint",
    "functional",
    "jacobian",
    "jvp",
    "kernels",
    "nn",
    "register_transformers",
    "release_host_memory",
    "replace",
    "replacements",
    "report",
    "restore",
    "retain_host_memory",
]
