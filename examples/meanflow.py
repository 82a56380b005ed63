"""One-step generation of digits with MeanFlow: ``python -m examples.meanflow``.

A small diffusion transformer learns the average velocity u(z, r, t) of a flow from data at t = 0
to noise at t = 1 (Geng et al. 2025, "Mean Flows for One-step Generative Modeling",
arXiv:2505.13447).  Its training target,

    u = v - (t - r) du/dt,        du/dt = v . du/dz + 0 . du/dr + 1 . du/dt,

takes a JVP through the whole network, and the loss stops the target's gradient.  The first steps
run twice from the same weights: in native PyTorch, whose attention has a JVP only as a matrix of
scores, and after ``jacobian_ops.replace``.
"""

from __future__ import annotations

import argparse
import copy
import gc
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacobian_ops

PROVIDERS = ("native", "jacobian_ops")
CLASSES = 10
SIDE = 8
WARM_UP = 3  # steps that are not timed
# float32 rounding in the first steps; it grows as training goes on.
ERRORS_AGREE = 1e-3


class Block(nn.Module):
    """Attention and MLP, each modulated by the condition and starting as the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(batch, tokens, width) and (batch, width) -> (batch, tokens, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulate(condition).unsqueeze(1).chunk(6, -1)
        )
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, h, h, need_weights=False)[0]
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


class DiffusionTransformer(nn.Module):
    """Average velocity of 8x8 images between the times r and t, given their class.

    Args:
        width: Size of a token.
        depth: Number of blocks.
        heads: Attention heads in a block.
        patch: Side of a patch in pixels.
    """

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4, patch: int = 1):
        super().__init__()
        self.patch, pixels = patch, patch * patch
        self.embed = nn.Linear(pixels, width)
        self.position = nn.Parameter(0.5 * torch.randn((SIDE // patch) ** 2, width))
        self.label = nn.Embedding(CLASSES, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.act = nn.SiLU()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, pixels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        steps = torch.arange(width // 4) / (width // 4)
        self.register_buffer("frequencies", 1000.0 ** (1 - steps) / 10)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """(batch, 8, 8), two times (batch,) and classes (batch,) -> (batch, 8, 8)."""
        angle = torch.cat([time[:, None] * self.frequencies for time in (t, t - r)], -1)
        waves = torch.cat((angle.cos(), angle.sin()), -1)
        condition = self.act(self.time(waves) + self.label(label))
        p, n = self.patch, SIDE // self.patch
        x = z.unflatten(2, (n, p)).unflatten(1, (n, p)).transpose(2, 3).flatten(3).flatten(1, 2)
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulate(condition).unsqueeze(1).chunk(2, -1)
        x = self.head(self.norm(x) * (1 + scale) + shift)
        return x.unflatten(2, (p, p)).unflatten(1, (n, n)).transpose(2, 3).flatten(3).flatten(1, 2)


def draw_times(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Times r <= t, logit-normal; equal for half of the samples, where u is the velocity itself."""
    r, t = torch.sigmoid(torch.randn(2, batch, generator=generator) - 0.4).sort(0).values
    return torch.where(torch.rand(batch, generator=generator) < 0.5, t, r), t


def native_jvp(f: Callable, primals: tuple, tangents: tuple) -> tuple[Tensor, Tensor]:
    """torch.func.jvp with the only attention of torch's that has one."""
    with sdpa_kernel(SDPBackend.MATH):
        y, ty = torch.func.jvp(f, primals, tangents)
    return y, ty.detach()


def our_jvp(f: Callable, primals: tuple, tangents: tuple) -> tuple[Tensor, Tensor]:
    """The same, keeping nothing of the tangent for backward."""
    return jacobian_ops.jvp(f, primals, tangents, tangent_graph=False)


JVP = {"native": native_jvp, "jacobian_ops": our_jvp}


