"""What was built and what runs: `jacobian_ops.build_info()`, `python -m jacobian_ops.info`."""

from __future__ import annotations

import platform

import torch  # before _cpu: both then share the one OpenMP runtime that torch loads

from .. import _backend, _cpu

__all__ = ["__version__", "build_info"]

__version__: str = _cpu.version


def build_info() -> dict[str, object]:
    """Facts about this build and this process.

    Returns:
        A dict of plain values: ``version``; ``compiler`` (its name, version, flags); ``isa``, the
        instruction set in use, and ``available_isas``, those that were built and that this machine
        has (``JACOBIAN_OPS_ISA`` picks one before the import); ``openmp``, the runtime that is
        loaded and its threads; ``threads``, what the next kernel uses (``torch.set_num_threads``);
        ``cuda``, what its kernels were built for and whether they can run here; ``torch``;
        ``python``; ``platform``.
    """
    return {
        "version": __version__,
        "compiler": _cpu.compiler(),
        "isa": _cpu.isa(),
        "available_isas": tuple(_cpu.available_isas()),
        "openmp": _cpu.openmp(),
        "threads": torch.get_num_threads(),
        "cuda": _cuda(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _cuda() -> str:
    """What the CUDA kernels were built for, and why they cannot run here if so."""
    backend = _backend.BACKENDS.get("cuda")
    if backend is None:
        return "not built"
    built = f"built for {', '.join(backend.architectures())} with CUDA {backend.runtime()}"
    reason = backend.unusable()
    return built if reason is None else f"{built}; {reason}"
