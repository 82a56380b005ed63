"""Jacobians whose structure is known: what is stored, and what it makes cheap.

The stack of columns that products take is (K, *batch, *shape), see :class:`.operator.Operator`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import _linalg as linalg
from .operator import Operator, columns_at_once, flat

_LinAlgError = torch.linalg.LinAlgError


class Identity(Operator):
    """``I``.

    Args:
        shape: Of one sample's input and output.
        like: A tensor or operator of the dtype and device.
        batch_shape: Of the samples.
    """

    def __init__(self, shape, like: Tensor | Operator, batch_shape=()):
        super().__init__(shape, shape, like, batch_shape)

    @classmethod
    def of(cls, J: Operator) -> Identity:
        """The one that can be added to ``J``: ``Identity.of(J) + J``.

        Raises:
            ValueError: ``J`` is not square.
        """
        J._square("Identity.of")
        return cls(J.in_shape, J, J.batch_shape)

    def _ones(self):
        ones = torch.ones((), dtype=self.dtype, device=self.device)
        return ones.expand(*self.batch_shape, self.rows)

    def _apply(self, u):
        return u

    _transpose_apply = _solve = _apply

    def _transpose(self):
        return self

    def _blocks(self, blocks):
        rest = self.in_shape[len(blocks) :]
        return Identity(rest, self, (*self.batch_shape, *blocks))

    def _dense(self, max_bytes):
        return torch.diag_embed(self._ones())

    def _diagonal(self):
        return self._ones()

    def _slogdet(self, max_bytes):
        one = torch.ones(self.batch_shape, dtype=self.dtype, device=self.device)
        return one, torch.zeros_like(one)

    def _singular_values(self):
        return self._ones()

    flops = 0


class Zero(Operator):
    """The Jacobian of a constant.

    Args:
        in_shape: Of one sample's input.
        out_shape: Of its output.
        like: A tensor or operator of the dtype and device.
        batch_shape: Of the samples.
    """

    def _apply(self, u):
        return u.new_zeros(len(u), *self.batch_shape, *self.out_shape)

    def _transpose_apply(self, v):
        return v.new_zeros(len(v), *self.batch_shape, *self.in_shape)

    def _zeros(self, *shape):
        return torch.zeros((*self.batch_shape, *shape), dtype=self.dtype, device=self.device)

    def _transpose(self):
        return Zero(self.out_shape, self.in_shape, self, self.batch_shape)

    def _dense(self, max_bytes):
        return self._zeros(self.rows, self.columns)

    def _diagonal(self):
        return self._zeros(self.rows)

    def _slogdet(self, max_bytes):
        return self._zeros(), self._zeros() - torch.inf

    def _solve(self, v):
        raise _LinAlgError("solve: the Jacobian is zero")

    def _singular_values(self):
        return self._zeros(self.rows)

    flops = 0


class Diagonal(Operator):
    """``diag(d)``: of activations, dropout and whatever else takes each element by itself.

    Args:
        d: (*batch, *shape), the shape that of input and output.
        batch_dims: How many dimensions of ``d`` are the batch.
    """

    def __init__(self, d: Tensor, batch_dims: int = 0):
        super().__init__(d.shape[batch_dims:], d.shape[batch_dims:], d, d.shape[:batch_dims])
        self.d = d

    def _apply(self, u):
        return self.d * u

    _transpose_apply = _apply

    def _transpose(self):
        return self

    def _scale(self, a):
        return Diagonal(a * self.d, len(self.batch_shape))

    def _blocks(self, blocks):
        return Diagonal(self.d, len(self.batch_shape) + len(blocks))

    def _dense(self, max_bytes):
        return torch.diag_embed(self._diagonal())

    def _diagonal(self):
        return flat(self.d, len(self.batch_shape))

    def _slogdet(self, max_bytes):
        d = self._diagonal()
        return d.sign().prod(-1), d.abs().log().sum(-1)

    def _solve(self, v):
        if (self.d == 0).any():
            raise _LinAlgError("solve: the diagonal has zeros")
        return v / self.d

    def _singular_values(self):
        return self._diagonal().abs()

    @property
    def flops(self):
        """One multiplication an element."""
        return self.rows


class Dense(Operator):
    """A matrix, as of a linear layer, whose Jacobian is its weight.

    Args:
        matrix: (m, n), shared by the batch, or (*batch, m, n).
        in_shape: Of n elements; None for (n,).
        out_shape: Of m elements; None for (m,).
        batch_shape: None for that of ``matrix``.
    """

    def __init__(self, matrix: Tensor, in_shape=None, out_shape=None, batch_shape=None):
        m, n = matrix.shape[-2:]
        super().__init__(
            (n,) if in_shape is None else in_shape,
            (m,) if out_shape is None else out_shape,
            matrix,
            matrix.shape[:-2] if batch_shape is None else batch_shape,
        )
        self.matrix = matrix

    def _apply(self, u):
        return _product(self.matrix, flat(u, 1 + len(self.batch_shape)), self.out_shape)

    def _transpose_apply(self, v):
        return _product(self.matrix.mT, flat(v, 1 + len(self.batch_shape)), self.in_shape)

    def _transpose(self):
        return Dense(self.matrix.mT, self.out_shape, self.in_shape, self.batch_shape)

    def _dense(self, max_bytes):
        return self.matrix.expand(self.shape)

    def _diagonal(self):
        return self.matrix.diagonal(dim1=-2, dim2=-1).expand(*self.batch_shape, self.rows)

    def _slogdet(self, max_bytes):
        sign, logabs = linalg.slogdet(self.matrix)
        return sign.expand(self.batch_shape), logabs.expand(self.batch_shape)

    def _solve(self, v):
        if self.matrix.dim() > 2:
            return self._solve_dense(v)
        x = linalg.solve(self.matrix, flat(v, 1 + len(self.batch_shape))[..., None])[..., 0]
        return x.reshape(len(v), *self.batch_shape, *self.in_shape)


def _product(matrix, u, shape):
    """The matrix, of one or of each sample, times the columns u (K, *batch, n)."""
    if matrix.dim() == 2:
        y = u @ matrix.mT
    else:
        y = (matrix @ u.movedim(0, -1)).movedim(-1, 0)
    return y.reshape(*u.shape[:-1], *shape)


class Triangular(Operator):
    """A Jacobian that is known to be triangular, as of an autoregressive or coupling layer.

    Its products are those of ``J``; what is added is ``det J = prod_i J_ii``, in O(n).  That it is
    triangular is believed, not checked.

    Args:
        J: Any square operator.
        lower: Whether zeros are above the diagonal or below.  None where inputs and outputs have
            to be permuted alike first, by a permutation that is not known: that is enough for the
            determinant, while :meth:`solve` then has no use for it.
        diagonal: (*batch, n); None for ``J.diagonal()``.

    Raises:
        ValueError: ``J`` is not square, or ``diagonal`` has another shape.
    """

    def __init__(self, J: Operator, lower: bool | None = True, diagonal: Tensor | None = None):
        J._square("Triangular")
        diagonal = J.diagonal() if diagonal is None else diagonal
        if diagonal.shape != J.shape[:-1]:
            raise ValueError(
                f"Triangular: diagonal has shape {list(diagonal.shape)}; "
                f"allowed: {list(J.shape[:-1])}"
            )
        super().__init__(J.in_shape, J.out_shape, diagonal, J.batch_shape)
        self.J, self.lower, self._d = J, lower, diagonal

    def _apply(self, u):
        return self.J._apply(u)

    def _transpose_apply(self, v):
        return self.J._transpose_apply(v)

    def _transpose(self):
        lower = None if self.lower is None else not self.lower
        return Triangular(self.J.T, lower, self._d)

    def _dense(self, max_bytes):
        return self.J._dense(max_bytes)

    def _diagonal(self):
        return self._d

    def _slogdet(self, max_bytes):
        return self._d.sign().prod(-1), self._d.abs().log().sum(-1)

    def _solve(self, v):
        if (self._d == 0).any():
            raise _LinAlgError("solve: the diagonal of the triangle has zeros")
        if self.lower is None:
            return self.J._solve(v)
        columns = flat(v, 1 + len(self.batch_shape)).movedim(0, -1)
        x = linalg.solve_triangular(self.dense(), columns, upper=not self.lower)
        return x.movedim(-1, 0).reshape(len(v), *self.batch_shape, *self.in_shape)

    @property
    def flops(self):
        """Those of ``J``."""
        return self.J.flops

    @property
    def parts(self):
        """``J``."""
        return (self.J,)


class DiagonalPlusLowRank(Operator):
    """``diag(d) + U V^T`` on vectors of n elements: softmax and the norms.

    ``det = prod d det C`` with the capacitance ``C = I + V^T diag(d)^-1 U`` (matrix determinant
    lemma), and ``J^-1 = D^-1 - D^-1 U C^-1 V^T D^-1`` (Woodbury).

    Args:
        d: (*batch, n).
        U: (*batch, n, r).
        V: (*batch, n, r).
        C: (*batch, r, r) where it is known better than its sum rounds: the 0 of a singular layer.
            Then ``det = prod d det C`` has to hold where ``d`` has zeros, too.
        label: The name that the structure prints.
    """

    def __init__(self, d: Tensor, U: Tensor, V: Tensor, C: Tensor | None = None, label=None):
        super().__init__(d.shape[-1:], d.shape[-1:], d, d.shape[:-1])
        self.d, self.U, self.V, self.C = d, U, V, C
        self._label = label

    @property
    def label(self):
        """Its name and rank."""
        name = self._label or "DiagonalPlusLowRank"
        return f"{name} (diagonal plus rank {self.U.shape[-1]})"

    @classmethod
    def of_softmax(cls, y: Tensor, sign: float = 1.0) -> DiagonalPlusLowRank:
        """Of ``y = softmax(sign x)``: ``sign (diag(y) - y y^T)``, singular, as ``J 1 = 0``."""
        name = "Softmax" if sign > 0 else "Softmin"
        return cls(sign * y, -sign * y[..., None], y[..., None], _zero(y), name)

    @classmethod
    def of_log_softmax(cls, y: Tensor) -> DiagonalPlusLowRank:
        """``I - 1 s^T`` with ``s = exp(y)``; singular."""
        ones = torch.ones_like(y)
        return cls(ones, -ones[..., None], y.exp()[..., None], _zero(y), "LogSoftmax")

    @classmethod
    def of_norm(cls, x: Tensor, weight, eps: float, centred: bool, label) -> DiagonalPlusLowRank:
        """Of ``weight (x - mean) r``, ``r = (var + eps)^-1/2``, over the last dimension.

        ``J = diag(weight r) (I - (1 1^T + xhat xhat^T) / n)``; without the mean, as in RMSNorm,
        without ``1 1^T``, where ``C = eps r^2`` exactly.

        Args:
            x: (*batch, n).
            weight: Of a shape that broadcasts with ``x``, or None for ones.
            eps: Added to the variance.
            centred: Whether the mean is subtracted.
            label: The name that the structure prints.
        """
        n = x.shape[-1]
        x = x - x.mean(-1, keepdim=True) if centred else x
        r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        xhat = x * r
        V = torch.stack([torch.ones_like(x), xhat], -1) if centred else xhat[..., None]
        d = (r if weight is None else weight * r).expand(x.shape)
        C = eps * r.square()[..., None]
        if centred:
            C = torch.nn.functional.pad(C, (1, 0, 1, 0))
        return cls(d, -d[..., None] * V / n, V, C, label)

    def _apply(self, u):
        return self.d * u + _low_rank(self.U, self.V, u)

    def _transpose_apply(self, v):
        return self.d * v + _low_rank(self.V, self.U, v)

    def _transpose(self):
        C = None if self.C is None else self.C.mT
        return DiagonalPlusLowRank(self.d, self.V, self.U, C, self._label)

    def _scale(self, a):
        return DiagonalPlusLowRank(a * self.d, a * self.U, self.V, self.C, self._label)

    def scaled_rows(self, e: Tensor) -> DiagonalPlusLowRank:
        """``diag(e)`` times this."""
        return DiagonalPlusLowRank(e * self.d, e[..., None] * self.U, self.V, self.C)

    def scaled_columns(self, e: Tensor) -> DiagonalPlusLowRank:
        """This times ``diag(e)``."""
        return DiagonalPlusLowRank(e * self.d, self.U, e[..., None] * self.V, self.C)

    def plus(self, e: Tensor) -> DiagonalPlusLowRank:
        """This plus ``diag(e)``."""
        return DiagonalPlusLowRank(self.d + e, self.U, self.V)

    def _dense(self, max_bytes):
        return torch.diag_embed(self.d) + self.U @ self.V.mT

    def _diagonal(self):
        return self.d + (self.U * self.V).sum(-1)

    def _capacitance(self):
        """None where the lemma would divide by zero."""
        if self.C is not None:
            return self.C
        if (self.d == 0).any():
            return None
        one = torch.eye(self.U.shape[-1], dtype=self.dtype, device=self.device)
        return one + self.V.mT @ (self.U / self.d[..., None])

    def _slogdet(self, max_bytes):
        C = self._capacitance()
        if C is None:
            return super()._slogdet(max_bytes)
        sign, logabs = linalg.slogdet(C)
        return sign * self.d.sign().prod(-1), logabs + self.d.abs().log().sum(-1)

    def _solve(self, v):
        C = self._capacitance()
        if C is None or (self.d == 0).any():
            return self._solve_dense(v)
        z = v / self.d
        w = linalg.solve(C, z[..., None, :].matmul(self.V).mT)
        return z - ((self.U / self.d[..., None]) @ w).squeeze(-1)

    @property
    def flops(self):
        """Of the diagonal and both factors."""
        return self.rows * (1 + 4 * self.U.shape[-1])


def _zero(y):
    return y.new_zeros(*y.shape[:-1], 1, 1)


def _low_rank(U, V, u):
    return ((u[..., None, :] @ V) @ U.mT).squeeze(-2)


class Selection(Operator):
    """Some elements of x, in any order: ``y.flatten() = x.flatten()[index]``.

    Args:
        index: (m,), or None for all in their order: a change of shape.
        in_shape: Of one sample's input.
        out_shape: Of its output.
        like: A tensor or operator of the dtype and device.
        batch_shape: Of the samples.
    """

    def __init__(
        self, index: Tensor | None, in_shape, out_shape, like: Tensor | Operator, batch_shape=()
    ):
        super().__init__(in_shape, out_shape, like, batch_shape)
        self.index = index

    def _order(self):
        return torch.arange(self.columns, device=self.device) if self.index is None else self.index

    def _apply(self, u):
        rows = u.reshape(len(u), *self.batch_shape, self.columns)
        rows = rows if self.index is None else rows[..., self.index]
        return rows.reshape(len(u), *self.batch_shape, *self.out_shape)

    def _transpose_apply(self, v):
        rows = v.reshape(len(v), *self.batch_shape, self.rows)
        zeros = v.new_zeros(len(v), *self.batch_shape, self.columns)
        sums = zeros.index_add(-1, self._order(), rows)
        return sums.reshape(len(v), *self.batch_shape, *self.in_shape)

    def after(self, first: Selection) -> Operator:
        """The product of this with another one, which is applied first."""
        index = first._order()[self._order()]
        both = isinstance(self, Permutation) and isinstance(first, Permutation)
        if both and torch.equal(index, torch.arange(self.rows, device=self.device)):
            if self.out_shape == first.in_shape:
                return Identity(self.out_shape, self, self.batch_shape)
            index = None
        kind = Permutation if both else Selection
        return kind(index, first.in_shape, self.out_shape, self, self.batch_shape)

    def _dense(self, max_bytes):
        units = torch.eye(self.columns, dtype=self.dtype, device=self.device)
        return units[self._order()].expand(self.shape)

    def _diagonal(self):
        fixed = self._order() == torch.arange(self.rows, device=self.device)
        return fixed.to(self.dtype).expand(*self.batch_shape, self.rows)

    flops = 0


class Permutation(Selection):
    """All elements of x in another order or shape; arguments as of :class:`Selection`."""

    @property
    def label(self):
        """Whether the order changes."""
        return "Reshape" if self.index is None else "Permutation"

    def _transpose(self):
        inverse = None if self.index is None else self.index.argsort()
        return Permutation(inverse, self.out_shape, self.in_shape, self, self.batch_shape)

    def _transpose_apply(self, v):
        return self.T._apply(v)

    _solve = _transpose_apply

    def _slogdet(self, max_bytes):
        one = torch.ones(self.batch_shape, dtype=self.dtype, device=self.device)
        return one * self._parity(), torch.zeros_like(one)

    def _parity(self) -> int:
        """(-1)^(n - cycles)."""
        follow, cycles = self._order().tolist(), 0
        seen = [False] * len(follow)
        for i in range(len(follow)):
            cycles += not seen[i]
            while not seen[i]:
                seen[i], i = True, follow[i]
        return 1 if (len(follow) - cycles) % 2 == 0 else -1

    def _singular_values(self):
        one = torch.ones((), dtype=self.dtype, device=self.device)
        return one.expand(*self.batch_shape, self.rows)


class Linearisation:
    """Both products of a function of one or several tensors, evaluated once.

    VJPs are backward passes of the graph that the function left; JVPs are the VJPs of that VJP,
    which is linear in its cotangent.  So both are of the same evaluation, dropout masks included,
    and the function need have no forward mode.

    Args:
        vjp: From a cotangent of ``y`` to a tuple of one for each input, as torch.func.vjp makes it.
        y: The result.
        label: The function's name.
    """

    def __init__(self, vjp, y: Tensor, label: str):
        self._vjp, self._jvp, self.label = vjp, None, label
        # Where the VJP is linearised: not at 0, as some backward passes take logarithms of v.
        self._at = y.new_ones(()).expand(y.shape)

    def vjp(self, v: Tensor) -> tuple[Tensor, ...]:
        """Stacks of cotangents of the inputs, of a stack of the result's."""
        return self._mapped(self._vjp, v)

    def jvp(self, *us: Tensor) -> Tensor:
        """A stack of tangents of the result, of stacks of the inputs'."""
        if self._jvp is None:
            with torch.enable_grad():  # for later products, if not for this one
                _, self._jvp = torch.func.vjp(self._vjp, self._at.clone())
        return self._mapped(lambda *us: self._jvp(us)[0], *us)

    def _mapped(self, f, *stacks):
        if len(stacks[0]) == 0:  # which vmap does not take
            one = (stack.new_zeros(1, *stack.shape[1:]) for stack in stacks)
            return tree_map(lambda t: t[:0], self._mapped(f, *one))
        step = columns_at_once(max(self._at.numel(), *(stack[0].numel() for stack in stacks)))
        if len(stacks[0]) > step:
            chunks = zip(*(stack.split(step) for stack in stacks), strict=True)
            return tree_map(lambda *ts: torch.cat(ts), *(self._mapped(f, *c) for c in chunks))
        try:
            if len(stacks[0]) == 1:
                return tree_map(lambda t: t[None], f(*(stack[0] for stack in stacks)))
            return torch.func.vmap(f)(*stacks)
        except RuntimeError as e:
            raise RuntimeError(f"jacobian: {self.label} cannot be differentiated: {e}") from e


