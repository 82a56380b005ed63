"""Tables and pictures of ``python -m bench limits``."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .targets import LEAST, OVER_COMPILE


@dataclass
class Result:
    """Medians of one line, seconds a call.

    ``ours``, ``eager`` and ``compile`` ran in one process that keeps its memory; ``ours_retaining``
    and ``eager_installed`` each in its own; ``one_thread`` is ours on one thread.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    target: float
    threads: int
    ours: float
    eager: float
    compile: float | None
    ours_retaining: float
    eager_installed: float
    one_thread: float | None
    bytes: float
    flops: float | None
    limit: str
    limit_seconds: float
    status: str

    def title(self) -> str:
        """The line in words."""
        return f"{self.op} {self.shape} {self.dtype} {self.mode}"

    @property
    def kernel(self) -> float:
        """Eager over ours, memory kept."""
        return self.eager / self.ours

    @property
    def user(self) -> float:
        """Eager as installed over ours with memory retained."""
        return self.eager_installed / self.ours_retaining

    @property
    def over_compile(self) -> float | None:
        """torch.compile over ours, memory kept."""
        return self.compile / self.ours if self.compile else None

    @property
    def percent(self) -> float:
        """Share of the limit that ours reaches."""
        return 100 * self.limit_seconds / self.ours

    @property
    def most(self) -> float:
        """How many times eager's speed this machine allows at all."""
        return self.eager / self.limit_seconds

    @property
    def reason(self) -> str:
        """The physical cause of a line that misses a target; empty where none is known."""
        if not self.short:
            return ""
        if all(self._beyond(*miss) for miss in self._misses()):
            return NOTHING_LEFT
        if self.percent >= NEAR:
            return AT_LIMIT
        return next((t for words, t in REASONS if all(w in self.title() for w in words)), "")

    def _beyond(self, name: str, wanted: float) -> bool:
        """Whether the other's time over the machine's limit is less than what is wanted."""
        return getattr(self, name) / self.limit_seconds < wanted

    def _misses(self) -> list[tuple[str, float]]:
        """Of eager and compile, which miss what is wanted of them, and that."""
        missed = [("eager", self.target)] if self.kernel < self.target else []
        wanted = min(self.target, OVER_COMPILE)
        if self.over_compile is not None and self.over_compile < wanted:
            missed.append(("compile", wanted))
        return missed

    @property
    def short(self) -> list[str]:
        """Which targets the line misses."""
        return [f"{name} {wanted:.3g}x" for name, wanted in self._misses()]


@dataclass
class Point:
    """One op's forward at one size: bytes moved, and seconds of ours, of eager, of a copy."""

    op: str
    bytes: float
    ours: float
    eager: float
    limit_seconds: float


