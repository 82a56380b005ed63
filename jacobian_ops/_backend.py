"""The native modules, and how tensors are described to them.

A backend is a module with the interface of ``csrc/bindings.cpp``.  It takes addresses, sizes and
strides; every description carries the extent of its memory, so that native code can check again.
Callers keep the tensors alive until the kernel has returned: on a device it may run later, in the
order of the current stream, as torch's allocator expects.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings

import torch  # before _cpu: both then share the one OpenMP runtime that torch loads
from torch import Tensor

from . import _cpu

# By device type.
BACKENDS = {"cpu": _cpu}
if importlib.util.find_spec("jacobian_ops._cuda"):
    from . import _cuda

    BACKENDS["cuda"] = _cuda

DTYPES = {getattr(torch, name): code for name, code in _cpu.dtypes().items()}
ACTIVATION_CODES = _cpu.activations()
AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def of(op: str, argument: str, t: Tensor):
    """The backend of the device of ``t``; a device that nothing was built for raises."""
    backend = BACKENDS.get("cpu" if t.is_cpu else t.device.type)
    if backend is None:
        raise NotImplementedError(
            f"{op}: {argument} is on device {t.device}; this build of jacobian_ops has kernels for "
            f"{', '.join(BACKENDS)}"
        )
    return backend


def usable(op: str, argument: str, t: Tensor) -> bool:
    """Whether kernels run on the device of ``t``; warns once where they were built but cannot."""
    backend = of(op, argument, t)
    if backend.kind == "cpu" or t.is_cpu:
        return True
    if t.device not in _usable:
        with _current(t):
            reason = backend.unusable()
        _usable[t.device] = reason is None
        if reason is not None:
            warnings.warn(f"jacobian_ops: native ops run on {t.device}: {reason}", stacklevel=4)
    return _usable[t.device]


_usable: dict[torch.device, bool] = {}


def run(op: str, argument: str, t: Tensor, kernel: str, *args, sums=None, groups=None) -> None:
    """Run ``kernel`` where ``t``, the op's ``argument``, is.

    Args:
        op: For the message, where there is no backend.
        argument: For the message.
        t: A tensor on the device that is to run.
        kernel: A name of ``csrc/bindings.cpp``.
        args: Its arguments but the last one, which says how to run.
        sums: (outer, n, inner, scale) of a sum over n, for which a device needs memory.
        groups: The same of a norm of groups: its first argument, and how many sums it makes.
    """
    backend = of(op, argument, t)
    if backend.kind == "cpu":
        getattr(backend, kernel)(*args, threads())
        return
    workspace = None
    if sums is not None:
        workspace = t.new_empty(backend.sum_workspace(sums), dtype=torch.uint8)
    elif groups is not None:
        workspace = t.new_empty(backend.group_norm_workspace(*groups), dtype=torch.uint8)
    where = (workspace.data_ptr(), workspace.numel()) if workspace is not None else (0, 0)
    with _current(t):
        stream = torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0
        getattr(backend, kernel)(*args, (stream, *where))


def _current(t: Tensor):
    """Make the device of ``t`` the current one, which kernels are launched on."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()


def on_device(t: Tensor) -> bool:
    """Whether the kernels for ``t`` are those of a GPU."""
    backend = BACKENDS.get("cpu" if t.is_cpu else t.device.type)
    return backend is not None and backend.kind == "cuda"


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


def heads(t: Tensor):
    """A tensor (batch, heads, rows, width) of any strides, with its reachable extent.

    A bool tensor, which masks scores, is bytes.
    """
    sizes, strides = t.shape, t.stride()
    extent = 0
    if t.numel():
        extent = 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    return t.data_ptr(), extent, DTYPES.get(t.dtype, 0), *sizes, *strides


def grid(t: Tensor, sizes, strides):
    """Vectors along the last dimension of ``t``, contiguous, at the points of a grid of 3 sizes."""
    extent = t.shape[-1] + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    return t.data_ptr(), extent, DTYPES[t.dtype], t.shape[-1], *sizes, *strides


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
