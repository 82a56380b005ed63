"""Swap the layers of a model for ours in place, and back.

A layer changes its class only: parameters, buffers, hooks, the training flag, names and state_dict
keys stay, and so does every reference to it.  What is not known to give the same results is left.
"""

from .sequence import FusedSequential
from .swap import replace, restore
from .table import Replacement, Replacements, replacements
from .transformers import causal_lm_loss, register_transformers

__all__ = [
    "FusedSequential",
    "Replacement",
    "Replacements",
    "causal_lm_loss",
    "register_transformers",
    "replace",
    "replacements",
    "restore",
]
