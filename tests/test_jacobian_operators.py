"""Every operator against its dense matrix, alone and in products and sums with every other."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from jacobian_ops.jacobian import (
    BlockDiagonal,
    Chain,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Identity,
    Operator,
    Permutation,
    Scaled,
    Selection,
    Sum,
    Transposed,
    Triangular,
    Zero,
    jacobian,
)

pytestmark = pytest.mark.cpu_only

close = torch.testing.assert_close
N = 6


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Maker:
    """``make(batch)`` gives an operator and, independently of it, its matrix."""

    name: str
    make: Callable

    def __str__(self):
        return self.name


def identity(batch):
    return Identity((N,), randn(1), batch), torch.eye(N).double().expand(*batch, N, N)


def zero(batch):
    return Zero((N,), (N,), randn(1), batch), torch.zeros(*batch, N, N).double()


def diagonal(batch):
    d = randn(*batch, N)
    return Diagonal(d, len(batch)), torch.diag_embed(d)


def diagonal_of_matrix(batch):
    d = randn(*batch, 2, 3)
    return Diagonal(d, len(batch)), torch.diag_embed(d.reshape(*batch, N))


def dense(batch):
    A = randn(*batch, N, N)
    return Dense(A), A


def dense_shared(batch):
    A = randn(N, N)
    return Dense(A, (2, 3), (3, 2), batch), A.expand(*batch, N, N)


def triangular(batch):
    A = randn(*batch, N, N).tril()
    return Triangular(Dense(A)), A


def triangular_upper(batch):
    A = randn(*batch, N, N).triu()
    return Triangular(Dense(A), lower=False), A


def triangular_permuted(batch):
    order = torch.randperm(N)
    A = randn(*batch, N, N).tril()[..., order, :][..., :, order]
    return Triangular(Dense(A), lower=None), A


def low_rank(batch):
    d, U, V = randn(*batch, N), randn(*batch, N, 2), randn(*batch, N, 2)
    return DiagonalPlusLowRank(d, U, V), torch.diag_embed(d) + U @ V.mT


def permutation(batch):
    index = torch.randperm(N)
    matrix = torch.eye(N).double()[index].expand(*batch, N, N)
    return Permutation(index, (2, 3), (N,), randn(1), batch), matrix


def reshape(batch):
    matrix = torch.eye(N).double().expand(*batch, N, N)
    return Permutation(None, (2, 3), (3, 2), randn(1), batch), matrix


def selection(batch):
    index = torch.randint(N, (N,))
    matrix = torch.eye(N).double()[index].expand(*batch, N, N)
    return Selection(index, (2, 3), (N,), randn(1), batch), matrix


def blocks(batch):
    A = randn(*batch, 2, 3, 3)
    matrix = torch.zeros(*batch, N, N).double()
    matrix[..., :3, :3], matrix[..., 3:, 3:] = A[..., 0, :, :], A[..., 1, :, :]
    return BlockDiagonal(Dense(A)), matrix


def blocks_of_blocks(batch):
    """Two blocks of three diagonals plus low rank each, of one element."""
    d, u, v = randn(*batch, 2, 3, 1), randn(*batch, 2, 3, 1, 1), randn(*batch, 2, 3, 1, 1)
    J = BlockDiagonal(DiagonalPlusLowRank(d, u, v), 2)
    return J, torch.diag_embed((d + (u * v)[..., 0]).reshape(*batch, N))


def scaled(batch):
    J, A = dense(batch)
    return Scaled(-1.5, J), -1.5 * A


def scaled_by_tensor(batch):
    J, A = low_rank(batch)
    a = torch.tensor(2.5, dtype=torch.float64)
    return a * J, a * A


def total(batch):
    (J, A), (K, B) = dense(batch), low_rank(batch)
    return Sum([J, K]), A + B


def chain(batch):
    A, d, B = randn(*batch, N, 4), randn(*batch, 4), randn(*batch, 4, N)
    return Chain([Dense(A), Diagonal(d, len(batch)), Dense(B)]), (A * d[..., None, :]) @ B


def chain_of_square(batch):
    (J, A), (K, B), (L, C) = low_rank(batch), dense(batch), triangular(batch)
    return Chain([J, K, L]), A @ B @ C


def residual(batch):
    """I + J with a bottleneck."""
    J, A = chain(batch)
    return Identity.of(J) + J, torch.eye(N).double() + A


def matrix_free(batch):
    x = randn(*batch, N)
    J = jacobian(lambda x: torch.logcumsumexp(x, -1), x, len(batch))
    return J, (x[..., None, :] - x.logcumsumexp(-1)[..., None]).exp().tril()


def traced(batch):
    A, x = randn(N, N), randn(*batch, 3, 2)
    slope = 1 - (x.flatten(-2) @ A.mT).tanh().square()
    J = jacobian(lambda x: torch.cumsum((x.flatten(-2) @ A.mT).tanh(), -1), x, len(batch))
    return J, torch.ones(N, N).double().tril() @ (slope[..., None] * A)


def joined(batch):
    A, x = randn(N, N), randn(*batch, N)
    J = jacobian(lambda x: _mix(x.sin(), x @ A), x, len(batch))
    sin, cos = x.sin(), x.cos()
    last = (x @ A).roll(1, -1)
    return J, torch.diag_embed(cos * last) + sin[..., None] * A.mT.roll(1, 0)


def _mix(a, b):
    """An op of two tensors that is not elementwise."""
    return torch.einsum("...i,...i->...i", a, b.roll(1, -1))


def transposed(batch):
    J, A = matrix_free(batch)
    return Transposed(J), A.mT


SQUARE = [
    Maker(f.__name__, f)
    for f in (
        identity,
        zero,
        diagonal,
        diagonal_of_matrix,
        dense,
        dense_shared,
        triangular,
        triangular_upper,
        triangular_permuted,
        low_rank,
        permutation,
        reshape,
        selection,
        blocks,
        blocks_of_blocks,
        scaled,
        scaled_by_tensor,
        total,
        chain,
        chain_of_square,
        residual,
        matrix_free,
        traced,
        joined,
        transposed,
    )
]


def wide(batch):
    A = randn(*batch, 3, N)
    return Dense(A, (2, 3)), A


def wide_selection(batch):
    index = torch.tensor([4, 0])
    matrix = torch.eye(N).double()[index].expand(*batch, 2, N)
    return Selection(index, (N,), (2,), randn(1), batch), matrix


def wide_zero(batch):
    return Zero((N,), (2, 2), randn(1), batch), torch.zeros(*batch, 4, N).double()


def wide_blocks(batch):
    A = randn(3, 2)
    matrix = torch.block_diag(A, A, A).expand(*batch, 9, N)
    return BlockDiagonal(Dense(A, batch_shape=(*batch, 3))), matrix


def wide_matrix_free(batch):
    x = randn(*batch, N)
    J = jacobian(lambda x: x.cumsum(-1).square().unflatten(-1, (3, 2)).sum(-1), x, len(batch))
    ones, y = torch.ones(N, N).double().tril(), x.cumsum(-1)
    return J, (2 * y[..., None] * ones).unflatten(-2, (3, 2)).sum(-2)


WIDE = [
    Maker(f.__name__, f) for f in (wide, wide_selection, wide_zero, wide_blocks, wide_matrix_free)
]
BATCHES = [(), (3, 2)]


def check(J: Operator, A: torch.Tensor):
    """All products of ``J`` in all forms, and what follows from them, against its matrix."""
    batch, m, n = J.batch_shape, *A.shape[-2:]
    assert J.shape == A.shape and (J.rows, J.columns) == (m, n)
    close(J.dense(), A)
    u, v = randn(*batch, n), randn(*batch, m)
    Au, vA = (A @ u[..., None])[..., 0], (v[..., None, :] @ A)[..., 0, :]
    close(J @ u, Au.reshape((J @ u).shape))
    close(J @ u.reshape(*batch, *J.in_shape), Au.reshape(*batch, *J.out_shape))
    close(v.reshape(*batch, *J.out_shape) @ J, vA.reshape(*batch, *J.in_shape))
    close(J.T @ v, v @ J)
    for k in (0, 1, 4):
        U, V = randn(*batch, n, k), randn(*batch, k, m)
        if U.shape != (*batch, *J.in_shape) and V.shape != (*batch, *J.out_shape):
            close(J @ U, A @ U)
            close(V @ J, V @ A)
            close(J.T @ V.mT, (V @ A).mT)
    close(J.T.dense(), A.mT)
    close(J.T.T.dense(), A)
    for i in (0, m - 1, -1):
        close(J.row(i), A[..., i, :].reshape(*batch, *J.in_shape))
    for j in (0, n - 1, -1):
        close(J.column(j), A[..., :, j].reshape(*batch, *J.out_shape))
    close((-2 * J + J).dense(), -A)
    close((J - J * 3).dense(), -2 * A)
    assert J.structure.splitlines()[0].startswith(J.label) and J.flops >= 0
    if m == n:
        close(J.diagonal(), A.diagonal(dim1=-2, dim2=-1))
        close(J.trace(), A.diagonal(dim1=-2, dim2=-1).sum(-1))
        close((Identity.of(J) + J).dense(), torch.eye(n).double() + A)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("maker", SQUARE + WIDE, ids=str)
def test_products(maker, batch):
    check(*maker.make(batch))


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("maker", SQUARE, ids=str)
def test_determinant_and_inverse(maker, batch):
    J, A = maker.make(batch)
    sign, logabs = J.slogdet()
    if torch.linalg.matrix_rank(A).min() < N:
        assert maker.name in ("zero", "selection", "chain")
        assert (sign == 0).all() and (logabs == -torch.inf).all()
        with pytest.raises(torch.linalg.LinAlgError):
            J.solve(randn(*batch, N))
        return
    expected = torch.linalg.slogdet(A)
    close(sign, expected.sign)
    close(logabs, expected.logabsdet)
    close(J.logdet(), torch.where(sign < 0, torch.nan, logabs), equal_nan=True)
    b = randn(*batch, N, 3)
    close(J.solve(b), torch.linalg.solve(A, b))
    vector = b[..., 0].reshape(*batch, *J.out_shape)
    x = torch.linalg.solve(A, b[..., 0]).reshape(*batch, *J.in_shape)
    close(J.solve(vector), x)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("maker", SQUARE + WIDE, ids=str)
def test_singular_values(maker, batch):
    J, A = maker.make(batch)
    close(J.svdvals(), torch.linalg.svdvals(A))
    close(J.norm(), torch.linalg.matrix_norm(A, 2))


@pytest.mark.parametrize("left", SQUARE, ids=str)
def test_pairs(left):
    """Products and sums with every operator, whatever they simplify to."""
    batch = (2,)
    for right in SQUARE + WIDE:
        (J, A), (K, B) = left.make(batch), right.make(batch)
        KJ, u = K @ J, randn(*batch, N)
        close(KJ.dense(), B @ A)
        close((KJ @ u).reshape(*batch, -1), (B @ A @ u[..., None])[..., 0])
        if K.rows == N:
            close((J + K).dense(), A + B)
            close((KJ + K).diagonal(), (B @ A + B).diagonal(dim1=-2, dim2=-1))


STRUCTURES = [
    # product or sum, what it is, of which it is made
    (diagonal, "@", diagonal, Diagonal),
    (diagonal, "@", low_rank, DiagonalPlusLowRank),
    (low_rank, "@", diagonal, DiagonalPlusLowRank),
    (permutation, "@", reshape, Permutation),
    (selection, "@", permutation, Selection),
    (identity, "@", dense, Dense),
    (dense, "@", identity, Dense),
    (zero, "@", matrix_free, Zero),
    (blocks, "@", blocks, BlockDiagonal),
    (dense, "@", dense, Chain),
    (identity, "+", diagonal, Diagonal),
    (identity, "+", identity, Scaled),
    (diagonal, "+", diagonal, Diagonal),
    (low_rank, "+", identity, DiagonalPlusLowRank),
    (dense, "+", dense, Dense),
    (zero, "+", dense, Dense),
    (dense, "+", zero, Dense),
    (blocks, "+", blocks, BlockDiagonal),
    (matrix_free, "+", identity, Sum),
]


@pytest.mark.parametrize("left, sign, right, kind", STRUCTURES)
def test_structure_is_kept(left, sign, right, kind):
    J, K = left((2,))[0], right((2,))[0]
    if sign == "@":
        J = J @ K
    else:
        J = J + K
    assert type(J) is kind, J.structure


def test_transposes_keep_the_structure():
    for maker in (identity, diagonal, dense, triangular, low_rank, permutation, blocks, total):
        J, _ = maker(())
        assert type(J.T) is type(J)
    J, _ = matrix_free(())
    assert J.T.T is J


def test_structure_prints_the_tree():
    J, _ = residual(())
    assert J.structure.splitlines() == [
        "Sum 6 x 6",
        "├─ Identity 6 x 6",
        "└─ Chain 6 x 6, reverse accumulation ((1 2) 3): 312 flops "
        "(pure forward 312, pure reverse 312)",
        "   ├─ Dense 6 x 4",
        "   ├─ Diagonal 4 x 4",
        "   └─ Dense 4 x 6",
    ]
    assert repr(J) == "<Sum 6 x 6, float64>"
    J, _ = blocks((3,))
    assert J.structure == "BlockDiagonal, 2 blocks, 6 x 6, batch [3]\n└─ Dense 3 x 3, batch [3, 2]"


def test_cut_into_chunks(monkeypatch):
    """The same whatever the chunks of columns, rows and diagonals."""
    for maker in (matrix_free, wide_matrix_free, joined, transposed):
        J, A = maker((2,))
        monkeypatch.setattr("jacobian_ops.jacobian.operator._CHUNK", 2 * 6 * 4)
        close(J.dense(), A)
        close(J.T.dense(), A.mT)
        U = randn(2, N, 9)
        close(J @ U, A @ U)
        if J.rows == J.columns:
            close(J.diagonal(), A.diagonal(dim1=-2, dim2=-1))


def test_no_larger_than_allowed():
    n = 10**6
    J = Diagonal(torch.ones(n, dtype=torch.float64))
    J = J + jacobian(lambda x: x.cumsum(0), J.d)
    with pytest.raises(MemoryError, match=r"1000000 x 1000000 would take 7.45e\+03 GiB.* 1 GiB"):
        J.dense()
    with pytest.raises(MemoryError):
        J.slogdet()
    assert J.row(3).sum() == 5  # products go on


def test_to_scipy():
    J, A = wide_matrix_free(())
    L = J.to_scipy()
    u, v = randn(N, 3), randn(3, 2)
    close(torch.from_numpy(L @ u.numpy()), A @ u)
    close(torch.from_numpy(L @ u[:, 0].numpy()), A @ u[:, 0])
    close(torch.from_numpy(L.H @ v.numpy()), A.T @ v)
    close(torch.from_numpy(L.rmatvec(v[:, 0].numpy())), A.T @ v[:, 0])
    half = Dense(A.bfloat16()).to_scipy()
    assert half.dtype == "float32"
    close(
        torch.from_numpy(half @ u[:, 0].bfloat16().float().numpy()), A @ u[:, 0], atol=0.2, rtol=0
    )
    with pytest.raises(ValueError, match=r"to_scipy: the Jacobian has a batch \[2\]"):
        dense((2,))[0].to_scipy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    """Every result has the dtype of the operator, and the value to its precision."""
    eye = torch.eye(N, dtype=dtype)
    d, one = torch.arange(1, N + 1).to(dtype), torch.ones(N, 1, dtype=dtype)
    for J in (
        Diagonal(d),
        Dense(eye + 0.125 * one @ one.T),
        Triangular(Dense(eye + one @ d[None].tril(-1))),
        DiagonalPlusLowRank(d, one, one),
        Permutation(torch.arange(N).flip(0), (N,), (N,), d),
        Identity((N,), d) + Chain([Dense(one), Dense(one.T)]),
        jacobian(lambda x: x.cumsum(0), d),
    ):
        A = J.dense().double()
        close_enough = dict(rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        for ours, theirs in (
            (J @ d, A @ d.double()),
            (d @ J, d.double() @ A),
            (J.slogdet().logabsdet, torch.linalg.slogdet(A).logabsdet),
            (J @ J.solve(d), d.double()),
            (J.svdvals(), torch.linalg.svdvals(A)),
            (J.trace(), A.trace()),
        ):
            assert ours.dtype is dtype
            close(ours.double(), theirs, **close_enough)


ERRORS = [
    (
        lambda J, x: J @ x[:4],
        ValueError,
        r"J @ u: u has shape \[4\], .* \[6, 6\]; allowed: \[6\] or",
    ),
    (lambda J, x: J @ [1.0], TypeError, "J @ u: u must be a Tensor, got list"),
    (
        lambda J, x: J @ x.float(),
        TypeError,
        "u has dtype torch.float32, the Jacobian torch.float64",
    ),
    (lambda J, x: x[:4] @ J, ValueError, r"v @ J: v has shape \[4\]"),
    (lambda J, x: x.reshape(2, 3) @ J, ValueError, r"v has shape \[2, 3\].* rows \[..., k, 6\]"),
    (lambda J, x: J.row(6), IndexError, "row: index 6 is out of range; allowed: -6 to 5"),
    (lambda J, x: J.column(-7), IndexError, "column: index -7 is out of range"),
    (lambda J, x: J * x, TypeError, r"a is a tensor of shape \[6\]; allowed: a number"),
    (lambda J, x: J * "2", TypeError, "a is '2'"),
    (lambda J, x: J + 1, TypeError, "unsupported operand"),
    (
        lambda J, x: J @ wide(())[0],
        ValueError,
        "MatrixFree logcumsumexp 6 x 6 @ Dense 3 x 6; allowed",
    ),
    (lambda J, x: J + wide(())[0], ValueError, "6 x 6 \\+ Dense 3 x 6; allowed: the same size"),
    (lambda J, x: J + dense((2,))[0], ValueError, "batch \\[2\\]; allowed"),
    (lambda J, x: J @ Diagonal(x.float()), TypeError, "of dtypes torch.float64 and torch.float32"),
    (lambda J, x: J.solve(x[:5]), ValueError, r"solve: b has shape \[5\]"),
    (lambda J, x: J.norm(1), ValueError, "norm: ord is 1; allowed: 2"),
    (lambda J, x: J.svdvals(7), ValueError, "svdvals: k is 7; allowed: 1 to 6"),
    (lambda J, x: Triangular(J, diagonal=x[:4]), ValueError, r"shape \[4\]; allowed: \[6\]"),
]


@pytest.mark.parametrize("call, error, match", ERRORS)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call(matrix_free(())[0], randn(N))


@pytest.mark.parametrize("name", ["diagonal", "trace", "slogdet", "logdet", "solve"])
def test_square_only(name):
    J, _ = wide(())
    with pytest.raises(ValueError, match=f"{name}: the Jacobian is 3 x 6; allowed: a square one"):
        getattr(J, name)(*([randn(3)] if name == "solve" else []))
    for make in (Triangular, Identity.of):
        with pytest.raises(ValueError, match="allowed: a square one"):
            make(J)
