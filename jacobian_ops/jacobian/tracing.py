"""Follow x through a function, and keep the operator of each op.

The function runs on a :class:`Traced` tensor, which sees every op through ``__torch_function__``:
modules, hooks, fused ops and control flow are as they always are.  An op in :data:`RULES` gives its
structure, any other one is linearised by torch.func.vjp.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .composite import add, compose
from .operator import Operator
from .structures import Identity, Joined, Linearisation, MatrixFree

# From a function to rule(func, args, kwargs, deps), deps being the traced ones among the arguments;
# a rule returns None where it does not hold.
RULES = {}

# A sum of branches of more operators than this, those counted twice that two of them share, would
# be slower than f itself.
_MOST_OPERATORS = 1024
_PLAIN = (int, float, complex, bool, str, torch.dtype, torch.device, torch.layout, type(None))


IN_PLACE = "jacobian: f changes its input in place; allowed: functions that leave it as it is"


class Refused(Exception):
    """What no other way to linearise would change, with the text of the error."""


class Unsupported(Exception):
    """What tracing cannot follow."""


class Traced(Tensor):
    """A tensor that depends on x, with the operators that lead to it.

    Args:
        value: The tensor itself.
        factors: The operators from x on, the first one first.
        batch_dims: How many first dimensions are the batch.
        recorded: Whether the operators have a graph of their own.
        fresh: Whether nothing else shares its memory, so that it may be overwritten.
    """

    @staticmethod
    def __new__(cls, value, factors, batch_dims, recorded, fresh=False):
        """A wrapper without memory of its own."""
        return Tensor._make_wrapper_subclass(
            cls, value.shape, dtype=value.dtype, device=value.device
        )

    def __init__(self, value, factors, batch_dims, recorded, fresh=False):
        self.value, self.factors, self.batch_dims = value, factors, batch_dims
        self.fresh, self.recorded = fresh, recorded

    def overwrite(self, other: Traced) -> Traced:
        """Become the result of an op that wrote into this one."""
        if not self.fresh:
            raise Unsupported if self.factors else Refused(IN_PLACE)
        self.value, self.factors = other.value, other.factors
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if not torch.is_grad_enabled():
            # Inside torch.no_grad or an autograd.Function, whose derivative is not that of its ops.
            raise Unsupported
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        deps = list({id(t): t for t in leaves if isinstance(t, Traced)}.values())
        with torch.set_grad_enabled(deps[0].recorded):
            result = RULES[func](func, args, kwargs, deps) if func in RULES else None
            return _unknown(func, args, kwargs, deps) if result is None else result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise Unsupported


def with_values(deps, values, *trees):
    """The trees of arguments with values in the place of the traced tensors."""
    given = dict(zip(map(id, deps), values, strict=True))
    return tree_map_only(Traced, lambda t: given[id(t)], trees)


def join(y: Tensor, deps, operators, fresh: bool = True) -> Traced:
    """``y`` behind the operators from each of the tensors that it depends on."""
    shared, branches = _branches(deps)
    if branches is None:
        (operator,) = operators
    else:
        operator = functools.reduce(add, map(compose, operators, branches))
    return follow(y, deps, shared, operator, fresh)


def follow(y, deps, shared, operator: Operator, fresh) -> Traced:
    """``y`` behind one operator after the shared ones."""
    dims, first = deps[0].batch_dims, deps[0].value
    if y.dtype != first.dtype or y.shape[:dims] != first.shape[:dims]:
        raise Unsupported
    if operator.size > _MOST_OPERATORS:
        raise Unsupported
    factors = shared if isinstance(operator, Identity) else (*shared, operator)
    return Traced(y, factors, dims, deps[0].recorded, fresh)


def _branches(deps):
    """The operators that all paths to ``deps`` begin with, and the product of the rest of each."""
    if len(deps) == 1:
        return deps[0].factors, None
    paths = [dep.factors for dep in deps]
    count = 0
    for step in zip(*paths, strict=False):
        if any(operator is not step[0] for operator in step):
            break
        count += 1
    branches = [
        product(path[count:]) if len(path) > count else identity(dep)
        for dep, path in zip(deps, paths, strict=True)
    ]
    return paths[0][:count], branches


def product(factors) -> Operator:
    """Of the operators, the first one applied first."""
    return functools.reduce(lambda before, J: compose(J, before), factors)


def identity(dep: Traced) -> Identity:
    """Of one traced tensor."""
    dims = dep.batch_dims
    return Identity(dep.value.shape[dims:], dep.value, dep.value.shape[:dims])


def _unknown(func, args, kwargs, deps):
    """An op without a rule: every floating-point tensor that it gives is linearised."""
    name = getattr(func, "__name__", "function")
    spec, others, at, aliases = None, None, [], []

    def run(*values):
        nonlocal spec, others
        before = [v._version for v in values]
        a, k = with_values(deps, values, args, kwargs)
        leaves, spec = tree_flatten(func(*a, **k))
        if any(v._version != old for v, old in zip(values, before, strict=True)):
            raise Unsupported
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if leaf.requires_grad and leaf.is_floating_point():
                    at.append(i)
                    aliases.append(leaf._is_view() or any(leaf is v for v in values))
            elif not isinstance(leaf, _PLAIN):
                raise Unsupported
        others = leaves
        return tuple(leaves[i] for i in at), tuple(t for t in leaves if isinstance(t, Tensor))

    results, vjp, tensors = _vjp(run, [dep.value for dep in deps])
    tensors = iter(tensors)
    leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in others]
    for i, (y, alias) in enumerate(zip(results, aliases, strict=True)):
        leaves[at[i]] = _linearised(name, vjp, results, i, y, deps, not alias)
        if alias:
            for dep in deps:
                dep.fresh = False
    return tree_unflatten(leaves, spec)


def _vjp(run, values):
    """torch.func.vjp with auxiliary tensors, also of a function without any result."""
    empty = False

    def tried(*values):
        nonlocal empty
        results, tensors = run(*values)
        empty = not results
        return (values[0].new_zeros(()),) if empty else results, tensors

    results, vjp, tensors = torch.func.vjp(tried, *values, has_aux=True)
    return () if empty else results, vjp, tensors


def _linearised(name, vjp, results, i, y, deps, fresh):
    def only(v):  # cotangents of the other results are zero
        return vjp(tuple(v if j == i else torch.zeros_like(r) for j, r in enumerate(results)))

    dims = deps[0].batch_dims
    check_independent(only, y, dims, name)
    products = Linearisation(only, y, name)
    shared, branches = _branches(deps)
    if branches is None:
        operator = MatrixFree(products, deps[0].value, y, dims)
    else:
        operator = Joined(products, branches, y)
    return follow(y, deps, shared, operator, fresh)


def check_independent(vjp, y: Tensor, batch_dims: int, label: str) -> None:
    """That each sample is mapped by itself: then VJPs scale, sample by sample, as cotangents do.

    Args:
        vjp: From a cotangent of ``y`` to those of the inputs.
        y: The result.
        batch_dims: How many first dimensions are the batch.
        label: The function's name.

    Raises:
        ValueError: Samples are mixed.
    """
    batch = y.shape[:batch_dims]
    count = math.prod(batch)
    if count < 2:
        return
    v = torch.arange(1, y.numel() + 1, device=y.device).double().sin().reshape(y.shape)
    scales = torch.linspace(1, 2, count, device=y.device, dtype=torch.float64).reshape(batch)

    def scaled(t):
        return t * scales.reshape(*batch, *(1,) * (t.dim() - batch_dims))

    with torch.no_grad():
        pairs = zip(vjp(v.to(y.dtype)), vjp(scaled(v).to(y.dtype)), strict=True)
        for gx, of_scaled in pairs:
            error = (of_scaled - scaled(gx)).abs()
            if (error > torch.finfo(y.dtype).eps ** 0.5 * of_scaled.abs().max()).any():
                raise ValueError(mixes(label, batch))


def mixes(label: str, batch) -> str:
    """The text of that error."""
    return (
        f"jacobian: {label} mixes the samples of the batch {list(batch)}; allowed: functions that "
        "map each by itself, or batch_dims=0"
    )
