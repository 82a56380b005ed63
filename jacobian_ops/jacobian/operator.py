"""The base of all Jacobians: shapes, forms of arguments, and what follows from products alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _linalg as linalg

if TYPE_CHECKING:
    import scipy.sparse.linalg

# Numbers that the products of one chunk of basis vectors may hold: 32 MiB in float64.
_CHUNK = 2**22
MAX_BYTES = 2**30
# Up to this many rows a decomposition of the dense matrix beats Krylov steps, and is exact.
DENSE = 512


def flat(t: Tensor, dims: int) -> Tensor:
    """All dimensions but the first ``dims`` as one."""
    return t.reshape(*t.shape[:dims], math.prod(t.shape[dims:]))


def columns_at_once(size: int) -> int:
    """How many columns of products with ``size`` numbers a column make a chunk."""
    return max(1, _CHUNK // max(size, 1))


class SLogDet(NamedTuple):
    """Sign and logarithm of the absolute value of a determinant, as torch.linalg.slogdet's."""

    sign: Tensor
    logabsdet: Tensor


class Operator:
    """A Jacobian ``J`` of shape (*batch, m, n) that is applied, and formed only by :meth:`dense`.

    A subclass gives ``_apply`` and ``_transpose_apply``, and whatever its structure makes cheaper.
    Both take and return stacks of K columns, one before the batch: ``_apply`` takes
    (K, *batch, *in_shape) and returns (K, *batch, *out_shape).

    With a batch there is one Jacobian a sample, and every result has the batch first.

    Args:
        in_shape: Of one sample's input, of n elements.
        out_shape: Of one sample's output, of m elements.
        like: A tensor or operator of the dtype and device.
        batch_shape: Of the samples.
    """

    def __init__(self, in_shape, out_shape, like: Tensor | Operator, batch_shape=()):
        self.in_shape = tuple(in_shape)
        self.out_shape = tuple(out_shape)
        self.batch_shape = tuple(batch_shape)
        self.dtype, self.device = like.dtype, like.device

    # What a subclass gives.

    def _apply(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def _transpose_apply(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _transpose(self) -> Operator:
        from .composite import Transposed

        return Transposed(self)

    def _scale(self, a) -> Operator:
        from .composite import Scaled

        return Scaled(a, self)

    def _blocks(self, blocks: tuple[int, ...]) -> Operator | None:
        """This as an operator with ``blocks``, the first dimensions of input and output, batched.

        None where an output outside a block depends on its input, or nothing is known about it.
        """
        return self if not blocks else None

    def _dense(self, max_bytes: int) -> Tensor:
        by_rows = self.rows <= self.columns
        chunks = [flat(chunk, 1 + len(self.batch_shape)) for _, chunk in self._basis(by_rows)]
        stack = torch.cat(chunks)  # (m or n, *batch, n or m)
        return stack.movedim(0, -2 if by_rows else -1)

    def _diagonal(self) -> Tensor:
        parts = []
        for start, chunk in self._basis(by_rows=True):
            rows = flat(chunk, 1 + len(self.batch_shape))[..., start : start + len(chunk)]
            parts.append(rows.diagonal(dim1=0, dim2=-1))
        return torch.cat(parts, -1)

    def _slogdet(self, max_bytes: int) -> tuple[Tensor, Tensor]:
        return linalg.slogdet(self.dense(max_bytes))

    def _solve(self, v: Tensor) -> Tensor:
        """``J^-1 v`` for a stack (K, *batch, *out_shape)."""
        from .solve import gmres

        return self._solve_dense(v) if self.rows <= DENSE else gmres(self, v)

    def _solve_dense(self, v: Tensor) -> Tensor:
        columns = flat(v, 1 + len(self.batch_shape)).movedim(0, -1)
        x = linalg.solve(self.dense(), columns)
        return x.movedim(-1, 0).reshape(len(v), *self.batch_shape, *self.in_shape)

    def _singular_values(self) -> Tensor | None:
        """All n = m of them, (*batch, n), in any order, where the structure shows them."""
        return None

    @property
    def flops(self) -> int:
        """Multiplications and additions of one product, forward or transposed, of one sample.

        An operator whose structure is not known counts as a dense one.
        """
        return 2 * self.rows * self.columns

    @property
    def label(self) -> str:
        """What :attr:`structure` calls it."""
        return type(self).__name__

    @property
    def parts(self) -> tuple[Operator, ...]:
        """The operators it is made of."""
        return ()

    @functools.cached_property
    def size(self) -> int:
        """How many operators the tree has, shared ones counted as often as they are in it."""
        return 1 + sum(part.size for part in self.parts)

    # Shapes and forms.

    @property
    def rows(self) -> int:
        """``m``, the number of outputs."""
        return math.prod(self.out_shape)

    @property
    def columns(self) -> int:
        """``n``, the number of inputs."""
        return math.prod(self.in_shape)

    @property
    def shape(self) -> torch.Size:
        """(*batch, m, n)."""
        return torch.Size((*self.batch_shape, self.rows, self.columns))

    @property
    def structure(self) -> str:
        """The tree of operators that it is made of, a line each, the first applied last."""
        return "\n".join(self._tree())

    def _tree(self) -> Iterator[str]:
        yield self._describe()
        for i, part in enumerate(self.parts):
            last = i == len(self.parts) - 1
            for j, line in enumerate(part._tree()):
                yield (("└─ " if last else "├─ ") if j == 0 else "   " if last else "│  ") + line

    def _describe(self) -> str:
        return self._title()

    def _title(self) -> str:
        batch = f", batch {list(self.batch_shape)}" if self.batch_shape else ""
        return f"{self.label} {self.rows} x {self.columns}{batch}"

    def __repr__(self):
        return f"<{self._title()}, {str(self.dtype).removeprefix('torch.')}>"

    def _columns_of(self, name: str, u, shape) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """``u`` as a stack of columns, and how to bring a stack of results into its form."""
        batch, size = self.batch_shape, math.prod(shape)
        if not isinstance(u, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(u).__name__}")
        if u.dtype != self.dtype:
            raise TypeError(f"{name} has dtype {u.dtype}, the Jacobian {self.dtype}")
        if u.shape == (*batch, *shape):
            return u[None], lambda y: y[0]
        if u.shape == (*batch, size):
            return u.reshape(1, *batch, *shape), lambda y: flat(y[0], len(batch))
        if u.shape[:-1] == (*batch, size):
            stack = u.movedim(-1, 0)
            stack = stack.reshape(len(stack), *batch, *shape)
            return stack, lambda y: flat(y, 1 + len(batch)).movedim(0, -1)
        forms = [[*batch, *shape], [*batch, size]]
        allowed = " or ".join(map(str, forms[: 1 if forms[0] == forms[1] else 2]))
        matrix = ", ".join(map(str, [*batch, size, "k"]))
        raise ValueError(
            f"{name} has shape {list(u.shape)}, the Jacobian {list(self.shape)}; "
            f"allowed: {allowed} or a matrix [{matrix}]"
        )

    def _basis(self, by_rows: bool) -> Iterator[tuple[int, Tensor]]:
        """Products with all basis vectors, in chunks: where each starts, and its stack."""
        taken, apply = (
            (self.out_shape, self._transpose_apply) if by_rows else (self.in_shape, self._apply)
        )
        size = math.prod(taken)
        step = columns_at_once(max(self.rows, self.columns) * math.prod(self.batch_shape))
        for start in range(0, max(size, 1), step):
            count = min(step, size - start)
            yield start, apply(self._units(range(start, start + count), taken))

    def _units(self, indices, shape) -> Tensor:
        """Basis vectors, (K, *batch, *shape)."""
        units = torch.zeros(len(indices), math.prod(shape), dtype=self.dtype, device=self.device)
        units[range(len(indices)), list(indices)] = 1
        ones = (1,) * len(self.batch_shape)
        units = units.reshape(len(indices), *ones, *shape)
        return units.expand(len(indices), *self.batch_shape, *shape)

    def _square(self, name: str) -> None:
        if self.rows != self.columns:
            raise ValueError(
                f"{name}: the Jacobian is {self.rows} x {self.columns}; allowed: a square one"
            )

    # The algebra.

    @property
    def T(self) -> Operator:
        """The transpose, whose products are VJPs."""
        return self._transpose()

    def __matmul__(self, other):
        """``J @ u``, a JVP, or the chain rule ``J @ K`` with another operator.

        ``u`` is a tensor of x's shape, a vector (*batch, n) or a matrix of columns (*batch, n, k);
        what fits several of them is the first.  The result has the same form.
        """
        if isinstance(other, Operator):
            from .composite import compose

            return compose(self, other)
        stack, form = self._columns_of("J @ u: u", other, self.in_shape)
        return form(self._apply(stack))

    def __rmatmul__(self, v):
        """``v @ J``, a VJP: ``v`` of y's shape, a vector (*batch, m), or rows (*batch, k, m)."""
        shapes = (*self.batch_shape, *self.out_shape), (*self.batch_shape, self.rows)
        if isinstance(v, Tensor) and v.dim() == len(self.batch_shape) + 2 and v.shape not in shapes:
            if v.shape[-1] != self.rows:
                raise ValueError(
                    f"v @ J: v has shape {list(v.shape)}, the Jacobian {list(self.shape)}; "
                    f"allowed: rows [..., k, {self.rows}]"
                )
            stack, form = self._columns_of("v @ J: v", v.mT, self.out_shape)
            return form(self._transpose_apply(stack)).mT
        stack, form = self._columns_of("v @ J: v", v, self.out_shape)
        return form(self._transpose_apply(stack))

    def __add__(self, other):
        if not isinstance(other, Operator):
            return NotImplemented
        from .composite import add

        return add(self, other)

    def __sub__(self, other):
        return self + -other if isinstance(other, Operator) else NotImplemented

    def __neg__(self):
        return self * -1

    def __mul__(self, a):
        if not (isinstance(a, Real) or isinstance(a, Tensor) and a.dim() == 0):
            given = f"a tensor of shape {list(a.shape)}" if isinstance(a, Tensor) else repr(a)
            raise TypeError(
                f"a * J: a is {given}; allowed: a number or a tensor without dimensions"
            )
        return self._scale(a)

    __rmul__ = __mul__

    # What is asked of it.

    def dense(self, max_bytes: int = MAX_BYTES) -> Tensor:
        """The matrix, by the cheaper of rows (VJPs) and columns (JVPs), in chunks.

        Args:
            max_bytes: What the matrix may take.

        Returns:
            (*batch, m, n).

        Raises:
            MemoryError: It would take more.
        """
        size = self.shape.numel() * self.dtype.itemsize
        if size > max_bytes:
            raise MemoryError(
                f"dense: the matrix {' x '.join(map(str, self.shape))} would take "
                f"{size / 2**30:.3g} GiB; max_bytes allows {max_bytes / 2**30:.3g} GiB"
            )
        return self._dense(max_bytes)

    def row(self, i: int) -> Tensor:
        """The gradient of output ``i`` of y.flatten(), in x's shape: one VJP.

        Raises:
            IndexError: ``i`` is out of range.
        """
        return self._transpose_apply(self._unit("row", i, self.out_shape))[0]

    def column(self, j: int) -> Tensor:
        """The derivative by input ``j`` of x.flatten(), in y's shape: one JVP.

        Raises:
            IndexError: ``j`` is out of range.
        """
        return self._apply(self._unit("column", j, self.in_shape))[0]

    def _unit(self, name, i, shape):
        size = math.prod(shape)
        if not -size <= i < size:
            raise IndexError(f"{name}: index {i} is out of range; allowed: {-size} to {size - 1}")
        return self._units([i % size], shape)

    def diagonal(self) -> Tensor:
        """The diagonal (*batch, n) of a square Jacobian, the matrix never formed.

        Without a structure that shows it, this is n VJPs.

        Raises:
            ValueError: It is not square.
        """
        self._square("diagonal")
        return self._diagonal()

    def trace(self) -> Tensor:
        """The sum of the diagonal, (*batch).

        Raises:
            ValueError: The Jacobian is not square.
        """
        self._square("trace")
        return self._diagonal().sum(-1)

    def slogdet(self, max_bytes: int = MAX_BYTES) -> SLogDet:
        """Sign and ``log|det J|``, differentiable.

        O(n) for diagonals, triangles, permutations and diagonals plus low rank (matrix determinant
        lemma); sums over blocks and over chains of square factors; an LU factorisation of the
        dense matrix for the rest.  The logarithm is -inf, and the sign 0, for a singular Jacobian.

        Args:
            max_bytes: What a dense matrix may take.

        Returns:
            (sign, logabsdet), both (*batch).

        Raises:
            ValueError: The Jacobian is not square.
            MemoryError: The matrix would take more.
        """
        self._square("slogdet")
        return SLogDet(*self._slogdet(max_bytes))

    def logdet(self, max_bytes: int = MAX_BYTES) -> Tensor:
        """``log det J``, nan where the determinant is negative; else as :meth:`slogdet`."""
        self._square("logdet")
        sign, logabs = self._slogdet(max_bytes)
        return torch.where(sign < 0, torch.full_like(logabs, torch.nan), logabs)

    def solve(self, b: Tensor) -> Tensor:
        """``J^-1 b``, differentiable: by structure, else LU of a small matrix, else scipy's GMRES.

        Args:
            b: In y's shape, a vector (*batch, n) or a matrix of columns (*batch, n, k).

        Returns:
            The solution in the form of ``b``; in x's shape where ``b`` has y's.

        Raises:
            ValueError: The Jacobian is not square, or ``b`` has another shape.
            torch.linalg.LinAlgError: It is singular, or GMRES did not converge.
        """
        self._square("solve")
        stack, form = self._columns_of("solve: b", b, self.out_shape)
        return form(self._solve(stack))

    def svdvals(self, k: int | None = None) -> Tensor:
        """The ``k`` largest singular values: :func:`jacobian_ops.jacobian.spectrum.svdvals`."""
        from .spectrum import svdvals

        return svdvals(self, k)

    def norm(self, ord: int = 2) -> Tensor:
        """The spectral norm, (*batch): the largest singular value.

        Raises:
            ValueError: ``ord`` is not 2.
        """
        if ord != 2:
            raise ValueError(f"norm: ord is {ord!r}; allowed: 2, the largest singular value")
        return self.svdvals(1)[..., 0]

    def cond(self) -> Tensor:
        """Largest over smallest singular value, (*batch); inf for a singular Jacobian."""
        values = self.svdvals()
        largest, smallest = values[..., 0], values[..., -1]
        return torch.where(smallest == 0, torch.inf, largest / smallest)

    def is_invertible(self, rtol: float | None = None) -> Tensor:
        """Whether f has a smooth inverse near x, by the inverse function theorem.

        It has one if the Jacobian is square and its smallest singular value exceeds ``rtol`` times
        the largest.

        Args:
            rtol: None for n times the machine epsilon of the dtype, as torch.linalg.matrix_rank.

        Returns:
            Booleans, (*batch).
        """
        if self.rows != self.columns:
            return torch.zeros(self.batch_shape, dtype=torch.bool, device=self.device)
        rtol = self.rows * torch.finfo(self.dtype).eps if rtol is None else rtol
        values = self.svdvals()
        return values[..., -1] > rtol * values[..., 0]

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """A scipy LinearOperator with these products, in numpy's float64 or float32.

        Raises:
            ValueError: There is a batch.
            ImportError: scipy is not installed.
        """
        import numpy
        from scipy.sparse.linalg import LinearOperator

        if self.batch_shape:
            raise ValueError(
                f"to_scipy: the Jacobian has a batch {list(self.batch_shape)}; allowed: none"
            )
        dtype = numpy.float64 if self.dtype is torch.float64 else numpy.float32

        def product(operator):
            @torch.no_grad()
            def run(u):
                u = torch.from_numpy(numpy.array(u)).to(self.device, self.dtype)
                # scipy hands a vector over as one column, too.
                y = operator @ u.reshape(operator.columns, -1)
                return y.reshape(operator.rows, *u.shape[1:]).cpu().to(torch.float64).numpy()

            return run

        forward, transposed = product(self), product(self.T)
        return LinearOperator(
            (self.rows, self.columns), forward, transposed, forward, dtype, transposed
        )
