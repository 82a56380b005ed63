"""``python -m bench limits``: every op against its target and the limit of this machine.

Each line is measured twice, everything interleaved:

* kernel against kernel: one process that keeps its host memory, so that nobody pays page faults;
* as a user meets it: native PyTorch as installed, in a process of its own, and ours in another one
  after :func:`jacobian_ops.retain_host_memory`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import limits_report, machine, measure, providers
from .limits_report import Point, Result
from .targets import LINES, SWEEP, Line
from .timing import SLOW, Clock, interleaved

IDLE = 0.02  # seconds in which OpenMP's threads stop waiting actively
AWAKE = 0.01  # seconds of calls before the clock starts: a machine that slept is slow at first
BLOCK = 0.02  # seconds of calls that are timed at once
CPU = torch.device("cpu")

# A thread to a processor: with several processes the two of one would at times wait for each other
# on the same one.
_BOUND = {"OMP_PROC_BIND": "true"}
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
    os.environ.update(variables | _BOUND)
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

    def prepare(self, line: str, number: int):
        """For ``LINES[number]`` or ``SWEEP[number]``: calls for a clock; errors; who fails."""
        names, errors, failed = self._ask(("prepare", (line, number)))
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
    clock = Clock(CPU, cold=False)
    lists = {"line": LINES, "sweep": SWEEP}
    calls, slow = {}, set()
    while True:
        try:
            name, number = pipe.recv()
        except EOFError:
            return
        try:
            if name != "prepare":
                start = time.perf_counter()
                while name not in slow and time.perf_counter() - start < AWAKE:
                    calls[name]()
                answer = clock(calls[name], number)
                if answer > SLOW:
                    slow.add(name)
            else:
                calls.clear()  # before the next inputs are made
                slow.clear()
                kind, index = number
                line = lists[kind][index]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the compiler's advice
                    made = measure.prepare(line.case, line.dtype, line.mode, chosen, CPU)
                calls = made.calls
                answer = list(calls), made.errors, made.failed
        except Exception as e:
            answer = RuntimeError(f"{type(e).__name__}: {e}")
        try:
            pipe.send(answer)
        except OSError:  # nobody waits for it any more
            return


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
    measure.set_limits(row, line.case, line.dtype, CPU, cold=False)
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
            made, errors_here, failed_here = worker.prepare("line", number)
            calls |= {(kind, name): call for name, call in made.items()}
            failed |= failed_here
            errors = errors_here if kind == "kept" else errors
        missing = [failed[name] for name in ("jacobian_ops", "eager") if name in failed]
        if missing:
            raise RuntimeError(f"{line.title()}: {missing[0]}")
        measured = interleaved(calls, _RemoteClock(), seconds, rounds=5, block=BLOCK)
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


def sweep(threads: int, seconds: float, progress: Callable[[str], None]) -> list[Point]:
    """Ours and eager over sizes, in one process that keeps its memory."""
    rows = [_row(line, threads) for line in SWEEP]
    worker = Worker(KEPT, ("jacobian_ops", "eager"), threads)
    points = []
    try:
        for number, (line, row) in enumerate(zip(SWEEP, rows, strict=True)):
            progress(line.title())
            calls = worker.prepare("sweep", number)[0]
            measured = interleaved(calls, _RemoteClock(), seconds, rounds=5, block=BLOCK)
            ours, eager = (measured[name].median for name in ("jacobian_ops", "eager"))
            points.append(Point(row.op, row.bytes, ours, eager, row.limit_seconds))
    finally:
        worker.close()
    return points


def main(arguments: list[str]) -> int:
    """The command; 1 when something is wrong or short of its target without a reason."""
    p = argparse.ArgumentParser(prog="python -m bench limits", description=__doc__)
    p.add_argument("--only", default="", help="measure lines whose title contains this")
    p.add_argument("--skip", default=None, help="leave out lines whose title contains this")
    p.add_argument("--seconds", type=float, default=0.2, help="of measuring, a line and provider")
    p.add_argument("--no-compile", action="store_true", help="without torch.compile")
    p.add_argument("--sweep", action="store_true", help="measure over sizes too, up to 1 GiB")
    p.add_argument("--json", type=Path, help="write the figures")
    p.add_argument("--read", type=Path, help="report such a file instead of measuring")
    p.add_argument("--markdown", type=Path, help="write the table")
    p.add_argument("--plots", type=Path, help="write pictures into this folder")
    options = p.parse_args(arguments)
    numbers = [i for i, line in enumerate(LINES) if options.only in line.title()]
    if options.skip is not None:
        numbers = [i for i in numbers if options.skip not in LINES[i].title()]
    if not numbers:
        p.error(f"--only {options.only!r}: no such line")
    console = Console()
    if not console.is_terminal:
        console.width = 160  # of a file or a pipe
    if options.read:
        try:
            results, points, environment = limits_report.read(options.read)
        except (OSError, ValueError, TypeError, KeyError) as e:
            p.error(f"--read {options.read}: no file of --json: {e}")
    else:
        results, points = _measured(console, options, numbers)
        environment = machine.environment(torch.get_num_threads())
    limits_report.print_table(console, results)
    if options.json:
        limits_report.write(options.json, results, points, environment)
    if options.markdown:
        options.markdown.write_text(limits_report.markdown(results))
    if options.plots:
        limits_report.draw(options.plots, results, points, environment)
    wrong = [r for r in results if r.status.startswith("wrong")]
    for r in wrong:
        console.print(f"[bold red]{r.title()}: {r.status}[/]")
    return int(bool(wrong) or any(r.short and not r.reason for r in results))


def _measured(console, options, numbers) -> tuple[list[Result], list[Point]]:
    """The lines, and the sizes if they are asked for, with a progress bar.

    Interrupted, it ends with those that were measured.
    """
    threads = torch.get_num_threads()
    results, points = [], []
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        TimeRemainingColumn(),
    )
    session = Session(threads, not options.no_compile, numbers)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(numbers) + options.sweep * len(SWEEP))

        def step(title):
            progress.update(task, description=title[:60])
            progress.advance(task)

        try:
            for number in numbers:
                step(LINES[number].title())
                results.append(session(number, options.seconds))
        except KeyboardInterrupt:
            console.print(f"interrupted after {len(results)} lines")
            return results, points
        finally:
            session.close()
        if options.sweep:
            points = sweep(threads, options.seconds, step)
    return results, points
