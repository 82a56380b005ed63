"""The demo's table, picture and JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import jacobian_ops

from .compare import PROVIDERS, Product, Run

PRODUCTS = {"jvp": "JVP of the logits", "hvp": "Hessian-vector product"}


def print_table(
    console: Console, trainings: dict[float, dict[str, Run]], products: dict[str, Product]
) -> None:
    table = Table(title="Native PyTorch and jacobian_ops.replace(model)", title_justify="left")
    for heading in ("", *PROVIDERS, "ours / native"):
        table.add_column(heading, justify="right" if heading else "left")
    for p, runs in trainings.items():
        table.add_section()
        table.add_row(f"[bold]training, dropout {p:g}[/]")
        native, ours = (runs[name] for name in PROVIDERS)
        table.add_row("loss, last tenth", *(f"{r.final_loss:.6f}" for r in (native, ours)))
        table.add_row("test accuracy", *(f"{r.accuracy:.1%}" for r in (native, ours)))
        table.add_row("time a step", *_times(native.step_seconds, ours.step_seconds))
        table.add_row(
            "saved for backward",
            *(f"{r.saved_bytes / 2**20:.1f} MiB" for r in (native, ours)),
            f"{ours.saved_bytes / native.saved_bytes:.2f}",
        )
        if p == 0:
            table.add_row("loss curves differ by", "", f"{curve_difference(runs):.1e} at most")
    table.add_section()
    table.add_row("[bold]through the trained model[/]")
    for kind, product in products.items():
        table.add_row(PRODUCTS[kind], *_times(*(product.seconds[name] for name in PROVIDERS)))
        table.add_row("  relative difference", "", f"{product.relative_difference:.1e}")
    console.print(table)


def _times(native: float, ours: float) -> tuple[str, str, str]:
    return f"{native * 1e3:.1f} ms", f"{ours * 1e3:.1f} ms", f"{ours / native:.2f}"


def curve_difference(runs: dict[str, Run]) -> float:
    """The largest difference of two loss curves, relative where the loss exceeds 1; NaN counts."""
    native, ours = (torch.tensor(runs[name].losses, dtype=torch.float64) for name in PROVIDERS)
    return ((native - ours).abs() / native.abs().clamp(min=1)).max().item()


def write_json(
    path: Path,
    settings: dict,
    trainings: dict[float, dict[str, Run]],
    products: dict[str, Product],
    failures: list[str],
) -> None:
    record = {
        "settings": settings,
        "build": jacobian_ops.build_info(),
        "threads": torch.get_num_threads(),
        "training": [
            {
                "dropout": p,
                **({"curve_difference": curve_difference(runs)} if p == 0 else {}),
                **{
                    name: {
                        "final_loss": run.final_loss,
                        "step_seconds": run.step_seconds,
                        **dataclasses.asdict(run),
                    }
                    for name, run in runs.items()
                },
            }
            for p, runs in trainings.items()
        ],
        "products": {kind: dataclasses.asdict(product) for kind, product in products.items()},
        "failures": failures,
    }
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")


def draw(path: Path, trainings: dict[float, dict[str, Run]], products: dict[str, Product]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"native": "#999999", "jacobian_ops": "#0b62a4"}
    figure, axes = plt.subplots(
        1,
        len(trainings) + 1,
        figsize=(4.6 * (len(trainings) + 1), 3.8),
        layout="constrained",
    )
    for axis, (p, runs) in zip(axes, trainings.items(), strict=False):
        # Ours is drawn thin over a wide native line: where they agree, both can be seen.
        for name, width in zip(PROVIDERS, (4.5, 1.3), strict=True):
            axis.plot(runs[name].losses, label=name, color=colours[name], linewidth=width)
        note = f", at most {curve_difference(runs):.0e} apart" if p == 0 else ""
        axis.set(title=f"dropout {p:g}{note}", xlabel="step", ylabel="training loss", yscale="log")
        axis.legend(frameon=False)
    bars = {
        f"step,\ndropout {p:g}": {name: runs[name].step_seconds for name in PROVIDERS}
        for p, runs in trainings.items()
    }
    bars |= {kind.upper(): product.seconds for kind, product in products.items()}
    for i, name in enumerate(PROVIDERS):
        places = [b + 0.4 * (i - 0.5) for b in range(len(bars))]
        heights = [1e3 * seconds[name] for seconds in bars.values()]
        drawn = axes[-1].bar(places, heights, 0.38, label=name, color=colours[name])
        axes[-1].bar_label(drawn, fmt="%.0f", fontsize=8)
    axes[-1].set_xticks(range(len(bars)), bars)
    axes[-1].set(title=f"median time, {torch.get_num_threads()} threads", ylabel="ms")
    axes[-1].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
