"""Whose matrix product a linear map runs: ours, or the one of the library in torch.

With AMX, on Intel processors, MKL and oneDNN reach most of the peak in many shapes, and oneDNN does
in bfloat16 on AMD's with AVX512-BF16.  On other processors, and where activation and dropout are
fused into the product, ours runs.  The classes below are measured ones (docs/performance.md).

On a GPU cuBLASLt does large products; activation and dropout then follow in one more kernel.  Where
the launches and the passes over memory cost more than the arithmetic, one kernel of ours does
everything.  A table says where, which can be measured anew (jacobian_ops/tuning.py).
"""

from __future__ import annotations

import contextlib
import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, _cpu, tuning

CHOICES = ("auto", "own", "torch")
# "own" has the same bits for any number of threads; MKL does not promise that.
CHOICE = os.environ.get("JACOBIAN_OPS_GEMM", "auto")
if CHOICE not in CHOICES:
    raise ImportError(f"JACOBIAN_OPS_GEMM: allowed {', '.join(CHOICES)}, got {CHOICE!r}")


def _library() -> str | None:
    """The kind of processor on which torch's library was seen to be ahead in some shapes."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return None
    if _cpu.processor() == "intel" and "amx" in _cpu.available_isas():
        return "amx"
    if _cpu.processor() == "amd" and "avx512bf16" in _cpu.available_isas():
        return "avx512bf16"
    return None


_LIBRARY = _library()
_WIDE = (torch.float32, torch.float64)
# In 16 bits ours is ahead up to this size, oneDNN's kernels beyond it and for a thin matrix.
_SMALL = {torch.bfloat16: 1024, torch.float16: 256}
_THIN = 64
# Rows up to which ours reads weights in place.
_IN_PLACE = 16
# Rows from which two products of 16 bits are joined into one.
_JOINED = 1024


def _ours_in_16_bits(dtype: torch.dtype, *sizes: int) -> bool:
    return min(sizes) >= _THIN and max(sizes) <= _SMALL[dtype]


# On a GPU, rows up to which x and its tangent are joined for one product: W is then read once, and
# that is most of the traffic.
_FEW_ROWS = 128


def _long_in_bf16(dtype: torch.dtype, m: int) -> bool:
    """Where oneDNN is not behind without AMX."""
    return dtype is torch.bfloat16 and m > _IN_PLACE


# Whether torch's library is ahead where it may be chosen, for m rows of K numbers that become N.


def _ahead(dtype: torch.dtype, m: int, k: int, n: int, wide: bool) -> bool:
    """``wide`` says it for 32 bits and more."""
    if CHOICE == "torch":
        return True
    if _LIBRARY == "avx512bf16":
        return _long_in_bf16(dtype, m)
    return wide if dtype in _WIDE else not _ours_in_16_bits(dtype, m, k, n)


def _ahead_for_y(dtype: torch.dtype, m: int, k: int, n: int) -> bool:
    few = 16 if dtype is torch.float32 else 8
    return _ahead(dtype, m, k, n, not (k <= 256 and m >= 4096 or 2 <= m <= few and k >= 1024))


def _ahead_for_gx(dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    return _ahead(dtype, m, k, n, True)


def _ahead_for_gweight(dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    return _ahead(dtype, m, k, n, not (m <= 128 and n * k >= 1 << 23))


def torch_is_faster_at_all(x: Tensor, weight: Tensor, recording: bool) -> bool:
    """For ``x W^T`` on the CPU, and both products of its VJP if ``recording``; x is (*, K)."""
    if _backend.on_device(x) or not (x.numel() and _torch_serves(weight)):
        return False
    n, k = weight.shape
    return _ahead_at_all((CHOICE, _LIBRARY), x.dtype, x.numel() // k, k, n, recording)


@functools.lru_cache(maxsize=1024)
def _ahead_at_all(setting, dtype: torch.dtype, m: int, k: int, n: int, recording: bool) -> bool:
    return _ahead_for_y(dtype, m, k, n) and (
        not recording or (_ahead_for_gx(dtype, m, n, k) and _ahead_for_gweight(dtype, m, n, k))
    )


def torch_is_faster_for_attention(q: Tensor) -> bool:
    """For attention's products in its forward pass."""
    if q.dtype is not torch.bfloat16 or not q.is_cpu or _backend.on_device(q):
        return False
    return CHOICE == "torch" or (CHOICE == "auto" and _LIBRARY == "amx")


def _torch_serves(*matrices: Tensor | None) -> bool:
    """Whether torch's product takes these matrices at all, and may be chosen."""
    if CHOICE == "own":
        return False
    if _backend.on_device(matrices[0]):
        return all(a is None or (a.numel() > 0 and not a.is_neg()) for a in matrices)
    if CHOICE == "auto" and _LIBRARY is None:
        return False
    return all(
        a is None or (a.dim() == 2 and a.numel() > 0 and a.is_cpu and not a.is_neg())
        for a in matrices
    )


def _on_device(kind: str, x: Tensor, weight: Tensor, products: int = 1) -> bool:
    """For a product on a GPU: whether torch's is to run; ``kind`` as in tuning.py."""
    most = tuning.limits(x.device)[kind][x.dtype]
    return CHOICE == "torch" or tuning.steps(x, weight, products) > most


def torch_is_faster_unfused(
    x: Tensor, weight: Tensor, tx: Tensor | None = None, tweight: Tensor | None = None
) -> bool:
    """For ``m * f(x W^T + b)`` or its JVP: whether torch's product is to run, and f after it."""
    if not (_torch_serves(x, weight, tx, tweight) and _backend.on_device(x)):
        return False
    return _on_device("fused", x, weight, 1 + (tx is not None) + (tweight is not None))


