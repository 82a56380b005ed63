"""The ops whose Jacobian has a structure, by the functions that torch and this package call."""

from __future__ import annotations

import functools
import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import functional as ours
from .composite import BlockDiagonal, compose
from .structures import Dense, Diagonal, DiagonalPlusLowRank, Permutation, Selection
from .tracing import RULES, Refused, Traced, Unsupported, identity, join, mixes, with_values

_HOMES = (torch, Tensor, F, ours)


def _register(names: str, rule) -> None:
    """Make it the rule of all functions and methods of these names."""
    for name in names.split():
        RULES.update({getattr(home, name): rule for home in _HOMES if hasattr(home, name)})


# Constants: what a tensor says of itself.


def _constant(func, args, kwargs, deps):
    return func(*with_values(deps, [d.value for d in deps], *args), **kwargs)


_register("dim size numel is_floating_point __len__ stride ndimension element_size", _constant)
for _name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"):
    RULES[getattr(Tensor, _name).__get__] = _constant


# Elementwise: diagonal.

_ACTIVATIONS = """relu leaky_relu elu selu celu relu6 hardtanh sigmoid tanh gelu silu softplus mish
    hardswish hardsigmoid logsigmoid softsign tanhshrink hardshrink softshrink threshold prelu rrelu
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout"""
_FUNCTIONS = """abs neg negative exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal
    sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erfinv lgamma digamma logit
    clamp clip clamp_min clamp_max nan_to_num pow __pow__ __rpow__ float_power where masked_fill
    maximum minimum lerp atan2 hypot addcmul addcdiv logaddexp"""
_PRODUCTS = "mul multiply __mul__ __rmul__ div divide true_divide __truediv__ __div__"
_QUOTIENTS = "__rdiv__ __rtruediv__"
_SUMS = "add __add__ __radd__ sub subtract __sub__ rsub __rsub__"


def _elementwise(func, args, kwargs, deps, slopes=None):
    """``diag(f'(x))`` for each argument, or the multiple of I that the slope says."""
    name = func.__name__
    writes = name in _IN_PLACE
    if writes and not isinstance(args[0], Traced) or kwargs.get("out") is not None:
        raise Unsupported
    may_write = writes or kwargs.get("inplace") or any(a is True for a in args[1:])
    written = same = False

    def run(*values):
        nonlocal written, same
        zs = [v.clone() for v in values] if may_write else values
        versions = [z._version for z in zs]
        a, k = with_values(deps, zs, args, kwargs)
        y = func(*a, **k)
        written = any(z._version != old for z, old in zip(zs, versions, strict=True))
        same = any(y is z for z in zs)
        return y

    y, vjp = torch.func.vjp(run, *(dep.value for dep in deps))
    if any(dep.value.shape != y.shape for dep in deps):
        if written:
            raise Unsupported
        return None
    if same and not written:
        operators = [identity(deps[0])]
    elif slopes is not None:
        operators = [a * identity(d) for a, d in zip(slopes, deps, strict=True)]
        operators = [o.J if o.a == 1 else o for o in operators]
    else:
        dims = deps[0].batch_dims
        operators = [Diagonal(d, dims) for d in vjp(torch.ones_like(y))]
    result = join(y, deps, operators, fresh=not same or written)
    if same and not written:
        deps[0].fresh = False
    return args[0].overwrite(result) if written else result


def _sum(func, args, kwargs, deps):
    """``a + b`` and ``a - b``: multiples of I."""
    if kwargs or len(args) != 2:
        return _elementwise(func, args, kwargs, deps)
    reversed_ = "rsub" in func.__name__
    signs = (-1 if reversed_ else 1, 1 if reversed_ or "add" in func.__name__ else -1)
    slopes = [sum(s for s, a in zip(signs, args, strict=True) if a is d) for d in deps]
    return _elementwise(func, args, kwargs, deps, slopes)


