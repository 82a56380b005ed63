"""Jacobians made of others, and the rules by which products and sums keep their structure."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import _linalg as linalg
from . import chain
from .operator import Operator
from .structures import Dense, Diagonal, DiagonalPlusLowRank, Identity, Permutation, Selection, Zero


class Transposed(Operator):
    """``J^T``: the products of ``J`` with their roles exchanged.

    Args:
        J: What is transposed.
    """

    def __init__(self, J: Operator):
        super().__init__(J.out_shape, J.in_shape, J, J.batch_shape)
        self.J = J

    def _apply(self, u):
        return self.J._transpose_apply(u)

    def _transpose_apply(self, v):
        return self.J._apply(v)

    def _transpose(self):
        return self.J

    def _dense(self, max_bytes):
        return self.J._dense(max_bytes).mT

    def _diagonal(self):
        return self.J._diagonal()

    def _slogdet(self, max_bytes):
        return self.J._slogdet(max_bytes)

    def _singular_values(self):
        return self.J._singular_values()

    @property
    def flops(self):
        """Those of ``J``."""
        return self.J.flops

    @property
    def parts(self):
        """``J``."""
        return (self.J,)


class Scaled(Operator):
    """``a J``.

    Args:
        a: A number or a tensor without dimensions.
        J: What is scaled.
    """

    def __init__(self, a: float | Tensor, J: Operator):
        super().__init__(J.in_shape, J.out_shape, J, J.batch_shape)
        self.a, self.J = a, J

    def _apply(self, u):
        return self.a * self.J._apply(u)

    def _transpose_apply(self, v):
        return self.a * self.J._transpose_apply(v)

    def _transpose(self):
        return self.a * self.J.T

    def _scale(self, a):
        return (a * self.a) * self.J

    def _blocks(self, blocks):
        J = self.J._blocks(blocks)
        return None if J is None else self.a * J

    def _dense(self, max_bytes):
        return self.a * self.J._dense(max_bytes)

    def _diagonal(self):
        return self.a * self.J._diagonal()

    def _factor(self):
        return torch.as_tensor(self.a, dtype=self.dtype, device=self.device)

    def _slogdet(self, max_bytes):
        sign, logabs = self.J._slogdet(max_bytes)
        a, n = self._factor(), self.rows
        return sign * a.sign() ** n, logabs + n * a.abs().log()

    def _solve(self, v):
        if self.a == 0:
            raise torch.linalg.LinAlgError("solve: the Jacobian is scaled by zero")
        return self.J._solve(v) / self.a

    def _singular_values(self):
        values = self.J._singular_values()
        return None if values is None else self._factor().abs() * values

    @property
    def label(self):
        """With the factor."""
        return f"Scaled by {float(self.a):.4g}"

    @property
    def flops(self):
        """Those of ``J``, and one multiplication an output."""
        return self.J.flops + self.rows

    @property
    def parts(self):
        """``J``."""
        return (self.J,)


class Sum(Operator):
    """``J_1 + J_2 + ...``, as of a residual block, ``I + J``.

    Args:
        terms: Operators of the same size.
    """

    def __init__(self, terms):
        first = terms[0]
        super().__init__(first.in_shape, first.out_shape, first, first.batch_shape)
        self.terms = tuple(terms)

    def _apply(self, u):
        return functools.reduce(torch.add, (J._apply(u) for J in self.terms))

    def _transpose_apply(self, v):
        return functools.reduce(torch.add, (J._transpose_apply(v) for J in self.terms))

    def _transpose(self):
        return Sum([J.T for J in self.terms])

    def _blocks(self, blocks):
        terms = [J._blocks(blocks) for J in self.terms]
        return None if None in terms else functools.reduce(add, terms)

    def _dense(self, max_bytes):
        return functools.reduce(torch.add, (J._dense(max_bytes) for J in self.terms))

    def _diagonal(self):
        return functools.reduce(torch.add, (J._diagonal() for J in self.terms))

    def _slogdet(self, max_bytes):
        diagonal, narrow = self._bottleneck()
        if diagonal is None:
            return super()._slogdet(max_bytes)
        # det(D + A B) = det D det(I + B D^-1 A), whose matrix is as small as the bottleneck.
        A, B = narrow
        sign, logabs = diagonal._slogdet(max_bytes)
        small = compose(B, compose(Diagonal(1 / diagonal.d, len(self.batch_shape)), A))
        one = torch.eye(small.rows, dtype=self.dtype, device=self.device)
        inner, more = linalg.slogdet(one + small.dense(max_bytes))
        return sign * inner, logabs + more

    def _bottleneck(self):
        """(D, (A, B)) where this is D + A B with fewer rows in B than in D, else (None, None)."""
        if len(self.terms) != 2:
            return None, None
        for diagonal, other in (self.terms, self.terms[::-1]):
            D = _as_diagonal(diagonal)
            if D is not None and isinstance(other, Chain) and (D.d != 0).all():
                widths = [J.columns for J in other.factors[:-1]]
                at = 1 + min(range(len(widths)), key=widths.__getitem__)
                if widths[at - 1] < self.rows:
                    parts = other.factors[:at], other.factors[at:]
                    return D, tuple(functools.reduce(compose, part) for part in parts)
        return None, None

    @property
    def flops(self):
        """Those of the terms, and their sum."""
        return sum(J.flops for J in self.terms) + (len(self.terms) - 1) * self.rows

    @property
    def parts(self):
        """The terms."""
        return self.terms


class Chain(Operator):
    """``J_k ... J_2 J_1``, the chain rule; the factor that is applied last comes first.

    Args:
        factors: Operators of fitting sizes, in the order of the matrix product.
    """

    def __init__(self, factors):
        first, last = factors[0], factors[-1]
        super().__init__(last.in_shape, first.out_shape, first, first.batch_shape)
        self.factors = tuple(factors)

    def _apply(self, u):
        for J in reversed(self.factors):
            u = J._apply(u)
        return u

    def _transpose_apply(self, v):
        for J in self.factors:
            v = J._transpose_apply(v)
        return v

    def _transpose(self):
        return Chain([J.T for J in reversed(self.factors)])

    def _blocks(self, blocks):
        factors = [J._blocks(blocks) for J in self.factors]
        return None if None in factors else functools.reduce(compose, factors)

    def plan(self, max_bytes: float = math.inf) -> chain.Plan:
        """The cheapest bracket order of the dense product, beside pure forward and pure reverse.

        Args:
            max_bytes: What one of the matrices in between may take.

        Returns:
            A :class:`jacobian_ops.jacobian.chain.Plan`, which prints itself.
        """
        numbers = max_bytes / self.dtype.itemsize / max(math.prod(self.batch_shape), 1)
        return chain.plan(self.factors, numbers)

    def _dense(self, max_bytes):
        plan = self.plan(max_bytes)
        if plan.flops == math.inf:  # every order has too large a matrix in between
            return super()._dense(max_bytes)
        return chain.evaluate(self.factors, plan.brackets)

    def _slogdet(self, max_bytes):
        if all(J.rows == J.columns for J in self.factors):
            signs, logs = zip(*(J._slogdet(max_bytes) for J in self.factors), strict=True)
            return functools.reduce(torch.mul, signs), functools.reduce(torch.add, logs)
        if self._narrowest() < self.rows:  # the rank is not full
            zero = torch.zeros(self.batch_shape, dtype=self.dtype, device=self.device)
            return zero, zero - torch.inf
        return super()._slogdet(max_bytes)

    def _solve(self, v):
        if all(J.rows == J.columns for J in self.factors):
            for J in self.factors:
                v = J._solve(v)
            return v
        if self._narrowest() < self.rows:
            raise torch.linalg.LinAlgError(
                f"solve: the Jacobian is singular, {self.rows} x {self.rows} through a bottleneck "
                f"of {self._narrowest()}"
            )
        return super()._solve(v)

    def _narrowest(self):
        return min(J.columns for J in self.factors)

    def _describe(self):
        return f"{self._title()}, {self.plan()}"

    @property
    def flops(self):
        """Those of the factors."""
        return sum(J.flops for J in self.factors)

    @property
    def parts(self):
        """The factors."""
        return self.factors


class BlockDiagonal(Operator):
    """A Jacobian a block, the blocks the first dimensions of input and output.

    Args:
        J: With the blocks as the last dimensions of its batch.
        dims: How many these are.
    """

    def __init__(self, J: Operator, dims: int = 1):
        batch, self.blocks = J.batch_shape[:-dims], J.batch_shape[-dims:]
        shapes = (*self.blocks, *J.in_shape), (*self.blocks, *J.out_shape)
        super().__init__(*shapes, J, batch)
        self.J = J

    def _apply(self, u):
        return self.J._apply(u)

    def _transpose_apply(self, v):
        return self.J._transpose_apply(v)

    def _transpose(self):
        return BlockDiagonal(self.J.T, len(self.blocks))

    def _scale(self, a):
        return BlockDiagonal(a * self.J, len(self.blocks))

    def _blocks(self, blocks):
        if blocks == self.blocks[: len(blocks)]:
            rest = len(self.blocks) - len(blocks)
            return BlockDiagonal(self.J, rest) if rest else self.J
        if self.blocks == blocks[: len(self.blocks)]:
            return self.J._blocks(blocks[len(self.blocks) :])
        return None

    def _flat(self, t):
        """A result of ``J`` with one dimension for all blocks."""
        at = len(self.batch_shape)
        return t.reshape(*self.batch_shape, -1, *t.shape[at + len(self.blocks) :])

    def _dense(self, max_bytes):
        blocks = self._flat(self.J._dense(max_bytes)).movedim(-3, -1)  # (*batch, m, n, blocks)
        return blocks.diag_embed().movedim(-2, -4).movedim(-1, -2).reshape(self.shape)

    def _diagonal(self):
        if self.J.rows != self.J.columns:
            return super()._diagonal()
        return self.J._diagonal().reshape(*self.batch_shape, self.rows)

    def _slogdet(self, max_bytes):
        sign, logabs = self.J._slogdet(max_bytes)
        return self._flat(sign).prod(-1), self._flat(logabs).sum(-1)

    def _solve(self, v):
        return self.J._solve(v)

    def _singular_values(self):
        values = self.J._singular_values()
        return None if values is None else values.reshape(*self.batch_shape, self.rows)

    @property
    def label(self):
        """With the number of blocks."""
        return f"BlockDiagonal, {' x '.join(map(str, self.blocks))} blocks,"

    @property
    def flops(self):
        """Those of all blocks."""
        return math.prod(self.blocks) * self.J.flops

    @property
    def parts(self):
        """The operator of the blocks."""
        return (self.J,)


def compose(left: Operator, right: Operator) -> Operator:
    """``left @ right``, with the structure that their product has.

    Raises:
        ValueError: The sizes or batches do not fit.
    """
    _check_fit("@", left, right, left.columns == right.rows, "as many columns left as rows right")
    if isinstance(left, Scaled):
        return left.a * compose(left.J, right)
    if isinstance(right, Scaled):
        return right.a * compose(left, right.J)
    if left.in_shape != right.out_shape:
        right = compose(_reshape(right, right.out_shape, left.in_shape), right)
    factors = list(left.factors if isinstance(left, Chain) else [left])
    for factor in right.factors if isinstance(right, Chain) else [right]:
        while factors and (merged := _product(factors[-1], factor)) is not None:
            factors.pop()
            factor = merged
        factors.append(factor)
    return factors[0] if len(factors) == 1 else Chain(factors)


def _product(a: Operator, b: Operator) -> Operator | None:
    """``a @ b`` where it is one operator as cheap as each of them, else None."""
    if isinstance(a, Identity):
        return b
    if isinstance(b, Identity):
        return a
    if isinstance(a, Zero) or isinstance(b, Zero):
        return Zero(b.in_shape, a.out_shape, a, a.batch_shape)
    if isinstance(a, Diagonal) and isinstance(b, Diagonal):
        return Diagonal(a.d * b.d, len(a.batch_shape))
    if isinstance(a, Diagonal) and isinstance(b, DiagonalPlusLowRank):
        return b.scaled_rows(a.d)
    if isinstance(a, DiagonalPlusLowRank) and isinstance(b, Diagonal):
        return a.scaled_columns(b.d)
    if isinstance(a, Selection) and isinstance(b, Selection):
        return a.after(b)
    return _by_blocks(compose, a, b)


def _by_blocks(combine, a: Operator, b: Operator) -> Operator | None:
    """Block by block where both are diagonal in the same blocks, else None."""
    blocks = [J.blocks for J in (a, b) if isinstance(J, BlockDiagonal)]
    if not blocks:
        return None
    common = min(blocks, key=len)
    parts = a._blocks(common), b._blocks(common)
    return None if None in parts else BlockDiagonal(combine(*parts), len(common))


def add(left: Operator, right: Operator) -> Operator:
    """``left + right``, with the structure that their sum has.

    Raises:
        ValueError: The sizes or batches differ.
    """
    _check_fit("+", left, right, left.shape == right.shape, "the same size")
    if left.in_shape != right.in_shape or left.out_shape != right.out_shape:
        after = _reshape(right, right.out_shape, left.out_shape)
        right = compose(after, compose(right, _reshape(right, left.in_shape, right.in_shape)))
    terms = list(left.terms if isinstance(left, Sum) else [left])
    for term in right.terms if isinstance(right, Sum) else [right]:
        for i, other in enumerate(terms):
            merged = _sum(other, term)
            if merged is not None:
                terms[i] = merged
                break
        else:
            terms.append(term)
    return terms[0] if len(terms) == 1 else Sum(terms)


def _reshape(J: Operator, before, after) -> Operator:
    if before == after:
        return Identity(before, J, J.batch_shape)
    return Permutation(None, before, after, J, J.batch_shape)


def _sum(a: Operator, b: Operator) -> Operator | None:
    """``a + b`` where it is one operator, else None."""
    if isinstance(a, Zero):
        return b
    if isinstance(b, Zero):
        return a
    c, d = _multiple(a), _multiple(b)
    if c is not None and d is not None:
        return Scaled(c + d, Identity(a.in_shape, a, a.batch_shape))
    d, e = _as_diagonal(a), _as_diagonal(b)
    if d is not None and e is not None:
        return Diagonal(d.d + e.d, len(a.batch_shape))
    if isinstance(a, DiagonalPlusLowRank) and e is not None:
        return a.plus(e.d)
    if isinstance(b, DiagonalPlusLowRank) and d is not None:
        return b.plus(d.d)
    if isinstance(a, Dense) and isinstance(b, Dense) and a.matrix.dim() == b.matrix.dim():
        return Dense(a.matrix + b.matrix, a.in_shape, a.out_shape, a.batch_shape)
    return _by_blocks(add, a, b)


def _multiple(J: Operator):
    """``c`` where this is ``c I``, else None."""
    if isinstance(J, Scaled) and isinstance(J.J, Identity):
        return J.a
    return 1 if isinstance(J, Identity) else None


def _as_diagonal(J: Operator) -> Diagonal | None:
    if isinstance(J, Diagonal):
        return J
    if isinstance(J, Scaled):
        inner = _as_diagonal(J.J)
        return None if inner is None else J.a * inner
    if isinstance(J, Identity):
        return Diagonal(J._ones().reshape(*J.batch_shape, *J.in_shape), len(J.batch_shape))
    return None


def _check_fit(sign, left, right, fits, allowed):
    if not fits or left.batch_shape != right.batch_shape:
        raise ValueError(
            f"cannot form {left._title()} {sign} {right._title()}; allowed: {allowed}, and the "
            "same batch"
        )
    if left.dtype != right.dtype:
        raise TypeError(
            f"cannot form {left._title()} {sign} {right._title()} of dtypes {left.dtype} and "
            f"{right.dtype}; allowed: the same dtype"
        )
