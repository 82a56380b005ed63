"""Timing of several ways to do the same thing, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Measurement, TaskSpec

from . import machine

BLOCK = 2e-3  # seconds of calls between two looks at the clock, unless told otherwise
MAX_ROUNDS = 101
SLOW = 1.0  # seconds of a call that needs no repetition to be timed
PATIENCE = 30.0  # seconds of a line after which no other round is begun


@dataclass
class Clock:
    """Seconds of a number of calls on one device; ``cold`` sweeps its caches before each call."""

    device: torch.device
    cold: bool

    def __post_init__(self):
        cuda = self.device.type == "cuda"
        if cuda:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        else:
            cache = machine.cache_bytes()
        self._sweep = torch.empty(2 * cache, dtype=torch.int8, device=self.device)
        self._run = self._on_cuda if cuda else self._on_cpu

    def __call__(self, call: Callable, number: int) -> float:
        """Seconds a call."""
        if not self.cold:
            return self._run(call, number) / number
        total = 0.0
        for _ in range(number):
            self._sweep.add_(1)
            total += self._run(call, 1)
        return total / number

    def _on_cpu(self, call, number):
        start = time.perf_counter()
        for _ in range(number):
            call()
        return time.perf_counter() - start

    def _on_cuda(self, call, number):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(number):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def interleaved(
    calls: dict[str, Callable],
    clock: Clock,
    seconds: float,
    rounds: int,
    block: float = BLOCK,
) -> dict[str, Measurement]:
    """Time the calls in turn, round by round, each first in some of the rounds.

    Args:
        calls: What to time, by name; they were called before, so nothing is set up any more.
        clock: How.
        seconds: About how long to measure each.
        rounds: Least number of rounds, unless they take very long.
        block: About how many seconds of calls are timed at once.

    Returns:
        A measurement for each name, in seconds a call.
    """
    numbers = {}
    for name, call in calls.items():
        once = clock(call, 1)
        if once < SLOW:
            once = min(once, clock(call, 1))
        numbers[name] = 1 if clock.cold else max(1, min(10_000, int(block / max(once, 1e-7))))
    times = {name: [] for name in calls}
    order = list(calls)
    spent = 0.0
    start = time.perf_counter()
    done = 0
    while done == 0 or (
        spent < PATIENCE and (done < rounds or (spent < seconds * len(order) and done < MAX_ROUNDS))
    ):
        for name in order:
            times[name].append(clock(calls[name], numbers[name]))
        order = order[1:] + order[:1]
        done += 1
        spent = time.perf_counter() - start
    # torch's Measurement divides by the number of calls itself.
    return {
        name: Measurement(
            numbers[name],
            [t * numbers[name] for t in taken],
            TaskSpec(name, "", num_threads=torch.get_num_threads()),
        )
        for name, taken in times.items()
    }