def _times(func, args, kwargs, deps):
    """A product with a number is a multiple of I, with a tensor a diagonal."""
    slopes = None
    if not kwargs and len(args) == 2 and isinstance(args[1], Real) and args[1]:
        slopes = [args[1] if "mul" in func.__name__ else 1 / args[1]]
    return _elementwise(func, args, kwargs, deps, slopes)


def _in_place(names):
    """The names of the variants that write into their first argument."""
    dunders = (f"__i{name.strip('_')}__" for name in names.split() if name.startswith("__"))
    return " ".join([*(f"{name}_" for name in names.split()), *dunders])


_IN_PLACE = set(_in_place(" ".join((_ACTIVATIONS, _FUNCTIONS, _PRODUCTS, _SUMS))).split())
_register(" ".join((_ACTIVATIONS, _FUNCTIONS, _QUOTIENTS)), _elementwise)
_register(_in_place(f"{_ACTIVATIONS} {_FUNCTIONS}"), _elementwise)
_register(f"{_PRODUCTS} {_in_place(_PRODUCTS)}", _times)
_register(f"{_SUMS} {_in_place(_SUMS)}", _sum)


# Fused ops: what they are made of.


def _made_of(func):
    def register(parts):
        RULES[func] = lambda func, args, kwargs, deps: parts(*args, **kwargs)
        return parts

    return register


@_made_of(ours.linear_act_dropout)
def _linear_act_dropout(
    input, weight, bias=None, activation="gelu", p=0.0, training=True, residual=None, generator=None
):
    y = ours.linear(input, weight, bias)
    if activation == "gelu_tanh":
        y = ours.gelu(y, approximate="tanh")
    elif activation != "identity":
        y = getattr(ours, activation)(y)
    y = ours.dropout(y, p, training, generator=generator)
    return y if residual is None else residual + y


@_made_of(ours.softmax_dropout)
def _softmax_dropout(input, dim=-1, p=0.0, training=True, generator=None):
    return ours.dropout(ours.softmax(input, dim), p, training, generator=generator)


@_made_of(ours.dropout_add)
def _dropout_add(input, residual, p=0.0, training=True, generator=None):
    return residual + ours.dropout(input, p, training, generator=generator)


@_made_of(ours.add_layer_norm)
def _add_layer_norm(input, residual, *args, **kwargs):
    total = input + residual
    return ours.layer_norm(total, *args, **kwargs), total


@_made_of(ours.add_rms_norm)
def _add_rms_norm(input, residual, *args, **kwargs):
    total = input + residual
    return ours.rms_norm(total, *args, **kwargs), total


@_made_of(ours.swiglu)
def _swiglu(gate, up):
    return ours.silu(gate) * up


@_made_of(ours.geglu)
def _geglu(gate, up, approximate="none"):
    return ours.gelu(gate, approximate) * up


# Ops of which the first argument alone has the structure.


def _of_first(names):
    def register(rule):
        def run(func, args, kwargs, deps):
            alone = len(deps) == 1 and args and args[0] is deps[0]
            return rule(func, *args, **kwargs) if alone else None

        _register(names, run)
        return rule

    return register


@_of_first("linear")
def _linear(func, input, weight, bias=None):
    """The weight, for each row."""
    rows = input.value.dim() - 1 - input.batch_dims
    if rows < 0 or weight.dim() != 2:
        return None
    y = func(input.value, weight, bias)
    return join(y, [input], [_each(_rows_times(weight, y), rows)])


def _matmul(func, args, kwargs, deps):
    """``x @ W`` and ``W @ x`` with a constant matrix ``W``."""
    if kwargs or len(args) != 2 or len(deps) != 1 or args[0] is args[1]:
        return None
    dep, left = deps[0], args[0] is deps[0]
    matrix = args[1] if left else args[0]
    rows = dep.value.dim() - 1 - dep.batch_dims
    if rows < 0 or matrix.dim() != 2 or not left and dep.value.dim() != 1:
        return None
    y = func(*with_values(deps, [dep.value], *args))
    return join(y, deps, [_each(_rows_times(matrix.mT if left else matrix, y), rows)])


