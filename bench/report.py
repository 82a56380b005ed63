"""The bench's table, files and picture."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import machine
from .measure import Row

OURS = "jacobian_ops"


def groups(rows: list[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Rows of one measurement by provider, in the order measured."""
    grouped = {}
    for row in rows:
        grouped.setdefault(row.key(), {})[row.provider] = row
    return grouped


def ratio(rows: dict[str, Row], provider: str) -> float | None:
    """How many times faster ours is, or how many times as much the provider saves."""
    ours, other = rows.get(OURS), rows.get(provider)
    if not ours or not other:
        return None
    if ours.saved_bytes and other.saved_bytes is not None:
        return other.saved_bytes / ours.saved_bytes
    return other.median / ours.median if ours.median and other.median else None


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.saved_bytes is not None:
        return f"{row.saved_bytes / 2**20:.2f} MiB"
    return _time(row.median) if row.median else row.status.split(":")[0]


def _ratio_cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"[{'red' if value < 1 else 'green'}]{value:.2f}x[/]"


def print_table(console: Console, rows: list[Row], providers: tuple[str, ...]) -> None:
    """A table for each op, shape and dtype, a line for each measurement."""
    others = [name for name in providers if name != OURS]
    console.print("[bold]Nx[/]: the other takes N times as long as ours, or keeps N times as much")
    tables = {}
    for key, by_provider in groups(rows).items():
        table = tables.get(key[:3])
        if table is None:
            table = tables[key[:3]] = Table(
                title=" ".join(key[:3]), title_justify="left", title_style="bold", box=SIMPLE_HEAD
            )
            for heading, width in (("mode", 11), ("cache", 5), ("output", 12)):
                table.add_column(heading, min_width=width)
            for heading, width in (("ours", 8), ("IQR", 4), ("rate", 12), ("% of limit", 10)):
                table.add_column(heading, min_width=width, justify="right")
            table.add_column("error", min_width=5, justify="right")
            for name in others:
                table.add_column(name, min_width=8, justify="right")
                table.add_column("", min_width=6, justify="right")
        ours = by_provider.get(OURS)
        figures = [""] * 4
        if ours is not None and ours.median:
            figures = [
                f"{100 * (ours.upper - ours.lower) / ours.median:.0f}%",
                ours.rate,
                f"{ours.percent:.0f} ({ours.limit})",
                "" if ours.error is None else f"{ours.error:.0e}",
            ]
        table.add_row(
            *key[3:],
            _cell(ours),
            *figures,
            *(
                cell
                for name in others
                for cell in (_cell(by_provider.get(name)), _ratio_cell(ratio(by_provider, name)))
            ),
        )
    for table in tables.values():
        console.print(table)
    for name in others:
        timed = (g for g in groups(rows).values() if next(iter(g.values())).median)
        values = [v for v in (ratio(g, name) for g in timed) if v is not None]
        if values:
            mean = math.exp(sum(map(math.log, values)) / len(values))
            lost = sum(v < 1 for v in values)
            console.print(
                f"{name}: geometric mean {mean:.2f}x over {len(values)} timed rows; we lose {lost}"
            )


def write(
    rows: list[Row], to_csv: Path | None, to_json: Path | None, to_png: Path | None, threads: int
) -> None:
    """Write the files that were asked for."""
    for path in (to_csv, to_json, to_png):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if to_csv:
        with to_csv.open("w", newline="") as f:
            writer = csv.DictWriter(f, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)
    if to_json:
        to_json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
        environment = json.dumps(machine.environment(threads), indent=1, default=str)
        to_json.with_name("environment.json").write_text(environment + "\n")
    if to_png:
        draw(rows, to_png)


def read(path: Path) -> list[Row]:
    """The rows of a ``--json`` file."""
    return [Row(**record) for record in json.loads(path.read_text())]


def markdown(rows: list[Row], cache: str = "warm") -> str:
    """A Markdown table of fresh outputs with one state of the caches, a line for each op and shape.

    A cell has the time of each other provider over ours, and our share of the machine's limit.
    """
    chosen = groups([r for r in rows if (r.cache, r.output) in ((cache, "fresh"), ("", ""))])
    others = [name for name in dict.fromkeys(r.provider for r in rows) if name != OURS]
    modes = list(dict.fromkeys(key[3] for key in chosen))
    head = ["op", *modes]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for label in dict.fromkeys(key[:3] for key in chosen):
        cells = []
        for mode in modes:
            group = next((g for k, g in chosen.items() if k[:4] == (*label, mode)), {})
            ratios = (ratio(group, name) for name in others)
            cell = " / ".join("–" if v is None else f"{v:.2g}x" for v in ratios)
            percent = group[OURS].percent if OURS in group else None
            cells.append(cell if percent is None else f"{cell}, {percent:.0f} %")
        lines.append(f"| {' '.join(label)} | {' | '.join(cells)} |")
    return f"{' / '.join(others)}, share of the limit\n\n" + "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """A bar for each measurement of the first cache and fresh outputs, against each provider."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in rows if r.median and r.output == "fresh"]
    cache = timed[0].cache if timed else ""
    chosen = groups([r for r in timed if r.cache == cache])
    others = list(dict.fromkeys(r.provider for r in timed if r.provider != OURS))
    modes = list(dict.fromkeys(key[3] for key in chosen))
    labels = list(dict.fromkeys(key[:3] for key in chosen))
    figure, axes = plt.subplots(
        1,
        max(1, len(modes)),
        figsize=(3.0 + 2.6 * max(1, len(modes)), 1.6 + 0.3 * len(labels)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colours = ("#999999", "#d9822b", "#5b8c5a", "#7a5ba6")
    height = 0.8 / max(1, len(others))
    for axis, mode in zip(axes[0], modes, strict=False):
        for i, name in enumerate(others):
            values = [
                ratio(chosen.get((*label, mode, cache, "fresh"), {}), name) or 0 for label in labels
            ]
            places = [k + height * (i + 0.5) - 0.4 for k in range(len(labels))]
            axis.barh(places, values, height, label=name, color=colours[i % len(colours)])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=mode, xlabel="times ours")
        axis.spines[["top", "right"]].set_visible(False)
        if any(axis.patches) and max(p.get_width() for p in axis.patches) > 8:
            axis.set_xscale("symlog", linthresh=2)
    axes[0][0].set_yticks(range(len(labels)), [" ".join(label) for label in labels], fontsize=8)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Time of the others over ours, {cache} cache, fresh outputs")
    figure.savefig(path, dpi=120)
    plt.close(figure)