def loss_of(model: nn.Module, jvp: Callable, x, noise, r, t, label) -> tuple[Tensor, Tensor]:
    """The MeanFlow loss with its adaptive weight (power 1), and the mean squared error.

    So weighted, the loss itself stays near 1; the error tells how training goes.
    """
    velocity = noise - x
    z = torch.lerp(x, noise, t[:, None, None])
    u, dudt = jvp(
        lambda z, r, t: model(z, r, t, label),
        (z, r, t),
        (velocity, torch.zeros_like(r), torch.ones_like(t)),
    )
    target = velocity - (t - r)[:, None, None] * dudt
    error = (u - target).square().mean((1, 2))
    return (error / (error.detach() + 1e-3)).mean(), error.detach().mean()


@dataclass
class Run:
    """What one provider did in the steps that both run."""

    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def step_seconds(self) -> float:
        """Median after the warm-up."""
        return statistics.median(self.seconds[WARM_UP:] or self.seconds)


class Trainer:
    """A model, its optimiser, and the average of its weights."""

    def __init__(self, model: nn.Module, jvp: Callable, rate: float):
        self.model, self.jvp, self.rate = model, jvp, rate
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
        self.average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
        )

    def step(self, done: float, *batch: Tensor) -> float:
        """One step at the share ``done`` of the training; the mean squared error before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1, 50 * done + 0.1, 2.5 * (1 - done) + 0.02)
        loss, error = loss_of(self.model, self.jvp, *batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)
        return error.item()


def peak_bytes(run: Callable[[], object]) -> int:
    """How much the process's resident memory rises above its present size during a call (Linux)."""

    def read(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split(f"{name}:")[1].split()[0])

    gc.collect()
    jacobian_ops.release_host_memory()
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


@torch.no_grad()
def sample(model: nn.Module, label: Tensor, generator: torch.Generator) -> Tensor:
    """Images in one step: noise minus the average velocity over all of the time."""
    noise = torch.randn(len(label), SIDE, SIDE, generator=generator)
    r, t = torch.zeros(len(label)), torch.ones(len(label))
    return noise - model(noise, r, t, label)