class MatrixFree(Operator):
    """The Jacobian of a function that nothing is known about.

    Args:
        products: Its :class:`Linearisation`.
        x: (*batch, *in_shape).
        y: (*batch, *out_shape).
        batch_dims: How many of their first dimensions are the batch.
    """

    def __init__(self, products: Linearisation, x: Tensor, y: Tensor, batch_dims: int = 0):
        super().__init__(x.shape[batch_dims:], y.shape[batch_dims:], y, y.shape[:batch_dims])
        self.products = products

    @property
    def label(self):
        """With the function's name."""
        return f"MatrixFree {self.products.label}"

    def _transpose_apply(self, v):
        (gx,) = self.products.vjp(v)
        return gx

    def _apply(self, u):
        return self.products.jvp(u)


class Joined(Operator):
    """The Jacobian of a function of several tensors that all depend on x, such as attention.

    Args:
        products: Its :class:`Linearisation`.
        branches: The operators from x to each of the tensors.
        y: (*batch, *out_shape).
    """

    def __init__(self, products: Linearisation, branches, y: Tensor):
        first = branches[0]
        dims = len(first.batch_shape)
        super().__init__(first.in_shape, y.shape[dims:], y, first.batch_shape)
        self.products, self.branches = products, tuple(branches)

    @property
    def label(self):
        """With the function's name."""
        return f"Joined {self.products.label}"

    def _transpose_apply(self, v):
        pairs = zip(self.branches, self.products.vjp(v), strict=True)
        return functools.reduce(torch.add, (J._transpose_apply(g) for J, g in pairs))

    def _apply(self, u):
        return self.products.jvp(*(J._apply(u) for J in self.branches))

    @property
    def flops(self):
        """Those of the branches, and of a dense matrix from each to y."""
        return sum(J.flops + 2 * self.rows * J.rows for J in self.branches)

    @property
    def parts(self):
        """The branches."""
        return self.branches
