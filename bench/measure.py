"""One run of the bench: check each row against float64, then time its providers side by side."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import machine, modes
from .cases import SEED, Case, mask, reference
from .providers import Provider
from .timing import Clock, interleaved

# Beyond this many times the eager op's error, or this many eps, ours is wrong.  In float64 the
# reference is rounded as much as what it judges.
ERROR_RATIO, ERROR_EPS = 4, 8
FLOAT64_ERROR = 1e-12


@dataclass
class Row:
    """One provider's figures for one op, shape, dtype, mode, cache and kind of output.

    Times are seconds a call; ``limit_seconds`` is what the bytes need at copy bandwidth or the
    flops at peak, whichever is more.  ``error`` is the largest error of any result, relative to the
    largest value of that result in float64.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    cache: str  # warm, cold; empty for saved bytes
    output: str  # fresh, preallocated; empty for saved bytes
    threads: int
    provider: str
    status: str = "ok"
    median: float | None = None
    lower: float | None = None  # quartiles
    upper: float | None = None
    bytes: float | None = None
    flops: float | None = None
    limit: str = ""  # copy, fma
    limit_seconds: float | None = None
    error: float | None = None
    saved_bytes: int | None = None

    def key(self) -> tuple[str, ...]:
        """What rows that are compared have in common."""
        return (self.op, self.shape, self.dtype, self.mode, self.cache, self.output)

    def title(self) -> str:
        """The key in words."""
        return " ".join(part for part in self.key() if part)

    @property
    def percent(self) -> float | None:
        """Share of the limit."""
        return 100 * self.limit_seconds / self.median if self.median else None

    @property
    def rate(self) -> str:
        """GFLOP/s or GB/s."""
        if not self.median:
            return ""
        if self.limit == "fma":
            return f"{self.flops / self.median / 1e9:.0f} GFLOP/s"
        return f"{self.bytes / self.median / 1e9:.1f} GB/s"


def random_tensors(case: Case, dtype: torch.dtype, device: torch.device):
    """Inputs, a tangent for each, and a cotangent; the same for every provider."""
    generator = torch.Generator(device).manual_seed(SEED)

    def random(shape, deviation=1.0):
        # Of variance 1/K for the weights, so that results stay near one.
        scale = shape[-1] ** -0.5 if len(shape) == 2 and case.op.startswith("linear") else deviation
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    inputs = tuple(random(shape, case.deviation) for shape in case.shapes)
    tangents = tuple(map(random, case.shapes))
    return inputs, tangents, random(case.output_shape)


@dataclass
class Prepared:
    """What to call, by provider; the error of its results where that is known; who fails."""

    calls: dict[str, Callable] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def prepare(
    case: Case,
    dtype: torch.dtype,
    mode: str,
    providers: list[Provider],
    device: torch.device,
    output: str = "fresh",
) -> Prepared:
    """Calls that ran once, with their results checked against float64."""
    prepared = Prepared()
    inputs, tangents, gy = random_tensors(case, dtype, device)
    for provider in providers:
        try:
            torch.manual_seed(SEED)
            if output == "fresh":
                call = provider.prepare(case, mode, inputs, tangents, gy)
            else:
                call = provider.into(case, mode, inputs, gy)
            if call is None:
                continue
            torch.manual_seed(SEED)
            results = call()
        except Exception as e:
            first = str(e).splitlines()[0]
            prepared.failed[provider.name] = f"fails: {type(e).__name__}: {first}"
            continue
        if provider.checkable(case):
            prepared.errors[provider.name] = _error(
                case, provider, mode, results, inputs, tangents, gy
            )
        prepared.calls[provider.name] = call
    return prepared


def _error(case, provider, mode, results, inputs, tangents, gy) -> float:
    m = mask(case, provider.function, gy.dtype, gy.device) if case.random else None
    wide = [tuple(t.double() for t in ts) for ts in (inputs, tangents)]
    expected = modes.callable_for(mode, reference(case, m), *wide, gy.double())()
    worst = 0.0
    for got, want in zip(modes.flatten(results), modes.flatten(expected), strict=True):
        scale = want.abs().max().clamp(min=1e-30)
        worst = max(worst, ((got.double() - want).abs().max() / scale).item())
    return worst


