"""``python -m bench limits``: every op against its target and the limit of this machine.

Each line is measured twice, everything interleaved:

* kernel against kernel: one process that keeps its host memory, so that nobody pays page faults;
* as a user meets it: native PyTorch as installed, in a process of its own, and ours in another one
  after :func:`jacobian_ops.retain_host_memory`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import machine, measure, providers
from .cases import Case, activation, dropout, linear, linear_act_dropout, softmax, softmax_dropout
from .timing import Clock, interleaved

FORWARD, BOTH, JVP = "forward", "forward+vjp", "jvp"
OVER_COMPILE = 1.2  # enough ahead of torch.compile, where the target is no less
LEAST = 0.97  # of eager's speed, at every row
P = 0.1
IDLE = 0.02  # seconds in which OpenMP's threads stop waiting actively


@dataclass(frozen=True)
class Line:
    """One op, shape, dtype and mode, and how many times eager's speed it should reach."""

    case: Case
    mode: str
    target: float
    dtype: torch.dtype = torch.float32

    def title(self) -> str:
        """The line in words."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case.op} {self.case.label} {dtype} {self.mode}"


def _lines(case: Case, forward, both, jvp, dtype=torch.float32) -> list[Line]:
    targets = ((FORWARD, forward), (BOTH, both), (JVP, jvp))
    return [Line(case, mode, target, dtype) for mode, target in targets if target]


LARGE, SMALL = (4096, 4096), (32, 64)
SHAPES = ((2048, 1024, 4096), (4096, 256, 1024), (16384, 64, 256))
# float32 targets of forward, forward+VJP and JVP, with memory kept.
ACTIVATIONS = {
    "gelu": (1.25, 1.6, 2.5),
    "silu": (1.1, 1.1, 7),
    "sigmoid": (1.4, 1.5, 2),
    "tanh": (7, 3.8, 5),
    "softplus": (2.5, 2.1, 3),
    "mish": (9, 9, 20),
}
CHEAP = ("relu", "leaky_relu", "relu6", "hardtanh", "hardswish", "hardsigmoid")
EXPONENTIAL = ("elu", "selu", "celu", "logsigmoid")

LINES = tuple(
    line
    for lines in (
        *(
            _lines(softmax(name, (8192, 1024)), 2, 1.6, 5)
            + _lines(softmax(name, (512, 32768)), 1.6, 1.6, 4.5)
            for name in ("softmax", "log_softmax")
        ),
        _lines(softmax("softmax", (65536, 64)), 2.2, 1.4, 5),
        _lines(softmax("softmax", (8192, 1024), dim=0), 4, 3, 5),
        _lines(softmax("softmax", (64, 512, 256), dim=1), 2.2, 2, 5),
        _lines(softmax("softmax", (8192, 1024)), 2, 1.6, 5, torch.bfloat16),
        *(_lines(activation(name, LARGE), *targets) for name, targets in ACTIVATIONS.items()),
        _lines(activation("gelu", LARGE, approximate="tanh"), 4, 3.5, 5),
        *(_lines(activation(name, LARGE), 1, 1.3, 2) for name in CHEAP),
        *(_lines(activation(name, LARGE), 1, 1.3, 2) for name in EXPONENTIAL),
        *(
            _lines(activation("gelu", LARGE), *ACTIVATIONS["gelu"], dtype)
            for dtype in (torch.bfloat16, torch.float16)
        ),
        _lines(activation("gelu", (1024, 4096)), LEAST, LEAST, LEAST, torch.float64),
        _lines(dropout((1024, 1024)), 40, 17, 17),
        _lines(dropout(LARGE), 40, 17, 17),
        *(_lines(linear(*shape), 2.4, 2.3, 2.3) for shape in SHAPES),
        *(_lines(linear(m, 4096, 4096), 3, 2.5, 2.5) for m in (64, 256)),
        *(_lines(linear(m, 4096, 4096), 4, 3, 3) for m in (1, 8)),
        *(
            _lines(linear(*shape), 1.15, 1.1, 1.1, torch.bfloat16)
            for shape in (*SHAPES, (64, 4096, 4096), (8, 4096, 4096))
        ),
        _lines(linear(1024, 1024, 1024), LEAST, LEAST, LEAST, torch.float64),
        *(
            _lines(linear_act_dropout("gelu", *shape, P), 3, both, 4)
            for shape, both in zip(SHAPES, (2.8, 4.5, 4.5), strict=True)
        ),
        *(
            _lines(linear_act_dropout("gelu", *shape, 0.0), LEAST, both, LEAST)
            for shape, both in zip(SHAPES, (2.4, 2.6, 2.4), strict=True)
        ),
        _lines(softmax_dropout((8192, 1024)), 15, 10, 10),
        *(_lines(activation(name, SMALL), None, 1 / 1.1, None) for name in ("relu", "gelu")),
        _lines(softmax("softmax", SMALL), None, 1 / 1.1, None),
        _lines(linear(32, 64, 64), None, 1 / 1.1, None),
    )
    for line in lines
)


@dataclass
class Result:
    """Medians of one line, seconds a call.

    ``ours``, ``eager`` and ``compile`` ran in one process that keeps its memory; ``ours_retaining``
    and ``eager_installed`` each in its own; ``one_thread`` is ours on one thread.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    target: float
    threads: int
    ours: float
    eager: float
    compile: float | None
    ours_retaining: float
    eager_installed: float
    one_thread: float | None
    bytes: float
    flops: float | None
    limit: str
    limit_seconds: float
    status: str
    reason: str = ""

    @property
    def kernel(self) -> float:
        """Eager over ours, memory kept."""
        return self.eager / self.ours

    @property
    def user(self) -> float:
        """Eager as installed over ours with memory retained."""
        return self.eager_installed / self.ours_retaining

    @property
    def over_compile(self) -> float | None:
        """torch.compile over ours, memory kept."""
        return self.compile / self.ours if self.compile else None

    @property
    def percent(self) -> float:
        """Share of the limit that ours reaches."""
        return 100 * self.limit_seconds / self.ours

    @property
    def most(self) -> float:
        """How many times eager's speed this machine allows at all."""
        return self.eager / self.limit_seconds

    @property
    def short(self) -> list[str]:
        """Which targets the line misses."""
        missed = []
        if self.kernel < self.target:
            missed.append(f"eager {self.target:.3g}x")
        wanted = min(self.target, OVER_COMPILE)
        if self.over_compile is not None and self.over_compile < wanted:
            missed.append(f"compile {wanted:.3g}x")
        return missed