def torch_is_faster(x: Tensor, weight: Tensor, *tangents: Tensor | None) -> bool:
    """For ``x W^T``: whether torch's product is to run."""
    if not _torch_serves(x, weight, *tangents):
        return False
    if _backend.on_device(x):
        return _on_device("plain", x, weight, 1 + sum(t is not None for t in tangents))
    (m, k), n = x.shape, weight.shape[0]
    return _ahead_for_y(x.dtype, m, k, n)


def torch_is_faster_for_gx(gy: Tensor, weight: Tensor) -> bool:
    """For ``gy W``."""
    if not _torch_serves(gy, weight):
        return False
    if _backend.on_device(gy):
        return _on_device("plain", gy, weight.mT)
    (m, n), k = gy.shape, weight.shape[1]
    return _ahead_for_gx(gy.dtype, m, n, k)


def torch_is_faster_for_gweight(gy: Tensor, x: Tensor) -> bool:
    """For ``gy^T x``: a sum over few rows is a large result that ours writes past the caches."""
    if not _torch_serves(gy, x):
        return False
    if _backend.on_device(gy):
        return _on_device("plain", gy.mT, x.mT)
    (m, n), k = gy.shape, x.shape[1]
    return _ahead_for_gweight(gy.dtype, m, n, k)


def torch_is_faster_for_vjp(
    gy: Tensor, weight: Tensor | None, x: Tensor | None, sums: bool
) -> bool:
    """For ``gz W``, ``gz^T x`` and the sums of ``gz = m f'(s) gy``: whether torch's are to run.

    A factor is None where its product is not wanted.
    """
    if weight is None and x is None:
        return True  # no product: only sums, of which a kernel has more blocks than one of products
    if not _backend.on_device(gy):
        return (weight is not None and torch_is_faster_for_gx(gy, weight)) or (
            x is not None and torch_is_faster_for_gweight(gy, x)
        )
    if not _torch_serves(gy, weight, x):
        return False
    steps = 0
    if weight is not None:
        steps += tuning.steps(gy, weight.mT)
    if x is not None or sums:
        steps += tuning.steps(gy.mT, gy.mT[..., :1, :] if x is None else x.mT)
    return CHOICE == "torch" or steps > tuning.limits(gy.device)["vjp"][gy.dtype]


@contextlib.contextmanager
def as_they_are():
    """Neither recorded by autograd nor cast by autocast."""
    C = torch._C
    with C._AutoDispatchBelowAutograd(), C._ExcludeDispatchKeyGuard(_backend.AUTOCAST_KEYS):
        yield


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Torch's ``a b``, unseen by autograd."""
    with as_they_are():
        return torch.matmul(a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's ``x W^T + b``, unseen by autograd: in 16 bits the bias joins before the rounding."""
    if x.dim() > 2:
        return _affine(x, weight, None if bias is None else bias.unsqueeze(-2))
    with as_they_are():
        return F.linear(x, weight, bias)


def _affine(x: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    """Torch's ``x W^T + offset``; the offset broadcasts along rows."""
    with as_they_are():
        if offset is None:
            return torch.matmul(x, weight.mT)
        if x.dim() == 2:
            return torch.addmm(offset, x, weight.mT)
        offset, left, right = (t.flatten(0, -3) for t in (offset, x, weight.mT))
        return torch.baddbmm(offset, left, right).unflatten(0, x.shape[:-2])


def torch_is_faster_for_tangents(x: Tensor, weight: Tensor, *tangents: Tensor | None) -> bool:
    """For the two or three products of a JVP, as :func:`dual` takes them."""
    joined = x.dtype not in _WIDE and all(t is not None for t in tangents)
    if CHOICE == "auto" and not _backend.on_device(x):
        if _LIBRARY == "avx512bf16":
            return False  # ours packs x and W once for all products
        if joined and x.shape[0] < _JOINED:
            return False  # joining the weights costs more than it saves
    return torch_is_faster(x, weight, *tangents)


def dual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tx: Tensor | None,
    tweight: Tensor | None,
    tbias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``x W^T + b`` and its tangent by torch's products."""
    rows = x.shape[-2]
    if tweight is None and tx is not None and _backend.on_device(x) and rows <= _FEW_ROWS:
        offset = None
        if bias is not None or tbias is not None:
            zero = x.new_zeros(weight.shape[:-1])
            lines = (zero if line is None else line for line in (bias, tbias))
            shape = (*x.shape[:-1], weight.shape[-2])
            offset = torch.cat([line.unsqueeze(-2).expand(shape) for line in lines], -2)
        both = _affine(torch.cat((x, tx), -2), weight, offset)
        # Copies: results of an op share no memory.
        y, ty = both.split(rows, -2)
        dense = torch.contiguous_format
        return y.clone(memory_format=dense), ty.clone(memory_format=dense)
    return linear(x, weight, bias), _tangent(x, weight, tx, tweight, tbias)


def _tangent(
    x: Tensor,
    weight: Tensor,
    tx: Tensor | None,
    tweight: Tensor | None,
    tbias: Tensor | None,
) -> Tensor:
    """Torch's ``tx W^T + x tW^T + tb``; in 16 bits as one product, so that it is rounded once."""
    if tx is None and tweight is None:
        zero = x.new_zeros((*x.shape[:-1], weight.shape[-2]))
        return zero if tbias is None else zero.add_(tbias.unsqueeze(-2))
    if tweight is None:
        return linear(tx, weight, tbias)
    if tx is None:
        return linear(x, tweight, tbias)
    if x.dtype not in _WIDE:
        return linear(torch.cat((tx, x), -1), torch.cat((weight, tweight), -1), tbias)
    return _affine(x, tweight, linear(tx, weight, tbias))
