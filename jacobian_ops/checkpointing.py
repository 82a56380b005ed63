"""Trade memory for a second forward pass in the layers of a Sequential."""

from __future__ import annotations

import math

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import set_checkpoint_early_stop

from .replace import FusedSequential

__all__ = ["CheckpointedSequential", "checkpoint"]

_POLICIES = "'sqrt', 'all', 'none' or a number of segments"


class CheckpointedSequential(FusedSequential):
    """A Sequential in segments, of which the backward pass keeps the inputs only.

    The rest is computed again when it is needed, but for the last of several segments: its backward
    comes first.  Each segment fuses what :class:`FusedSequential` does.

    Attributes:
        policy: As in :func:`checkpoint`.
    """

    policy: str | int

    def segments(self) -> list[FusedSequential]:
        """The children in runs of nearly equal length; the modules are shared."""
        children = list(self)
        count = min(_count(self.policy, len(children)), len(children))
        bounds = [round(i * len(children) / count) for i in range(count + 1)] if count else []
        return [FusedSequential(*children[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]

    def forward(self, input: Tensor) -> Tensor:
        """Run the segments in order, all of them plainly under torch.func and forward AD.

        Those have no hooks for what is kept, or want the tangents that recomputing has not.
        """
        plainly = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        segments = self.segments()
        for i, segment in enumerate(segments):
            if plainly or (i > 0 and i == len(segments) - 1):
                input = segment(input)
            else:
                # Recomputing stops early by an exception, which leaves a Function that calls
                # save_for_forward in a cycle with its result until the next garbage collection.
                with set_checkpoint_early_stop(False):
                    input = torch_checkpoint(segment, input, use_reentrant=False)
        return input


def checkpoint(model: nn.Sequential, policy: str | int = "sqrt") -> nn.Sequential:
    """Make a Sequential keep less for its backward pass, in place, by computing it again.

    For L layers of equal cost ("sqrt": Chen et al. 2016, arXiv:1604.06174):

    ======== =================== ============================= ====================
    policy   kept after forward  most at a time, in backward   forward passes
    ======== =================== ============================= ====================
    "none"   O(L)                O(L)                          1
    "sqrt"   O(sqrt L)           O(sqrt L)                     2, but for the last segment
    "all"    O(1)                O(L)                          2
    an int k O(k + L / k)        O(k + L / k)                  2, but for the last segment
    ======== =================== ============================= ====================

    Gradients are the same, dropout draws the same masks again, and double backward works.  Under
    torch.func and forward AD all layers run plainly: derivatives are right, no memory is saved.
    Parameters, buffers, state_dict keys and hooks of the layers stay.  BatchNorm in training
    counts a batch twice in its running statistics, as with torch.utils.checkpoint.

    Args:
        model: A Sequential, one after ``jacobian_ops.replace`` too; of a model of other kinds, the
            Sequential of its blocks.
        policy: "sqrt" for about sqrt(L) segments, "all" for one that is all computed again, "none"
            to undo this function, or the number of segments, of which 1 is "all".

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no Sequential, or one with a forward of its own.
        ValueError: ``policy`` is none of these.
    """
    if not isinstance(model, nn.Sequential) or "forward" in model.__dict__:
        raise TypeError(
            "checkpoint: model must be a torch.nn.Sequential without a forward of its own, got "
            f"{type(model).__name__}; of other models, give the Sequential of the blocks"
        )
    _count(policy, 1)
    former = model.__dict__.get("_former_class", type(model))
    if former not in (nn.Sequential, FusedSequential):
        raise TypeError(
            f"checkpoint: model is a {former.__name__}, whose forward may not be a Sequential's; "
            "allowed: torch.nn.Sequential itself"
        )
    if policy == "none":
        model.__class__ = former
        model.__dict__.pop("_former_class", None)
        model.__dict__.pop("policy", None)
    else:
        model.__class__ = CheckpointedSequential
        model.__dict__.update(_former_class=former, policy=policy)
    return model


def _count(policy, layers) -> int:
    """How many segments."""
    if policy in ("sqrt", "all", "none"):
        return {"sqrt": round(math.sqrt(layers)), "all": 1, "none": 0}[policy]
    if isinstance(policy, int) and not isinstance(policy, bool) and policy > 0:
        return policy
    raise ValueError(f"checkpoint: policy is {policy!r}; allowed: {_POLICIES}, at least 1")
