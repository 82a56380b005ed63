"""Where gradients vanish, explode and flow: ``python -m examples.gradient_flow``.

``jacobian_ops.report`` on three deep networks for scikit-learn's digits as they are before
training: one of sigmoids, whose Jacobians shrink the gradient at least fourfold a layer; one of
ReLUs with weights three times too large; and a residual one, whose identities carry it through.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from sklearn.datasets import load_digits
from torch import Tensor, nn

import jacobian_ops

COLORS = {"sigmoid": "#0072b2", "large weights": "#d55e00", "residual": "#009e73"}
CLASSES = 10


class Block(nn.Module):
    """x + W2 relu(W1 norm(x))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.act = nn.ReLU()
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) -> the same."""
        return x + self.down(self.act(self.up(self.norm(x))))


def plain(activation: type[nn.Module], scale: float, depth: int, width: int) -> list[nn.Module]:
    """Linear maps of random weights with deviation scale / sqrt(n), an activation behind each."""
    linears = [nn.Linear(width, width) for _ in range(depth)]
    for linear in linears:
        nn.init.normal_(linear.weight, std=scale / math.sqrt(width))
        nn.init.zeros_(linear.bias)
    return [module for linear in linears for module in (linear, activation())]


def networks(depth: int, width: int) -> dict[str, nn.Sequential]:
    """The three, each of ``depth`` hidden layers, behind an embedding and before a head."""
    hidden = {
        "sigmoid": plain(nn.Sigmoid, 1.0, depth, width),
        "large weights": plain(nn.ReLU, 3 * math.sqrt(2), depth, width),
        "residual": [Block(width) for _ in range(depth // 2)],
    }
    return {
        name: nn.Sequential(nn.Linear(64, width), *layers, nn.Linear(width, CLASSES))
        for name, layers in hidden.items()
    }


def check(reports: dict) -> list[str]:
    """What is not as the names of the networks say."""
    failures = []
    for name, expected in (("sigmoid", "vanishing"), ("large weights", "exploding")):
        if not any(expected in flag for flag in reports[name].layers[0].flags):
            failures.append(f"{name}: no {expected} gradient at the first layer")
    rows = reports["residual"].layers
    if any("ing gradient" in flag for row in rows for flag in row.flags):
        failures.append("residual: a gradient vanishes or explodes")
    blocks = [row for row in rows if row.identity is not None]
    if not blocks or not all("identity carries" in row.flags for row in blocks):
        failures.append("residual: a block whose identity does not carry the gradient")
    return failures


def draw(path: Path, reports: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, report in reports.items():
        y = [row.gradient for row in report.layers if row.identity is None]
        x = [i / (len(y) - 1) for i in range(len(y))]
        axis.plot(x, y, ".-", color=COLORS[name], label=name)
    axis.axhline(1, color="#b8b8b8", linewidth=0.8, zorder=0)
    axis.set(yscale="log", xlabel="depth, from the first layer to the last")
    axis.set_ylabel("gradient by the layer's result,\nover that by the model's")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.gradient_flow", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write")
    parser.add_argument("--depth", type=int, help="hidden layers, at least 8")
    parser.add_argument("--quick", action="store_true", help="small models, in a few seconds")
    options = parser.parse_args(arguments)
    depth, width = (8, 32) if options.quick else (16, 128)
    depth = depth if options.depth is None else options.depth
    if depth < 8:
        parser.error("--depth must be at least 8")

    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = 140  # the table without a folded line
    torch.manual_seed(0)
    x = torch.tensor(load_digits().data[:128], dtype=torch.float32) / 8 - 1
    reports, seconds = {}, {}
    for name, model in networks(depth, width).items():
        with console.status(f"{name}: layer by layer"):
            began = time.perf_counter()
            reports[name] = jacobian_ops.report(model, x)
            seconds[name] = time.perf_counter() - began
        console.print(f"[bold]{name}[/], {seconds[name]:.1f} s")
        console.print(reports[name])
    draw(options.output / "gradient_flow.png", reports)
    failures = check(reports)
    record = {
        "settings": dict(depth=depth, width=width, batch=len(x)),
        "seconds": seconds,
        "reports": {name: report.to_dict() for name, report in reports.items()},
        "failures": failures,
    }
    (options.output / "gradient_flow.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(
        f"wrote gradient_flow.json and gradient_flow.png into {escape(str(options.output))}",
        soft_wrap=True,
    )
    for failure in failures:
        console.print(f"[bold red]failed:[/] {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
