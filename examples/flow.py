"""Normalizing flows with log-determinants in O(n): ``python -m examples.flow``.

RealNVP (Dinh, Sohl-Dickstein and Bengio 2017, arXiv:1605.08803): a coupling layer lets half of its
inputs through, x_1 -> x_1, and maps the others by x_2 -> x_2 exp(s(x_1)) + t(x_1).  Its Jacobian is
block triangular with the diagonal (1, exp s), so that log|det J| = sum s whatever s and t are, and
log p(x) = log N(z; 0, I) + sum of the layers' log|det J|.

Trained on the two moons and on scikit-learn's digits; then checked: the sum against slogdet of the
dense Jacobian, the inverse, and that the density of the plane integrates to 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn

import jacobian_ops

DETERMINANTS_AGREE = 1e-9  # float64, sums of some hundred terms
INVERSES_AGREE = 1e-9
INTEGRAL_AGREES = 0.01  # a sum over a grid, and what is outside of it


class Coupling(nn.Module):
    """One coupling layer behind a permutation of the n inputs, whose |det| is 1.

    Args:
        order: The permutation; the first half of it goes through as it is.
        hidden: Width of the network that makes s and t.
        dropout: In that network; a mask is part of the map, whose determinant it leaves as it is.
    """

    def __init__(self, order: Tensor, hidden: int, dropout: float):
        super().__init__()
        n = len(order)
        self.half = n // 2
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        layer = jacobian_ops.nn.LinearActDropout
        self.network = nn.Sequential(
            layer(self.half, hidden, activation="silu", p=dropout),
            layer(hidden, hidden, activation="silu", p=dropout),
            jacobian_ops.nn.Linear(hidden, 2 * (n - self.half)),
        )
        nn.init.zeros_(self.network[-1].weight)  # starts as a permutation
        nn.init.zeros_(self.network[-1].bias)

    def scale_and_shift(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of the scale, between -1 and 1, and t."""
        s, t = self.network(first).chunk(2, -1)
        return jacobian_ops.functional.tanh(s), t

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(*, n) -> (*, n) and log|det J|, (*)."""
        first, second = x[..., self.order].tensor_split((self.half,), -1)
        s, t = self.scale_and_shift(first)
        return torch.cat((first, second * s.exp() + t), -1), s.sum(-1)

    def inverse(self, y: Tensor) -> Tensor:
        """From the result back to x."""
        first, second = y.tensor_split((self.half,), -1)
        s, t = self.scale_and_shift(first)
        return torch.cat((first, (second - t) * (-s).exp()), -1)[..., self.back]


class Flow(nn.Module):
    """A chain of couplings from data to a standard normal."""

    def __init__(self, n: int, layers: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        swap = torch.tensor([1, 0])
        self.layers = nn.ModuleList(
            Coupling(swap if n == 2 else torch.randperm(n), hidden, dropout) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result and log|det J| of all layers together: that of a product is a sum."""
        total = 0.0
        for layer in self.layers:
            x, log_det = layer(x)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        """From noise to data."""
        for layer in reversed(self.layers):
            z = layer.inverse(z)
        return z

    def log_prob(self, x: Tensor) -> Tensor:
        """The logarithm of the density at every x, (*)."""
        z, log_det = self(x)
        return normal_log_prob(z) + log_det