# --- processes ---------------------------------------------------------------------------------

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
RETAINING = {"JACOBIAN_OPS_RETAIN_HOST_MEMORY": "1"}
_MEMORY = ("MALLOC_", "JACOBIAN_OPS_RETAIN_HOST_MEMORY", "LD_PRELOAD")


@contextlib.contextmanager
def _environment(variables: dict[str, str]):
    """The environment with these memory settings and no others."""
    kept = dict(os.environ)
    for name in kept:
        if name.startswith(_MEMORY):
            del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


class Worker:
    """A process of its own that prepares and times calls of some providers.

    Args:
        variables: Its memory settings.
        names: Its providers.
        threads: How many it computes with.
    """

    def __init__(self, variables: dict[str, str], names: tuple[str, ...], threads: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, names, threads), daemon=True)
        with _environment(variables):
            self._process.start()
        there.close()

    def prepare(self, number: int) -> tuple[dict[str, Callable], dict[str, float], dict[str, str]]:
        """For line ``number``: the calls, to be given to a clock; errors; who fails."""
        names, errors, failed = self._ask(("prepare", number))
        calls = {name: lambda count, name=name: self._ask((name, count)) for name in names}
        return calls, errors, failed

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _ask(self, request):
        self._pipe.send(request)
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe, names: tuple[str, ...], threads: int) -> None:
    """The other side of a :class:`Worker`."""
    torch.set_num_threads(threads)
    chosen = [providers.make(name) for name in names]
    device = torch.device("cpu")
    clock = Clock(device, cold=False)
    calls = {}
    while True:
        try:
            name, number = pipe.recv()
        except EOFError:
            return
        try:
            if name != "prepare":
                calls[name]()  # wakes the threads
                answer = clock(calls[name], number)
            else:
                calls.clear()  # before the next inputs are made
                line = LINES[number]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the compiler's advice
                    made = measure.prepare(line.case, line.dtype, line.mode, chosen, device)
                calls = made.calls
                answer = list(calls), made.errors, made.failed
        except Exception as e:
            answer = RuntimeError(f"{type(e).__name__}: {e}")
        pipe.send(answer)