_register("matmul __matmul__ __rmatmul__ mm mv", _matmul)


def _rows_times(weight, y):
    weight = weight if torch.is_grad_enabled() else weight.detach()
    return Dense(weight, batch_shape=y.shape[:-1])


def _each(operator, dims):
    """Block-diagonal in the last ``dims`` dimensions of its batch."""
    return BlockDiagonal(operator, dims) if dims else operator


def _along(x, batch_dims, dims, make):
    """The operator ``make(rows)`` of vectors along ``dims``, on tensors of the shape of ``x``.

    None where ``dims`` are dimensions of the batch.
    """
    dims = sorted(d % x.dim() for d in dims)
    if not dims or dims[0] < batch_dims:
        return None
    others = [d for d in range(batch_dims, x.dim()) if d not in dims]
    batch, shape = x.shape[:batch_dims], x.shape[batch_dims:]
    moved = x.permute(*range(batch_dims), *others, *dims)
    rows = moved.reshape(*batch, *(x.shape[d] for d in others), math.prod(x.shape[d] for d in dims))
    blocks = _each(make(rows), len(others))
    if rows.shape == x.shape and moved.stride() == x.stride():
        return blocks
    index = torch.arange(math.prod(shape), device=x.device).reshape(shape)
    index = index.permute([d - batch_dims for d in (*others, *dims)]).flatten()
    index = None if others + dims == list(range(batch_dims, x.dim())) else index
    P = Permutation(index, shape, rows.shape[batch_dims:], x, batch)
    return compose(P.T, compose(blocks, P))


def _softmax(make):
    def rule(func, input, dim=None, _stacklevel=3, dtype=None):
        if dim is None or dtype is not None or input.value.dim() == 0:
            return None
        y = func(input.value, dim)
        operator = _along(y, input.batch_dims, [dim], make)
        return None if operator is None else join(y, [input], [operator])

    return rule


_of_first("softmax")(_softmax(DiagonalPlusLowRank.of_softmax))
_of_first("softmin")(_softmax(functools.partial(DiagonalPlusLowRank.of_softmax, sign=-1.0)))
_of_first("log_softmax")(_softmax(DiagonalPlusLowRank.of_log_softmax))


def _norm(func, y_args, input, dims, weight, eps, centred, label):
    def make(rows):
        return DiagonalPlusLowRank.of_norm(rows, weight, eps, centred, label)

    operator = _along(input.value, input.batch_dims, dims, make)
    return None if operator is None else join(func(input.value, *y_args), [input], [operator])


@_of_first("layer_norm")
def _layer_norm(func, input, normalized_shape, weight=None, bias=None, eps=1e-5, _=None):
    dims = range(-len(normalized_shape), 0)
    row = None if weight is None else weight.flatten()
    args = normalized_shape, weight, bias, eps
    return _norm(func, args, input, dims, row, eps, True, "LayerNorm")


@_of_first("rms_norm")
def _rms_norm(func, input, normalized_shape, weight=None, eps=None):
    dims = range(-len(normalized_shape), 0)
    row = None if weight is None else weight.flatten()
    wide = torch.float64 if input.value.dtype is torch.float64 else torch.float32
    known = torch.finfo(wide).eps if eps is None else eps
    args = normalized_shape, weight, eps
    return _norm(func, args, input, dims, row, known, False, "RMSNorm")


@_of_first("group_norm")
def _group_norm(func, input, num_groups, weight=None, bias=None, eps=1e-5, _=None):
    x, batch_dims = input.value, input.batch_dims
    if batch_dims > 1:
        return None
    rows = x.reshape(len(x), num_groups, -1)
    row = None
    if weight is not None:
        of_channels = (-1, *(1,) * (x.dim() - 2))
        row = weight.reshape(of_channels).expand(x.shape[1:]).reshape(rows.shape[1:])
    blocks = DiagonalPlusLowRank.of_norm(rows, row, eps, True, "GroupNorm")
    P = Permutation(None, x.shape[batch_dims:], rows.shape[batch_dims:], x, x.shape[:batch_dims])
    operator = compose(P.T, compose(_each(blocks, 2 - batch_dims), P))
    return join(func(x, num_groups, weight, bias, eps), [input], [operator])


