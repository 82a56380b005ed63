"""Which sizes one fused kernel computes on a GPU, and which cuBLASLt does: measured on yours.

``linear_act_dropout`` and its JVP run as one kernel of ours where that is faster than a product by
cuBLASLt with activation and dropout after it.  The sizes built in are estimates; :func:`autotune`
replaces them by measured ones and remembers these for the GPU.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from . import _backend

__all__ = ["autotune"]

# Multiply-adds, by dtype, up to which one kernel of ours does product and epilogue.  Not measured:
# a launch costs some microseconds, in which a GPU does about this many.
BUILT_IN = {
    torch.float32: 1 << 24,
    torch.float64: 1 << 22,
    torch.bfloat16: 1 << 25,
    torch.float16: 1 << 25,
}
_SIDES = tuple(1 << i for i in range(5, 13))  # of cubes that are timed


def cache_file() -> Path:
    """Where measured sizes are kept: in ``JACOBIAN_OPS_CACHE``, else in the user's cache."""
    folder = os.environ.get("JACOBIAN_OPS_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "jacobian_ops") / "fused.json"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def fused_up_to(device: torch.device) -> dict[torch.dtype, int]:
    """Multiply-adds, by dtype, up to which one kernel of ours is to run on ``device``."""
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
        Multiply-adds of a product, by dtype.

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
    """The largest size up to which ours was faster throughout."""
    from .kernels import _gemm, linear_act_dropout

    before, best = _gemm.CHOICE, 0
    try:
        for side in _SIDES:
            x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            bias = torch.randn(side, device=device).to(dtype)
            took = {}
            for choice in ("own", "torch"):
                _gemm.CHOICE = choice
                timer = Timer(
                    "f(x, w, b)", globals=dict(f=linear_act_dropout, x=x, w=weight, b=bias)
                )
                took[choice] = timer.blocked_autorange(min_run_time=seconds).median
            if took["own"] > took["torch"]:
                break
            best = side**3
    finally:
        _gemm.CHOICE = before
    return best
