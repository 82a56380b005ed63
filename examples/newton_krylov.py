"""A nonlinear PDE with exact JVPs and with differences: ``python -m examples.newton_krylov``.

Bratu's problem of solid fuel ignition, -laplace(u) = lambda exp(u) on the unit square and u = 0 on
its boundary, by the five-point stencil: 128^2 unknowns, near lambda = 6.8, beyond which there is no
solution.  ``newton_krylov`` of ours sees the Jacobian through torch.func.jvp,
``scipy.optimize.newton_krylov`` through differences of f, both of the same f in the same run, as
they come and preconditioned by the fast sine transform's inverse of the Laplacian.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.optimize
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from jacobian_ops.jacobian.newton_krylov import newton_krylov

COLORS = {"jacobian_ops": "#0062a4", "scipy": "#999999"}
SOLUTIONS_AGREE = 1e-6


def bratu(u: Tensor, strength: float) -> Tensor:
    """h^2 (-laplace(u) - strength exp(u)) at the inner points of a grid of spacing h, (n, n)."""
    h = 1 / (u.shape[0] + 1)
    v = torch.nn.functional.pad(u, (1, 1, 1, 1))
    across = (u - v[:-2, 1:-1]) + (u - v[2:, 1:-1])
    along = (u - v[1:-1, :-2]) + (u - v[1:-1, 2:])
    # Sums alone: a number as a factor takes torch's forward mode a way through Python, 0.7 ms.
    return across + along - torch.exp(u + math.log(strength * h * h))


def inverse_laplacian(n: int) -> Callable[[np.ndarray], np.ndarray]:
    """The map from r to the u with -h^2 laplace(u) = r: the stencil's eigenvectors are sines."""
    one = 2 - 2 * np.cos(np.pi / (n + 1) * np.arange(1, n + 1))
    eigenvalues = one[:, None] + one

    def solve(r: np.ndarray) -> np.ndarray:
        return scipy.fft.idstn(scipy.fft.dstn(r, type=1) / eigenvalues, type=1)

    return solve


@dataclass
class Run:
    """What one solver did."""

    solver: str
    preconditioned: bool
    calls: int = 0  # of f, alone or with its JVP
    seconds: float = 0.0
    residual: float = math.nan  # the largest component
    failure: str = ""
    history: list[tuple[int, float]] = field(default_factory=list)  # calls and residual by step


def solve(run: Run, n: int, strength: float, tol: float) -> np.ndarray:
    """Solve it as ``run`` says, and write there what happened."""

    def f(u: Tensor) -> Tensor:
        run.calls += 1
        return bratu(u, strength)

    inverse = inverse_laplacian(n)
    began = time.perf_counter()
    u = np.full((n, n), math.nan)
    try:
        if run.solver == "jacobian_ops":
            M = (lambda v: torch.from_numpy(inverse(v.numpy()))) if run.preconditioned else None
            u = newton_krylov(
                f,
                torch.zeros(n, n, dtype=torch.float64),
                tol=tol,
                preconditioner=M,
                callback=lambda _, residual: run.history.append((run.calls, residual)),
            ).numpy()
        else:
            size = n * n
            M = LinearOperator((size, size), lambda v: inverse(v.reshape(n, n)).ravel())
            u = scipy.optimize.newton_krylov(
                lambda v: f(torch.from_numpy(v)).numpy(),
                np.zeros((n, n)),
                f_tol=tol,
                maxiter=50,
                inner_M=M if run.preconditioned else None,
                callback=lambda _, r: run.history.append((run.calls, float(abs(r).max()))),
            )
    except (RuntimeError, scipy.optimize.NoConvergence, ValueError) as e:
        run.failure = f"{type(e).__name__}: {str(e).splitlines()[0]}"
    run.seconds = time.perf_counter() - began
    run.residual = bratu(torch.from_numpy(u), strength).abs().max().item()
    return u


def draw(path: Path, runs: list[Run], solution: np.ndarray) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    for run in runs:
        style = dict(color=COLORS[run.solver], linestyle="-" if run.preconditioned else "--")
        words = f"{run.solver}{', preconditioned' if run.preconditioned else ''}"
        if run.history:
            left.plot(*zip(*run.history, strict=True), "o", label=words, **style)
    left.set(xscale="log", yscale="log", xlabel="calls of f or of its JVP", ylabel="max |f(u)|")
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    image = right.imshow(solution, origin="lower", extent=(0, 1, 0, 1))
    right.set_title(f"u, {solution.size} unknowns")
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.newton_krylov", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write")
    parser.add_argument("--points", type=int, help="inner points in a row of the grid")
    parser.add_argument("--strength", type=float, default=6.7, help="lambda")
    parser.add_argument("--tol", type=float, default=1e-10, help="largest component of f that is 0")
    parser.add_argument("--quick", action="store_true", help="a small grid, in a few seconds")
    options = parser.parse_args(arguments)
    n = options.points if options.points is not None else 24 if options.quick else 128
    if n < 2 or not options.tol > 0 or not options.strength > 0:
        parser.error("--points must be at least 2, --tol and --strength positive")

    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    runs = [Run(s, p) for p in (False, True) for s in ("jacobian_ops", "scipy")]
    solutions = []
    with Progress(console=console) as progress:
        task = progress.add_task("solving", total=len(runs))
        for run in runs:
            solutions.append(solve(run, n, options.strength, options.tol))
            progress.advance(task)

    table = Table(title=f"Bratu's problem, lambda = {options.strength:g}, {n * n} unknowns")
    for heading in ("solver", "preconditioner", "steps", "calls of f", "time", "max |f|"):
        table.add_column(heading, justify="left" if heading[0] in "sp" else "right")
    for run in runs:
        kind = "sine transform" if run.preconditioned else "none"
        numbers = str(len(run.history)), str(run.calls), f"{run.seconds:.2f} s"
        table.add_row(run.solver, kind, *numbers, f"{run.residual:.1e}")
    console.print(table)

    best = solutions[2]
    failures, differences = [], []
    for run, u in zip(runs, solutions, strict=True):
        differences.append(float(abs(u - best).max()))
        if run.solver == "jacobian_ops" and not run.residual <= options.tol:
            failures.append(f"ours did not converge: max |f| = {run.residual:.1e}, {run.failure}")
        elif run.failure:
            console.print(f"scipy: {escape(run.failure)}")
        elif not differences[-1] <= SOLUTIONS_AGREE:
            failures.append(f"{run.solver}'s solution differs by {differences[-1]:.1e}")
    console.print(f"max u = {best.max():.6f}; solutions differ by {max(differences):.1e} at most")
    draw(options.output / "newton_krylov.png", runs, best)
    record = {
        "settings": dict(points=n, strength=options.strength, tol=options.tol),
        "threads": torch.get_num_threads(),
        "runs": [asdict(run) for run in runs],
        "max_u": float(best.max()),
        "differences": differences,
        "failures": failures,
    }
    (options.output / "newton_krylov.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(
        f"wrote newton_krylov.json and newton_krylov.png into {escape(str(options.output))}",
        soft_wrap=True,
    )
    for failure in failures:
        console.print(f"[bold red]failed:[/] {escape(failure)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
