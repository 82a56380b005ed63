"""The bracket order of a chain's dense product: forward, reverse or mixed accumulation.

Matrix-chain multiplication by dynamic programming (Godbole, IEEE Trans. Comput. 1973), where a
factor that is applied faster than a dense matrix costs what applying it costs; for Jacobians see
Griewank and Naumann, "Accumulating Jacobians as chained sparse matrix products", 2003.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from torch import Tensor

from .operator import Operator, flat

# Which factors are multiplied first: the number of one, or a pair of brackets.
Brackets = int | tuple


@dataclass(frozen=True)
class Plan:
    """How a chain ``J_1 J_2 ... J_k`` is multiplied out, numbered as its structure lists it.

    Attributes:
        brackets: Nested pairs of the factors' numbers, from 0.
        flops: What this order costs for one sample.
        forward_flops: What pure forward accumulation costs, ``J_1 (J_2 (... J_k))``.
        reverse_flops: What pure reverse accumulation costs, ``((J_1 J_2) ...) J_k``.
    """

    brackets: Brackets
    flops: float
    forward_flops: float
    reverse_flops: float

    @property
    def order(self) -> str:
        """The brackets in words: ``((1 2) (3 4))``."""
        return _text(self.brackets)

    @property
    def mode(self) -> str:
        """In words: forward, reverse, or mixed where that is cheaper than both."""
        if self.flops == self.reverse_flops:
            return "reverse"
        return "forward" if self.flops == self.forward_flops else "mixed"

    def __str__(self):
        return (
            f"{self.mode} accumulation {self.order}: {self.flops:.3g} flops "
            f"(pure forward {self.forward_flops:.3g}, pure reverse {self.reverse_flops:.3g})"
        )


def _text(brackets) -> str:
    if isinstance(brackets, int):
        return str(brackets + 1)
    return f"({' '.join(map(_text, brackets))})"


def forward(count: int) -> Brackets:
    """From the input on: ``J_1 (J_2 (... J_k))``."""
    return functools.reduce(lambda inner, i: (i, inner), reversed(range(count - 1)), count - 1)


def reverse(count: int) -> Brackets:
    """From the output on: ``((J_1 J_2) ...) J_k``."""
    return functools.reduce(lambda inner, i: (inner, i), range(1, count), 0)


def plan(factors: tuple[Operator, ...], max_numbers: float = math.inf) -> Plan:
    """The cheapest order.

    Args:
        factors: In the order of the matrix product.
        max_numbers: What a matrix in between may hold.

    Returns:
        The plan; its ``flops`` are inf where every order needs a larger matrix.
    """
    count = len(factors)
    best: dict[tuple[int, int], tuple[float, Brackets]] = {(i, i): (0, i) for i in range(count)}
    for length in range(1, count):
        for i in range(count - length):
            j = i + length
            options = (
                (
                    best[i, s][0] + best[s + 1, j][0] + _product_flops(factors, i, s, j),
                    (best[i, s][1], best[s + 1, j][1]),
                )
                for s in range(i, j)
            )
            cost, brackets = min(options, key=lambda option: option[0])
            if factors[i].rows * factors[j].columns > max_numbers:
                cost = math.inf
            best[i, j] = cost, brackets
    cost, brackets = best[0, count - 1]
    pure = {order: flops(factors, order(count)) for order in (reverse, forward)}
    for order, of_order in pure.items():  # of orders that cost the same, a pure one
        if of_order == cost and _largest(factors, order(count)) <= max_numbers:
            brackets = order(count)
            break
    return Plan(brackets, cost, pure[forward], pure[reverse])


def _product_flops(factors, i, s, j) -> float:
    """Of the product of the matrices i..s and s+1..j, a single factor being left as it is."""
    left, right = factors[s], factors[s + 1]
    m, inner, n = factors[i].rows, left.columns, factors[j].columns
    if i < s and s + 1 < j:
        return 2 * m * inner * n
    by_columns, by_rows = n * left.flops, m * right.flops
    if i < s:
        return by_rows
    if s + 1 < j:
        return by_columns
    return min(by_columns + _dense_flops(right), by_rows + _dense_flops(left))


def _dense_flops(J: Operator) -> float:
    """Of forming the matrix: nothing where it is stored."""
    from .structures import Dense

    return 0 if isinstance(J, Dense) else min(J.rows, J.columns) * J.flops


def flops(factors: tuple[Operator, ...], brackets: Brackets) -> float:
    """What an order costs for one sample; arguments as of :func:`evaluate`."""
    cost, _, _ = _walk(factors, brackets)
    return cost


def _walk(factors, brackets):
    """(flops, first, last) of a bracket."""
    if isinstance(brackets, int):
        return 0, brackets, brackets
    left, i, s = _walk(factors, brackets[0])
    right, _, j = _walk(factors, brackets[1])
    return left + right + _product_flops(factors, i, s, j), i, j


def _largest(factors, brackets) -> int:
    """Of the products in a bracket."""
    if isinstance(brackets, int):
        return 0
    _, i, j = _walk(factors, brackets)
    return max(
        factors[i].rows * factors[j].columns, *(_largest(factors, part) for part in brackets)
    )


def evaluate(factors: tuple[Operator, ...], brackets: Brackets) -> Tensor:
    """The dense product in the given order.

    Args:
        factors: In the order of the matrix product.
        brackets: Nested pairs of their numbers, as of :class:`Plan`, :func:`forward` or
            :func:`reverse`.

    Returns:
        (*batch, m, n).
    """
    if isinstance(brackets, int):
        return factors[brackets]._dense(math.inf)
    left, right = brackets
    if not isinstance(left, int):
        product = evaluate(factors, left)
        if isinstance(right, int):
            return _from_right(product, factors[right])
        return product @ evaluate(factors, right)
    J = factors[left]
    if not isinstance(right, int):
        return _from_left(J, evaluate(factors, right))
    K = factors[right]
    by_columns = K.columns * J.flops + _dense_flops(K)
    if by_columns <= J.rows * K.flops + _dense_flops(J):
        return _from_left(J, K._dense(math.inf))
    return _from_right(J._dense(math.inf), K)


def _from_left(J: Operator, matrix: Tensor) -> Tensor:
    columns = matrix.movedim(-1, 0)
    stack = columns.reshape(len(columns), *J.batch_shape, *J.in_shape)
    return flat(J._apply(stack), 1 + len(J.batch_shape)).movedim(0, -1)


def _from_right(matrix: Tensor, J: Operator) -> Tensor:
    rows = matrix.movedim(-2, 0)
    stack = rows.reshape(len(rows), *J.batch_shape, *J.out_shape)
    return flat(J._transpose_apply(stack), 1 + len(J.batch_shape)).movedim(0, -2)