@dataclass(frozen=True)
class _RemoteClock:
    """Asks the process that has the call, once the threads of the last one sleep."""

    cold: bool = False

    def __call__(self, call: Callable, number: int) -> float:
        time.sleep(IDLE)
        return call(number)


def _row(line: Line, threads: int) -> measure.Row:
    """The line's work, and what the machine needs for it."""
    dtype = str(line.dtype).removeprefix("torch.")
    row = measure.Row(
        *(line.case.op, line.case.label, dtype, line.mode, "warm", "fresh", threads),
        "jacobian_ops",
    )
    measure.set_limits(row, line.case, line.dtype, torch.device("cpu"), cold=False)
    return row


class Session:
    """The processes of one run."""

    def __init__(self, threads: int, compiled: bool, numbers: list[int]):
        # While nothing else runs: the limits are those of an idle machine.
        self.rows = {number: _row(LINES[number], threads) for number in numbers}
        kept = ("jacobian_ops", "eager", "compile") if compiled else ("jacobian_ops", "eager")
        self.threads = threads
        self.workers = {
            "kept": Worker(KEPT, kept, threads),
            "retaining": Worker(RETAINING, ("jacobian_ops",), threads),
            "installed": Worker({}, ("eager",), threads),
            "one thread": Worker(KEPT, ("jacobian_ops",), 1),
        }

    def __call__(self, number: int, seconds: float) -> Result:
        """Measure one line."""
        line = LINES[number]
        row = self.rows[number]
        calls, errors, failed = {}, {}, {}
        for kind, worker in self.workers.items():
            if kind == "one thread" and row.limit != "fma":
                continue
            made, errors_here, failed_here = worker.prepare(number)
            calls |= {(kind, name): call for name, call in made.items()}
            failed |= failed_here
            errors = errors_here if kind == "kept" else errors
        missing = [failed[name] for name in ("jacobian_ops", "eager") if name in failed]
        if missing:
            raise RuntimeError(f"{line.title()}: {missing[0]}")
        measured = interleaved(calls, _RemoteClock(), seconds, rounds=7)
        times = {key: m.median for key, m in measured.items()}
        return Result(
            *(row.op, row.shape, row.dtype, row.mode, line.target, self.threads),
            ours=times["kept", "jacobian_ops"],
            eager=times["kept", "eager"],
            compile=times.get(("kept", "compile")),
            ours_retaining=times["retaining", "jacobian_ops"],
            eager_installed=times["installed", "eager"],
            one_thread=times.get(("one thread", "jacobian_ops")),
            bytes=row.bytes,
            flops=row.flops,
            limit=row.limit,
            limit_seconds=row.limit_seconds,
            status=measure.status("jacobian_ops", errors, line.dtype),
        )

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers.values():
            worker.close()


# --- why a line is short -----------------------------------------------------------------------

# By op and mode, either of them any: what stands between ours and the target where the machine's
# limit alone does not.
REASONS: dict[tuple[str, str], str] = {}


def reason(result: Result) -> str:
    """The physical cause of a line that misses a target; empty where none is known."""
    if result.most < result.target:
        return f"eager takes {result.most:.2f} times the limit: no more can be gained"
    for key in ((result.op, result.mode), (result.op, ""), ("", result.mode)):
        if key in REASONS:
            return REASONS[key]
    return ""


# --- the report --------------------------------------------------------------------------------


