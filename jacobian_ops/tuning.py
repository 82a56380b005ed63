"""Which sizes one fused kernel computes on a GPU, and which cuBLASLt does: measured on yours.

``linear_act_dropout`` and its JVP run as one kernel of ours where that is faster than a product by
cuBLASLt with activation and dropout after it.  The sizes built in are estimates; :func:`autotune`
replaces them by measured ones and remembers these for the GPU.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from . import _backend

__all__ = ["autotune"]

# Steps (see :func:`steps`), by dtype, up to which one kernel of ours does product and epilogue.
# Not measured: in about this many a multiprocessor spends what two launches cost.
BUILT_IN = {
    torch.float32: 512,
    torch.float64: 256,
    torch.bfloat16: 1024,
    torch.float16: 1024,
}
_DEPTHS = tuple(1 << i for i in range(5, 14))  # that are timed
_ACROSS = 8  # squares of results in each direction, while they are


def cache_file() -> Path:
    """Where measured sizes are kept: in ``JACOBIAN_OPS_CACHE``, else in the user's cache."""
    folder = os.environ.get("JACOBIAN_OPS_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "jacobian_ops") / "fused.json"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _side(dtype: torch.dtype) -> int:
    """Rows and columns of the results that a block of threads makes: csrc/cuda/linear.cuh."""
    return 32 if dtype is torch.float64 else 64


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def steps(x: torch.Tensor, weight: torch.Tensor, products: int = 1) -> int:
    """What the time of one kernel for ``x W^T`` grows with.

    Each block of threads makes a square of results in K steps, and each multiprocessor a share of
    the squares: K times the squares of one multiprocessor, times the number of ``products``.
    """
    *batch, rows, depth = x.shape
    side = _side(x.dtype)
    squares = math.prod(batch) * -(-rows // side) * -(-weight.shape[-2] // side)
    return products * depth * -(-squares // _multiprocessors(x.device))


@functools.cache
def fused_up_to(device: torch.device) -> dict[torch.dtype, int]:
    """Steps, by dtype, up to which one kernel of ours is to run on ``device``."""
    try:
        known = json.loads(cache_file().read_text())[_name(device)]
        return {dtype: int(known[str(dtype).removeprefix("torch.")]) for dtype in BUILT_IN}
    except (OSError, ValueError, KeyError, TypeError):
        return BUILT_IN


def autotune(
    device: torch.device | str = "cuda",
    *,
    seconds: float = 0.02,
    save: bool = True,
) -> dict[torch.dtype, int]:
    """Measure up to which size one fused kernel is faster, use that from now on, and keep it.

    Args:
        device: The GPU.
        seconds: Of measuring, a size and way.
        save: Write the result where later programs find it, see :func:`cache_file`.

    Returns:
        Steps (see :func:`steps`), by dtype.

    Raises:
        ValueError: ``device`` has no kernels of the kind that is tuned here.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if not _backend.on_device(torch.empty(0, device=device)):
        raise ValueError(
            f"autotune: device is {device}; allowed: a GPU that kernels were built for"
        )
    found = {}
    for dtype in BUILT_IN:
        found[dtype] = _crossing(device, dtype, seconds)
    fused_up_to.cache_clear()
    if save:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        known[_name(device)] = {str(d).removeprefix("torch."): n for d, n in found.items()}
        path.write_text(json.dumps(known, indent=2))
    return found


def _crossing(device, dtype, seconds) -> int:
    """The number of steps up to which ours was faster throughout."""
    from .kernels import _gemm, linear_act_dropout

    before, best = _gemm.CHOICE, 0
    try:
        side = _ACROSS * _side(dtype)
        bias = torch.randn(side, device=device).to(dtype)
        for depth in _DEPTHS:
            x, weight = (torch.randn(side, depth, device=device).to(dtype) for _ in range(2))
            took = {}
            for choice in ("own", "torch"):
                _gemm.CHOICE = choice
                timer = Timer(
                    "f(x, w, b)", globals=dict(f=linear_act_dropout, x=x, w=weight, b=bias)
                )
                took[choice] = timer.blocked_autorange(min_run_time=seconds).median
            if took["own"] > took["torch"]:
                break
            best = steps(x, weight)
    finally:
        _gemm.CHOICE = before
    return best
