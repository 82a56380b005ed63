"""Keep the host memory that the C library would give back to the system after every large tensor.

With glibc's defaults every block above 32 MiB is a mapping of its own: each new tensor of that size
is mapped, zeroed and faulted in page by page, and unmapped when it dies, which costs several times
the arithmetic of a memory-bound op.  That holds for all of PyTorch on a CPU, not for this package
alone, and so does the cure.
"""

from __future__ import annotations

import os

from . import _cpu

__all__ = ["release_host_memory", "retain_host_memory"]


def retain_host_memory() -> dict[str, int]:
    """Let this process keep freed host memory for its next tensors.

    The cost: the resident memory of the process stays at its peak.  The setting holds for every
    allocation of the process through malloc, native ops and numpy included, from now on.  The
    environment variable ``JACOBIAN_OPS_RETAIN_HOST_MEMORY=1`` does the same at import.

    Returns:
        What was set, by name in mallopt(3).  Empty where nothing was: on a system whose C library
        is not glibc (musl, macOS), or behind another allocator (jemalloc, tcmalloc).
    """
    return dict(_cpu.retain_host_memory())


def release_host_memory() -> dict[str, int]:
    """Undo :func:`retain_host_memory`, and give memory that is free now back to the system.

    Blocks that the heap holds free are still used before new ones are mapped.

    Returns:
        What was set, by name in mallopt(3): glibc's defaults, with the thresholds where its own
        adaptation to large blocks ends.  Empty where nothing was.
    """
    return dict(_cpu.release_host_memory())


def _retain_if_asked() -> None:
    asked = os.environ.get("JACOBIAN_OPS_RETAIN_HOST_MEMORY", "")
    if asked not in ("", "0", "1"):
        raise ImportError(f"JACOBIAN_OPS_RETAIN_HOST_MEMORY: allowed 0 or 1, got {asked!r}")
    if asked == "1":
        retain_host_memory()


_retain_if_asked()