def print_table(console: Console, results: list[Result]) -> None:
    """A line for each result, the reasons below."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("op, shape, dtype, mode")
    for heading in ("target", "K", "E", "compile", "% of limit", "2 t / 1 t", "ours", ""):
        table.add_column(heading, justify="right")
    reasons = list(dict.fromkeys(r.reason for r in results if r.reason))
    for r in results:
        note = ""
        if r.short:
            note = f"[{reasons.index(r.reason) + 1}]" if r.reason else "[red]unexplained[/]"
        colour = "green" if r.kernel >= r.target else "red" if r.kernel < LEAST else "yellow"
        table.add_row(
            *cells(r, f"[{colour}]{r.kernel:.2f}x[/]"),
            note.replace("[", r"\[") if r.reason else note,
        )
    console.print("K: eager over ours, memory kept; E: eager as installed over ours retaining")
    console.print(table)
    for i, text in enumerate(reasons, 1):
        console.print(rf"\[{i}] {text}")
    for line in summary(results):
        console.print(line)


def cells(r: Result, kernel: str) -> tuple[str, ...]:
    """The columns of a result before its note."""
    return (
        f"{r.op} {r.shape} {r.dtype} {r.mode}",
        f"{r.target:.3g}x",
        kernel,
        f"{r.user:.2f}x",
        "" if r.over_compile is None else f"{r.over_compile:.2f}x",
        f"{r.percent:.0f} ({r.limit})",
        "" if r.one_thread is None else f"{r.one_thread / r.ours:.2f}x",
        f"{r.ours * 1e3:.3g} ms",
    )


def summary(results: list[Result]) -> list[str]:
    """Geometric means, and how many lines miss something."""

    def mean(values):
        values = [v for v in values if v]
        return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan

    return [
        f"geometric mean over {len(results)} lines: K {mean(r.kernel for r in results):.2f}x, "
        f"E {mean(r.user for r in results):.2f}x, "
        f"compile {mean(r.over_compile for r in results):.2f}x",
        f"below {LEAST}x of eager: {sum(r.kernel < LEAST for r in results)}; "
        f"short of a target: {sum(bool(r.short) for r in results)}, "
        f"unexplained: {sum(bool(r.short) and not r.reason for r in results)}",
    ]


def markdown(results: list[Result]) -> str:
    """The table for a document."""
    reasons = list(dict.fromkeys(r.reason for r in results if r.reason))
    head = ("", "target", "K", "E", "compile", "limit", "2 t / 1 t", "ours", "")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in results:
        kernel = f"{r.kernel:.2f}x" if r.kernel < r.target else f"**{r.kernel:.2f}x**"
        note = f"[{reasons.index(r.reason) + 1}]" if r.reason else ""
        lines.append(f"| {' | '.join((*cells(r, kernel), note))} |")
    notes = [f"{i}. {text}" for i, text in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *summary(results), "", *notes]) + "\n"


def read(path: Path) -> list[Result]:
    """The results of a ``--json`` file, with today's reasons."""
    results = [Result(**record) for record in json.loads(path.read_text())["lines"]]
    for r in results:
        r.reason = reason(r) if r.short else ""
    return results


# --- command -----------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """The command; 1 when something is wrong or short of its target without a reason."""
    p = argparse.ArgumentParser(prog="python -m bench limits", description=__doc__)
    p.add_argument("--only", default="", help="measure lines whose title contains this")
    p.add_argument("--seconds", type=float, default=0.2, help="of measuring, a line and provider")
    p.add_argument("--no-compile", action="store_true", help="without torch.compile")
    p.add_argument("--json", type=Path, help="write the figures")
    p.add_argument("--markdown", type=Path, help="print the table of such a file instead")
    options = p.parse_args(arguments)
    if options.markdown:
        print(markdown(read(options.markdown)))
        return 0
    numbers = [i for i, line in enumerate(LINES) if options.only in line.title()]
    if not numbers:
        p.error(f"--only {options.only!r}: no such line")
    console = Console()
    if not console.is_terminal:
        console.width = 160  # of a file or a pipe
    threads = torch.get_num_threads()
    session = Session(threads, not options.no_compile, numbers)
    results = []
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(numbers))
            for number in numbers:
                progress.update(task, description=LINES[number].title()[:60])
                result = session(number, options.seconds)
                result.reason = reason(result) if result.short else ""
                results.append(result)
                progress.advance(task)
    finally:
        session.close()
    print_table(console, results)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "lines": [dataclasses.asdict(r) for r in results],
            "environment": machine.environment(threads),
        }
        options.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    wrong = [r for r in results if r.status.startswith("wrong")]
    for r in wrong:
        console.print(f"[bold red]{r.op} {r.shape} {r.dtype} {r.mode}: {r.status}[/]")
    return int(bool(wrong) or any(r.short and not r.reason for r in results))
