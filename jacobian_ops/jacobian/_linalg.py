"""torch.linalg's decompositions, in float32 for the dtypes that it has none for."""

from __future__ import annotations

import torch
from torch import Tensor


def _in_wide(function):
    def run(*tensors, **kwargs):
        dtype = tensors[0].dtype
        if dtype.itemsize >= 4:
            return function(*tensors, **kwargs)
        results = function(*(t.float() for t in tensors), **kwargs)
        return results.to(dtype) if isinstance(results, Tensor) else [r.to(dtype) for r in results]

    return run


slogdet = _in_wide(torch.linalg.slogdet)
solve = _in_wide(torch.linalg.solve)
solve_triangular = _in_wide(torch.linalg.solve_triangular)
svdvals = _in_wide(torch.linalg.svdvals)
