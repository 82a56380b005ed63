"""Whose matrix product a plain linear map runs: ours, or the one of the library in torch.

On Intel processors torch's MKL and oneDNN reach most of the peak in many shapes; elsewhere, and
where activation, dropout or both tangents are fused into the product, ours is the faster one.  The
classes below are measured ones (docs/performance.md).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import _cpu

CHOICES = ("auto", "own", "torch")
# "own" has the same bits for any number of threads; MKL does not promise that.
CHOICE = os.environ.get("JACOBIAN_OPS_GEMM", "auto")
if CHOICE not in CHOICES:
    raise ImportError(f"JACOBIAN_OPS_GEMM: allowed {', '.join(CHOICES)}, got {CHOICE!r}")

_MEASURED = _cpu.processor() == "intel" and torch.backends.mkl.is_available()
_WIDE = (torch.float32, torch.float64)
# Multiply-adds above which oneDNN's kernels for 16 bits overtake ours.
_LARGE = {torch.bfloat16: 1 << 30, torch.float16: 1 << 24}


def _torch_serves(*matrices: Tensor | None) -> bool:
    """Whether torch's product takes these matrices at all, and may be chosen."""
    if CHOICE == "own" or (CHOICE == "auto" and not _MEASURED):
        return False
    return all(a is None or (a.dim() == 2 and a.is_cpu and not a.is_neg()) for a in matrices)


def torch_is_faster(x: Tensor, weight: Tensor, *tangents: Tensor | None) -> bool:
    """For ``x W^T``: whether torch's product is to run."""
    if not _torch_serves(x, weight, *tangents):
        return False
    (m, k), n = x.shape, weight.shape[0]
    if CHOICE == "torch":
        return True
    if x.dtype is torch.float32:
        return not (k <= 256 and m >= 4096 or 2 <= m <= 16 and k >= 1024)
    if x.dtype is torch.float64:
        return not (k <= 256 and m >= 4096 or 2 <= m <= 8 and k >= 1024)
    return m * k * n > _LARGE[x.dtype] or min(m, k, n) < 64


def torch_is_faster_for_gx(gy: Tensor, weight: Tensor) -> bool:
    """For ``gy W``."""
    if not _torch_serves(gy, weight):
        return False
    (m, n), k = gy.shape, weight.shape[1]
    if CHOICE == "torch" or gy.dtype in _WIDE:
        return True
    return m * n * k > _LARGE[gy.dtype] or min(m, n, k) < 128


def torch_is_faster_for_gweight(gy: Tensor, x: Tensor) -> bool:
    """For ``gy^T x``: a sum over few rows is a large result that ours writes past the caches."""
    if not _torch_serves(gy, x):
        return False
    (m, n), k = gy.shape, x.shape[1]
    if CHOICE == "torch":
        return True
    if gy.dtype in _WIDE:
        return not (m <= 128 and n * k >= 1 << 23)
    return m * n * k > _LARGE[gy.dtype] or min(m, n, k) < 128


def product(x: Tensor, weight_t: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Torch's ``x weight_t + bias`` into ``out``, unseen by autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        if bias is None:
            return torch.mm(x, weight_t, out=out)
        return torch.addmm(bias, x, weight_t, out=out)
