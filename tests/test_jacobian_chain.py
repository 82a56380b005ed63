"""The bracket order of chains: the cheapest of all, and the same product in every order."""

import math

import pytest
import torch

from jacobian_ops.jacobian import (
    BlockDiagonal,
    Chain,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Plan,
    chain,
    jacobian,
)

pytestmark = pytest.mark.cpu_only

close = torch.testing.assert_close


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def dense(*sizes):
    """Matrices of sizes[0] x sizes[1], sizes[1] x sizes[2], ..."""
    return [Dense(randn(*shape)) for shape in zip(sizes, sizes[1:], strict=False)]


def all_brackets(i, j):
    if i == j:
        return [i]
    return [
        (left, right)
        for s in range(i, j)
        for left in all_brackets(i, s)
        for right in all_brackets(s + 1, j)
    ]


def structured():
    d, U, V = randn(5), randn(5, 1), randn(5, 1)
    x = randn(6)
    return [
        *dense(3, 5),
        DiagonalPlusLowRank(d, U, V),
        *dense(5, 4),
        BlockDiagonal(Dense(randn(2, 2, 3))),
        jacobian(lambda x: x.logcumsumexp(0), x),
        Diagonal(randn(6)),
        *dense(6, 2),
    ]


CHAINS = {
    "growing": lambda: dense(2, 3, 5, 7, 11),
    "shrinking": lambda: dense(11, 7, 5, 3, 2),
    "bottleneck": lambda: dense(9, 8, 1, 8, 9),
    "wide": lambda: dense(2, 9, 9, 9, 2),
    "structured": structured,
    "diagonals": lambda: [Diagonal(randn(3)), DiagonalPlusLowRank(randn(3), *randn(2, 3, 1))],
}


@pytest.mark.parametrize("name", CHAINS)
def test_every_order_gives_the_product_and_none_is_cheaper(name):
    factors = CHAINS[name]()
    A = factors[0].dense()
    for J in factors[1:]:
        A = A @ J.dense()
    plan = chain.plan(factors)
    brackets = all_brackets(0, len(factors) - 1)
    costs = [chain.flops(factors, order) for order in brackets]
    assert plan.flops == min(costs) == chain.flops(factors, plan.brackets)
    assert plan.forward_flops == chain.flops(factors, chain.forward(len(factors)))
    assert plan.reverse_flops == chain.flops(factors, chain.reverse(len(factors)))
    for order in brackets:
        close(chain.evaluate(factors, order), A)
    close(Chain(factors).dense(), A)


def test_pure_orders():
    assert chain.forward(4) == (0, (1, (2, 3)))
    assert chain.reverse(4) == (((0, 1), 2), 3)
    assert chain.forward(1) == chain.reverse(1) == 0


MODES = {
    # sizes from y to x: the mode, the order
    (1, 50, 50, 50): ("reverse", "((1 2) 3)"),
    (50, 50, 50, 1): ("forward", "(1 (2 3))"),
    (50, 1, 50, 1): ("forward", "(1 (2 3))"),
    (30, 40, 2, 40, 30): ("mixed", "((1 2) (3 4))"),
}


@pytest.mark.parametrize("sizes", MODES, ids=str)
def test_modes(sizes):
    plan = Chain(dense(*sizes)).plan()
    assert (plan.mode, plan.order) == MODES[sizes]


def test_costs():
    """Counted by hand: a multiplication and an addition for each product of two numbers."""
    A, B, C = dense(2, 3, 5, 7)
    assert chain.flops([A, B], (0, 1)) == 2 * 2 * 3 * 5
    assert chain.flops([A, B, C], ((0, 1), 2)) == 2 * 2 * 3 * 5 + 2 * 2 * 5 * 7
    D = Diagonal(randn(5))
    assert chain.flops([D, C], (0, 1)) == 5 * 7  # its rows are scaled
    assert chain.flops([B, D, C], ((0, 1), 2)) == 3 * 5 + 2 * 3 * 5 * 7
    J = DiagonalPlusLowRank(randn(7), randn(7, 1), randn(7, 1))
    assert chain.flops([C, J], (0, 1)) == 5 * (7 + 4 * 7)


def test_plan_is_printed():
    plan = Plan(((0, 1), 2), 1234.0, 5e6, 1e7)
    assert str(plan) == (
        "mixed accumulation ((1 2) 3): 1.23e+03 flops (pure forward 5e+06, pure reverse 1e+07)"
    )


def test_no_matrix_in_between_larger_than_allowed():
    """Another order, or products by chunks where every order has too large a matrix."""
    J = Chain(dense(4, 100, 100, 4))
    small = 4 * 100 * 8
    assert J.plan(small).flops < math.inf
    J = Chain([*dense(2, 50), *dense(50, 2)])
    assert J.plan(2 * 2 * 8).flops < math.inf  # the product alone
    K = Chain(dense(30, 2, 40, 30))
    assert K.plan(30 * 30 * 8).flops < math.inf
    L = Chain(dense(2, 50, 50, 2))
    assert L.plan(4 * 8).flops == math.inf
    close(L.dense(4 * 8), L.factors[0].matrix @ L.factors[1].matrix @ L.factors[2].matrix)
    with pytest.raises(MemoryError):
        L.dense(3 * 8)


def test_batches_and_derivatives():
    weights = [randn(3, 4).requires_grad_(), randn(2, 4).requires_grad_(), randn(4, 5)]
    A, d, B = weights
    factors = [Dense(A, batch_shape=(2,)), Diagonal(d, 1), Dense(B, batch_shape=(2,))]
    expected = (A * d[:, None, :]) @ B
    for order in all_brackets(0, 2):
        product = chain.evaluate(factors, order)
        close(product, expected)
        close(
            torch.autograd.grad(product.sin().sum(), (A, d)),
            torch.autograd.grad(expected.sin().sum(), (A, d), retain_graph=True),
        )