NOTHING_LEFT = (
    "eager, or torch.compile, itself takes less than the target times the machine's limit: see "
    "column 'most'"
)
NEAR = 85  # per cent
AT_LIMIT = f"at {NEAR} % of the machine's limit, or more"
_LARGER = "bound by arithmetic, not by memory: "
# What is held to stand between ours and a target where the limit above does not: the first entry
# whose words are all in the line's title. Inferred from timings and instruction counts, not from a
# profile. Cycles are those of one core of a Xeon with AVX-512 and AMX, at 3.9 GHz, for a vector of
# 16 numbers that is in a cache; memory takes 17 for one that is read and one written.
REASONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("linear_act_dropout", "p=0.1"),
        "drawing the mask costs 28 cycles a vector in every pass (Philox4x32-10), and the products "
        "are as fast as MKL's, which eager runs",
    ),
    (
        ("linear", "bfloat16", "jvp"),
        "below 1024 rows, and where it is small, our own product runs, which rounds the sum of two "
        "products once; torch's AMX kernel, which eager runs, is the faster one",
    ),
    (
        ("linear", "bfloat16"),
        "torch's AMX kernel is the faster one and runs on both sides; ours differs by the way to "
        "it through Python, and by the bias gradient's own pass over gy",
    ),
    (("linear", "float64"), "MKL runs on both sides; what differs is the way to it through Python"),
    (
        ("linear", "8x4096"),
        "reads the weight and its tangent, 128 MiB, once: 8 rows give 16 multiply-adds for each "
        "number read, too few to reach the peak",
    ),
    (
        ("linear", "16384x64"),
        "an inner dimension of 64: little is multiplied for each number that is packed or written",
    ),
    (
        ("linear", "32x64"),
        "the native op runs on both sides; asking whether it may costs about 2 us",
    ),
    (
        ("linear ", "float32"),
        "MKL runs in eager, in torch.compile and, in most of these shapes, here: 1.2x more takes a "
        "product at 85 % of the peak or above, which neither MKL nor ours reaches",
    ),
    (
        ("linear_cross_entropy",),
        "three products of the logits' size, and the logits' passes between them, on both sides: "
        "MKL's products, which run in chunks of rows here",
    ),
    (
        ("cross_entropy",),
        _LARGER + "an exponential a number, at the same speed from a cache as from memory; a plain "
        "sum of the logits takes three quarters of the forward's time",
    ),
    (
        ("attention", "bfloat16"),
        "torch's kernel, on AMX tiles, runs the forward on both sides; what else is ours computes "
        "in float32, where eager's products are AMX's too",
    ),
    (
        ("attention",),
        "of one thread's forward 63 % are products, at 70 % of the peak, and 26 % exponentials (a "
        "profile); on this processor torch's own products are as fast",
    ),
    (("linear_act_dropout",), "the products are as fast as MKL's, which eager runs"),
    (
        ("softmax_dropout",),
        _LARGER + "28 cycles a vector for the mask in each pass (18 products on the one port that "
        "has them at this width), beside two exponentials",
    ),
    (("dropout",), _LARGER + "28 cycles a vector for Philox4x32-10, in every pass"),
    (
        ("softmax 65536x64",),
        "a row is 4 vectors: maximum and sum across lanes count beside so short a row",
    ),
    (
        ("softmax",),
        "three passes that wait for each other (maximum, sum, result): exponentials and "
        "conversions, 15 to 25 cycles a vector, do not wholly overlap with memory",
    ),
    (
        ("gelu", "float16"),
        _LARGER + "26 cycles a vector in float32, and conversions, against 8 of memory",
    ),
    (
        ("gelu", "bfloat16"),
        _LARGER + "26 cycles a vector in float32, and conversions, against 8 of memory",
    ),
    (("gelu",), _LARGER + "26 to 30 cycles a vector in each pass"),
)


HEADINGS = ("target", "K", "E", "compile", "most", "% of limit", "n t / 1 t", "ours", "")


def print_table(console: Console, results: list[Result]) -> None:
    """A line for each result, the reasons below."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("op, shape, dtype, mode")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    reasons = list(dict.fromkeys(r.reason for r in results if r.reason))
    for r in results:
        note = ""
        if r.short:
            note = f"[{reasons.index(r.reason) + 1}]" if r.reason else "[red]unexplained[/]"
        colour = "green" if r.kernel >= r.target else "red" if r.kernel < LEAST else "yellow"
        table.add_row(
            *cells(r, f"[{colour}]{r.kernel:.2f}x[/]"),
            note.replace("[", r"\[") if r.reason else note,
        )
    console.print("K: eager over ours, memory kept; E: eager as installed over ours retaining")
    console.print(table)
    for i, text in enumerate(reasons, 1):
        console.print(rf"\[{i}] {text}")
    for line in summary(results):
        console.print(line)


def cells(r: Result, kernel: str) -> tuple[str, ...]:
    """The columns of a result before its note."""
    return (
        r.title(),
        f"{r.target:.3g}x",
        kernel,
        f"{r.user:.2f}x",
        "" if r.over_compile is None else f"{r.over_compile:.2f}x",
        f"{r.most:.2f}x",
        f"{r.percent:.0f} ({r.limit})",
        "" if r.one_thread is None else f"{r.one_thread / r.ours:.2f}x",
        f"{r.ours * 1e3:.3g} ms",
    )


def summary(results: list[Result]) -> list[str]:
    """Geometric means, and how many lines miss something."""

    def mean(values):
        values = [v for v in values if v]
        return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan

    return [
        f"geometric mean over {len(results)} lines: K {mean(r.kernel for r in results):.2f}x, "
        f"E {mean(r.user for r in results):.2f}x, "
        f"compile {mean(r.over_compile for r in results):.2f}x",
        f"below {LEAST}x of eager: {sum(r.kernel < LEAST for r in results)}; "
        f"short of a target: {sum(bool(r.short) for r in results)}, "
        f"unexplained: {sum(bool(r.short) and not r.reason for r in results)}",
    ]


def markdown(results: list[Result]) -> str:
    """The table for a document."""
    reasons = list(dict.fromkeys(r.reason for r in results if r.reason))
    head = ("", *HEADINGS)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in results:
        kernel = f"{r.kernel:.2f}x" if r.kernel < r.target else f"**{r.kernel:.2f}x**"
        note = f"[{reasons.index(r.reason) + 1}]" if r.reason else ""
        lines.append(f"| {' | '.join((*cells(r, kernel), note))} |")
    notes = [f"{i}. {text}" for i, text in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *summary(results), "", *notes]) + "\n"


def write(path: Path, results: list[Result], points: list[Point], environment: dict) -> None:
    """Figures and environment as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "lines": [dataclasses.asdict(r) for r in results],
        "sweep": [dataclasses.asdict(p) for p in points],
        "environment": environment,
    }
    path.write_text(json.dumps(figures, indent=1, default=str) + "\n")


