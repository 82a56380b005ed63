"""Checks, layouts and outputs that all kernels share."""

from __future__ import annotations

import math
import warnings
from functools import wraps

import numpy as np
import torch
from torch import Tensor

from .. import _backend

ALLOWED_DTYPES = "float64, float32, bfloat16 or float16"


def name_of(dtype: torch.dtype) -> str:
    """``float32`` rather than ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def check_tensor(op: str, argument: str, t: Tensor) -> None:
    """Raise unless ``t`` is a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {argument} must be Tensor, not {type(t).__name__}")


def check_dtype(op: str, argument: str, t: Tensor) -> None:
    """Raise unless ``t`` is a tensor, of a dtype that there are kernels for."""
    check_tensor(op, argument, t)
    if t.dtype not in _backend.DTYPES:
        raise NotImplementedError(
            f"{op}: {argument} has dtype {name_of(t.dtype)}; allowed: {ALLOWED_DTYPES}"
        )


def check_same(op: str, first: str, x: Tensor, argument: str, t: Tensor) -> None:
    """Raise unless ``t`` is a tensor of the dtype and device of ``x``."""
    check_tensor(op, argument, t)
    if t.dtype is x.dtype and t.is_cpu and x.is_cpu:
        return
    if t.dtype != x.dtype:
        raise RuntimeError(
            f"{op}: {argument} has dtype {name_of(t.dtype)}, {first} has {name_of(x.dtype)}; "
            "they must be the same"
        )
    if t.device != x.device:
        raise RuntimeError(
            f"{op}: {argument} is on {t.device}, {first} is on {x.device}; they must be the same"
        )


def check_p(op: str, p: float) -> None:
    """Raise unless ``p`` is a probability."""
    try:
        allowed = 0.0 <= p <= 1.0
    except TypeError:
        kind = type(p).__name__
        raise TypeError(f"{op}: p, the dropout probability, must be Number, not {kind}") from None
    if not allowed:
        raise ValueError(
            f"{op}: p, the dropout probability, has to be between 0 and 1, but got {p}"
        )


def check_operands(op: str, names: tuple[str, ...], tensors) -> None:
    """Raise unless the tensors have one shape, dtype and device; None is one that is absent."""
    x = tensors[0]
    ready = isinstance(x, Tensor) and x.dtype in _backend.DTYPES
    for t in tensors[1:] if ready else ():
        if t is not None and not (
            t.dtype is x.dtype
            and t.shape == x.shape
            and (t.is_cpu and x.is_cpu or t.device == x.device)
        ):
            ready = False
            break
    if not ready:
        _raise_mismatch(op, names, tensors)


def operands(op: str, names: tuple[str, ...], tensors, row_major: bool = False):
    """Checked tensors of one shape in one dense layout.  None stays None.

    The layout is that of ``torch.empty_like(first)``: the first tensor's own where it is dense.
    With ``row_major`` it is the logical order, for kernels that count elements.
    """
    check_operands(op, names, tensors)
    for t in tensors:
        if t is not None and (not t.is_contiguous() or t.is_neg()):
            return _align(tensors, row_major)
    return tensors


def _raise_mismatch(op, names, tensors):
    """Say which tensor does not fit, and why."""
    x = tensors[0]
    check_dtype(op, names[0], x)
    for name, t in zip(names[1:], tensors[1:], strict=True):
        if t is not None:
            check_same(op, names[0], x, name, t)
            if t.shape != x.shape:
                raise RuntimeError(
                    f"{op}: {name} has shape {list(t.shape)}, {names[0]} has shape "
                    f"{list(x.shape)}; they must be the same"
                )


def _align(tensors, row_major):
    """The tensors in one dense layout."""
    tensors = [None if t is None else t.resolve_neg() for t in tensors]
    if row_major:
        return [None if t is None else t.contiguous() for t in tensors]
    layout = result_like(tensors[0])
    return [
        t if t is None or t.stride() == layout.stride() else result_like(layout).copy_(t)
        for t in tensors
    ]


def result_like(x: Tensor, row_major: bool = False) -> Tensor:
    """A new tensor for a result of the shape of ``x``: its layout, or the logical order.

    Kernels and the fake rules of torch.compile share it, so that strides agree.
    """
    if row_major:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x)


