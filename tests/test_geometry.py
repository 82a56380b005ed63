"""plot_geometry: what is drawn, read back from the figure."""

import math

import numpy as np
import pytest
import torch

from jacobian_ops.jacobian.geometry import plot_geometry

pytestmark = pytest.mark.cpu_only

X = torch.tensor([1.5, 0.5], dtype=torch.float64)


def square(p):
    """z -> z^2 as a map of the plane."""
    return torch.stack((p[0] ** 2 - p[1] ** 2, 2 * p[0] * p[1]))


def curves(axis):
    """Points of the curves by their label, and those of the grid."""
    named = {line.get_label(): line.get_xydata() for line in axis.lines if len(line.get_xydata())}
    grid = [line.get_xydata() for line in axis.lines if line.get_color() == "#b8b8b8"]
    return named, grid


def arrows(axis):
    return [np.subtract(t.xy, t.xyann) for t in axis.texts]


def test_conformal():
    """det 10, both singular values sqrt(10): the ellipse is a circle."""
    left, right = plot_geometry(square, X, radius=0.5).axes
    texts = [t.get_text() for t in right.get_legend().get_texts()]
    assert texts[1].endswith("det J = 10") and all(t.endswith("= 3.162") for t in texts[2:])

    (circle, grid), (images, grid_images) = curves(left), curves(right)
    circle = circle["circle, radius 0.5"]
    np.testing.assert_allclose(np.hypot(*(circle - [1.5, 0.5]).T), 0.5)
    z = circle @ [1, 1j]
    np.testing.assert_allclose(images["f(circle)"] @ [1, 1j], z**2)
    np.testing.assert_allclose(np.hypot(*(images[texts[1]] - [2, 1.5]).T), 0.5 * math.sqrt(10))
    assert len(grid) == len(grid_images) == 26
    for line, image in zip(grid, grid_images, strict=True):
        np.testing.assert_allclose(image @ [1, 1j], (line @ [1, 1j]) ** 2, atol=1e-12)


def test_axes_of_the_ellipse():
    """J v_i = s_i u_i, and a negative determinant is said to be one."""
    a = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    layer = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(a)
    left, right = plot_geometry(layer, torch.tensor([0.2, -0.1]), radius=2).axes
    labels = [t.get_text() for t in right.get_legend().get_texts()]
    assert labels[1].endswith("det J = \N{MINUS SIGN}7")
    v, u = arrows(left), arrows(right)
    np.testing.assert_allclose([a.numpy() @ one for one in v], u, rtol=1e-6)
    np.testing.assert_allclose([np.hypot(*one) for one in v], 2)
    np.testing.assert_allclose(
        [np.hypot(*one) / 2 for one in u], torch.linalg.svdvals(a), rtol=1e-6
    )
    named, _ = curves(right)  # a linear map is its own approximation
    np.testing.assert_allclose(named["f(circle)"], named[labels[1]], rtol=1e-5, atol=1e-6)


def test_singular_and_in_place(tmp_path):
    """A projection's ellipse is a segment; a function may work in place; x stays as it was."""

    def f(p):
        p[1] = 0
        return p

    x = X.clone()
    figure = plot_geometry(f, x)
    assert torch.equal(x, X)
    labels = [t.get_text() for t in figure.axes[1].get_legend().get_texts()]
    assert labels[1].endswith("det J = 0") and labels[3].endswith("= 0")
    figure.savefig(tmp_path / "geometry.png")
    assert (tmp_path / "geometry.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "f,x,radius,error,words",
    [
        (square, [1.0, 2.0], 1, TypeError, "x must be a floating-point tensor, got list"),
        (square, torch.tensor([1, 2]), 1, TypeError, "floating-point tensor, got torch.int64"),
        (square, torch.zeros(3), 1, ValueError, r"x has shape \[3\]; allowed: \[2\]"),
        (square, X, 0, ValueError, "radius is 0"),
        (square, X, math.nan, ValueError, "radius is nan"),
        (lambda p: p[:1], X, 1, ValueError, r"f\(x\) has shape \[1\]; allowed: \[2\]"),
        (lambda p: (p, p), X, 1, TypeError, "f must return a tensor, got tuple"),
        (lambda p: p.detach(), X, 1, RuntimeError, "does not depend on x through"),
        (lambda p: p.log() - 1 / (p - 0.5), X, 1, ValueError, "must be finite"),
    ],
)
def test_errors(f, x, radius, error, words):
    with pytest.raises(error, match=f"plot_geometry: .*{words}"):
        plot_geometry(f, x, radius=radius)