def status(name: str, errors: dict[str, float], dtype: torch.dtype) -> str:
    """``ok``, ``unchecked`` or ``wrong: ...`` of a provider among the errors of all."""
    if name not in errors:
        return "unchecked"
    floor = FLOAT64_ERROR if dtype is torch.float64 else ERROR_EPS * torch.finfo(dtype).eps
    allowed = max(ERROR_RATIO * errors.get("eager", 0.0), floor)
    if not errors[name] <= allowed:
        return f"wrong: error {errors[name]:.1e}, allowed {allowed:.1e}"
    return "ok"


def set_limits(row: Row, case: Case, dtype: torch.dtype, device: torch.device, cold: bool) -> None:
    """Fill in what the row must move and compute, and how long the machine needs for that."""
    row.bytes = case.traffic[row.mode] * dtype.itemsize
    row.flops = case.flops.get(row.mode)
    if device.type == "cuda":
        copy, peaks = machine.device_limits(device.index or 0)
        peak = peaks[dtype]
    else:
        copy = machine.bandwidth(row.bytes, row.threads, cold)
        peak = machine.flops(dtype, row.threads)
    needs = {"copy": row.bytes / copy, "fma": (row.flops or 0) / peak}
    row.limit = max(needs, key=needs.get)
    row.limit_seconds = needs[row.limit]


@dataclass
class Run:
    """What to measure, and how long."""

    cases: list[Case]
    modes: tuple[str, ...]
    dtypes: list[torch.dtype]
    providers: list[Provider]
    caches: tuple[str, ...]
    device: torch.device
    seconds: float
    rounds: int

    def __call__(self, console: Console) -> list[Row]:
        """Measure everything, with a progress bar; rows in the order of the cases."""
        rows = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        total = len(self.cases) * len(self.dtypes) * len(self.modes)
        with Progress(*columns, console=console) as progress, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's advice
            task = progress.add_task("", total=total)
            for case in self.cases:
                for dtype in self.dtypes:
                    for mode in self.modes:
                        progress.update(task, description=f"{case.op} {case.label} {mode}"[:48])
                        rows += self._rows(case, dtype, mode)
                        progress.advance(task)
        return rows

    def _rows(self, case: Case, dtype: torch.dtype, mode: str) -> list[Row]:
        if mode == "saved bytes":
            return self._saved(case, dtype)
        rows = []
        for output in ("fresh", "preallocated"):
            prepared = prepare(case, dtype, mode, self.providers, self.device, output)
            if prepared.calls:
                rows += self._timed(case, dtype, mode, output, prepared)
        return rows

    def _timed(self, case, dtype, mode, output, prepared) -> list[Row]:
        rows = []
        for cache in self.caches:
            clock = Clock(self.device, cache == "cold")
            measured = interleaved(prepared.calls, clock, self.seconds, self.rounds)
            for name in [*prepared.calls, *prepared.failed]:
                row = Row(
                    *(case.op, case.label, str(dtype).removeprefix("torch.")),
                    *(mode, cache, output, torch.get_num_threads(), name),
                    error=prepared.errors.get(name),
                )
                if name in prepared.failed:
                    row.status = prepared.failed[name]
                else:
                    m = measured[name]
                    row.median, row.lower, row.upper = m.median, m._p25, m._p75
                    set_limits(row, case, dtype, self.device, cache == "cold")
                    row.status = status(name, prepared.errors, dtype)
                rows.append(row)
        return rows

    def _saved(self, case, dtype) -> list[Row]:
        inputs, rows = random_tensors(case, dtype, self.device)[0], []
        for provider in self.providers:
            row = Row(
                *(case.op, case.label, str(dtype).removeprefix("torch."), "saved bytes"),
                *("", "", torch.get_num_threads(), provider.name),
            )
            try:
                row.saved_bytes = provider.saved_bytes(case, inputs)
            except Exception as e:
                row.status = f"fails: {type(e).__name__}: {str(e).splitlines()[0]}"
            if row.saved_bytes is not None or row.status != "ok":
                rows.append(row)
        return rows
