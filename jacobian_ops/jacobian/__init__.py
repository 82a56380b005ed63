"""Jacobians as linear operators: ``jacobian_ops.jacobian(f, x)``, and what is done with them.

The package is called like the function that it is about, so both are one object: a module that can
be called.  ``jacobian_ops.jacobian(f, x)`` is :func:`.linearize.jacobian`, and
``jacobian_ops.jacobian.hvp`` a name in it, as with any package.
"""

import sys
import types

from .chain import Plan
from .composite import BlockDiagonal, Chain, Scaled, Sum, Transposed
from .determinant import LogDetEstimate, logdet_series
from .functions import compute_full_jacobian, ggnvp, hvp, jvp, vjp
from .geometry import plot_geometry
from .hutchinson import Estimate, divergence, trace
from .implicit import fixed_point
from .linearize import jacobian
from .newton_krylov import newton_krylov
from .operator import Operator, SLogDet
from .structures import (
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Identity,
    Joined,
    MatrixFree,
    Permutation,
    Selection,
    Triangular,
    Zero,
)

__all__ = [
    "BlockDiagonal",
    "Chain",
    "Dense",
    "Diagonal",
    "DiagonalPlusLowRank",
    "Estimate",
    "Identity",
    "Joined",
    "LogDetEstimate",
    "MatrixFree",
    "Operator",
    "Permutation",
    "Plan",
    "SLogDet",
    "Scaled",
    "Selection",
    "Sum",
    "Transposed",
    "Triangular",
    "Zero",
    "compute_full_jacobian",
    "divergence",
    "fixed_point",
    "ggnvp",
    "hvp",
    "jacobian",
    "jvp",
    "logdet_series",
    "newton_krylov",
    "plot_geometry",
    "trace",
    "vjp",
]


class _Callable(types.ModuleType):
    __call__ = staticmethod(jacobian)


sys.modules[__name__].__class__ = _Callable
