"""Command line of the demo: ``python -m examples.digits``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import compare, report

# float32 rounding, grown over the training; observed are a few 1e-7.
CURVES_AGREE = 1e-4
PRODUCTS_AGREE = 1e-4


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write")
    parser.add_argument("--steps", type=int, help="optimiser steps of each training")
    parser.add_argument("--batch", type=int, default=32, help="images in a step")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the second training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small model, in a few seconds")
    options = parser.parse_args(arguments)
    if options.quick:
        size, steps, rate, repeats = dict(width=32, depth=1), 80, 1e-2, 3
    else:
        size, steps, rate, repeats = dict(width=128, depth=4), 200, 1e-3, 15
    if options.steps is not None:
        steps = options.steps
    if min(steps, options.batch) < 1:
        parser.error("--steps and --batch must be at least 1")
    if not 0 <= options.dropout <= 1:
        parser.error("--dropout must be between 0 and 1")
    # A model that guesses is right one time in ten.
    least_accuracy = 0.3 if options.quick else 0.85

    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    start = time.perf_counter()
    digits = compare.load(options.seed)
    trainings, trained = {}, {}
    columns = (
        TextColumn("{task.description:>22}"),
        BarColumn(12),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console) as progress:
        for p in dict.fromkeys((0.0, options.dropout)):
            task = progress.add_task(f"training, dropout {p:g}", total=steps, state="")

            def show(losses, task=task):
                state = f"loss {losses['native']:.4f}, ours {losses['jacobian_ops']:.4f}"
                progress.update(task, advance=1, state=state)

            torch.manual_seed(options.seed)
            model = compare.Transformer(p=p, **size)
            trained[p], trainings[p] = compare.train(
                model, digits, steps, options.batch, rate, options.seed, show
            )
        rounds = 2 * (compare.WARM_UP + repeats)
        task = progress.add_task("JVP and HVP", total=rounds, state="")
        products = compare.products(
            trained[0.0]["native"],
            digits,
            options.batch,
            repeats,
            options.seed,
            lambda: progress.advance(task),
        )

    failures = check(trainings, products, least_accuracy)
    report.print_table(console, trainings, products)
    settings = {
        "steps": steps,
        "batch": options.batch,
        "seed": options.seed,
        "quick": options.quick,
        "seconds": time.perf_counter() - start,
        **size,
    }
    report.write_json(options.output / "digits.json", settings, trainings, products, failures)
    report.draw(options.output / "digits.png", trainings, products)
    console.print(
        f"{settings['seconds']:.0f} s on {torch.get_num_threads()} threads; wrote digits.json and "
        f"digits.png into {escape(str(options.output))}",
        soft_wrap=True,
    )
    for failure in failures:
        console.print(f"[bold red]failed:[/] {failure}")
    return 1 if failures else 0


def check(trainings, products, least_accuracy: float) -> list[str]:
    """What went wrong, in words."""
    failures = []
    for p, runs in trainings.items():
        for name, run in runs.items():
            if not run.accuracy >= least_accuracy:
                failures.append(
                    f"dropout {p:g}, {name}: test accuracy {run.accuracy:.1%}, expected at least "
                    f"{least_accuracy:.0%}"
                )
    difference = report.curve_difference(trainings[0.0])
    if not difference <= CURVES_AGREE:
        failures.append(f"without dropout the loss curves differ by {difference:.1e}")
    for kind, product in products.items():
        if not product.relative_difference <= PRODUCTS_AGREE:
            failures.append(f"{kind} differs by {product.relative_difference:.1e}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
