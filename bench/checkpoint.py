"""Memory against recomputation by depth: ``python -m bench checkpoint``.

A deep MLP with dropout in three policies of ``jacobian_ops.checkpoint``: keep all, O(L); keep the
inputs of sqrt(L) segments, O(sqrt L); compute all again, O(1) after the forward pass, yet O(L) at
the peak of the backward pass.  Bytes are those of the storages that are alive, all of them counted,
and time is that of a forward and a backward pass.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import weakref
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import jacobian_ops

POLICIES = {"none": 1.0, "sqrt": 0.5, "all": 0.0}  # and the powers of L that they keep
COLORS = {"none": "#000000", "sqrt": "#0072b2", "all": "#d55e00"}
POWERS_AGREE = 0.2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that ops have made since and that are alive.

    Attributes:
        now: At the moment.
        peak: At most.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._known.update(
            t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)
        )
        result = func(*args, **(kwargs or {}))
        for t in tree_iter(result):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int):
        self._known.discard(key)
        self.now -= size


def deep(depth: int, width: int, dropout: float) -> nn.Sequential:
    """One op a layer: linear, gelu and dropout, whose mask is a seed."""
    layer = jacobian_ops.nn.LinearActDropout
    return nn.Sequential(*(layer(width, width, activation="gelu", p=dropout) for _ in range(depth)))


def step(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The gradients of a forward and a backward pass, with the dropout masks of seed 0."""
    torch.manual_seed(0)
    return torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()])


def memory(model: nn.Sequential, x: Tensor) -> tuple[int, int]:
    """Bytes that a forward pass keeps, and most in the backward pass, those of gradients included.

    The input's are in both, the result's in neither.
    """
    with LiveBytes() as live:
        y = model(x)
        kept = live.now - y.nbytes + x.nbytes
        live.peak = live.now
        torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y))
        return kept, live.peak - y.nbytes + x.nbytes


def power(depths: list[int], values: list[float]) -> float:
    """The p of the power law L^p that fits best."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (depths, values))
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x @ x)).item()


def draw(path: Path, rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for axis, key, words, unit in zip(
        panels,
        ("kept_bytes", "peak_bytes", "seconds"),
        ("MiB kept after the forward pass", "MiB at the backward pass's peak", "ms a step"),
        (2**20, 2**20, 1e-3),
        strict=True,
    ):
        for policy, exponent in POLICIES.items():
            line = [row for row in rows if row["policy"] == policy]
            depths, values = [r["depth"] for r in line], [r[key] / unit for r in line]
            axis.plot(depths, values, "o-", color=COLORS[policy], label=f'"{policy}"')
            if axis is panels[0]:
                guide = [values[-1] * (d / depths[-1]) ** exponent for d in depths]
                axis.plot(depths, guide, ":", color=COLORS[policy])
                name = {1.0: "O(L)", 0.5: "O(√L)", 0.0: "O(1)"}[exponent]
                axis.annotate(
                    f" {name}", (depths[-1], values[-1]), color=COLORS[policy], va="center"
                )
        axis.set(xscale="log", yscale="log", xlabel="layers L", title=words)
        axis.set_xticks(depths, [str(d) for d in depths])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].margins(x=0.15)
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    """The command; 1 where a policy does not do what it says."""
    parser = argparse.ArgumentParser(prog="python -m bench checkpoint", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write")
    parser.add_argument("--depth", type=int, help="layers of the deepest model, at least 16")
    parser.add_argument("--repeats", type=int, help="timed steps of each model")
    parser.add_argument("--quick", action="store_true", help="small models, in a few seconds")
    options = parser.parse_args(arguments)
    width, batch = (16, 512) if options.quick else (128, 4096)
    deepest = options.depth if options.depth is not None else 64
    repeats = options.repeats if options.repeats is not None else 1 if options.quick else 5
    if deepest < 16 or repeats < 1:
        parser.error("--depth must be at least 16 and --repeats at least 1")
    depths = [4]
    while depths[-1] * 2 <= deepest:
        depths.append(depths[-1] * 2)

    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    torch.manual_seed(0)
    rows, failures = [], []
    with Progress(console=console) as progress:
        task = progress.add_task("policies by depth", total=len(depths) * len(POLICIES))
        for depth in depths:
            model = deep(depth, width, dropout=0.1)
            x = torch.randn(batch, width, requires_grad=True)
            expected = step(model, x)
            for policy in POLICIES:
                jacobian_ops.checkpoint(model, policy)
                if not all(map(torch.equal, step(model, x), expected)):
                    failures.append(f"gradients differ: {depth} layers, policy {policy}")
                kept, peak = memory(model, x)
                seconds = []
                for _ in range(repeats):
                    began = time.perf_counter()
                    step(model, x)
                    seconds.append(time.perf_counter() - began)
                row = dict(depth=depth, policy=policy, kept_bytes=kept, peak_bytes=peak)
                rows.append({**row, "seconds": statistics.median(seconds)})
                progress.advance(task)

    table = Table(title=f"{batch} rows of width {width}, linear + gelu + dropout a layer")
    for heading in ("layers", "policy", "kept", "peak", "a step", "of none"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    plain = {row["depth"]: row["seconds"] for row in rows if row["policy"] == "none"}
    for row in rows:
        sizes = (f"{row[key] / 2**20:.2f} MiB" for key in ("kept_bytes", "peak_bytes"))
        ratio = row["seconds"] / plain[row["depth"]]
        times = f"{1e3 * row['seconds']:.1f} ms", f"{ratio:.2f}"
        table.add_row(str(row["depth"]), row["policy"], *sizes, *times)
    console.print(table)

    powers = {}
    for policy, expected_power in POLICIES.items():
        line = [row for row in rows if row["policy"] == policy]
        values = [row["kept_bytes"] for row in line]
        powers[policy] = power(depths, values) if min(values) > 0 else math.nan
        console.print(f"{policy}: keeps L^{powers[policy]:.2f}")
        if not abs(powers[policy] - expected_power) <= POWERS_AGREE:
            failures.append(
                f"policy {policy} keeps L^{powers[policy]:.2f}, expected L^{expected_power:g}"
            )
    draw(options.output / "checkpoint.png", rows)
    settings = dict(depths=depths, width=width, batch=batch, threads=torch.get_num_threads())
    record = {"settings": settings, "rows": rows, "powers": powers, "failures": failures}
    (options.output / "checkpoint.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(
        f"wrote checkpoint.json and checkpoint.png into {escape(str(options.output))}",
        soft_wrap=True,
    )
    for failure in failures:
        console.print(f"[bold red]failed:[/] {failure}")
    return 1 if failures else 0
