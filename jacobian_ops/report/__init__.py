"""How gradients flow through a model: what the Jacobian of each of its layers is like and costs."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor, nn

from .calls import record, seeded
from .measure import is_block, measure
from .table import Layer, Report

__all__ = ["Layer", "Report", "report"]

DEAD, SATURATED, IDENTITY = 0.1, 0.5, 0.5  # from where on a share, or a cosine, is flagged


def report(
    model: nn.Module,
    x: Tensor | tuple,
    *,
    samples: int = 2,
    steps: int = 5,
    vanishing: float = 1e-3,
    exploding: float = 1e3,
    seed: int = 0,
) -> Report:
    """Look at the Jacobian of every layer of a model where it works on ``x``.

    Layers are the modules that call no other module, at each of their calls; residual blocks,
    modules with a sum through which their input reaches their result as it is, come with them.
    Every layer is run again on its inputs, and its J is multiplied by random vectors: gains are
    estimates, the largest one by ``steps`` steps of Lanczos's method on J^T J (Golub and Kahan
    1965), the mean by |J w|^2, which is |J|_F^2 in the mean over normal w (Hutchinson 1990).  The
    gradient is that of a random linear function of the model's result.

    The model stays as it is: buffers are put back, and no ``.grad`` is written.  Memory is taken
    for a copy of every layer's inputs.

    Args:
        model: Any module; after ``jacobian_ops.replace`` too.  Its training flag is obeyed.
        x: Its input, or a tuple of its inputs.  Some dozens of samples make the shares of dead and
            saturated units mean something.
        samples: Random vectors for a mean.
        steps: Steps for a largest singular value.
        vanishing: Gradients below this share of that at the model's result are flagged.
        exploding: Those above this many times.
        seed: Of the vectors, and of dropout.

    Returns:
        A :class:`Report`: ``print`` it, or call ``to_dict()`` or ``plot(path)``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``samples`` or ``steps`` is below 1, or the model returns no floating-point
            tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value in (("samples", samples), ("steps", steps)):
        if value < 1:
            raise ValueError(f"report: {name} is {value}; it must be at least 1")
    inputs = x if isinstance(x, tuple) else (x,)
    seed += 2**40  # x may well be the first that torch.manual_seed(0) gives
    with _unchanged(model), seeded(inputs, seed), torch.enable_grad():
        calls = record(model, inputs)
        rows = []
        for call in calls:
            whole = call is calls[0]
            if call.calls_others and not whole and not is_block(call, seed):
                continue
            rows.append(measure(call, samples, steps, seed))
            _flag(rows[-1], vanishing, exploding)
    if not calls[0].calls_others:  # the model is one layer
        return Report(rows, dataclasses.replace(rows[0], name="model"))
    return Report(rows[1:], rows[0])


def _flag(row, vanishing, exploding):
    if row.gradient is not None and row.gradient < vanishing:
        row.flags.append("vanishing gradient")
    if row.gradient is not None and not row.gradient <= exploding:
        row.flags.append("exploding gradient")
    if row.dead is not None and row.dead >= DEAD:
        row.flags.append(f"{row.dead:.0%} dead")
    if row.saturated is not None and row.saturated >= SATURATED:
        row.flags.append(f"{row.saturated:.0%} saturated")
    if row.identity is not None and row.identity >= IDENTITY and row.name != "model":
        row.flags.append("identity carries")


@contextlib.contextmanager
def _unchanged(model):
    """Buffers put back; attention by the general way, whose products all exist."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