def read(path: Path) -> tuple[list[Result], list[Point], dict]:
    """What :func:`write` wrote."""
    figures = json.loads(path.read_text())
    results = [Result(**record) for record in figures["lines"]]
    points = [Point(**record) for record in figures["sweep"]]
    return results, points, figures["environment"]


def draw(folder: Path, results: list[Result], points: list[Point], environment: dict) -> None:
    """Pictures: ratios.png, roofline.png and, of a sweep, sizes.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"ratios": _ratios(plt, results), "roofline": _roofline(plt, results, environment)}
    if points:
        pictures["sizes"] = _sizes(plt, points)
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)


def _ratios(plt, results):
    """Eager and torch.compile over ours, and the target, for each op and mode."""
    modes = list(dict.fromkeys(r.mode for r in results))
    labels = list(dict.fromkeys((r.op, r.shape, r.dtype) for r in results))
    figure, axes = plt.subplots(
        *(1, len(modes)),
        figsize=(4 + 3.2 * len(modes), 1.5 + 0.24 * len(labels)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        chosen = [r for r in results if r.mode == mode]
        places = [labels.index((r.op, r.shape, r.dtype)) for r in chosen]
        axis.barh(places, [r.kernel for r in chosen], 0.7, color="#7fa6c9", label="eager / ours")
        compiled = [(k, r.over_compile) for k, r in zip(places, chosen, strict=True)]
        compiled = [(k, v) for k, v in compiled if v]
        axis.plot(
            [v for _, v in compiled],
            [k for k, _ in compiled],
            *("x",),
            color="#c0392b",
            markersize=4,
            label="compile / ours",
        )
        axis.plot(
            [r.target for r in chosen], places, "|", color="black", markersize=8, label="target"
        )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks([0.5, 1, 2, 5, 10, 20, 40], [f"{v:g}x" for v in (0.5, 1, 2, 5, 10, 20, 40)])
        axis.minorticks_off()
        axis.set_title(mode)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(labels)), [" ".join(label) for label in labels], fontsize=7)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(frameon=False, fontsize=8)
    return figure


def _roofline(plt, results, environment):
    """Rate against operations a byte, for what multiplies matrices."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    copy = max(environment["copy_bytes_per_second"].values())
    for dtype, colour in (("float32", "#1f618d"), ("bfloat16", "#b9770e")):
        chosen = [r for r in results if r.dtype == dtype and r.flops and r.shape.count("x") == 1]
        if not chosen:
            continue
        peak = environment["fma_peak_flops"][dtype]
        reach = [r.flops / r.bytes for r in chosen]
        low, high = min(reach) / 2, max(reach) * 2
        corner = min(max(peak / copy, low), high)
        axis.plot(
            [low, corner, high],
            [min(low * copy, peak) / 1e9, min(corner * copy, peak) / 1e9, peak / 1e9],
            color=colour,
            linewidth=1,
        )
        for name, marker in (("ours", "o"), ("eager", "x")):
            axis.plot(
                *(reach, [r.flops / getattr(r, name) / 1e9 for r in chosen], marker),
                color=colour,
                markersize=5,
                fillstyle="none",
                label=f"{dtype}, {name}",
            )
    axis.set(xscale="log", yscale="log", xlabel="flop a byte of memory", ylabel="GFLOP/s")
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)
    return figure


def _sizes(plt, points):
    """Rate against size, an axis for each op."""
    ops = list(dict.fromkeys(p.op for p in points))
    figure, axes = plt.subplots(
        *(1, len(ops)),
        figsize=(3.2 * len(ops), 3.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, op in zip(axes[0], ops, strict=True):
        chosen = [p for p in points if p.op == op]
        sizes = [p.bytes / 8 for p in chosen]
        for name, style in (("limit_seconds", "k:"), ("ours", "o-"), ("eager", "x-")):
            label = "copy" if name == "limit_seconds" else name
            rates = [p.bytes / getattr(p, name) / 1e9 for p in chosen]
            axis.plot(sizes, rates, style, markersize=4, linewidth=1, label=label)
        axis.set(xscale="log", yscale="log", title=op, xlabel="elements")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("GB/s read and written")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure
