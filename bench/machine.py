"""The limits of this machine, and what else a reader of figures must know about it."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path

import torch

import jacobian_ops
from jacobian_ops import _backend

MEMORY = 256 << 20  # bytes of a copy that no cache holds


@functools.cache
def flops(dtype: torch.dtype, threads: int) -> float:
    """Multiply-adds in registers, flop/s.  float16 is computed in float32 on a CPU."""
    return _backend.BACKENDS["cpu"].fma_peak(_backend.DTYPES[dtype], threads)


@functools.cache
def _bandwidth(size: int, threads: int) -> float:
    return max(
        _backend.BACKENDS["cpu"].copy_bandwidth(size, non_temporal, threads)
        for non_temporal in (False, True)
    )


def bandwidth(traffic: float, threads: int, cold: bool) -> float:
    """Bytes/s, read and written, of the best copy that moves as many bytes, or of one in memory."""
    size = MEMORY if cold else min(MEMORY, 1 << max(14, int(traffic / 2).bit_length()))
    return _bandwidth(size, threads)


@functools.cache
def device_limits(index: int) -> tuple[float, dict[torch.dtype, float]]:
    """Copy bandwidth and matrix-product throughput of a GPU, both measured through torch."""
    device = torch.device("cuda", index)
    x = torch.empty(1 << 28, device=device)
    y = torch.empty_like(x)

    def seconds(run):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        best = float("inf")
        for _ in range(10):
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) * 1e-3)
        return best

    copy = 2 * x.numel() * 4 / seconds(lambda: y.copy_(x))
    peaks = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        a = torch.randn(4096, 4096, device=device, dtype=dtype)
        peaks[dtype] = 2 * 4096**3 / seconds(lambda a=a: a @ a)
    return copy, peaks


def cache_bytes() -> int:
    """Size of the last-level cache, 32 MiB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), "")


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(threads: int) -> dict:
    """Everything that figures depend on and a file can hold."""
    prefixes = ("OMP_", "MKL_", "GOMP_", "KMP_", "MALLOC_", "JACOBIAN_OPS_", "LD_PRELOAD", "TORCH")
    return {
        "commit": _commit(),
        "processor": _processor(),
        "logical_processors": os.cpu_count(),
        "last_level_cache_bytes": cache_bytes(),
        "load_average": os.getloadavg(),
        "threads": threads,
        "interop_threads": torch.get_num_interop_threads(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)},
        "build": jacobian_ops.build_info(),
        "torch_configuration": torch.__config__.show(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "fma_peak_flops": {
            str(d).removeprefix("torch."): flops(d, threads) for d in _backend.DTYPES
        },
        "copy_bytes_per_second": {
            kind: _backend.BACKENDS["cpu"].copy_bandwidth(MEMORY, non_temporal, threads)
            for kind, non_temporal in (("plain", False), ("non_temporal", True))
        },
    }
