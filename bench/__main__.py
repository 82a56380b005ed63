"""Command line of the bench."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from . import checkpoint, compare, limits, measure, models, modes, providers, report
from .cases import CASES

DTYPES = ("float64", "float32", "bfloat16", "float16")


def _choices(allowed):
    """A parser of comma-separated choices, that names what is allowed."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(part.strip() for part in text.split(",") if part.strip())
        for part in chosen:
            if part not in allowed:
                raise argparse.ArgumentTypeError(f"{part!r}; allowed: {', '.join(allowed)}")
        return chosen

    return parse


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: an integer of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The options."""
    ops = tuple(dict.fromkeys(case.op for case in CASES))
    available = providers.installed()
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure jacobian_ops beside native autograd, interleaved in one run.  Each "
        "row is checked against float64 first.  Lists are separated by commas.",
        epilog="python -m bench limits: each op against its target and the machine's limit.  "
        "python -m bench checkpoint: memory against recomputation, by depth.  "
        "python -m bench models: training steps of whole models.  "
        "python -m bench compare OLD NEW: what got slower between two --json files.  "
        "python -m bench markdown FILE: the table of one.",
    )
    p.add_argument("--op", type=_choices(ops), help=f"of {', '.join(ops)}")
    p.add_argument("--mode", type=_choices(modes.MODES), help=f"of {', '.join(modes.MODES)}")
    p.add_argument(
        "--dtype", type=_choices(DTYPES), default=("float32",), help=f"of {', '.join(DTYPES)}"
    )
    p.add_argument(
        "--provider",
        type=_choices(available),
        default=available,
        help=f"of {', '.join(available)}",
    )
    p.add_argument(
        "--cache",
        type=_choices(("warm", "cold")),
        default=("warm", "cold"),
        help="inputs as the last call left them, or swept out of the caches",
    )
    p.add_argument("--threads", type=_positive, help="default: torch's")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    p.add_argument("--seconds", type=float, default=0.2, help="of measuring, a row and provider")
    p.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    p.add_argument("--csv", type=Path)
    p.add_argument("--json", type=Path, help="writes environment.json beside it")
    p.add_argument("--plot", type=Path, help="PNG")
    return p


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    for command in (checkpoint, compare, limits, models):
        if arguments[:1] == [command.__name__.split(".")[-1]]:
            return command.main(arguments[1:])
    if arguments[:1] == ["markdown"] and len(arguments) == 2:
        print(report.markdown(report.read(Path(arguments[1]))))
        return 0
    p = parser()
    options = p.parse_args(arguments)
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        p.error(f"--device {options.device}: {e}")
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # of a file or a pipe
    run = measure.Run(
        cases=[
            c
            for c in CASES
            if (options.op is None or c.op in options.op) and (c.quick or not options.quick)
        ],
        modes=options.mode or modes.MODES,
        dtypes=[getattr(torch, name) for name in options.dtype],
        providers=[providers.make(name) for name in options.provider],
        caches=options.cache,
        device=device,
        seconds=0.02 if options.quick else options.seconds,
        rounds=5 if options.quick else 11,
    )
    if not run.cases:
        p.error("nothing to measure: --quick leaves no shape of this --op")
    rows = run(console)
    report.print_table(console, rows, options.provider)
    report.write(rows, options.csv, options.json, options.plot, torch.get_num_threads())
    wrong = [row for row in rows if row.status.startswith("wrong")]
    for row in wrong:
        console.print(f"[bold red]{row.provider} {row.title()}: {row.status}[/]")
    return 1 if any(row.provider == "jacobian_ops" for row in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