@_of_first("batch_norm")
def _batch_norm(
    func,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    _=None,
):
    if func is torch.batch_norm:  # its arguments come in another order
        return None
    x = input.value
    args = running_mean, running_var, weight, bias, training, momentum, eps
    if training and input.batch_dims:
        raise Refused(mixes("batch_norm in training", x.shape[: input.batch_dims]))
    if training:
        dims = [d for d in range(x.dim()) if d != 1]
        row = None if weight is None else weight[:, None]
        return _norm(func, args, input, dims, row, eps, True, "BatchNorm")
    if input.batch_dims > 1:
        return None
    d = (running_var + eps).rsqrt()
    d = (d if weight is None else d * weight).to(x.dtype).reshape(-1, *(1,) * (x.dim() - 2))
    diagonal = Diagonal(d.expand(x.shape), input.batch_dims)
    return join(func(x, *args), [input], [diagonal])


# Elements of x in other places: selections and permutations.


@_of_first(
    "reshape view view_as flatten ravel unflatten permute transpose t swapaxes swapdims movedim "
    "moveaxis squeeze unsqueeze flip fliplr flipud roll rot90 pixel_shuffle pixel_unshuffle "
    "channel_shuffle __getitem__ select narrow index_select chunk split unbind contiguous clone"
)
def _selected(func, input, *args, **kwargs):
    x, dims = input.value, input.batch_dims
    batch, n = x.shape[:dims], math.prod(x.shape[dims:])
    order = torch.arange(x.numel(), device=x.device)
    leaves, spec = tree_flatten(func(order.reshape(x.shape), *args, **kwargs))
    operators = []
    for moved in leaves:
        if moved.shape[:dims] != batch:
            return None
        index = moved.reshape(math.prod(batch), -1) if moved.numel() else moved.new_zeros(1, 0)
        first = index[0]
        if not torch.equal(index, order.reshape(-1, n)[:, :1] + first):
            return None  # each sample takes other elements
        kind = Permutation if torch.equal(first.sort().values, order[:n]) else Selection
        same = torch.equal(first, order[:n])
        if same and moved.shape == x.shape:
            operators.append(identity(input))
        else:
            shapes = x.shape[dims:], moved.shape[dims:]
            operators.append(kind(None if same else first, *shapes, x, batch))
    ys = tree_flatten(func(x, *args, **kwargs))[0]
    input.fresh = False
    pairs = zip(ys, operators, strict=True)
    return tree_unflatten([join(y, [input], [J], fresh=False) for y, J in pairs], spec)


for _name in ("T", "mT"):
    RULES[getattr(Tensor, _name).__get__] = RULES[Tensor.t]


def _cat(func, args, kwargs, deps):
    """Each tensor goes to its place in the result: the transpose of a selection."""
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dims, batch = deps[0].batch_dims, deps[0].value.shape[: deps[0].batch_dims]
    if dim % deps[0].dim() < dims or kwargs.get("out") is not None:
        return None
    y = func(with_values(deps, [d.value for d in deps], tensors)[0], dim)
    places = torch.arange(math.prod(y.shape[dims:]), device=y.device).reshape(y.shape[dims:])
    sizes = [t.shape[dim] for t in tensors]
    operators = dict.fromkeys(map(id, deps))
    for t, place in zip(tensors, places.split(sizes, dim % y.dim() - dims), strict=True):
        if isinstance(t, Traced):
            index, shape = place.flatten(), t.value.shape[dims:]
            J = Selection(index, y.shape[dims:], shape, y, batch).T
            former = operators[id(t)]
            operators[id(t)] = J if former is None else former + J
    return join(y, deps, list(operators.values()))


_register("cat concat concatenate", _cat)
