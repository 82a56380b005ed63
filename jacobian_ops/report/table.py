"""What a report holds, as a table, a dictionary and a picture."""

from __future__ import annotations

import dataclasses
import math

from .._text import text_of


@dataclasses.dataclass
class Layer:
    """One call of a layer, a residual block, or the whole model, whose Jacobian J is m x n.

    Attributes:
        name: As in ``model.named_modules()``; a second call has ``#2`` behind; "model" for all.
        kind: The module's class.
        structure: Of J, in words.
        m: Elements of the result, the whole batch.
        n: Elements of the input that J is by, the first floating-point one; None without any.
        saved_bytes: What a forward pass of this layer keeps for its backward pass, parameters not
            counted; measured.  What two layers keep of the same tensor counts for both.
        vjp_flops: Of J^T v alone, without the parameters' gradients.  Two for a multiply-add of a
            matrix product, one for each element of another op's largest tensor.
        jvp_flops: Of J u, beyond those of the forward pass.
        largest_gain: An estimate of the largest singular value, from below.
        mean_gain: An estimate of the singular values' root mean square, |J|_F / sqrt(min(m, n)).
        identity: An estimate of the cosine of the angle between J and I, tr J / (|J|_F sqrt(n)), of
            a residual block; else None.
        gradient: |gradient by the layer's result| / |gradient by the model's|, for a random one.
        dead: Share of ReLU units, columns of the last dimension or channels, that are zero for all
            of the batch; of a ReLU.
        saturated: Share of the units with less than 5 % of the largest derivative, of a sigmoid or
            tanh; of rows with one probability above 0.99, of a softmax.
        flags: What to look at, in words.
    """

    name: str
    kind: str
    structure: str
    m: int
    n: int | None
    saved_bytes: int
    vjp_flops: int | None = None
    jvp_flops: int | None = None
    largest_gain: float | None = None
    mean_gain: float | None = None
    identity: float | None = None
    gradient: float | None = None
    dead: float | None = None
    saturated: float | None = None
    flags: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Report:
    """What :func:`report` found; printed, a table (which needs ``rich``).

    Attributes:
        layers: In the order in which they are called, a residual block before what is inside.
        model: All of it; the same quantities.
    """

    layers: list[Layer]
    model: Layer

    def to_dict(self) -> dict:
        """Plain numbers, strings and lists, ready for JSON."""
        return dataclasses.asdict(self)

    def plot(self, path=None):
        """Draw the gains of the layers and the gradient that reaches them, by depth.

        Args:
            path: Where to save it as a PNG, if given.

        Returns:
            A matplotlib.figure.Figure, which pyplot does not know of.
        """
        from matplotlib.figure import Figure

        rows = [r for r in self.layers if r.largest_gain is not None and r.identity is None]
        blocks = [r for r in self.layers if r.identity is not None]
        at = {r.name: i for i, r in enumerate(self.layers)}
        figure = Figure(figsize=(min(14, max(7, 2 + 0.2 * len(at))), 6.4), layout="constrained")
        gains, gradients = figure.subplots(2, 1, sharex=True)
        for chosen, marker, words in ((rows, "o", ""), (blocks, "s", ", residual block")):
            if x := [at[r.name] for r in chosen]:
                large, mean = (
                    [getattr(r, k) for r in chosen] for k in ("largest_gain", "mean_gain")
                )
                gains.plot(x, large, marker, color="#d55e00", label=f"largest{words}")
                gains.plot(x, mean, marker, color="#0072b2", label=f"root mean square{words}")
                gains.vlines(x, mean, large, color="#b8b8b8", zorder=0)
        reached = [r for r in self.layers if r.gradient is not None]
        x, y = [at[r.name] for r in reached], [r.gradient for r in reached]
        gradients.plot(x, y, ".-", color="black")
        gains.set(ylabel="singular values of J", yscale="log")
        gradients.set(ylabel="gradient by the result,\nover that by the model's", yscale="log")
        for axis in (gains, gradients):
            axis.axhline(1, color="#b8b8b8", linewidth=0.8, zorder=0)
            axis.spines[["top", "right"]].set_visible(False)
        if rows or blocks:
            gains.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        shown = list(at)
        if len(shown) > 60:  # as many names as there is room for
            shown = [r.name for r in blocks] or shown[:: math.ceil(len(at) / 60)]
        gradients.set_xticks([at[name] for name in shown], shown, rotation=90, fontsize=8)
        gradients.set_xlim(-1, len(at))
        if path is not None:
            figure.savefig(path, dpi=120, format="png")
        return figure

    def __rich__(self):
        from rich import box
        from rich.table import Table

        table = Table(title="Jacobians of the layers", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("layer", "kind", "Jacobian", "m x n"):
            table.add_column(heading, overflow="fold")
        for heading in ("kept", "VJP flops", "JVP flops", "gain: max", "rms", "gradient"):
            table.add_column(heading, justify="right")
        table.add_column("flags")
        for row in self.layers:
            table.add_row(*_cells(row))
        table.add_section()
        table.add_row(*_cells(self.model))
        return table

    def __str__(self):
        return text_of(self.__rich__())


def _cells(row: Layer) -> tuple[str, ...]:
    from rich.markup import escape

    bad = any(word in flag for flag in row.flags for word in ("vanishing", "exploding", "dead"))
    flags = escape(", ".join(row.flags))
    return (
        *map(escape, (row.name, row.kind, row.structure)),
        "-" if row.n is None else f"{row.m} x {row.n}",
        _units(row.saved_bytes, ("B", "KiB", "MiB", "GiB"), 1024),
        *map(_units, (row.vjp_flops, row.jvp_flops)),
        *map(_number, (row.largest_gain, row.mean_gain, row.gradient)),
        f"[bold red]{flags}[/]" if bad else flags,
    )


def _number(value):
    return "-" if value is None else f"{value:.2g}"


def _units(value, names=("", "k", "M", "G", "T"), base=1000):
    if value is None:
        return "-"
    for name in names:
        if value < base or name == names[-1]:
            return f"{value:.3g} {name}".rstrip()
        value /= base