def linear_result(x: Tensor, weight: Tensor) -> Tensor:
    """A new tensor for ``x W^T``."""
    return x.new_empty((*x.shape[:-1], weight.shape[-2]))


def output(op: str, out: Tensor | None, like: Tensor) -> Tensor:
    """``out`` if the caller brings it, else a new tensor; laid out as ``like``, which is dense."""
    if out is None:
        return result_like(like)
    check_same(op, "the result", like, "out", out)
    if out.shape != like.shape or out.stride() != like.stride():
        raise RuntimeError(
            f"{op}: out has shape {list(out.shape)} and strides {out.stride()}; the result has "
            f"shape {list(like.shape)} and strides {like.stride()}"
        )
    # The kernel writes through an address, which autograd cannot see.
    torch.autograd.graph.increment_version(out)
    return out


def check_seed(op: str, seed: Tensor, x: Tensor) -> Tensor:
    """A contiguous seed tensor, one for each sample in the leading dimensions of ``x``."""
    if seed.dtype != torch.int64:
        raise RuntimeError(f"{op}: seed has dtype {name_of(seed.dtype)}; it must be int64")
    if seed.device != x.device:
        raise RuntimeError(f"{op}: seed is on {seed.device}, the input is on {x.device}")
    if seed.shape != x.shape[: seed.dim()]:
        raise RuntimeError(
            f"{op}: seed has shape {list(seed.shape)}; it must be a leading part of the input's "
            f"shape, {list(x.shape)}"
        )
    return seed.contiguous()


def seed_tensor(op: str, seed: int | Tensor | None, p: float, x: Tensor) -> Tensor | None:
    """``seed`` as an int64 tensor on the device of ``x``, None where nothing is dropped.

    An int is taken modulo 2**64.
    """
    check_p(op, p)
    if seed is None and p != 0.0:
        raise TypeError(f"{op}: seed is None and p is {p}; dropout needs an int or int64 tensor")
    if seed is None or isinstance(seed, Tensor):
        return seed
    seed = (int(seed) + 2**63) % 2**64 - 2**63
    # Not torch.tensor, which waits for a GPU and cannot be captured in a CUDA graph.
    return torch.full((), seed, dtype=torch.int64, device=x.device)


def normalize_dim(op: str, dim: int, ndim: int) -> int:
    """``dim`` counted from the front; a tensor without dimensions counts as one of size 1."""
    n = max(ndim, 1)
    if not isinstance(dim, (int, torch.SymInt)):
        raise TypeError(f"{op}: dim must be int, not {type(dim).__name__}")
    if not -n <= dim < n:
        raise IndexError(
            f"{op}: dim is {dim}; Dimension out of range (expected to be in range of "
            f"[{-n}, {n - 1}], but got {dim})"
        )
    return dim % n


def rows(shape: torch.Size, dim: int, scale: float = 1.0):
    """A row-major tensor seen as (outer, n, inner) with ``dim`` in the middle."""
    shape = shape or (1,)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :]), scale


def arrays_too(kernel):
    """Let ``kernel`` take numpy arrays, without a copy, and then return arrays."""

    @wraps(kernel)
    def call(*args, **kwargs):
        if args and isinstance(args[0], Tensor):
            return kernel(*args, **kwargs)
        if not any(isinstance(a, np.ndarray) for a in _flat((*args, *kwargs.values()))):
            return kernel(*args, **kwargs)
        for a in _flat(kwargs.get("out")):
            if isinstance(a, np.ndarray) and not a.flags.writeable:
                raise ValueError(f"{kernel.__name__}: out is a read-only array")
        result = kernel(*map(_from_array, args), **{k: _from_array(v) for k, v in kwargs.items()})
        if isinstance(result, tuple):
            return tuple(None if r is None else r.numpy() for r in result)
        return result.numpy()

    return call


def _flat(a):
    """The items of a tuple, and of the tuples in it."""
    return [b for item in a for b in _flat(item)] if isinstance(a, tuple) else [a]


def _from_array(a):
    if isinstance(a, tuple):
        return tuple(map(_from_array, a))
    if not isinstance(a, np.ndarray):
        return a
    with warnings.catch_warnings():  # a read-only array is only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(a)
