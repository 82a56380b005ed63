"""Sharpest directions of a transformer's loss: ``python -m examples.hvp``.

The largest eigenvalues of the Hessian of a trained classifier's loss, by Lanczos iterations
(scipy's eigsh) on Hessian-vector products, forward over reverse: ``jvp(grad(loss))``.  The Hessian,
a matrix of all parameters squared, is never formed.  Both sides start from the same vector: native
PyTorch, and the same model after ``jacobian_ops.replace``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.func import functional_call, grad, jvp
from torch.nn.utils import parameters_to_vector

import jacobian_ops

from .digits import compare

PROVIDERS = compare.PROVIDERS
EIGENVALUES_AGREE = 1e-2


def hessian(model: torch.nn.Module, x, y, report: Callable) -> tuple[LinearOperator, list[float]]:
    """The Hessian of the mean cross-entropy in all parameters, and the seconds of each product."""
    weights = {k: p.detach() for k, p in model.named_parameters()}
    size = sum(p.numel() for p in weights.values())
    seconds = []

    def loss(w):
        return F.cross_entropy(functional_call(model, w, (x,)), y)

    def product(v: np.ndarray) -> np.ndarray:
        began = time.perf_counter()
        parts = torch.from_numpy(v.ravel()).float().split([p.numel() for p in weights.values()])
        along = {k: t.view_as(p) for (k, p), t in zip(weights.items(), parts, strict=True)}
        hv = jvp(grad(loss), (weights,), (along,))[1]
        flat = parameters_to_vector([hv[k] for k in weights]).numpy().astype(v.dtype)
        seconds.append(time.perf_counter() - began)
        report()
        return flat

    return LinearOperator((size, size), matvec=product, dtype=np.float64), seconds


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.hvp", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write")
    parser.add_argument("--count", type=int, default=5, help="eigenvalues")
    parser.add_argument("--steps", type=int, help="optimiser steps before")
    parser.add_argument("--batch", type=int, default=128, help="images that the loss is a mean of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small model, in a few seconds")
    options = parser.parse_args(arguments)
    size = dict(width=32, depth=1) if options.quick else dict(width=128, depth=4)
    steps = options.steps if options.steps is not None else 40 if options.quick else 150
    if min(options.count, steps, options.batch) < 1:
        parser.error("--count, --steps and --batch must be at least 1")

    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    digits = compare.load(options.seed)
    torch.manual_seed(options.seed)
    results = {}
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=steps)
        models, _ = compare.train(
            compare.Transformer(p=0.0, **size),
            digits,
            steps,
            32,
            1e-3,
            options.seed,
            lambda _: progress.advance(task),
        )
        # One set of weights for both sides.
        models["jacobian_ops"] = jacobian_ops.replace(copy.deepcopy(models["native"]))
        x, y = digits.x[: options.batch], digits.y[: options.batch]
        for name in PROVIDERS:
            task = progress.add_task(f"products, {name}", total=None)
            operator, seconds = hessian(
                models[name], x, y, lambda task=task: progress.advance(task)
            )
            start = np.random.default_rng(options.seed).standard_normal(operator.shape[0])
            values = eigsh(
                operator, options.count, which="LA", v0=start, tol=1e-4, return_eigenvectors=False
            )
            progress.update(task, total=len(seconds))
            results[name] = sorted(values.tolist(), reverse=True), seconds

    (native, native_seconds), (ours, our_seconds) = (results[name] for name in PROVIDERS)
    difference = max(abs(a - b) for a, b in zip(native, ours, strict=True)) / abs(native[0])
    table = Table(title=f"Hessian of {operator.shape[0]} parameters, {options.batch} images")
    for heading in ("", *PROVIDERS):
        table.add_column(heading, justify="left" if not heading else "right")
    for i, (a, b) in enumerate(zip(native, ours, strict=True)):
        table.add_row(f"eigenvalue {i + 1}", f"{a:.4f}", f"{b:.4f}")
    medians = [statistics.median(s) for s in (native_seconds, our_seconds)]
    table.add_row("products", str(len(native_seconds)), str(len(our_seconds)))
    table.add_row("time a product", *(f"{1e3 * m:.1f} ms" for m in medians))
    console.print(table)
    failures = []
    if not difference <= EIGENVALUES_AGREE:
        failures.append(f"the eigenvalues of the two sides differ by {difference:.1e}")
    record = {
        "settings": dict(count=options.count, steps=steps, batch=options.batch, **size),
        "runs": {
            name: {"eigenvalues": values, "seconds": seconds}
            for name, (values, seconds) in results.items()
        },
        "difference": difference,
        "failures": failures,
    }
    (options.output / "hvp.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote hvp.json into {escape(str(options.output))}", soft_wrap=True)
    for failure in failures:
        console.print(f"[bold red]failed:[/] {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
