"""The native modules, and how tensors are described to them.

A backend is a module with the interface of ``csrc/bindings.cpp``.  It takes addresses, sizes and
strides; every description carries the extent of its memory, so that native code can check again.
Callers keep the tensors alive until the kernel has returned.
"""

from __future__ import annotations

import os

import torch  # before _cpu: both then share the one OpenMP runtime that torch loads
from torch import Tensor

from . import _cpu

BACKENDS = {"cpu": _cpu}
DTYPES = {getattr(torch, name): code for name, code in _cpu.dtypes().items()}
ACTIVATION_CODES = _cpu.activations()
AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def of(op: str, argument: str, t: Tensor):
    """The backend of the device of ``t``; a device that nothing was built for raises."""
    if t.is_cpu:
        return _cpu
    backend = BACKENDS.get(t.device.type)
    if backend is None:
        raise NotImplementedError(
            f"{op}: {argument} is on device {t.device}; this build of jacobian_ops has kernels for "
            f"{', '.join(BACKENDS)}"
        )
    return backend


def buffer(t: Tensor):
    """A dense tensor as (address, elements, dtype code)."""
    return t.data_ptr(), t.numel(), DTYPES[t.dtype]


def matrix(t: Tensor):
    """A tensor (rows, cols) or (batch, rows, cols) of any strides, with its reachable extent."""
    if t.dim() == 2:
        batch, batch_stride = 1, 0
        (rows, cols), (row_stride, col_stride) = t.shape, t.stride()
    else:
        (batch, rows, cols), (batch_stride, row_stride, col_stride) = t.shape, t.stride()
    extent = 0
    if batch and rows and cols:
        last = (batch - 1) * batch_stride + (rows - 1) * row_stride + (cols - 1) * col_stride
        extent = 1 + last
    strides = batch_stride, row_stride, col_stride
    return t.data_ptr(), extent, DTYPES[t.dtype], batch, rows, cols, *strides


def mask(seed: Tensor | None, p: float):
    """A dropout mask as (p, address of the seeds, number of seeds), one seed a sample."""
    return None if seed is None else (p, seed.data_ptr(), seed.numel())


_forked = False


def threads() -> int:
    """Threads for the next kernel: torch's setting, but one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def _after_fork():
    # GNU OpenMP's pool does not survive fork: the child would wait forever at its first region of
    # several threads, be it ours or one of a native op beside ours.
    global _forked
    _forked = True
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
