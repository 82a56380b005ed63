"""Backpropagation as a chain of VJPs: ``python -m examples.backprop``.

The classic network of 4 inputs, 3 hidden units with ReLU and 2 outputs under a squared error, step
by step with the raw products of ``jacobian_ops.kernels``: every cotangent is the one behind it
times a Jacobian that is never formed.  The result is autograd's.  Then what forming Jacobians
would cost: all of one against a single VJP, by the number of inputs and outputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import jacobian_ops.functional as J
from jacobian_ops import kernels

SIZES = (10, 32, 100, 316, 1000, 2048, 4096)
GRADIENTS_AGREE = 1e-12  # float64, a handful of products
PRODUCTS_AGREE = 1e-4  # float32, sums of up to 4096 terms


def network() -> dict[str, Tensor]:
    """An input, a target and weights with short numbers, of which ReLU stops the second unit."""
    rows = {
        "x": [[1.0, -2.0, 0.5, 3.0]],
        "target": [[1.0, 0.0]],
        "W1": [[0.2, -0.4, 1.0, 0.1], [-0.5, 0.3, 0.2, -0.1], [0.7, 0.1, -0.6, 0.4]],
        "b1": [0.1, 0.0, -0.2],
        "W2": [[1.0, 0.5, -1.0], [0.3, -0.8, 0.6]],
        "b2": [0.05, -0.1],
    }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in rows.items()}


def backpropagate(x, target, W1, b1, W2, b2) -> tuple[list[tuple], dict[str, Tensor]]:
    """Forward and backward, product by product.

    Returns:
        The steps, each (name, formula, value), and the gradients by name.
    """
    z = kernels.linear(x, W1, b1)
    h = kernels.activation(z, "relu")
    y = kernels.linear(h, W2, b2)
    error = y - target
    loss = error.square().sum() / 2

    gy = error  # of |y - target|^2 / 2
    gh, gW2, gb2 = kernels.linear_vjp(h, W2, gy)
    gz = kernels.activation_vjp(z, gh, "relu")
    gx, gW1, gb1 = kernels.linear_vjp(x, W1, gz)
    steps = [
        ("z", "W1 x + b1", z),
        ("h", "relu(z)", h),
        ("y", "W2 h + b2", y),
        ("loss", "|y - target|^2 / 2", loss),
        ("gy", "y - target", gy),
        ("gW2", "gy h^T", gW2),
        ("gb2", "gy", gb2),
        ("gh", "W2^T gy", gh),
        ("gz", "gh where z > 0, else 0", gz),
        ("gW1", "gz x^T", gW1),
        ("gb1", "gz", gb1),
        ("gx", "W1^T gz", gx),
    ]
    return steps, dict(x=gx, W1=gW1, b1=gb1, W2=gW2, b2=gb2)


def autograd_gradients(x, target, W1, b1, W2, b2) -> dict[str, Tensor]:
    """The same by torch.autograd through our layers."""
    leaves = {k: t.requires_grad_() for k, t in dict(x=x, W1=W1, b1=b1, W2=W2, b2=b2).items()}
    h = J.relu(J.linear(leaves["x"], leaves["W1"], leaves["b1"]))
    loss = (J.linear(h, leaves["W2"], leaves["b2"]) - target).square().sum() / 2
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def seconds(run: Callable[[], object], budget: float) -> float:
    """The median of as many runs as the budget allows, after one that is not timed."""
    run()
    times = []
    while not times or (sum(times) < budget and len(times) < 100):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def cost(n: int, budget: float) -> dict:
    """Time of all of the Jacobian of x -> relu(W x) and of one VJP, and how far they disagree.

    Row i of J is the VJP of the unit vector e_i: J is n VJPs, here in one product of matrices.
    """
    weight, x, v = torch.randn(n, n) / n**0.5, torch.randn(1, n), torch.randn(1, n)
    z = kernels.linear(x, weight)

    def vjps(gy):
        gz = kernels.activation_vjp(z.expand_as(gy), gy, "relu")
        return kernels.linear_vjp(None, weight, gz, (True, False, False))[0]

    identity = torch.eye(n)
    jacobian, gx = vjps(identity), vjps(v)
    return dict(
        n=n,
        vjp_seconds=seconds(lambda: vjps(v), budget),
        jacobian_seconds=seconds(lambda: vjps(identity), budget),
        jacobian_bytes=jacobian.nbytes,
        difference=((v @ jacobian - gx).norm() / gx.norm()).item(),
    )


def draw(path: Path, rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    n = [row["n"] for row in rows]
    for key, color, words in (
        ("jacobian_seconds", "#d55e00", "all of J, n VJPs"),
        ("vjp_seconds", "#0072b2", "one VJP"),
    ):
        axis.plot(n, [1e3 * row[key] for row in rows], "o-", color=color, label=words)
    last = rows[-1]
    factor = last["jacobian_seconds"] / last["vjp_seconds"]
    axis.vlines(n[-1], 1e3 * last["vjp_seconds"], 1e3 * last["jacobian_seconds"], color="#b8b8b8")
    axis.annotate(
        f"{factor:.0f} times ",
        (n[-1], 1e3 * (last["jacobian_seconds"] * last["vjp_seconds"] ** 2) ** (1 / 3)),
        ha="right",
        va="center",
    )
    axis.set(xscale="log", yscale="log", xlabel="inputs and outputs n", ylabel="ms")
    axis.set_title("x → relu(W x): its Jacobian against a product with it")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.backprop", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write")
    parser.add_argument("--largest", type=int, help="most inputs of a timed Jacobian")
    parser.add_argument("--quick", action="store_true", help="small sizes, in a few seconds")
    options = parser.parse_args(arguments)
    default = 316 if options.quick else 4096
    largest = default if options.largest is None else options.largest
    if largest < SIZES[0]:
        parser.error(f"--largest must be at least {SIZES[0]}")

    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    failures = []
    values = network()
    steps, gradients = backpropagate(**values)
    table = Table(title="4-3-2: forward, then a chain of VJPs")
    for heading in ("", "formula", "value"):
        table.add_column(heading)
    for name, formula, value in steps:
        if name == "gy":
            table.add_section()
        lines = torch.atleast_2d(value).tolist()
        shown = "\n".join("  ".join(f"{number:7.4f}" for number in line) for line in lines)
        table.add_row(name, formula, shown)
    console.print(table)
    expected = autograd_gradients(**values)
    difference = max((gradients[k] - g).abs().max().item() for k, g in expected.items())
    console.print(f"gradients differ from autograd's by {difference:.1e} at most")
    if not difference <= GRADIENTS_AGREE:
        failures.append(f"gradients differ from autograd's by {difference:.1e}")

    torch.manual_seed(0)
    sizes = [n for n in SIZES if n <= largest]
    rows = []
    with Progress(console=console) as progress:
        task = progress.add_task("all of J against one VJP", total=len(sizes))
        for n in sizes:
            rows.append(cost(n, 0.02 if options.quick else 0.5))
            progress.advance(task)
            if not rows[-1]["difference"] <= PRODUCTS_AGREE:
                failures.append(
                    f"n = {n}: v^T J differs from the VJP, {rows[-1]['difference']:.1e}"
                )
    table = Table(title="x -> relu(W x), n to n")
    for heading in ("n", "one VJP", "all of J", "times", "J takes"):
        table.add_column(heading, justify="right")
    for row in rows:
        ratio = row["jacobian_seconds"] / row["vjp_seconds"]
        times = (f"{1e3 * row[key]:.3f} ms" for key in ("vjp_seconds", "jacobian_seconds"))
        size = f"{row['jacobian_bytes'] / 2**20:.2f} MiB"
        table.add_row(str(row["n"]), *times, f"{ratio:.1f}", size)
    console.print(table)
    draw(options.output / "backprop.png", rows)
    record = {
        "steps": {name: value.tolist() for name, _, value in steps},
        "difference": difference,
        "threads": torch.get_num_threads(),
        "costs": rows,
        "failures": failures,
    }
    (options.output / "backprop.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(
        f"wrote backprop.json and backprop.png into {escape(str(options.output))}", soft_wrap=True
    )
    for failure in failures:
        console.print(f"[bold red]failed:[/] {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