def normal_log_prob(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


@dataclass
class Data:
    """Samples, and what makes vectors of them that have a density.

    Attributes:
        samples: (m, n), in random order, the first fifth for the test.
        spread: From samples to vectors, at random.
        dropout: That keeps a flow from learning them by heart.
    """

    samples: Tensor
    spread: Callable[[Tensor], Tensor]
    dropout: float

    def __post_init__(self):
        self.samples = self.samples[torch.randperm(len(self.samples))]
        x = self.spread(self.samples)
        self.mean, self.deviation = x.mean(0), x.std(0)

    def draw(self, samples: Tensor) -> Tensor:
        """Standardised vectors."""
        return (self.spread(samples) - self.mean) / self.deviation


def moons() -> Data:
    """Two interleaved half circles, 3000 points of the plane."""
    points = make_moons(3000, noise=0.07, random_state=0)[0]
    return Data(torch.tensor(points, dtype=torch.float32), lambda x: x, dropout=0.0)


def digits() -> Data:
    """1797 images of 64 pixels, spread evenly within their 17 levels, as logits."""
    pixels = torch.tensor(load_digits().data, dtype=torch.float32)

    def logits(x):
        return torch.logit(0.05 + 0.9 * (x + torch.rand(x.shape)) / 17)

    return Data(pixels, logits, dropout=0.2)


@dataclass
class Result:
    """What one training came to, in nats a sample."""

    name: str
    n: int
    losses: list[float] = field(default_factory=list)
    test: float = math.nan
    gaussian: float = math.nan  # of a normal distribution with mean and deviations of the data
    determinants: float = math.nan  # the largest difference of log|det J| from the dense one
    inverses: float = math.nan
    integral: float | None = None


def train(name: str, flow: Flow, data: Data, steps: int, report: Callable) -> Result:
    """Maximum likelihood on all but the test samples."""
    test, train = data.samples.tensor_split((len(data.samples) // 5,))
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    result = Result(name, test.shape[1])
    for _ in range(steps):
        loss = -flow.log_prob(data.draw(train[torch.randint(len(train), (128,))])).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        result.losses.append(loss.item())
        report()
    flow.eval()
    x = data.draw(test)
    with torch.no_grad():
        result.test = -flow.log_prob(x).mean().item()
        result.gaussian = -normal_log_prob(x).mean().item()
    check_flow(result, flow, x[:4])
    return result


def check_flow(result: Result, flow: Flow, x: Tensor) -> None:
    """Compare with the dense Jacobian and go back, in float64."""
    flow.double()
    x = x.double()
    with torch.no_grad():
        z, log_det = flow(x)
        result.inverses = (flow.inverse(z) - x).abs().max().item()
    jacobians = torch.stack([torch.func.jacrev(lambda x: flow(x)[0])(row) for row in x])
    dense = torch.linalg.slogdet(jacobians.detach()).logabsdet
    result.determinants = (dense - log_det).abs().max().item()
    flow.float()


@torch.no_grad()
def density(flow: Flow, reach: float, points: int) -> Tensor:
    """The density at the middles of points^2 cells of the square from -reach to reach."""
    line = (torch.arange(points) + 0.5) * (2 * reach / points) - reach
    cells = torch.cartesian_prod(line, line)
    parts = [flow.log_prob(part).double().exp() for part in cells.split(2**14)]
    return torch.cat(parts).unflatten(0, (points, points))


def determinant_seconds(n: int) -> tuple[float, float]:
    """Time of log|det J| of a flow of 4 layers by the sum, and by the dense Jacobian."""
    flow, x = Flow(n, 4, 64), torch.randn(n)

    def dense():
        return torch.linalg.slogdet(torch.func.jacrev(lambda x: flow(x)[0])(x))

    def median(run):
        run()
        times = []
        for _ in range(3):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    with torch.no_grad():
        return median(lambda: flow(x)), median(dense)


def draw(path: Path, plane: Tensor, reach: float, samples: Tensor, images: Tensor) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    extent = (-reach, reach, -reach, reach)
    left.imshow(plane.T.numpy(), origin="lower", extent=extent, cmap="magma")
    left.set(title="density of two moons", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5))
    middle.plot(*samples.mT.tolist(), ".", markersize=2, color="black")
    middle.set(title="samples", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    framed = nn.functional.pad(images, (1, 1, 1, 1))
    rows = framed.unflatten(0, (6, 6)).transpose(1, 2).reshape(60, 60)
    right.imshow(rows.numpy(), cmap="gray_r", vmin=0, vmax=16)
    right.set(title="digits from the flow", xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.flow", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write")
    parser.add_argument("--steps", type=int, help="optimiser steps of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small models, in a few seconds")
    options = parser.parse_args(arguments)
    steps = options.steps if options.steps is not None else 80 if options.quick else 800
    if steps < 1:
        parser.error("--steps must be at least 1")
    layers, hidden = (4, 32) if options.quick else (8, 128)
    sizes = (2, 16, 64) if options.quick else (2, 16, 64, 256, 512)
    points, reach = 120 if options.quick else 600, 6.0

    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    results, flows = [], {}
    torch.manual_seed(options.seed)
    sets = {"two moons": moons(), "digits": digits()}
    with Progress(console=console) as progress:
        for name, data in sets.items():
            task = progress.add_task(name, total=steps)
            flows[name] = Flow(data.samples.shape[1], layers, hidden, data.dropout)
            advance = functools.partial(progress.advance, task)
            results.append(train(name, flows[name], data, steps, advance))
    plane = density(flows["two moons"], reach, points)
    results[0].integral = plane.sum().item() * (2 * reach / points) ** 2
    with torch.no_grad():
        samples = flows["two moons"].inverse(torch.randn(2000, 2))
        data = sets["digits"]
        drawn = flows["digits"].inverse(0.7 * torch.randn(36, 64))
        logits = drawn * data.deviation + data.mean
        images = ((logits.sigmoid() - 0.05) / 0.9 * 17 - 0.5).reshape(36, 8, 8)
    draw(options.output / "flow.png", plane, reach, samples, images)

    table = Table(title=f"RealNVP, {layers} couplings, {steps} steps")
    for heading in ("", "n", "test, nats", "normal", "sum s - slogdet", "inverse", "integral"):
        table.add_column(heading, justify="right" if heading else "left")
    failures = []
    for r in results:
        integral = "" if r.integral is None else f"{r.integral:.4f}"
        numbers = f"{r.test:.3f}", f"{r.gaussian:.3f}", f"{r.determinants:.1e}"
        table.add_row(r.name, str(r.n), *numbers, f"{r.inverses:.1e}", integral)
        for words, value, least in (
            ("log|det J| differs from the dense one", r.determinants, DETERMINANTS_AGREE),
            ("the inverse is off", r.inverses, INVERSES_AGREE),
            ("the integral of the density is off", abs((r.integral or 1) - 1), INTEGRAL_AGREES),
        ):
            if not value <= least:
                failures.append(f"{r.name}: {words} by {value:.1e}")
        if not r.test < r.gaussian:
            failures.append(f"{r.name}: {r.test:.3f} nats, no better than a normal distribution")
    console.print(table)
    times = []
    table = Table(title="log|det J| of 4 couplings of n inputs")
    for heading in ("n", "sum s", "dense J and slogdet", "times"):
        table.add_column(heading, justify="right")
    for n in sizes:
        by_sum, dense = determinant_seconds(n)
        times.append(dict(n=n, sum_seconds=by_sum, dense_seconds=dense))
        shown = f"{1e3 * by_sum:.2f} ms", f"{1e3 * dense:.2f} ms", f"{dense / by_sum:.1f}"
        table.add_row(str(n), *shown)
    console.print(table)
    record = {
        "settings": dict(steps=steps, layers=layers, hidden=hidden, seed=options.seed),
        "threads": torch.get_num_threads(),
        "results": [vars(r) for r in results],
        "determinants": times,
        "failures": failures,
    }
    (options.output / "flow.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote flow.json and flow.png into {escape(str(options.output))}")
    for failure in failures:
        console.print(f"[bold red]failed:[/] {escape(failure)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
