"""A picture of what the Jacobian says about a map of the plane: its best linear approximation.

Near x, f(x + h) = f(x) + J h + O(|h|^2).  J takes the circle of radius r to an ellipse whose half
axes are r s_i u_i for the singular value decomposition J = sum_i s_i u_i v_i^T, and areas to
|det J| = s_1 s_2 times as much; det J < 0 turns the plane over.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Okabe and Ito's colours, which the colour-blind tell apart.
_IMAGE, _LINEAR, _AXES, _GRID = "#0072b2", "#d55e00", ("#000000", "#009e73"), "#b8b8b8"
_LINES, _POINTS = 13, 97  # lines of the grid each way, points on a curve


def plot_geometry(f: Callable[[Tensor], Tensor], x: Tensor, *, radius: float = 0.25):
    """Draw a circle around x and the grid, their images under f, and the ellipse that J makes.

    On the left are the circle, the grid and the right singular vectors v_i; on the right their
    images, the ellipse f(x) + J circle, and the half axes radius s_i u_i.  The legend has the
    determinant, the factor of areas, and the singular values s_i.  The smaller the radius, the
    closer ellipse and image.

    Args:
        f: A differentiable map of the plane, from a tensor of shape (2,) to one of shape (2,); an
            nn.Module too.
        x: The point, of shape (2,), floating point.
        radius: Of the circle, in the units of ``x``.

    Returns:
        A matplotlib.figure.Figure, which pyplot does not know of: ``figure.savefig(path)``.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or ``f`` does not return a tensor.
        ValueError: A shape is not (2,), the radius is not a positive number, or f(x), its Jacobian
            or an image is not finite.
        RuntimeError: f(x) does not depend on ``x`` through differentiable operations.
    """
    from matplotlib.figure import Figure

    center, y, J = _linearize(f, x, radius)
    u, s, vT = torch.linalg.svd(J)
    sign = torch.where(vT.sum(1) < 0, -1.0, 1.0).double()  # v_i to the upper right
    u, vT = u * sign, vT * sign[:, None]
    determinant = torch.linalg.det(J).item()

    angle = torch.linspace(0, 2 * math.pi, _POINTS, dtype=torch.float64)
    circle = radius * torch.stack((angle.cos(), angle.sin()), -1)
    grid = _grid(2 * radius)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for line in grid:
        _curve(left, center + line, color=_GRID, linewidth=0.8)
        _curve(right, _images(f, x, center + line), color=_GRID, linewidth=0.8)
    _curve(left, center + circle, color=_IMAGE, linewidth=2, label=f"circle, radius {radius:g}")
    _curve(right, _images(f, x, center + circle), color=_IMAGE, linewidth=2, label="f(circle)")
    ellipse = f"f(x) + J·circle, det J = {_number(determinant)}"
    _curve(right, y + circle @ J.mT, color=_LINEAR, linewidth=2, linestyle="--", label=ellipse)
    for axis, area, color in (
        (left, center + circle, _IMAGE),
        (right, y + circle @ J.mT, _LINEAR),
    ):
        axis.fill(*area.mT.tolist(), color=color, alpha=0.1, linewidth=0)
    for i, color in enumerate(_AXES):
        _arrow(left, center, radius * vT[i], color, f"$v_{i + 1}$")
        label = f"$\\sigma_{i + 1} u_{i + 1}$, $\\sigma_{i + 1}$ = {_number(s[i].item())}"
        _arrow(right, y, radius * s[i] * u[:, i], color, label)
    left.set_title(f"around x = ({_number(center[0].item())}, {_number(center[1].item())})")
    right.set_title(f"around f(x) = ({_number(y[0].item())}, {_number(y[1].item())})")
    for axis, at in ((left, center), (right, y)):
        axis.plot(*at.tolist(), "o", color="black", markersize=4, zorder=6)
        axis.set_aspect("equal", adjustable="datalim")
        axis.spines[["top", "right"]].set_visible(False)
        columns = 3 if axis is left else 2
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=columns, frameon=False)
    return figure


def _linearize(f, x, radius):
    """x, f(x) and the Jacobian in float64 on the CPU, checked."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"plot_geometry: x must be a floating-point tensor, got {given}")
    if x.shape != (2,):
        raise ValueError(f"plot_geometry: x has shape {list(x.shape)}; allowed: [2]")
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"plot_geometry: radius is {radius}; allowed: positive numbers")
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = _call(f, x.clone())  # a clone: f may work in place
        if not y.requires_grad:
            raise RuntimeError(
                "plot_geometry: f(x) does not depend on x through differentiable operations"
            )
        rows = [torch.autograd.grad(y[i], x, retain_graph=i == 0)[0] for i in range(2)]
    parts = tuple(t.detach().double().cpu() for t in (x, y, torch.stack(rows)))
    if not all(t.isfinite().all() for t in parts):
        raise ValueError(f"plot_geometry: x, f(x) and J must be finite, got {parts}")
    return parts


def _call(f, x):
    y = f(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"plot_geometry: f must return a tensor, got {type(y).__name__}")
    if y.shape != (2,):
        raise ValueError(f"plot_geometry: f(x) has shape {list(y.shape)}; allowed: [2]")
    return y


@torch.no_grad()
def _images(f, x, points):
    """Images of (n, 2) points, one by one: f need not know of batches."""
    return torch.stack([_call(f, p) for p in points.to(x)]).double().cpu()


def _grid(reach):
    """Lines at equal distances from -reach to reach in both directions, each (points, 2)."""
    along = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64)
    for level in torch.linspace(-reach, reach, _LINES, dtype=torch.float64):
        across = level.expand_as(along)
        yield torch.stack((along, across), -1)
        yield torch.stack((across, along), -1)


def _curve(axis, points, **style):
    axis.plot(*points.mT.tolist(), **style)


def _arrow(axis, start, vector, color, label):
    end = (start + vector).tolist()
    axis.annotate(
        "",
        end,
        start.tolist(),
        arrowprops=dict(arrowstyle="-|>", color=color, linewidth=2, shrinkA=0, shrinkB=0),
        zorder=5,
    )
    axis.plot([], [], color=color, linewidth=2, label=label)


def _number(value):
    """Four digits, and no trace of rounding in what is zero or an integer."""
    return f"{round(value, 12) + 0.0:.4g}".replace("-", "\N{MINUS SIGN}")
