"""``log det(I + J)`` for ``||J|| < 1`` where the matrix would be too large."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .operator import Operator, flat


class LogDetEstimate(NamedTuple):
    """A stochastic estimate with what is known of its error.

    Attributes:
        value: The mean of the probes, (*batch).
        standard_error: Of that mean, (*batch).
        truncation: What the terms left out come to at most, (*batch).
    """

    value: Tensor
    standard_error: Tensor
    truncation: Tensor


def logdet_series(
    J: Operator, terms: int = 20, probes: int = 64, generator: torch.Generator | None = None
) -> LogDetEstimate:
    """``log det(I + J) = sum_k (-1)^(k+1) tr(J^k) / k``, the traces by Hutchinson's estimator.

    ``tr(A) = E[v^T A v]`` for random signs ``v``, so that all costs ``terms`` JVPs of ``probes``
    columns.  For a residual block ``x + g(x)``, give the Jacobian of ``g``.  Behrmann et al.,
    "Invertible residual networks", arXiv:1811.00995.  The terms left out come to at most
    ``n ||J||^(K+1) / ((K+1) (1 - ||J||))``.

    Args:
        J: Square, of a spectral norm below 1.
        terms: K, how many of the series are summed.
        probes: Random vectors, of which the standard error is estimated: at least 2.
        generator: Where they come from; None is torch's default generator.

    Returns:
        Value, standard error and bound of the truncation; the value is differentiable.

    Raises:
        ValueError: ``J`` is not square or its norm is not below 1, ``terms`` is below 1, or
            ``probes`` below 2.
    """
    J._square("logdet_series")
    if terms < 1 or probes < 2:
        raise ValueError(
            f"logdet_series: terms is {terms} and probes is {probes}; allowed: at least 1 and 2"
        )
    with torch.no_grad():
        norm = J.norm()
    if not (norm < 1).all():
        raise ValueError(
            f"logdet_series: the Jacobian's norm is {norm.max().item():.4g}; allowed: below 1"
        )
    shape = probes, *J.batch_shape, *J.in_shape
    bits = torch.randint(2, shape, generator=generator, device=J.device)
    v = (2 * bits - 1).to(J.dtype)
    power, total = v, 0.0
    for k in range(1, terms + 1):
        power = J._apply(power).reshape(shape)
        trace = flat(v * power, 1 + len(J.batch_shape)).sum(-1)
        total = total + (-1) ** (k + 1) / k * trace
    truncation = J.rows * norm ** (terms + 1) / ((terms + 1) * (1 - norm))
    return LogDetEstimate(total.mean(0), total.detach().std(0) / probes**0.5, truncation)
