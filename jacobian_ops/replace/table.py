"""What replace did to a model, as data and as a table."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses

import torch

from .._text import text_of
from . import swap, transformers
from .classes import FORMER, recipe_of
from .sequence import activation_name, fusable


@dataclasses.dataclass
class Replacement:
    """A layer or block, or a setting of a model of transformers.

    Attributes:
        name: As in ``model.named_modules()``; "model" for the model itself.
        kind: Its class before :func:`jacobian_ops.replace`.
        action: "swapped", "fused" (several of its layers run as one op), or "left".
        detail: What runs now, or why it was left.
        parameters: Numbers in its own parameters, without those of its children.
        saved_bytes: What a forward pass keeps here for the backward pass, but for parameters and
            buffers; what several keep counts for the first.  None unless it was measured.
        native_saved_bytes: The same before :func:`jacobian_ops.replace`.
    """

    name: str
    kind: str
    action: str
    detail: str
    parameters: int
    saved_bytes: int | None = None
    native_saved_bytes: int | None = None


@dataclasses.dataclass
class Replacements:
    """What :func:`replacements` found; printed, a table (which needs ``rich``).

    Attributes:
        layers: In the order of ``model.named_modules()``; containers are left out.
        parameters: Numbers in all parameters of the model.
        saved_bytes: Of the whole model, as of one row; None unless it was measured.
        native_saved_bytes: The same before :func:`jacobian_ops.replace`.
    """

    layers: list[Replacement]
    parameters: int
    saved_bytes: int | None = None
    native_saved_bytes: int | None = None

    def counts(self) -> dict[str, int]:
        """How many were swapped, fused and left."""
        found = collections.Counter(row.action for row in self.layers)
        return {action: found[action] for action in ("swapped", "fused", "left")}

    def to_dict(self) -> dict:
        """Plain numbers, strings and lists, ready for JSON."""
        return dataclasses.asdict(self)

    def __rich__(self):
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        counts = ", ".join(f"{n} {action}" for action, n in self.counts().items())
        table = Table(title=f"Replacements: {counts}", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("layer", "class", "", "now, or why not"):
            table.add_column(heading, overflow="fold")
        for heading in ("parameters", "kept before", "kept now"):
            table.add_column(heading, justify="right")
        colors = {"swapped": "green", "fused": "bold green", "left": "yellow"}
        for row in self.layers:
            action = f"[{colors[row.action]}]{row.action}[/]"
            words = (escape(row.name), escape(row.kind), action, escape(row.detail))
            table.add_row(*words, *_sizes(row))
        table.add_section()
        table.add_row("model", "", "", "", *_sizes(self))
        return table

    def __str__(self):
        return text_of(self.__rich__())


def _sizes(row):
    kept = (row.native_saved_bytes, row.saved_bytes)
    return f"{row.parameters:,}", *("-" if n is None else f"{n / 2**20:.3f} MiB" for n in kept)


def replacements(model: torch.nn.Module, *args, **kwargs) -> Replacements:
    """What :func:`jacobian_ops.replace` swapped, fused and left in a model, and why.

    A layer whose children are exchanged or hooked after :func:`jacobian_ops.replace` runs them as
    they are, although it is listed as fused.

    Args:
        model: Any module.
        args: Of a call of the model.  With them or ``kwargs`` two copies of it are called, one of
            them restored, and what they keep for the backward pass is measured.
        kwargs: Of that call.

    Returns:
        Rows and sums; print it for a table.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"replacements: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    rows = [row for name, m in model.named_modules() for row in _rows(name or "model", m)]
    result = Replacements(rows, _count(model.parameters()))
    if args or kwargs:
        kept = _saved(copy.deepcopy(model), args, kwargs)
        before = _saved(swap.restore(copy.deepcopy(model)), args, kwargs)
        rows += [
            Replacement(name, type(module).__name__, "left", "ops of its own forward", 0)
            for name, module in ((n or "model", m) for n, m in model.named_modules())
            if (kept[name] or before[name]) and all(row.name != name for row in rows)
        ]
        order = {name or "model": i for i, (name, _) in enumerate(model.named_modules())}
        rows.sort(key=lambda row: order[row.name])
        seen = set()
        for row in rows:
            first = row.name not in seen
            seen.add(row.name)
            row.saved_bytes = kept[row.name] if first else 0
            row.native_saved_bytes = before[row.name] if first else 0
        result.saved_bytes = sum(kept.values())
        result.native_saved_bytes = sum(before.values())
    return result


def _count(parameters) -> int:
    return sum(p.numel() for p in parameters if not torch.nn.parameter.is_lazy(p))


def _rows(name, module):
    kind = module.__dict__.get(FORMER, type(module)).__name__
    parameters = _count(module.parameters(recurse=False))
    if transformers.is_model(module):
        for action, detail in transformers.settings(module):
            yield Replacement(name, kind, action, detail, 0)
    if FORMER in module.__dict__:
        recipe = recipe_of(module)
        if isinstance(module, torch.nn.Sequential):
            yield Replacement(name, kind, "fused", _fused(list(module)), parameters)
        elif recipe is not None and recipe.fuses:
            yield Replacement(name, kind, "fused", recipe.fuses, parameters)
        else:
            now = type(module).__name__ if recipe is None else recipe.__name__
            yield Replacement(name, kind, "swapped", f"{now} of jacobian_ops", parameters)
    elif not type(module).__module__.startswith("jacobian_ops"):
        reason = swap.plan(module)
        if isinstance(reason, type):
            reason = "it came after replace"
        if reason is not None:
            yield Replacement(name, kind, "left", reason, parameters)


def _fused(children) -> str:
    """The rows of layers that run as one op, in words."""
    found, i = [], 0
    while i < len(children):
        count = fusable(children, i)
        if count:
            found.append(", ".join(_word(child) for child in children[i : i + count]))
        i += max(count, 1)
    return "; ".join(found)


def _word(module) -> str:
    if activation_name(module) is not None:
        return "activation"
    return type(module).__name__.lower()


def _saved(model, args, kwargs) -> collections.Counter:
    """Bytes that each module keeps, by name."""
    names = {m: name or "model" for name, m in model.named_modules()}
    own = [*model.parameters(), *model.buffers()]
    known = {t.untyped_storage().data_ptr() for t in own}
    kept, alive, stack = collections.Counter(), [], ["model"]

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(storage)  # so that no address is used twice
            kept[stack[-1]] += storage.nbytes()
        return t

    devices = {t.device for t in own if t.device.type != "cpu"}
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with torch.random.fork_rng(devices), _tracked(names, stack), hooks, torch.enable_grad():
        model(*args, **kwargs)
    return kept


@contextlib.contextmanager
def _tracked(names, stack):
    """Keep the names of the modules that run; not by hooks, which would keep ops apart."""
    call = torch.nn.Module.__call__

    def tracked(module, *args, **kwargs):
        stack.append(names.get(module, stack[-1]))
        try:
            return call(module, *args, **kwargs)
        finally:
            stack.pop()

    torch.nn.Module.__call__ = tracked
    try:
        yield
    finally:
        torch.nn.Module.__call__ = call
