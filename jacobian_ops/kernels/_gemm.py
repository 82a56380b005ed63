"""Whose matrix product a plain linear map runs: ours, or the one of the library in torch.

On Intel processors torch's MKL and oneDNN reach most of the peak in many shapes; elsewhere, and
where activation, dropout or both tangents are fused into the product, ours is the faster one.  The
classes below are measured ones (docs/performance.md).
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _cpu

CHOICES = ("auto", "own", "torch")
# "own" has the same bits for any number of threads; MKL does not promise that.
CHOICE = os.environ.get("JACOBIAN_OPS_GEMM", "auto")
if CHOICE not in CHOICES:
    raise ImportError(f"JACOBIAN_OPS_GEMM: allowed {', '.join(CHOICES)}, got {CHOICE!r}")

_MEASURED = _cpu.processor() == "intel" and torch.backends.mkl.is_available()
_WIDE = (torch.float32, torch.float64)
# In 16 bits ours is ahead up to this size, oneDNN's kernels beyond it and for a thin matrix.
_SMALL = {torch.bfloat16: 1024, torch.float16: 256}
_THIN = 64


def _ours_in_16_bits(dtype: torch.dtype, *sizes: int) -> bool:
    return min(sizes) >= _THIN and max(sizes) <= _SMALL[dtype]


def _torch_serves(*matrices: Tensor | None) -> bool:
    """Whether torch's product takes these matrices at all, and may be chosen."""
    if CHOICE == "own" or (CHOICE == "auto" and not _MEASURED):
        return False
    return all(
        a is None or (a.dim() == 2 and a.numel() > 0 and a.is_cpu and not a.is_neg())
        for a in matrices
    )


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
    return not _ours_in_16_bits(x.dtype, m, k, n)


def torch_is_faster_for_gx(gy: Tensor, weight: Tensor) -> bool:
    """For ``gy W``."""
    if not _torch_serves(gy, weight):
        return False
    (m, n), k = gy.shape, weight.shape[1]
    return CHOICE == "torch" or gy.dtype in _WIDE or not _ours_in_16_bits(gy.dtype, m, n, k)


def torch_is_faster_for_gweight(gy: Tensor, x: Tensor) -> bool:
    """For ``gy^T x``: a sum over few rows is a large result that ours writes past the caches."""
    if not _torch_serves(gy, x):
        return False
    (m, n), k = gy.shape, x.shape[1]
    if CHOICE == "torch":
        return True
    if gy.dtype in _WIDE:
        return not (m <= 128 and n * k >= 1 << 23)
    return not _ours_in_16_bits(gy.dtype, m, n, k)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Torch's ``a b``, unseen by autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return torch.mm(a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's ``x W^T + b``, unseen by autograd: in 16 bits the bias joins before the rounding."""
    with torch._C._AutoDispatchBelowAutograd():
        return F.linear(x, weight, bias)


def tangent(
    x: Tensor,
    weight: Tensor,
    tx: Tensor | None,
    tweight: Tensor | None,
    tbias: Tensor | None,
) -> Tensor:
    """Torch's ``tx W^T + x tW^T + tb`` as one product, so that it is rounded once."""
    if tx is not None and tweight is not None:
        return linear(torch.cat((tx, x), 1), torch.cat((weight, tweight), 1), tbias)
    if tx is not None:
        return linear(tx, weight, tbias)
    if tweight is not None:
        return linear(x, tweight, tbias)
    zero = x.new_zeros(x.shape[0], weight.shape[0])
    return zero if tbias is None else zero.add_(tbias)