def draw(path: Path, images: Tensor, real: Tensor) -> None:
    """A grid of samples, a column a class, above a row of real digits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [images[i : i + CLASSES] for i in range(0, len(images), CLASSES)] + [real]
    figure, axes = pyplot.subplots(len(rows), CLASSES, figsize=(6, 0.66 * len(rows)))
    for line, row in zip(axes, rows, strict=True):
        for axis, image in zip(line, row, strict=True):
            axis.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
    axes[0][0].set_title("one step from noise", loc="left", fontsize=9)
    axes[-1][0].set_title("training data", loc="left", fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def nearest_accuracy(images: Tensor, label: Tensor, x: Tensor, y: Tensor) -> float:
    """Share of images whose nearest real digits (5, by distance) are of the class asked for."""
    nearest = torch.cdist(images.flatten(1), x.flatten(1)).topk(5, largest=False).indices
    return (y[nearest].mode(1).values == label).float().mean().item()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.meanflow", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write")
    parser.add_argument("--steps", type=int, help="optimiser steps of the training")
    parser.add_argument("--both", type=int, help="of them, steps that native PyTorch takes too")
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small model, in a few seconds")
    options = parser.parse_args(arguments)
    if options.quick:
        size, steps, both = dict(width=32, depth=1, patch=4), 30, 6
    else:
        size, steps, both = dict(width=128, depth=4, patch=2), 3000, 20
    steps = steps if options.steps is None else options.steps
    both = min(both, steps) if options.both is None else options.both
    if options.batch < 1 or not 1 <= both <= steps:
        parser.error("--steps, --batch and --both must be at least 1, and --both at most --steps")

    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    start = time.perf_counter()
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32) / 8 - 1
    y = torch.tensor(data.target)
    torch.manual_seed(options.seed)
    model = DiffusionTransformer(**size)
    models = {"native": model, "jacobian_ops": jacobian_ops.replace(copy.deepcopy(model))}
    trainers = {name: Trainer(m, JVP[name], 1e-3) for name, m in models.items()}
    runs = {name: Run() for name in PROVIDERS}
    generator = torch.Generator().manual_seed(options.seed)

    def batch():
        chosen = torch.randint(len(x), (options.batch,), generator=generator)
        noise = torch.randn(options.batch, SIDE, SIDE, generator=generator)
        return x[chosen], noise, *draw_times(options.batch, generator), y[chosen]

    columns = (
        TextColumn("{task.description:>22}"),
        BarColumn(12),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    errors = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("both, side by side", total=both, state="")
        for step in range(both):
            now = batch()
            for name in PROVIDERS if step % 2 else reversed(PROVIDERS):
                began = time.perf_counter()
                runs[name].errors.append(trainers[name].step(step / steps, *now))
                runs[name].seconds.append(time.perf_counter() - began)
            state = ", ".join(f"{name} {runs[name].errors[-1]:.6f}" for name in PROVIDERS)
            progress.update(task, advance=1, state=state)
        now = batch()
        for name, run in runs.items():
            trainer = trainers[name]

            def gradients(trainer=trainer):
                loss_of(trainer.model, trainer.jvp, *now)[0].backward()
                trainer.optimizer.zero_grad()

            run.peak_bytes = peak_bytes(gradients)
        ours = trainers["jacobian_ops"]
        errors += runs["jacobian_ops"].errors
        task = progress.add_task("training on ours", total=steps, completed=both, state="")
        for step in range(both, steps):
            errors.append(ours.step(step / steps, *batch()))
            if step % 10 == 0:
                state = f"error {statistics.fmean(errors[-100:]):.4f}"
                progress.update(task, completed=step + 1, state=state)
        progress.update(task, completed=steps)

    label = torch.arange(CLASSES).repeat(100)
    images = sample(ours.average.module, label, generator)
    accuracy = nearest_accuracy(images, label, x, y)
    draw(options.output / "meanflow.png", images[: 6 * CLASSES], x[:CLASSES])

    native, replaced = (runs[name] for name in PROVIDERS)
    difference = max(
        abs(a - b) / abs(a) for a, b in zip(native.errors, replaced.errors, strict=True)
    )
    table = Table(title=f"MeanFlow training step, batch {options.batch}, {both} steps of both")
    for heading in ("", *PROVIDERS, "native / ours"):
        table.add_column(heading, justify="left" if not heading else "right")
    for words, unit, of in (
        ("time a step", "ms", lambda run: 1e3 * run.step_seconds),
        ("peak memory of a step", "MiB", lambda run: run.peak_bytes / 2**20),
    ):
        a, b = of(native), of(replaced)
        ratio = f"{a / b:.2f}" if b > 0 else "-"
        table.add_row(words, f"{a:.1f} {unit}", f"{b:.1f} {unit}", ratio)
    table.add_row(
        "mean squared error",
        *(f"{r.errors[-1]:.6f}" for r in runs.values()),
        f"to {difference:.0e}",
    )
    console.print(table)
    seconds = time.perf_counter() - start
    console.print(
        f"{accuracy:.1%} of {len(label)} one-step samples are nearest to real digits of the class "
        f"asked for; {seconds:.0f} s on {torch.get_num_threads()} threads; wrote meanflow.json and "
        f"meanflow.png into {escape(str(options.output))}",
        soft_wrap=True,
    )
    failures = []
    if not difference <= ERRORS_AGREE:
        failures.append(f"the errors of the two sides differ by {difference:.1e}")
    if not all(map(math.isfinite, errors)):
        failures.append("an error is not finite")
    record = {
        "settings": dict(steps=steps, both=both, batch=options.batch, seed=options.seed, **size),
        "seconds": seconds,
        "runs": {
            name: {**vars(run), "step_seconds": run.step_seconds} for name, run in runs.items()
        },
        "difference": difference,
        "errors": errors,
        "nearest_accuracy": accuracy,
        "failures": failures,
    }
    (options.output / "meanflow.json").write_text(json.dumps(record, indent=1) + "\n")
    for failure in failures:
        console.print(f"[bold red]failed:[/] {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
