"""``python -m bench compare OLD NEW``: what got slower, or wrong, beyond noise."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .measure import Row
from .report import OURS, groups, read


def machine_drift(old: dict, new: dict) -> float:
    """How much slower the machine was: the median over the rows of what eager PyTorch took."""
    drifts = [
        new[key]["eager"].median / old[key]["eager"].median
        for key in old.keys() & new.keys()
        if all(g[key].get("eager") and g[key]["eager"].median for g in (old, new))
    ]
    return statistics.median(drifts) if drifts else 1.0


def changes(
    old: list[Row], new: list[Row], threshold: float
) -> tuple[list[tuple[Row, Row, float, str]], float]:
    """Ours in both files: (old row, new row, factor, verdict), the slowest first.

    The factor is that of the medians, over the machine's drift.  A row is slower when the factor
    is above ``1 + threshold`` and the quartiles, also corrected, do not overlap; faster likewise.
    """
    before, after = groups(old), groups(new)
    drift = machine_drift(before, after)
    found = []
    for key, providers in before.items():
        a, b = providers.get(OURS), after.get(key, {}).get(OURS)
        if a is None or b is None:
            continue
        if (b.median is None and b.saved_bytes is None) or b.status.startswith("wrong"):
            found.append((a, b, float("inf"), b.status))
            continue
        if a.saved_bytes is not None:
            factor = b.saved_bytes / a.saved_bytes if a.saved_bytes else float(b.saved_bytes == 0)
            verdict = "keeps more" if factor > 1 else "keeps less" if factor < 1 else ""
        elif a.median:
            factor = b.median / a.median / drift
            verdict = ""
            if factor > 1 + threshold and b.lower / drift > a.upper:
                verdict = "slower"
            elif factor < 1 / (1 + threshold) and b.upper / drift < a.lower:
                verdict = "faster"
        else:
            continue
        found.append((a, b, factor, verdict))
    return sorted(found, key=lambda change: -change[2]), drift


def main(arguments: list[str]) -> int:
    """The command; 1 when something got slower, keeps more, is wrong or fails."""
    p = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    p.add_argument("old", type=Path, help="a --json file")
    p.add_argument("new", type=Path, help="a later one")
    p.add_argument("--threshold", type=float, default=0.05, help="change that counts (0.05: 5%%)")
    options = p.parse_args(arguments)
    try:
        old, new = read(options.old), read(options.new)
    except (OSError, ValueError, TypeError) as e:
        p.error(f"no file of python -m bench --json: {e}")
    found, drift = changes(old, new, options.threshold)
    table = Table(title=f"{options.new} against {options.old}", box=SIMPLE_HEAD)
    table.add_column("measurement")
    for heading in ("old", "new", "new / old", ""):
        table.add_column(heading, justify="right")

    def figure(row):
        if row is None or (row.median is None and row.saved_bytes is None):
            return ""
        return f"{row.saved_bytes} B" if row.median is None else f"{row.median * 1e3:.4g} ms"

    for a, b, factor, verdict in found:
        if verdict:
            table.add_row(b.title(), figure(a), figure(b), f"{factor:.2f}", verdict)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # of a file or a pipe
    if table.row_count:
        console.print(table)
    worse = [v for *_, v in found if v and v not in ("faster", "keeps less")]
    console.print(
        f"{len(found)} rows in both; {len(worse)} worse, "
        f"{sum(v in ('faster', 'keeps less') for *_, v in found)} better, the rest within noise.  "
        f"Eager PyTorch took {drift:.2f} times as long: times are compared after that correction."
    )
    return 1 if worse else 0
