"""Traces of Jacobians from products with random vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Estimate", "divergence", "trace"]

_DISTRIBUTIONS = ("rademacher", "normal")


class Estimate(NamedTuple):
    """A mean over independent samples.

    Attributes:
        value: The mean.
        standard_error: The samples' standard deviation over the root of their number.
    """

    value: Tensor
    standard_error: Tensor


def trace(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    samples: int = 32,
    distribution: str = "rademacher",
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate tr J, the trace of the Jacobian of f at x, from JVPs with random vectors.

    tr J = E[w^T J w] where E[w w^T] = I (Hutchinson 1990).  For signs ("rademacher") the variance
    of a sample is 2 sum_{i != j} S_ij^2, where S is the symmetric part of J: none if S is diagonal.
    For normal w it is 2 |S|_F^2.

    Args:
        f: A function from x's shape to the same shape.  It is called under torch.func.vmap and
            torch.func.jvp; dropout in it has one mask for all samples.
        x: Where, floating point, of any shape.
        samples: How many JVPs, at least 2.
        distribution: "rademacher" or "normal".
        generator: Of the random vectors, instead of torch's own.

    Returns:
        An :class:`Estimate` of two scalars, which has derivatives by all that f depends on.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: f(x) has another shape, ``samples`` is below 2, or the distribution is unknown.
    """
    products = _quadratic_forms("trace", f, x, samples, distribution, generator)
    return _estimate(products.flatten(1).sum(1))


def divergence(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    samples: int = 1,
    distribution: str = "rademacher",
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate div f = tr J of a vector field at every sample of a batch.

    What a continuous normalizing flow integrates: d log p(x(t)) / dt = -div f (Chen et al. 2018,
    arXiv:1806.07366; estimated, Grathwohl et al. 2019, arXiv:1810.01367).

    Args:
        f: A vector field from (batch, *shape) to the same that treats every sample on its own;
            otherwise as in :func:`trace`.
        x: Where, (batch, *shape), floating point.
        samples: How many JVPs, for all of the batch at once; one alone has NaN as its error.
        distribution: As in :func:`trace`.
        generator: As in :func:`trace`.

    Returns:
        An :class:`Estimate` of two tensors of shape (batch,).

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: As in :func:`trace`, ``samples`` is below 1, or x has no dimension of a batch.
    """
    if isinstance(x, Tensor) and x.dim() < 1:
        raise ValueError("divergence: x has no dimensions; allowed: (batch, *shape)")
    products = _quadratic_forms("divergence", f, x, samples, distribution, generator, least=1)
    return _estimate(products.flatten(2).sum(2) if x.dim() > 1 else products)


def _quadratic_forms(op, f, x, samples, distribution, generator, least=2):
    """``w * (J w)`` for every random w, (samples, *x.shape)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: x must be a floating-point tensor, got {given}")
    if samples < least:
        raise ValueError(f"{op}: samples is {samples}; it must be at least {least}")
    if distribution not in _DISTRIBUTIONS:
        raise ValueError(
            f"{op}: distribution is {distribution!r}; allowed: {', '.join(_DISTRIBUTIONS)}"
        )
    w = torch.randn(samples, *x.shape, dtype=x.dtype, device=x.device, generator=generator)
    if distribution == "rademacher":
        w = torch.where(w < 0, -1.0, 1.0).to(x.dtype)

    def product(w):
        y, jw = torch.func.jvp(f, (x,), (w,))
        if y.shape != x.shape:
            raise ValueError(
                f"{op}: f(x) has shape {list(y.shape)}, x has {list(x.shape)}; they must be equal"
            )
        return w * jw

    return torch.func.vmap(product, randomness="same")(w)


def _estimate(values):
    """Mean over the first dimension, and its standard error."""
    samples = len(values)
    unknown = torch.full_like(values[0], torch.nan)
    standard_error = values.std(0) / samples**0.5 if samples > 1 else unknown
    return Estimate(values.mean(0), standard_error)
