"""How our ops run on sharded tensors: rules for :class:`torch.distributed.tensor.DTensor`.

``import jacobian_ops`` registers them.  A rule tells which dimensions of an op's tensors may lie on
the ranks of a mesh; where the given ones do not fit, DTensor redistributes them first, at the least
cost.  An op without a rule of its own takes replicated tensors.

What no placement of one op's tensors can say is here as functions: softmax and cross_entropy over a
dimension that is sharded, which exchange one number a row, and dropout's seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .autograd.rule import RULES
from .kernels.cross_entropy import wide

# ------------------------------------------------------------------- rules

# A rule takes an op's tensors and its other arguments, and labels the dimensions of the tensors and
# of the outputs.  Those with the same label are sharded together; "." is whole on every rank.  An
# output that lacks the label of what is sharded is a sum over the ranks.
_Labels = list[str]


def _dims(t, unsharded: Iterable[int] = ()) -> _Labels:
    """The dimensions of ``t``, counted from the front, but for those that stay whole."""
    return ["." if i in unsharded else str(i) for i in range(t.ndim)]


def _elementwise(outputs: int):
    def rule(tensors, consts):
        labels = [None if t is None else _dims(t) for t in tensors]
        return labels, [labels[0]] * outputs

    return rule


def _rows(outputs: int):
    """Along one dimension, the first of the constants."""

    def rule(tensors, consts):
        labels = [None if t is None else _dims(t, (consts[0],)) for t in tensors]
        return labels, [labels[0]] * outputs

    return rule


def _norm(columns: tuple[int, ...], outputs: int, sums: int = 0):
    """Over the last dimensions; ``columns`` are the arguments of the shape of weight."""

    def rule(tensors, consts):
        x, dims = tensors[0], consts[0]
        row = _dims(x, range(x.ndim - dims, x.ndim))
        column = ["."] * dims
        labels = [
            None if t is None else column if i in columns else row for i, t in enumerate(tensors)
        ]
        return labels, [row] * outputs + [column] * sums

    return rule


def _samples(outputs: int, sums: int = 0):
    """group_norm: over samples, unless 0 groups say that statistics are those of the batch."""

    def rule(tensors, consts):
        x, stats = tensors[0], tensors[-1]
        alone = consts[0] or stats is not None
        sample = ["0" if alone else "."] + ["."] * (x.ndim - 1)
        labels = [
            None if t is None else sample if t.ndim == x.ndim and t is not stats else ["."] * t.ndim
            for t in tensors
        ]
        return labels, [sample] * outputs + [["."]] * sums

    return rule


def _losses(outputs: str):
    """cross_entropy: each output is "x", of the shape of the logits, or "g", of the losses."""

    def rule(tensors, consts):
        x, target, weight, *others = tensors
        logits = _dims(x, (consts[0],))
        losses = [label for i, label in enumerate(logits) if i != consts[0]]

        def of(t):
            return None if t is None else logits if t.ndim == x.ndim else losses

        labels = [logits, of(target), None if weight is None else ["."], *map(of, others)]
        return labels, [logits if kind == "x" else losses for kind in outputs]

    return rule


def _linear_losses(tensors: str, outputs: str):
    """linear_cross_entropy: over rows; "x" are as many, "g" one number each, others are whole."""
    labels = {"x": ["0", "."], "g": ["0"], "w": [".", "."], "b": ["."]}

    def rule(given, consts):
        inputs = [None if t is None else labels[k] for k, t in zip(tensors, given, strict=True)]
        return inputs, [labels[k] for k in outputs]

    return rule


def _heads(outputs: int):
    """attention: over all dimensions before the last two, those of masks of size 1 excepted."""

    def rule(tensors, consts):
        q, k, seed = tensors[0], tensors[1], tensors[5]
        lead = q.ndim - 2
        shared = [i for i in range(lead) if k.shape[i] != 1 or q.shape[i] == 1]

        def of(t):
            if t is None:
                return None
            if t is seed:
                return ["."] * t.ndim
            wide = [i for i in shared if t.shape[i] != 1 or q.shape[i] == 1]
            return [str(i) if i in wide else "." for i in range(t.ndim)]

        return list(map(of, tensors)), [of(q)] * outputs

    return rule


def _rotary(tensors, consts):
    x, *tables = tensors
    row = _dims(x, (x.ndim - 1,))
    return [row] + [
        ["." if n == 1 else label for n, label in zip(t.shape, row, strict=True)] for t in tables
    ], [row]


def _products(inputs: str, outputs: str, sources: tuple[tuple[int, ...], ...] | None = None):
    """Linear maps, as an einsum: "mk nk +n" -> "mn", where a plus marks what is added to a sum.

    ``sources`` are the arguments that each output is made from, if not from all; without one of
    them it is empty.
    """

    def labelled(names, lead):
        plus, names = names[: names[0] == "+"], names.strip("+")
        return [str(i) for i in range(lead)] + [plus + n for n in names]

    def rule(tensors, consts):
        lead = tensors[0].ndim - 2
        given = zip(inputs.split(), tensors, strict=True)
        labels = [None if t is None else labelled(names, lead) for names, t in given]
        return labels, [labelled(names, lead) for names in outputs.split()], sources

    return rule


_RULES: dict[str, Callable] = {
    "activation": _elementwise(1),
    "activation_vjp": _elementwise(1),
    "activation_jvp": _elementwise(2),
    "activation_vjp_vjp": _elementwise(2),
    "activation_vjp_jvp": _elementwise(2),
    "dropout": _elementwise(1),
    "gated": _elementwise(1),
    "gated_jvp": _elementwise(2),
    "gated_vjp": _elementwise(2),
    "gated_vjp_vjp": _elementwise(3),
    "gated_vjp_jvp": _elementwise(4),
    "softmax": _rows(1),
    "softmax_vjp": _rows(1),
    "softmax_jvp": _rows(2),
    "softmax_vjp_vjp": _rows(2),
    "softmax_vjp_jvp": _rows(2),
    "log_softmax": _rows(1),
    "log_softmax_vjp": _rows(1),
    "log_softmax_tangent": _rows(1),
    "log_softmax_jvp": _rows(2),
    "log_softmax_vjp_vjp": _rows(2),
    "log_softmax_vjp_jvp": _rows(2),
    "norm": _norm((1, 2), 1),
    "norm_jvp": _norm((1, 2, 4, 5), 2),
    "norm_vjp": _norm((1,), 1, sums=2),
    "norm_vjp_jvp": _norm((1, 4), 2, sums=4),
    "add_norm": _norm((2, 3), 2),
    "add_norm_vjp": _norm((1,), 1, sums=2),
    "group_norm": _samples(1),
    "group_norm_jvp": _samples(2),
    "group_norm_vjp": _samples(1, sums=2),
    "group_norm_vjp_jvp": _samples(2, sums=4),
    "cross_entropy": _losses("g"),
    "cross_entropy_jvp": _losses("gg"),
    "cross_entropy_vjp": _losses("x"),
    "cross_entropy_vjp_jvp": _losses("xx"),
    "linear_cross_entropy": _linear_losses("xwgbb", "g"),
    "linear_cross_entropy_vjp": _linear_losses("xwgbbg", "xwb"),
    "attention": _heads(2),
    "attention_jvp": _heads(4),
    "attention_vjp": _heads(3),
    "rotary": _rotary,
    "linear": _products("mk nk +n", "mn"),
    "linear_jvp": _products("mk nk +n mk nk +n", "mn mn"),
    "linear_vjp": _products("mn mk nk", "mk nk n", ((0, 2), (0, 1), (0,))),
    "column_sum": _products("mn", "n"),
}


def _register(name: str) -> None:
    op = getattr(torch.ops.jacobian_ops, name).default
    count = RULES[name].tensors
    outputs = len(op._schema.returns)
    rule = _RULES.get(name)

    def placements(*args):
        tensors, consts = args[:count], args[count:]
        nothing = [None] * len(consts)
        whole = [None if t is None else Replicate() for t in tensors]
        found = [([Replicate()] * outputs, [*whole, *nothing])]
        if rule is not None:
            inputs, results, *sources = rule(tensors, consts)
            sources = sources[0] if sources and sources[0] else [range(count)] * outputs
            for label in dict.fromkeys(n.strip("+") for t in inputs for n in t or () if n != "."):
                on = [_input(label, t, results) for t in inputs]
                out = [
                    _output(label, r, of, inputs) for r, of in zip(results, sources, strict=True)
                ]
                found.append((out, [*on, *nothing]))
        return found

    register_sharding(op)(placements)
    # Every argument tells one call from another: None too, and the flags that shapes depend on.
    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    known[op] = dataclasses.replace(known[op], static_argnum=0)


def _place(label: str, labels: _Labels) -> int | None:
    names = [n.strip("+") for n in labels]
    return names.index(label) if label in names else None


def _input(label, labels, results):
    """How an argument lies on a mesh where the dimension called ``label`` is sharded."""
    if labels is None:
        return None
    place = _place(label, labels)
    if place is not None:
        return Shard(place)
    addend = any(n[0] == "+" for n in labels)
    return Partial() if addend and all(label not in r for r in results) else Replicate()


def _output(label, labels, sources, inputs):
    if any(inputs[i] is None for i in sources) and len(sources) < len(inputs):
        return Replicate()  # it is empty
    place = _place(label, labels)
    if place is not None:
        return Shard(place)
    split = any(inputs[i] is not None and _place(label, inputs[i]) is not None for i in sources)
    return Partial() if split else Replicate()


for _name in RULES:
    _register(_name)


# ------------------------------------------------------------------- across ranks


def shards(t, dim: int) -> bool:
    """Whether ``t`` is a DTensor whose dimension ``dim`` lies on several ranks."""
    return isinstance(t, DTensor) and any(p.is_shard(dim) for p in t.placements)


def summed(t: DTensor) -> DTensor:
    """``t`` without sums that are still to be taken over ranks."""
    placements = [Replicate() if p.is_partial() else p for p in t.placements]
    return t.redistribute(placements=placements)


def pinned(t: DTensor) -> DTensor:
    """``t``, whose cotangents and their cotangents are sharded as it is.

    Around an op with a seed: in another shard it would draw another mask.
    """
    return t.redistribute(placements=t.placements)


def replicated(t: Tensor | None, other: DTensor) -> Tensor | None:
    """A plain tensor, the same on all ranks, as a DTensor beside ``other``."""
    if t is None or isinstance(t, DTensor):
        return t
    return DTensor.from_local(t, other.device_mesh, [Replicate()] * other.device_mesh.ndim)


def shard_seed(seed: Tensor, t: DTensor) -> Tensor:
    """A seed for the shard of ``t`` on this rank; replicas get the same.

    A mask is drawn by the place of an element in its shard: one seed would repeat it in each.
    """
    coordinates = t.device_mesh.get_coordinate()
    shard = 0
    for p, size, i in zip(t.placements, t.device_mesh.shape, coordinates, strict=True):
        if p.is_shard():
            shard = shard * size + i + 1
    return seed + shard


def for_attention(query: DTensor, *others: Tensor) -> list[Tensor]:
    """All on the ranks that attention leaves ``query`` on: sharded in the same batch and heads."""
    mesh, kv = query.device_mesh, others[0].shape
    placements = [
        p
        if p.is_shard() and p.dim < query.ndim - 2 and kv[p.dim] % mesh.size(i) == 0
        else Replicate()
        for i, p in enumerate(query.placements)
    ]
    return [replicated(t, query).redistribute(placements=placements) for t in (query, *others)]


def _of_ranks(local: Tensor, x: DTensor, dim: int) -> DTensor:
    """One number a row from each rank that has a part of ``dim``, side by side on all of these.

    An explicit redistribution has a derivative; one that from_local does in its backward has none,
    and would drop second derivatives.
    """
    whole = [Replicate() if p.is_shard(dim) else p for p in x.placements]
    return DTensor.from_local(local, x.device_mesh, x.placements).redistribute(placements=whole)


def logsumexp(x: DTensor, dim: int) -> DTensor:
    """Over a sharded dimension, which is kept; one number a row goes to the other ranks."""
    return _of_ranks(x.to_local().logsumexp(dim, True), x, dim).logsumexp(dim, True)


def log_softmax(x: DTensor, dim: int) -> DTensor:
    """Over a sharded dimension, in float32 or wider; the result is sharded alike."""
    x = summed(x).to(wide(x.dtype))
    return x - logsumexp(x, dim)


def cross_entropy(
    x: DTensor, target: DTensor, dim: int, ignore_index: int, smoothing: float
) -> DTensor:
    """The losses of classes that lie on several ranks, replicated on those.

    Args:
        x: Logits, sharded along ``dim``, and along others if at all in whole rows.
        target: int64 classes, of the shape of ``x`` without ``dim``.
        dim: Of the classes, counted from the front.
        ignore_index: The class of rows whose loss is zero.
        smoothing: What part of the target is spread evenly over the classes.

    Returns:
        float32 or wider, of the shape of ``target``.

    Raises:
        IndexError: A class outside [0, C); on a GPU it makes NaN of its row instead.
    """
    count = x.shape[dim]
    x = summed(x).to(wide(x.dtype))
    of_class = [p.is_shard(dim) for p in x.placements]
    rows = [
        p if not p.is_shard() else Replicate() if here else Shard(p.dim - (p.dim > dim))
        for p, here in zip(x.placements, of_class, strict=True)
    ]
    classes = replicated(torch.arange(count, device=x.device), x).redistribute(
        placements=[Shard(0) if here else Replicate() for here in of_class]
    )
    logits, mine = x.to_local(), classes.to_local()
    target = target.redistribute(placements=rows)
    t, ignored = target.to_local(), target == ignore_index
    wrong = ~ignored & ((target < 0) | (target >= count))
    if x.device.type == "cpu" and wrong.to_local().any():
        raise IndexError(
            f"cross_entropy: target has class {t[wrong.to_local()][0].item()}; allowed: 0 to "
            f"{count - 1}, or ignore_index {ignore_index}"
        )
    total = logits.sum(dim, keepdim=True)
    picked = torch.zeros_like(total)
    if len(mine):
        at = (t - mine[0]).unsqueeze(dim)
        here = (at >= 0) & (at < len(mine))
        picked = logits.gather(dim, at.clamp(0, len(mine) - 1)).masked_fill(~here, 0)
    wanted = (1 - smoothing) * picked + smoothing / count * total
    losses = logsumexp(x, dim).squeeze(dim) - _of_ranks(wanted, x, dim).sum(dim)
    return losses.masked_fill(ignored, 0).masked_fill(wrong, torch.nan)
