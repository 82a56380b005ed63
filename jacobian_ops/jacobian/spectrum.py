"""Singular values, from which come the norm, the condition number and invertibility."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _linalg as linalg
from .operator import DENSE, MAX_BYTES, Operator


def svdvals(J: Operator, k: int | None = None) -> Tensor:
    """The ``k`` largest singular values, differentiable.

    Read off where the structure shows them (diagonals, permutations, blocks of them), else of the
    dense matrix where that is small or all values are wanted, else by scipy's ``svds`` (Lanczos)
    with our products, and then differentiable once: ``d sigma = u^T dJ v``.

    Args:
        J: A Jacobian.
        k: None for all min(m, n).

    Returns:
        (*batch, k), descending.

    Raises:
        ValueError: ``k`` is not from 1 to min(m, n).
        MemoryError: The dense matrix is needed, and larger than a GiB.
    """
    full = min(J.rows, J.columns)
    k = full if k is None else k
    if not 1 <= k <= full:
        raise ValueError(f"svdvals: k is {k}; allowed: 1 to {full}")
    values = J._singular_values()
    if values is not None:
        return values.sort(-1, descending=True).values[..., :k]
    if full <= DENSE or k > full // 4 or J.batch_shape:
        return linalg.svdvals(J.dense(MAX_BYTES))[..., :k]
    return _svds(J, k)


def _svds(J, k):
    import numpy
    from scipy.sparse.linalg import svds

    start = numpy.random.default_rng(0).standard_normal(min(J.rows, J.columns))
    u, values, vt = svds(J.to_scipy(), k=k, v0=start, tol=torch.finfo(J.dtype).eps ** (2 / 3))
    order = values.argsort()[::-1].copy()
    like = dict(dtype=J.dtype, device=J.device)
    u, v = torch.tensor(u[:, order], **like), torch.tensor(vt[order].T.copy(), **like)
    # The product rather than svds's values, for the graph.
    product = J._apply(v.T.reshape(k, *J.in_shape)).reshape(k, math.prod(J.out_shape))
    return (u.T * product).sum(-1)
