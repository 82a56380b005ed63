"""Which products a kernel of ours computes on a GPU, and which cuBLASLt does: measured on yours.

``linear_act_dropout`` and its JVP run as one kernel of ours where that is faster than a product by
cuBLASLt with activation and dropout after it ("fused"), and so does its VJP ("vjp"); the products
of ``linear``, its VJP and its JVP where ours is faster than cuBLASLt's alone ("plain").  The sizes
built in are estimates; :func:`autotune` replaces them by measured ones and remembers these for the
GPU.
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

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Steps (see :func:`steps`), by kind and dtype, up to which a kernel of ours runs.  Not measured: in
# about this many a multiprocessor spends what the two launches of a fused product cost; a VJP saves
# three, but makes the cotangent anew in every square; a plain product saves no launch.
BUILT_IN = {
    "fused": dict(zip(DTYPES, (512, 256, 1024, 1024), strict=True)),
    "vjp": dict(zip(DTYPES, (512, 256, 1024, 1024), strict=True)),
    "plain": dict.fromkeys(DTYPES, 0),
}
_DEPTHS = tuple(1 << i for i in range(5, 14))  # that are timed
_ACROSS = 8  # squares of results in each direction, while they are


def cache_file() -> Path:
    """Where measured sizes are kept: in ``JACOBIAN_OPS_CACHE``, else in the user's cache."""
    folder = os.environ.get("JACOBIAN_OPS_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "jacobian_ops") / "products.json"


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


_measured: dict[torch.device, dict] = {}  # by this process


@functools.cache
def limits(device: torch.device) -> dict[str, dict[torch.dtype, int]]:
    """Steps, by kind and dtype, up to which a kernel of ours is to run on ``device``."""
    if device in _measured:
        return _measured[device]
    try:
        known = json.loads(cache_file().read_text())[_name(device)]
        return {kind: {d: int(known[kind][_short(d)]) for d in DTYPES} for kind in BUILT_IN}
    except (OSError, ValueError, KeyError, TypeError):
        return BUILT_IN


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autotune(
    device: torch.device | str = "cuda",
    *,
    seconds: float = 0.02,
    save: bool = True,
) -> dict[str, dict[torch.dtype, int]]:
    """Measure up to which size a kernel of ours is faster, and use that from now on.

    Args:
        device: The GPU.
        seconds: Of measuring, a size and way.
        save: Write the result where later programs find it, see :func:`cache_file`.

    Returns:
        Steps (see :func:`steps`), by kind ("fused", "vjp" and "plain") and dtype.

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
    found = {
        kind: {dtype: _crossing(kind, device, dtype, seconds) for dtype in DTYPES}
        for kind in BUILT_IN
    }
    _measured[device] = found
    limits.cache_clear()
    if save:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        known[_name(device)] = {
            kind: {_short(d): n for d, n in steps_of.items()} for kind, steps_of in found.items()
        }
        path.write_text(json.dumps(known, indent=2))
    return found


def _crossing(kind, device, dtype, seconds) -> int:
    """The number of steps up to which ours was faster throughout."""
    from .kernels import _gemm

    before, best = _gemm.CHOICE, 0
    try:
        for depth in _DEPTHS:
            call, size = _example(kind, device, dtype, depth)
            took = {}
            for choice in ("own", "torch"):
                _gemm.CHOICE = choice
                timer = Timer("call()", globals=dict(call=call))
                took[choice] = timer.blocked_autorange(min_run_time=seconds).median
            if took["own"] > took["torch"]:
                break
            best = size
    finally:
        _gemm.CHOICE = before
    return best


def _example(kind, device, dtype, depth):
    """A call of this kind with inner dimensions of ``depth``, and its steps."""
    from . import kernels

    def made(*shape):
        return torch.randn(shape, device=device).to(dtype)

    side = _ACROSS * _side(dtype)
    if kind == "vjp":
        x, weight, gy, z = (made(depth, n) for n in (side, side, depth, depth))
        size = steps(gy, weight.mT) + steps(gy.mT, x.mT)
        return lambda: kernels.linear_act_dropout_vjp(x, weight, z, gy), size
    x, weight, bias = made(side, depth), made(side, depth), made(side)
    product = kernels.linear if kind == "plain" else kernels.linear_act_dropout
    return lambda: product(x, weight, bias), steps(x, weight)
