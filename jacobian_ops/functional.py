"""Drop-in for torch.nn.functional, plus fused ops that torch lacks.

Names, arguments, defaults, dtypes and errors are torch's.  Every op has VJP, JVP and their
derivatives under every transform of torch.func, forward AD and torch.compile.  Sums run in float32
or wider; bfloat16 and float16 results are rounded once.
"""

from __future__ import annotations

import math
import os

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function,
    has_torch_function_unary,
)

from . import _backend
from .autograd import activation as _activation
from .autograd import attention as _attention
from .autograd import cross_entropy as _entropy
from .autograd import dropout as _dropout
from .autograd import gated as _gated
from .autograd import group_norm as _groups
from .autograd import linear as _linear
from .autograd import linear_cross_entropy as _linear_entropy
from .autograd import norm as _norms
from .autograd import rotary as _rotary
from .autograd import softmax as _softmax
from .autograd.rule import CPU_KEYS, overwritable, reverse_may_follow
from .kernels import _gemm, resolve
from .kernels._arguments import ALLOWED_DTYPES, check_p, check_tensor, name_of, normalize_dim
from .kernels.cross_entropy import wide

try:
    from . import distributed as _distributed
except (ImportError, AttributeError):  # a torch without it, or one whose DTensor has changed
    _distributed = None

_C = torch._C

__all__ = [
    "batch_norm",
    "add_layer_norm",
    "add_rms_norm",
    "celu",
    "cross_entropy",
    "dropout",
    "dropout_add",
    "elu",
    "geglu",
    "gelu",
    "group_norm",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "instance_norm",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_act_dropout",
    "linear_cross_entropy",
    "linear_swiglu",
    "log_softmax",
    "logsigmoid",
    "mish",
    "relu",
    "relu6",
    "rms_norm",
    "scaled_dot_product_attention",
    "rotary_embedding",
    "selu",
    "sigmoid",
    "silu",
    "softmax",
    "softmax_dropout",
    "softmin",
    "softplus",
    "swiglu",
    "tanh",
]

# Plain calls on fewer elements than this go to the native op, whose shorter way through C++ then
# counts for more than the kernel.  0: never.
NATIVE_BELOW = int(os.environ.get("JACOBIAN_OPS_NATIVE_BELOW", "32768"))
# Where that size is a multiple of it: without a graph, and with one, whose way through Python is
# longer.  Measured (docs/performance.md): what is cheap to compute runs at the speed of the caches
# either way, and ours is ahead only in what leaves them.
_CHEAP = (128, 128)
_TIMES = {
    "relu": _CHEAP,
    "leaky_relu": _CHEAP,
    "hardtanh": _CHEAP,
    "relu6": _CHEAP,
    "hardswish": _CHEAP,
    "hardsigmoid": _CHEAP,
    "sigmoid": (8, 128),
    "gelu": (64, 4),
    "layer_norm": (8, 8),
    "silu": (4, 1),
    "softmax": (4, 16),
    "log_softmax": (4, 16),
    "softmin": (4, 16),
}
# Native ops that cannot stand in for ours where a graph is recorded: their backward has no
# derivative, or none in forward mode.
_NOT_RECORDED = ("hardsigmoid", "mish", "silu")
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _tiny(t: Tensor, op: str = "") -> bool:
    """Whether the native op should take ``t``: few elements, and no transform around them.

    What the native op refuses is said better by the way of the others, so callers go on then.
    """
    return (
        not torch.compiler.is_compiling()  # first: Dynamo cannot follow the rest
        and type(t) in _PLAIN_TYPES
        and t.numel() < NATIVE_BELOW * _times(op, t)
        and _ordinary(t)
    )


def _ordinary(t: Tensor) -> bool:
    """Whether ``t`` is an ordinary tensor of the CPU, with no transform around it."""
    return (
        not torch.compiler.is_compiling()
        and _dense(t)
        and not _C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # a dual number looks like any other
        # Modes and traces see the same op whatever the size.
        and not _C._len_torch_function_stack()
        and not _C._len_torch_dispatch_stack()
        and _C._get_tracing_state() is None
    )


def _dense(t) -> bool:
    """Whether ``t`` is a tensor that native kernels of the CPU take as it is."""
    return (
        type(t) in _PLAIN_TYPES and t.dtype in _backend.DTYPES and _C._dispatch_keys(t) == CPU_KEYS
    )


def _sharded(*tensors) -> bool:
    """Whether one of them is a DTensor."""
    return _distributed is not None and any(
        type(t) not in _PLAIN_TYPES and isinstance(t, _distributed.DTensor) for t in tensors
    )


def _times(op: str, t: Tensor) -> int:
    times = _TIMES.get(op)
    return 1 if times is None else times[t.requires_grad and torch.is_grad_enabled()]


def _ours(op: str, input: Tensor) -> bool:
    """Whether there are kernels for ``input``; what native ops take as well is left to them."""
    if not isinstance(input, Tensor):
        raise TypeError(
            f"{op}(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}"
        )
    if not _supported(input):
        return False
    return input.is_cpu or input.is_meta or _backend.usable(op, "input", input)


def _native(op: str, native, input: Tensor, *args, **kwargs):
    """The native op for an input that we have no kernels for (integers, complex, sparse)."""
    try:
        return native(input, *args, **kwargs)
    except (RuntimeError, TypeError, ValueError) as e:
        raise type(e)(
            f"{op}: input has dtype {name_of(input.dtype)} and layout {input.layout}; allowed: "
            f"strided {ALLOWED_DTYPES}, or what the native op takes ({e})"
        ) from e


def _pointwise(public, native, input, inplace=False, **params):
    """The common way of all activations; ``params`` are those of torch.nn.functional."""
    op = public.__name__
    if _tiny(input, op) and not (
        op in _NOT_RECORDED and input.requires_grad and torch.is_grad_enabled()
    ):
        if inplace:  # never tried twice: an error may come after the write
            return native(input, inplace=True, **params)
        try:
            return native(input, **params)
        except (RuntimeError, TypeError, ValueError):
            pass
    if has_torch_function_unary(input):
        return handle_torch_function(public, (input,), input, **_given(inplace=inplace), **params)
    if not _ours(op, input):
        return _native(op, native, input, **_given(inplace=inplace), **params)
    if op == "softplus":
        input = _full_precision(input)
    f = resolve(op, op, **params)
    args = (None, f.function, f.params, 0.0)
    if not inplace:
        return _activation.activation(input, *args)
    recording = torch.is_grad_enabled()
    if overwritable(input) and not (
        recording
        and input.requires_grad
        and not _activation.survives_overwriting(f.function, f.params)
    ):
        return _activation.activation_inplace(input, *args)
    # The derivative may need the input, or the input's tangent, which are about to be overwritten.
    return input.copy_(_activation.activation(input.clone() if recording else input, *args))


def _given(**flags):
    """The flags that are set: native ops without ``inplace`` have no such argument."""
    return {k: v for k, v in flags.items() if v is not None and v is not False}


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``max(x, 0)``; derivative 0 at 0.  Keeps the result for the derivative."""
    return _pointwise(relu, F.relu, input, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``x`` for x > 0, else ``negative_slope * x``.  Keeps the result for a positive slope."""
    return _pointwise(leaky_relu, F.leaky_relu, input, inplace, negative_slope=negative_slope)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``x`` for x > 0, else ``alpha * expm1(x)``.  Clevert et al., arXiv:1511.07289."""
    return _pointwise(elu, F.elu, input, inplace, alpha=alpha)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """ELU with the constants that keep mean and variance.  Klambauer et al., arXiv:1706.02515."""
    return _pointwise(selu, F.selu, input, inplace)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``x`` for x > 0, else ``alpha * expm1(x / alpha)``.  Barron, arXiv:1704.07483."""
    return _pointwise(celu, F.celu, input, inplace, alpha=alpha)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """``min(max(x, 0), 6)``; derivative 0 at both ends.  Keeps the result for the derivative."""
    return _pointwise(relu6, F.relu6, input, inplace)


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """``min(max(x, min_val), max_val)``; derivative 0 at both ends.

    Raises:
        ValueError: ``min_val`` is greater than ``max_val``.
    """
    if min_val > max_val:
        raise ValueError(
            f"hardtanh: min_val cannot be greater than max_val, got min_val={min_val}, "
            f"max_val={max_val}"
        )
    return _pointwise(hardtanh, F.hardtanh, input, inplace, min_val=min_val, max_val=max_val)


def sigmoid(input: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``.  Keeps the result for the derivative."""
    return _pointwise(sigmoid, torch.sigmoid, input)


def tanh(input: Tensor) -> Tensor:
    """Hyperbolic tangent.  Keeps the result for the derivative."""
    return _pointwise(tanh, torch.tanh, input)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``x * Phi(x)``, or its tanh approximation.  Hendrycks and Gimpel, arXiv:1606.08415.

    Keeps relative accuracy for large negative x, where ``(1 + erf) / 2`` cancels.

    Raises:
        RuntimeError: ``approximate`` is neither "none" nor "tanh".
    """
    if _tiny(input, "gelu" if approximate == "none" else ""):
        try:
            return F.gelu(input, approximate=approximate)
        except (RuntimeError, TypeError):
            pass
    if approximate not in ("none", "tanh"):
        raise RuntimeError(
            f"gelu: approximate argument must be either none or tanh, got {approximate!r}"
        )
    if has_torch_function_unary(input):
        return handle_torch_function(gelu, (input,), input, approximate=approximate)
    if not _ours("gelu", input):
        return _native("gelu", F.gelu, input, approximate=approximate)
    f = "gelu" if approximate == "none" else "gelu_tanh"
    return _activation.activation(input, None, f, (), 0.0)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``x * sigmoid(x)``.  Elfwing et al., arXiv:1702.03118."""
    return _pointwise(silu, F.silu, input, inplace)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """``log(1 + exp(beta * x)) / beta``, and ``x`` where ``beta * x > threshold``."""
    return _pointwise(softplus, F.softplus, input, beta=beta, threshold=threshold)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """``x * tanh(softplus(x))``, with one exponential.  Misra, arXiv:1908.08681."""
    return _pointwise(mish, F.mish, input, inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """``x * min(max(x + 3, 0), 6) / 6``.  Howard et al., arXiv:1905.02244."""
    return _pointwise(hardswish, F.hardswish, input, inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``min(max(x + 3, 0), 6) / 6``; derivative 0 at both ends."""
    return _pointwise(hardsigmoid, F.hardsigmoid, input, inplace)


def logsigmoid(input: Tensor) -> Tensor:
    """``log(sigmoid(x))`` without overflow."""
    return _pointwise(logsigmoid, F.logsigmoid, input)


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Softmax over one dimension.

    ``y = exp(x - max) / sum``; ``J = diag(y) - y y^T`` is symmetric and applied in O(n).

    Args:
        input: Logits of any shape.
        dim: The dimension that sums to one.
        _stacklevel: Of the warning that torch gives when ``dim`` is None.
        dtype: Cast ``input`` to this first.

    Returns:
        Contiguous probabilities of the shape of ``input``; kept for the derivative.

    Raises:
        IndexError: ``dim`` is out of range.
    """
    return _along_dim(softmax, F.softmax, input, dim, _stacklevel, dtype)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x - logsumexp(x)`` over one dimension; arguments as for :func:`softmax`."""
    return _along_dim(log_softmax, F.log_softmax, input, dim, _stacklevel, dtype)


def softmin(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``softmax(-x)`` over one dimension, in one pass; arguments as for :func:`softmax`."""
    return _along_dim(softmin, F.softmin, input, dim, _stacklevel, dtype)


def _as_vector(run, input: Tensor) -> Tensor:
    """``run`` of a tensor without dimensions, which the softmax family takes as one element."""
    return run(input.reshape(1)).reshape(())


def _along_dim(public, native, input, dim, _stacklevel, dtype):
    op = public.__name__
    if dim is not None and dtype is None and _tiny(input, op):
        try:
            return native(input, dim)
        except (RuntimeError, TypeError, IndexError):
            pass
    if has_torch_function_unary(input):
        return handle_torch_function(
            public, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype
        )
    if dim is None:
        dim = F._get_softmax_dim(op, input.dim(), _stacklevel + 1)
    if dtype is not None:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{op}: dtype must be torch.dtype, not {type(dtype).__name__}")
        input = input.to(dtype=dtype)
    if not _ours(op, input):
        return _native(op, native, input, dim)
    if dtype is None:
        input = _full_precision(input)
    dim = normalize_dim(op, dim, input.dim())
    if input.dim() == 0:
        return _as_vector(lambda x: public(x, dim), input)
    if _sharded(input) and _distributed.shards(input, dim):
        y = _distributed.log_softmax(-input if op == "softmin" else input, dim)
        return (y if op == "log_softmax" else y.exp()).to(input.dtype)
    if op == "log_softmax":
        return _softmax.log_softmax(input, dim)
    return _softmax.softmax(input, dim, -1.0 if op == "softmin" else 1.0)


def draw_seed(input: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A new dropout seed as a tensor.

    ``randint`` is the only random op, so manual_seed, checkpoint, torch.compile and vmap's
    ``randomness=`` treat our dropout as they treat any random op.
    """
    # The overload with a generator knows no symbolic shapes.
    extra = _given(generator=generator)
    device = input.device
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, **extra)
    return _distributed.shard_seed(seed, input) if _sharded(input) else seed


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by 1 / (1 - p).

    The mask is drawn again in VJP and JVP and never stored; it does not depend on layout or thread
    count.  Srivastava et al., JMLR 2014; the generator is Philox, Salmon et al., SC 2011.

    Args:
        input: Any shape.
        p: Probability of an element to be zeroed.
        training: If False, return ``input``.
        inplace: Write into ``input``.
        generator: Where the seed comes from; None is torch's default generator.

    Returns:
        Contiguous tensor of the shape and dtype of ``input``.

    Raises:
        ValueError: ``p`` is outside [0, 1].
    """
    if has_torch_function_unary(input):
        extra = _given(generator=generator)
        return handle_torch_function(
            dropout, (input,), input, p=p, training=training, inplace=inplace, **extra
        )
    check_p("dropout", p)
    ours = _ours("dropout", input)
    if not training or p == 0.0:
        return input
    if not ours:
        return _native("dropout", F.dropout, input, p, training, inplace)
    if _sharded(input):
        x = _distributed.summed(input)
        y = _distributed.pinned(_dropout.dropout(x, draw_seed(x, generator), p))
        return input.copy_(y) if inplace else y
    seed = draw_seed(input, generator)
    if not inplace:
        return _dropout.dropout(input, seed, p)
    if overwritable(input):
        return _dropout.dropout_inplace(input, seed, p)
    return input.copy_(_dropout.dropout(input, seed, p))


def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: float = 0.0,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``residual + dropout(input)`` in one pass: a residual block's ``I + J``.

    Args:
        input: The block's output, any shape.
        residual: The block's input; another shape or dtype broadcasts and promotes as ``+`` does.
        p: Dropout probability.
        training: If False, no dropout.
        generator: Where the seed comes from; None is torch's default generator.

    Raises:
        ValueError: ``p`` is outside [0, 1].
    """
    if has_torch_function((input, residual)):
        return handle_torch_function(
            dropout_add,
            (input, residual),
            input,
            residual,
            p=p,
            training=training,
            **_given(generator=generator),
        )
    check_p("dropout_add", p)
    check_tensor("dropout_add", "residual", residual)
    ours = _ours("dropout_add", input)
    if not training or p == 0.0:
        return residual + input
    for name, t in (("input", input), ("residual", residual)):
        if not ours or not _strided(t):
            raise _no_kernels("dropout_add", name, t)
    _check_device("dropout_add", input, residual=residual)
    alike = input.shape == residual.shape and input.dtype == residual.dtype
    if not alike or _sharded(input, residual):
        return residual + dropout(input, p, generator=generator)
    return _dropout.dropout_add(input, residual, draw_seed(input, generator), p)


def softmax_dropout(
    input: Tensor,
    dim: int = -1,
    p: float = 0.0,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``dropout(softmax(input, dim), p)`` in one pass, as attention uses it.

    Keeps ``input`` and the seed for the derivative; probabilities are recomputed row by row in
    cache.

    Args:
        input: Logits of any shape.
        dim: The dimension that sums to one.
        p: Dropout probability.
        training: If False, no dropout.
        generator: Where the seed comes from; None is torch's default generator.

    Raises:
        IndexError: ``dim`` is out of range.
        ValueError: ``p`` is outside [0, 1].
    """
    if has_torch_function_unary(input):
        extra = _given(generator=generator)
        return handle_torch_function(
            softmax_dropout, (input,), input, dim=dim, p=p, training=training, **extra
        )
    check_p("softmax_dropout", p)
    if not training or p == 0.0:
        return softmax(input, dim)
    if not _ours("softmax_dropout", input):
        raise _no_kernels("softmax_dropout", "input", input)
    input = _full_precision(input)
    dim = normalize_dim("softmax_dropout", dim, input.dim())
    if input.dim() == 0:
        return _as_vector(lambda x: softmax_dropout(x, dim, p, generator=generator), input)
    if _sharded(input):
        return dropout(softmax(input, dim), p, generator=generator)
    return _softmax.softmax_dropout(input, draw_seed(input, generator), dim, p)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` in one pass.  Shazeer, arXiv:2002.05202.

    ``gate`` and ``up`` may be the halves of one tensor, as ``chunk(2, -1)`` gives them: they are
    read where they are.

    Args:
        gate: Of any shape.
        up: The same; another shape or dtype broadcasts and promotes as ``*`` does.

    Returns:
        Contiguous tensor of the shape of ``gate``, which is kept for the derivative, with ``up``.
    """
    if has_torch_function((gate, up)):
        return handle_torch_function(swiglu, (gate, up), gate, up)
    return _gate("swiglu", "silu", silu, gate, up)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """``gelu(gate) * up`` in one pass; as :func:`swiglu`.

    Raises:
        RuntimeError: ``approximate`` is neither "none" nor "tanh".
    """
    if has_torch_function((gate, up)):
        return handle_torch_function(geglu, (gate, up), gate, up, approximate=approximate)
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"geglu: approximate is {approximate!r}; allowed: 'none', 'tanh'")
    f = "gelu" if approximate == "none" else "gelu_tanh"
    return _gate("geglu", f, lambda x: gelu(x, approximate), gate, up)


def _gate(op, f, activation, gate, up):
    """What swiglu and geglu share."""
    check_tensor(op, "gate", gate)
    check_tensor(op, "up", up)
    for name, t in (("gate", gate), ("up", up)):
        if not _ours(op, t):
            raise _no_kernels(op, name, t)
    _check_device(op, gate, "gate", up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        return activation(gate) * up
    return _gated.gated(gate, up, f)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``sum = input + residual`` and :func:`layer_norm` of it, in one pass.

    Args:
        input: A block's output, of any shape that ends in ``normalized_shape``.
        residual: The block's input; another shape or dtype broadcasts and promotes as ``+`` does.
        normalized_shape: As for :func:`layer_norm`.
        weight: As for :func:`layer_norm`.
        bias: As for :func:`layer_norm`.
        eps: As for :func:`layer_norm`.

    Returns:
        The normalized sum, and the sum, the residual of the next block.  It is kept for the
        derivative, with ``weight``; ``input`` and ``residual`` are not.

    Raises:
        RuntimeError: As for :func:`layer_norm`.
        ValueError: ``eps`` is negative.
    """
    if has_torch_function((input, residual, weight, bias)):
        return handle_torch_function(
            add_layer_norm,
            (input, residual, weight, bias),
            input,
            residual,
            normalized_shape,
            weight=weight,
            bias=bias,
            eps=eps,
        )
    op = "add_layer_norm"
    return _norm(op, input, normalized_shape, weight, bias, eps, centred=True, residual=residual)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum = input + residual`` and :func:`rms_norm` of it, in one pass.

    Arguments, results and errors as for :func:`add_layer_norm` and :func:`rms_norm`.
    """
    if has_torch_function((input, residual, weight)):
        return handle_torch_function(
            add_rms_norm,
            (input, residual, weight),
            input,
            residual,
            normalized_shape,
            weight=weight,
            eps=eps,
        )
    op = "add_rms_norm"
    if eps is None:
        check_tensor(op, "input", input)
        check_tensor(op, "residual", residual)
        eps = _epsilon(torch.promote_types(input.dtype, residual.dtype))
    return _norm(op, input, normalized_shape, weight, None, eps, centred=False, residual=residual)


def layer_norm(
    input: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``weight * (x - mean) / sqrt(var + eps) + bias`` over the last dimensions.

    Right at every order of differentiation, where the native op takes mean and variance for
    constants from the second derivative in forward mode, and the third in reverse mode, on.

    Args:
        input: Of any shape that ends in ``normalized_shape``.
        normalized_shape: The last dimensions of ``input``.
        weight: Of that shape, or None for ones; of the dtype of ``input``, or float32 where that
            is bfloat16 or float16: then it is rounded to that first, and so is its gradient.
        bias: Of that shape, or None for zeros; dtypes as for ``weight``.
        eps: Added to the variance, which is the population's.

    Returns:
        Contiguous tensor of the shape of ``input``, which is kept for the derivative, with
        ``weight`` and no statistics.

    Raises:
        RuntimeError: ``normalized_shape`` is empty or not the last dimensions of ``input``, or
            ``weight`` or ``bias`` has another shape or dtype.
        ValueError: ``eps`` is negative.
    """
    if _tiny(input, "layer_norm") and input.dtype in _FULL and eps >= 0 and input.numel():
        shape = _row_shape(normalized_shape)
        if shape and _like(weight, input, shape) and _like(bias, input, shape):
            return _norms.native_layer_norm(input, weight, bias, shape, eps)
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            layer_norm,
            (input, weight, bias),
            input,
            normalized_shape,
            weight=weight,
            bias=bias,
            eps=eps,
        )
    if not _ours("layer_norm", input):
        return _native("layer_norm", F.layer_norm, input, normalized_shape, weight, bias, eps)
    return _norm("layer_norm", input, normalized_shape, weight, bias, eps, centred=True)


def rms_norm(
    input: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimensions.

    Arguments, result and errors as for :func:`layer_norm`, but ``weight`` may have any floating
    dtype, as in torch.  ``eps=None`` is the machine epsilon of the type that sums run in: of
    float32 for bfloat16 and float16.
    """
    if has_torch_function((input, weight)):
        return handle_torch_function(
            rms_norm, (input, weight), input, normalized_shape, weight=weight, eps=eps
        )
    if not _ours("rms_norm", input):
        return _native("rms_norm", F.rms_norm, input, normalized_shape, weight, eps)
    if eps is None:
        eps = _epsilon(input.dtype)
    return _norm("rms_norm", input, normalized_shape, weight, None, eps, centred=False)


def _row_shape(normalized_shape) -> tuple:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _like(t, input, shape):
    """Whether ``t`` is absent, or an ordinary tensor of the last dimensions of ``input``."""
    if input.shape[-len(shape) :] != shape:
        return False
    return t is None or (_dense(t) and t.dtype is input.dtype and t.shape == shape)


def _epsilon(dtype):
    """rms_norm's default: of the type that sums run in."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _norm(op, input, normalized_shape, weight, bias, eps, centred, residual=None):
    """What norms share, with messages in the words of their arguments."""
    if residual is not None:
        for name, t in (("input", input), ("residual", residual)):
            check_tensor(op, name, t)
            if not _ours(op, t):
                raise _no_kernels(op, name, t)
        _check_device(op, input, residual=residual)
        # Autocast's cast is the norm's, not the sum's.
        if _is_cast(input) or input.shape != residual.shape or input.dtype != residual.dtype:
            total = input + residual
            return _norm(op, total, normalized_shape, weight, bias, eps, centred), total
    shape = _row_shape(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"{op}: normalized_shape is {list(shape)}; allowed: one or more of the last dimensions "
            f"of input, which has shape {list(input.shape)}"
        )
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}; it must be at least 0")
    input = _full_precision(input)
    columns = [
        _parameter(op, input, name, _full_precision(t), shape, "normalized_shape", strict=centred)
        for name, t in (("weight", weight), ("bias", bias))
    ]
    rest = *columns, len(shape), float(eps), centred
    if residual is not None:
        return _norms.add_norm(input, residual, *rest)
    return _norms.norm(input, *rest)


def rotary_embedding(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding: pairs ``(a, b)`` become ``(a cos - b sin, b cos + a sin)``.

    An orthogonal map, whose VJP is the inverse rotation; it is linear in ``input``, and in ``cos``
    and ``sin``, which may be learnt.  Heads may be transposed views: they are read where they are,
    and the result is laid out alike.  Su et al., arXiv:2104.09864.

    Args:
        input: (..., S, D), as (batch, heads, sequence, features).
        cos: (S, R/2) with R <= D, or more dimensions, of a shape that broadcasts to
            ``input.shape[:-1]``: (batch, 1, S, R/2) for positions of each sample.  Features from R
            on are passed through.  Tables that repeat their angles, (S, R), are sliced first:
            ``cos[..., : R // 2]``.
        sin: Of the shape of ``cos``; both are taken in the dtype of ``input``.
        interleaved: Whether a pair are neighbours, features (2i, 2i + 1), as in GPT-J, and not
            (i, i + R/2), as in GPT-NeoX and Llama.

    Returns:
        Tensor of the shape of ``input``; ``cos`` and ``sin`` are kept for the derivative, and
        ``input`` where they are learnt.

    Raises:
        RuntimeError: Shapes do not fit.
    """
    op = "rotary_embedding"
    tensors = input, cos, sin
    if has_torch_function(tensors):
        return handle_torch_function(
            rotary_embedding, tensors, *tensors, **_given(interleaved=interleaved)
        )
    check_tensor(op, "cos", cos)
    check_tensor(op, "sin", sin)
    for name, t in (("input", input), ("cos", cos), ("sin", sin)):
        if not _ours(op, t):
            raise _no_kernels(op, name, t)
    _check_device(op, input, cos=cos, sin=sin)
    if cos.shape != sin.shape:
        raise RuntimeError(
            f"{op}: sin has shape {list(sin.shape)}; it must be that of cos, {list(cos.shape)}"
        )
    fits = 0 < cos.dim() <= input.dim() and 2 * cos.shape[-1] <= input.shape[-1]
    if not fits or any(
        n not in (1, m) for n, m in zip(cos.shape[-2::-1], input.shape[-2::-1], strict=False)
    ):
        raise RuntimeError(
            f"{op}: cos has shape {list(cos.shape)}; allowed: what broadcasts to "
            f"{[*input.shape[:-1], 'R/2']} with R at most {list(input.shape[-1:])}"
        )
    added = (None,) * (input.dim() - cos.dim())
    cos, sin = (t.to(input.dtype)[added] for t in (cos, sin))
    return _rotary.rotary(input, cos, sin, bool(interleaved), False)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits with classes or probabilities; see :func:`torch.nn.functional`'s.

    Reads the logits once, and once more for the gradient; keeps no softmax.  In 16 bits the losses
    are reduced in float32 and rounded once.

    Args:
        input: Logits (C), (N, C) or (N, C, d1, ...).
        target: int64 (or uint8) classes of the shape of ``input`` without C, or probabilities like
            ``input``, which may be differentiated too.
        weight: Of the classes, (C), in the dtype of ``input``.  Not differentiable with classes.
        size_average: Deprecated, see ``reduction``.
        ignore_index: The class of rows that do not count; only for classes.
        reduce: Deprecated, see ``reduction``.
        reduction: "none", "sum", or "mean": over the rows that count, weighted by ``weight`` of
            their classes; for probabilities over all rows.
        label_smoothing: What part of the target is spread evenly over the classes.

    Returns:
        A number, or with "none" the losses of the shape of ``input`` without C.

    Raises:
        IndexError: A class outside [0, C) that is not ``ignore_index``.  On a GPU it makes NaN of
            its row instead: nothing waits there to tell.
        RuntimeError: Shapes or dtypes do not fit, or ``label_smoothing`` is not in [0, 1].
        ValueError: ``reduction`` is unknown, or ``target`` has another batch size.
    """
    if size_average is not None or reduce is not None:
        reduction = F._Reduction.legacy_get_string(size_average, reduce)
    options = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    if _tiny(input) and _plain(target) and (weight is None or _tiny(weight)):
        try:
            return F.cross_entropy(input, target, weight, **options)
        except (RuntimeError, TypeError, ValueError, IndexError):
            pass
    if has_torch_function((input, target, weight)):
        return handle_torch_function(
            cross_entropy, (input, target, weight), input, target, weight=weight, **options
        )
    op = "cross_entropy"
    if not _ours(op, input):
        return _native(op, F.cross_entropy, input, target, weight, **options)
    check_tensor(op, "target", target)
    _check_loss(op, reduction, label_smoothing)
    input = _in_full(input)
    if input.dim() == 0:
        raise RuntimeError(
            f"{op}: input has no dimensions; allowed: (C), (N, C) or (N, C, d1, ...)"
        )
    dim = 0 if input.dim() == 1 else 1
    if _sharded(input):
        target, weight = (_distributed.replicated(t, input) for t in (target, weight))
    weight = None if weight is None else _in_full(weight)
    weight = _class_weight(op, weight, input.dtype, input.shape[dim])
    if target.shape == input.shape and target.numel() != 0 or target.is_floating_point():
        return _of_probabilities(
            op, input, target, weight, dim, ignore_index, reduction, label_smoothing
        )
    target = _classes(op, target, (*input.shape[:dim], *input.shape[dim + 1 :]))
    rest = dim, ignore_index, float(label_smoothing)
    if weight is None and _sharded(input) and _distributed.shards(input, dim):
        losses = _distributed.cross_entropy(input, target, *rest)
    else:
        losses = _entropy.cross_entropy(input, target, weight, *rest)
    return _reduce(losses, target, weight, ignore_index, reduction).to(input.dtype)


def _plain(t) -> bool:
    return type(t) in _PLAIN_TYPES and _C._dispatch_keys(t) == CPU_KEYS


def _check_loss(op, reduction, label_smoothing):
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"{op}: reduction is {reduction!r}; allowed: 'none', 'mean' or 'sum' "
            f"({reduction} is not a valid value for reduction)"
        )
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(
            f"{op}: label_smoothing is {label_smoothing}; it must be between 0.0 and 1.0"
        )


def _in_full(input):
    """Autocast's cast to float32 of what it computes in that dtype on every device."""
    device = input.device.type
    if input.dtype in _HALVES and device != "meta" and torch.is_autocast_enabled(device):
        return input.float()
    return input


def _class_weight(op, weight, dtype, count):
    """Class weights in the dtype that losses have."""
    if weight is None:
        return None
    check_tensor(op, "weight", weight)
    if weight.shape != (count,):
        raise RuntimeError(
            f"{op}: weight has shape {list(weight.shape)}; it must have one number for each of the "
            f"{count} classes"
        )
    if weight.dtype != dtype and not (dtype in _HALVES and weight.dtype == torch.float32):
        raise RuntimeError(
            f"{op}: weight has dtype {name_of(weight.dtype)}, input has {name_of(dtype)}; they "
            "must be the same, or weight float32 where input is bfloat16 or float16"
        )
    return weight.to(wide(dtype))


def _classes(op, target, shape):
    """Classes as int64 of the shape that rows have."""
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            f"{op}: target has dtype {name_of(target.dtype)}; allowed: int64 or uint8 for classes, "
            "or probabilities of the shape of input"
        )
    if len(shape) == 0 and target.shape == (1,):
        target = target.reshape(())
    if tuple(target.shape) != tuple(shape):
        same_batch = target.dim() and len(shape) and target.shape[0] == shape[0]
        raise (RuntimeError if same_batch or not len(shape) else ValueError)(
            f"{op}: target has shape {list(target.shape)}; it must be {list(shape)}, input's "
            "without classes, or that of input for probabilities"
        )
    return target.long()


def _reduce(losses, target, weight, ignore_index, reduction):
    """Losses of classes, reduced in their own dtype."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    # Where no row counts the mean is nan and its cotangent infinite, which rows must not see.
    total = losses.masked_fill(target == ignore_index, 0).sum()
    return total / _denominator(target, weight, ignore_index)


def _denominator(target, weight, ignore_index):
    """What the mean of losses divides by: rows that count, or the weights of their classes."""
    counts = target != ignore_index
    if weight is None:
        return counts.sum()
    return (weight[target.clamp(0, len(weight) - 1)] * counts).sum()


def _of_probabilities(op, input, target, weight, dim, ignore_index, reduction, smoothing):
    if not target.is_floating_point():
        raise RuntimeError(
            f"{op}: target has dtype {name_of(target.dtype)} and the shape of input; allowed: a "
            "floating dtype for probabilities, or the shape of input without classes"
        )
    if target.shape != input.shape:
        raise RuntimeError(
            f"{op}: target has dtype {name_of(target.dtype)} and shape {list(target.shape)}; "
            f"allowed: int64 classes, or probabilities of the shape of input, {list(input.shape)}"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"{op}: ignore_index is {ignore_index}; allowed: a negative one with probabilities, "
            "where it is not supported"
        )
    dtype = torch.promote_types(input.dtype, target.dtype)
    logits, target = input.to(dtype), target.to(dtype)
    if weight is not None and _may_be_differentiated(weight):  # it becomes a part of the target
        column = weight.to(dtype).reshape([-1 if i == dim else 1 for i in range(input.dim())])
        target = column * ((1 - smoothing) * target + smoothing / input.shape[dim])
        weight, smoothing = None, 0.0
    losses = _entropy.cross_entropy(logits, target, weight, dim, -100, float(smoothing))
    if reduction != "none":
        losses = losses.sum() if reduction == "sum" else losses.mean()
    return losses.to(dtype)


def _may_be_differentiated(t):
    return (
        t.requires_grad
        or torch.compiler.is_compiling()
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options=None,
    chunk_size: int | None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without all the logits.

    Rows are taken in chunks: their logits are made, used and overwritten by their gradient.  So it
    is in the forward and in every derivative but the third, and forward over forward.  In 32 bits
    and more the forward of a sum or mean makes the gradients too, where nothing but a backward pass
    can follow, and keeps them for it; else the gradient makes the logits anew.  Probabilities are
    as large as the logits would be, and taken at once.

    Args:
        input: (K) or (*, K).
        linear_weight: (C, K).
        target: Classes (*), or probabilities (*, C).
        linear_bias: (C), or None.
        weight: Of the classes, (C), in the dtype of ``input``, or None.
        reduction: As for :func:`cross_entropy`.
        ignore_index: The class of rows that do not count; None for -100.
        label_smoothing: What part of the target is spread evenly over the classes.
        options: torch's, for its own chunks; not used.
        chunk_size: Rows of a chunk; None for as many as fit into the last cache.

    Returns:
        A number, or with "none" the losses (*).

    Raises:
        IndexError: A class outside [0, C), as for :func:`cross_entropy`.
        RuntimeError: Shapes or dtypes do not fit, or ``label_smoothing`` is not in [0, 1].
        ValueError: ``reduction`` is unknown, or ``chunk_size`` less than 1.
    """
    tensors = input, linear_weight, target, linear_bias, weight
    if has_torch_function(tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            input,
            linear_weight,
            target,
            linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            chunk_size=chunk_size,
        )
    op = "linear_cross_entropy"
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size}; it must be at least 1, or None")
    check_tensor(op, "target", target)
    ignore_index = -100 if ignore_index is None else ignore_index
    by_class = _sharded(linear_weight) and _distributed.shards(linear_weight, 0)
    if target.is_floating_point() or by_class or not _ours(op, input):
        logits = linear(input, linear_weight, linear_bias)
        rows = logits.shape[:-1]
        if not target.is_floating_point():
            target = _classes(op, target, rows).reshape(-1)
        elif target.shape == logits.shape:
            target = target.reshape(rows.numel(), logits.shape[-1])
        else:
            raise RuntimeError(
                f"{op}: target has dtype {name_of(target.dtype)} and shape {list(target.shape)}; "
                f"allowed: int64 classes {list(rows)}, or probabilities {list(logits.shape)}"
            )
        losses = cross_entropy(
            logits.reshape(rows.numel(), logits.shape[-1]),
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return losses.reshape(rows) if reduction == "none" else losses
    _check_loss(op, reduction, label_smoothing)
    _check_linear(op, linear_weight, linear_bias)
    input, linear_weight, linear_bias = _low_precision(input, linear_weight, linear_bias)
    rows, bias = _fit_linear(op, input, linear_weight, linear_bias)
    weight = _class_weight(op, weight, rows.dtype, linear_weight.shape[0])
    target = _classes(op, target, input.shape[:-1])
    args = rows, linear_weight, target.reshape(-1), bias, weight
    args = *args, ignore_index, float(label_smoothing), chunk_size or 0
    if reduction == "none":
        losses = _linear_entropy.linear_cross_entropy(*args).reshape(target.shape)
    else:
        losses = _linear_entropy.total_loss(*args)
        if reduction == "mean":
            losses = losses / _denominator(target, weight, ignore_index)
    return losses.to(_in_full(rows[:0]).dtype)


def _parameter(op, input, name, t, shape, what, strict=True):
    """A weight or bias of ``shape``, which is called ``what``, in the dtype of ``input``."""
    if t is None:
        return None
    check_tensor(op, name, t)
    if tuple(t.shape) != shape:
        raise RuntimeError(
            f"{op}: {name} has shape {list(t.shape)}; it must be {what}, {list(shape)}"
        )
    _check_parameter_dtype(op, input, name, t, strict)
    return t.to(input.dtype)


def _check_parameter_dtype(op, input, name, t, strict=True):
    wider = t.dtype is torch.float32 and input.dtype in _HALVES
    if strict and t.dtype is not input.dtype and not wider:
        raise RuntimeError(
            f"{op}: {name} has dtype {name_of(t.dtype)}; allowed: that of input, "
            f"{name_of(input.dtype)}, or float32 where input is bfloat16 or float16"
        )


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``weight * (x - mean) / sqrt(var + eps) + bias`` over groups of channels of each sample.

    Wu and He, arXiv:1803.08494.

    Args:
        input: (N, C) or (N, C, *).
        num_groups: A divisor of C.
        weight: (C,), or None for ones; dtypes as for :func:`layer_norm`.
        bias: (C,), or None for zeros.
        eps: Added to the variance, which is the population's.

    Returns:
        Contiguous tensor of the shape of ``input``, which is kept for the derivative, with
        ``weight`` and no statistics.

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
        ValueError: A single value in all groups of a number, or ``eps`` is negative.
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            group_norm, (input, weight, bias), input, num_groups, weight=weight, bias=bias, eps=eps
        )
    if not _ours("group_norm", input):
        return _native("group_norm", F.group_norm, input, num_groups, weight, bias, eps)
    _check_channels("group_norm", input)
    n, c, *rest = input.shape
    if not isinstance(num_groups, (int, torch.SymInt)):
        raise TypeError(f"group_norm: num_groups must be int, not {type(num_groups).__name__}")
    if num_groups <= 0:
        raise RuntimeError(
            f"group_norm: Expected num groups to be greater than 0, got num_groups={num_groups}"
        )
    if c % num_groups:
        raise RuntimeError(
            "group_norm: Expected number of channels in input to be divisible by num_groups, but "
            f"got input of shape {list(input.shape)} and num_groups={num_groups}"
        )
    _check_values("group_norm", (n * c // num_groups, num_groups, *rest))
    _check_eps("group_norm", eps)
    input, weight, bias = map(_full_precision, (input, weight, bias))
    weight, bias = _of_channels("group_norm", input, weight, bias)
    return _groups.group_norm(input, weight, bias, None, num_groups, float(eps))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``weight * (x - mean) / sqrt(var + eps) + bias`` over all values of a channel.

    Right at every order of differentiation, where the native op takes mean and variance for
    constants, see :func:`layer_norm`.  Ioffe and Szegedy, arXiv:1502.03167.

    Args:
        input: (N, C) or (N, C, *).
        running_mean: (C,), used unless in training, else moved towards the batch's, or None; no
            derivative; dtypes as for ``weight``.
        running_var: The same of the variance, which is the unbiased one here.
        weight: (C,), or None for ones; dtypes as for :func:`layer_norm`.
        bias: (C,), or None for zeros.
        training: Whether mean and variance are those of the batch.
        momentum: How far running statistics move, from 0 to 1.
        eps: Added to the variance, which is the population's in training.

    Returns:
        Contiguous tensor of the shape of ``input``, which is kept for the derivative, with
        ``weight`` and no statistics of the batch.

    Raises:
        RuntimeError: Shapes or dtypes do not fit, running statistics require grad, or are needed
            and absent.
        ValueError: A single value a channel in training, one of the running statistics without the
            other, or an ``eps`` that is negative, or 0 in training.
    """
    tensors = input, running_mean, running_var, weight, bias
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
        )
    if not _ours("batch_norm", input):
        rest = running_mean, running_var, weight, bias, training, momentum, eps
        return _native("batch_norm", F.batch_norm, input, *rest)
    _check_channels("batch_norm", input)
    if training:
        _check_values("batch_norm", tuple(input.shape))
    _check_eps("batch_norm", eps, training)
    weight, bias = _of_channels("batch_norm", input, weight, bias)
    running = _running("batch_norm", input, running_mean, running_var, training)
    if not training:
        wide = torch.float64 if input.dtype is torch.float64 else torch.float32
        stats = torch.stack([t.to(wide) for t in running])
        return _groups.group_norm(input, weight, bias, stats, 0, float(eps))
    if running is None or input.numel() == 0:
        return _groups.group_norm(input, weight, bias, None, 0, float(eps))
    y, stats = _groups.batch_norm(input, weight, bias, float(eps))
    _groups.update(stats, *running, float(momentum))
    return y


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`group_norm` of every channel by itself.

    Arguments, result and errors are those of :func:`batch_norm`, with ``use_input_stats`` for
    ``training``; running statistics move towards the mean of all samples'.  Ulyanov et al.,
    arXiv:1607.08022.
    """
    tensors = input, running_mean, running_var, weight, bias
    if has_torch_function(tensors):
        return handle_torch_function(
            instance_norm,
            tensors,
            input,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            use_input_stats=use_input_stats,
            momentum=momentum,
            eps=eps,
        )
    if not _ours("instance_norm", input):
        rest = running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        return _native("instance_norm", F.instance_norm, input, *rest)
    _check_channels("instance_norm", input)
    n, c, *rest = input.shape
    if use_input_stats and math.prod(rest) == 1:
        raise ValueError(
            "instance_norm: Expected more than 1 spatial element when training, got input size "
            f"{list(input.shape)}"
        )
    _check_eps("instance_norm", eps)
    weight, bias = _of_channels("instance_norm", input, weight, bias)
    running = _running("instance_norm", input, running_mean, running_var, use_input_stats)
    if not use_input_stats:
        return batch_norm(input, *running, weight, bias, False, momentum, eps)
    if running is None or input.numel() == 0:
        return _groups.group_norm(input, weight, bias, None, c, float(eps))
    side_by_side = input.reshape(1, n * c, *rest)
    weight, bias = (None if t is None else t.repeat(n) for t in (weight, bias))
    y, stats = _groups.batch_norm(side_by_side, weight, bias, float(eps))
    _groups.update(stats.unflatten(1, (n, c)).mean(1), *running, float(momentum))
    return y.reshape(input.shape)


def _check_channels(op, input):
    if input.dim() < 2:
        raise RuntimeError(
            f"{op}: Expected at least 2 dimensions for input tensor but received {input.dim()}; "
            "allowed: (N, C) or (N, C, *)"
        )


def _check_values(op, size):
    """A single value is its own mean, and everything would be 0."""
    if math.prod((size[0], *size[2:])) == 1:
        raise ValueError(
            f"{op}: Expected more than 1 value per channel when training, got input size "
            f"{list(size)}"
        )


def _check_eps(op, eps, training=False):
    if not (eps > 0 if training else eps >= 0):
        allowed = "positive during training" if training else "non-negative"
        raise ValueError(f"{op}: eps must be {allowed}, but got {eps}")


def _of_channels(op, input, weight, bias):
    """Weight and bias, checked, in the dtype of ``input``."""
    shape = (input.shape[1],)
    return (
        _parameter(op, input, name, t, shape, "a number for each channel")
        for name, t in (("weight", weight), ("bias", bias))
    )


def _running(op, input, mean, var, training):
    """Running statistics, checked; None where there are none."""
    for name, t in (("running_mean", mean), ("running_var", var)):
        if t is None:
            if training:
                continue
            raise RuntimeError(f"{op}: {name} must be defined in evaluation mode")
        check_tensor(op, name, t)
        if t.shape != input.shape[1:2]:
            raise RuntimeError(
                f"{op}: {name} should contain {input.shape[1]} elements not {list(t.shape)}"
            )
        _check_parameter_dtype(op, input, name, t)
        if t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: {name} requires grad, but the op is not differentiable with respect to it"
            )
    if (mean is None) != (var is None):
        raise ValueError(
            f"{op}: running_mean and running_var must either both be None or neither be None"
        )
    return None if mean is None else (mean, var)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``dropout(softmax(scale * q k^T + mask)) v`` in tiles, with every derivative.

    In bfloat16 the forward is torch's on Intel processors with AMX, which rounds the weights too.

    The matrix of scores is never stored, neither here nor in the VJP, the JVP and the derivatives
    of those, but for the gradient of a float mask and the second derivative in forward mode with
    dropout; third derivatives run in elementary ops.  Keeps the arguments, the result, a number
    a query, and dropout's seed.

    Args:
        query: (*, heads, queries, d); with two dimensions, or without heads, as in torch.
        key: (*, heads, keys, d).
        value: (*, heads, keys, dv).
        attn_mask: Broadcasts to (*, heads, queries, keys).  bool: False hides a key from a query.
            Of the dtype of ``query``, or float32: added to the scores.
        dropout_p: Probability that a weight is dropped.
        is_causal: Whether a query sees only keys up to its own index, counted from the top left.
        scale: Of the scores; None is ``1 / sqrt(d)``.
        enable_gqa: Whether a head of key and value may serve several adjacent ones of query.
        generator: Where dropout's seed comes from; None is torch's default generator.

    Returns:
        (*, heads, queries, dv); zeros for a query that sees no key.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit, or ``dropout_p`` is outside [0, 1].

    References: Dao et al., FlashAttention, 2022, arXiv:2205.14135; Ainslie et al., GQA, 2023,
    arXiv:2305.13245.
    """
    op = "scaled_dot_product_attention"
    tensors = query, key, value, attn_mask
    if has_torch_function(tensors):
        extra = _given(attn_mask=attn_mask, scale=scale, generator=generator)
        extra |= dict(dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa)
        return handle_torch_function(
            scaled_dot_product_attention, tensors, query, key, value, **extra
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"{op}: dropout_p is {dropout_p}; it has to be between 0 and 1")
    named = {"query": query, "key": key, "value": value}
    for name, t in named.items():
        check_tensor(op, name, t)
        if not (_supported(t) if name == "query" else _strided(t)):
            raise _no_kernels(op, name, t)
    if not _ours(op, query):
        return F.scaled_dot_product_attention(
            *(query, key, value, attn_mask, dropout_p, is_causal),
            **dict(scale=scale, enable_gqa=enable_gqa),
        )
    for name, t in named.items():
        if t.dim() < 2:
            raise RuntimeError(
                f"{op}: {name} has shape {list(t.shape)}; allowed: at least two dimensions"
            )
    query, key, value = _low_precision(query, key, value)
    for name, t in (("key", key), ("value", value)):
        if t.dtype != query.dtype:
            raise RuntimeError(
                f"{op}: Expected query, key, and value to have the same dtype, but query has "
                f"{name_of(query.dtype)} and {name} has {name_of(t.dtype)}"
            )
    _check_device(op, query, key=key, value=value, attn_mask=attn_mask)
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"{op}: query, key and value have shapes {list(query.shape)}, {list(key.shape)} and "
            f"{list(value.shape)}; allowed: the same last dimension of query and key, and the "
            "same length of key and value"
        )
    ndim = max(query.dim(), key.dim(), value.dim(), 0 if attn_mask is None else attn_mask.dim())
    query, key, value = _with_heads(op, query, key, value, enable_gqa, ndim)
    keep = bias = None
    if attn_mask is not None:
        keep, bias = _score_mask(op, attn_mask, query, key)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.shape[-1] else 1.0
    by_rank = dropout_p > 0.0 and _sharded(query)
    if by_rank:
        query, key, value = _distributed.for_attention(query, key, value)
    seed = draw_seed(query, generator) if dropout_p > 0.0 else None
    given = query, key, value, keep, bias, seed
    o = _attention.attention(*given, float(scale), is_causal, float(dropout_p))[0]
    o = _distributed.pinned(o) if by_rank else o
    return o if ndim > 2 else o.squeeze(0)


def _with_heads(op, query, key, value, enable_gqa, ndim):
    """The three with the same number of dimensions, at least 3, and the same batch dimensions."""
    given = [list(t.shape) for t in (query, key, value)]
    tensors = [t[(None,) * (max(ndim, 3) - t.dim())] for t in (query, key, value)]
    heads, *kv = (t.shape[-3] for t in tensors)
    many = max(kv)
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
        torch.broadcast_shapes(*((h,) for h in kv))
    except RuntimeError:
        batch = None
    divides = many and heads % many == 0 if enable_gqa else many in (1, heads)
    if batch is None or not (divides or heads == 1):
        raise RuntimeError(
            f"{op}: query, key and value have shapes {given[0]}, {given[1]} and {given[2]}; "
            "allowed: dimensions before the last two that broadcast"
            + (", and heads of key and value that divide those of query" if enable_gqa else "")
        )
    heads = (many if heads == 1 and many else heads, many, many)
    return (
        t.expand(*batch, h, *t.shape[-2:]) if t.shape[:-2] != (*batch, h) else t
        for t, h in zip(tensors, heads, strict=True)
    )


def _score_mask(op, mask, query, key):
    """(keep, bias) with as many dimensions as ``query``."""
    check_tensor(op, "attn_mask", mask)
    scores = (*query.shape[:-1], key.shape[-2])
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            f"{op}: attn_mask has dtype {name_of(mask.dtype)}; allowed: bool, float32, or "
            f"{name_of(query.dtype)} as query has"
        )
    full = mask[(None,) * (len(scores) - mask.dim())] if mask.dim() < len(scores) else mask
    if any(n not in (1, m) for n, m in zip(full.shape, scores, strict=True)):
        raise RuntimeError(
            f"{op}: attn_mask has shape {list(mask.shape)}; allowed: what broadcasts to "
            f"{list(scores)}"
        )
    return (full, None) if mask.dtype is torch.bool else (None, full.to(query.dtype))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + b``.

    Args:
        input: (*, in_features).
        weight: (out_features, in_features), or (in_features).
        bias: (out_features), or () with a one-dimensional weight.

    Returns:
        (*, out_features), or (*) with a one-dimensional weight.

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
    """
    if _left_to_torch(input, weight, bias):
        return F.linear(input, weight, bias)
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(linear, (input, weight, bias), input, weight, bias)
    _check_linear("linear", weight, bias)
    if not (_ours("linear", input) and _strided(weight) and _strided(bias)):
        return _native("linear", F.linear, input, weight, bias)
    if weight.dim() == 1:
        y = linear(input, weight.unsqueeze(0)).squeeze(-1)
        return y if bias is None else y + bias
    input, weight, bias = _low_precision(input, weight, bias)
    if bias is not None and bias.dim() > 1:
        return linear(input, weight) + bias
    x, bias = _fit_linear("linear", input, weight, bias)
    return _unflatten(_linear.linear(x, weight, bias), input)


def _left_to_torch(input, weight, bias) -> bool:
    """Whether the native linear should run: tiny, or torch's products run in any case.

    Its derivatives are right at every order, and its way through C++ is the shorter one.
    """
    if not (_ordinary(input) and _dense(weight) and input.dtype is weight.dtype):
        return False
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return False
    if input.dim() > 2 and not input.is_contiguous():  # there it adds the bias to rounded products
        return False
    if bias is not None and not (
        _dense(bias) and bias.dtype is weight.dtype and bias.shape == weight.shape[:1]
    ):
        return False
    if input.numel() < NATIVE_BELOW and weight.numel() < NATIVE_BELOW:
        return True
    recording = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    return _gemm.torch_is_faster_at_all(input, weight, recording)


def _activate(f, name, x):
    """An activation by the name that :func:`linear_act_dropout` has for it, ``f`` if resolved."""
    if f.function == "identity":
        return x
    if name in __all__:
        return globals()[name](x)
    return _activation.activation(x, None, f.function, f.params, 0.0)


def linear_act_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    p: float = 0.0,
    training: bool = True,
    *,
    residual: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``residual + dropout(activation(x W^T + b), p)`` as one GEMM, with the rest on its tiles.

    In 32 bits and more, without dropout and residual, it is :func:`linear` and then the activation
    where torch's product is the faster one, or the tensors are small.

    Keeps ``x``, ``W``, the seed and either ``z = x W^T + b`` or, for relu, sigmoid and tanh without
    dropout and residual, the result; for the identity neither.

    Args:
        input: (*, in_features).
        weight: (out_features, in_features).
        bias: (out_features).
        activation: A name in :data:`jacobian_ops.kernels.NAMES`, with torch's default parameters.
        p: Dropout probability.
        training: If False, no dropout.
        residual: (*, out_features), as of a block's input; another shape or dtype broadcasts and
            promotes as ``+`` does.
        generator: Where the seed comes from; None is torch's default generator.

    Returns:
        (*, out_features).

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
        ValueError: ``activation`` is unknown, or ``p`` outside [0, 1].
    """
    op = "linear_act_dropout"
    if has_torch_function((input, weight, bias, residual)):
        extra = dict(activation=activation, p=p, training=training, **_given(generator=generator))
        extra |= {} if residual is None else dict(residual=residual)
        tensors = (input, weight, bias)
        return handle_torch_function(linear_act_dropout, (*tensors, residual), *tensors, **extra)
    check_p(op, p)
    f = resolve(op, activation)
    alone = (p == 0.0 or not training) and residual is None
    # Not in 16 bits, where what the activation takes would be rounded.
    if alone and _left_to_torch(input, weight, bias) and input.dtype in _FULL:
        return _activate(f, activation, F.linear(input, weight, bias))
    _check_linear(op, weight, bias)
    if residual is not None:
        check_tensor(op, "residual", residual)
        _check_device(op, input, residual=residual)
    given = dict(input=input, weight=weight, bias=bias, residual=residual)
    for name, t in given.items():
        if not (_strided(t) if name != "input" else _ours(op, t)):
            raise _no_kernels(op, name, t)
    input, weight, bias = _low_precision(input, weight, bias)
    x, bias = _fit_linear(op, input, weight, bias)
    p = p if training else 0.0
    if _sharded(input, weight):  # the product may be a sum over ranks
        y = linear(input, weight, bias)
        y = _activation.activation(y, None, f.function, f.params, 0.0)
        y = dropout(y, p, generator=generator)
        return y if residual is None else residual + y
    seed = draw_seed(input, generator) if p > 0.0 else None
    shape = (*input.shape[:-1], weight.shape[0])
    fused = residual is not None and residual.shape == shape and residual.dtype == x.dtype
    added = residual.reshape(x.shape[0], shape[-1]) if fused else None
    keep_z = f.function != "identity" and reverse_may_follow((x, weight, bias))
    keep_z = keep_z and (fused or not _activation.from_result(f.function, p))
    rest = seed, f.function, f.params, p, keep_z
    y = _unflatten(_linear.linear_act_dropout(x, weight, bias, added, *rest)[0], input)
    return y if fused or residual is None else residual + y


def linear_swiglu(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """``silu(x Wg^T + bg) * (x Wu^T + bu)``: :func:`swiglu` of two :func:`linear`.

    Keeps ``input``, the weights and both pre-activations, which would cost two products to have
    again.

    Args:
        input: (*, in_features).
        gate_weight: (out_features, in_features).
        up_weight: (out_features, in_features).
        gate_bias: (out_features).
        up_bias: (out_features).

    Returns:
        (*, out_features).

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
    """
    gate, up = linear(input, gate_weight, gate_bias), linear(input, up_weight, up_bias)
    if gate.shape != up.shape:
        raise RuntimeError(
            f"linear_swiglu: up_weight has shape {list(up_weight.shape)}; it must be that of "
            f"gate_weight, {list(gate_weight.shape)}"
        )
    return swiglu(gate, up)


def _check_linear(op, weight, bias):
    check_tensor(op, "weight", weight)
    if bias is not None:
        check_tensor(op, "bias", bias)


def _strided(t):
    return t is None or t.layout is torch.strided


def _supported(t):
    """Whether a kernel could take it, on a device that has some."""
    return t.dtype in _backend.DTYPES and t.layout is torch.strided and not t.is_nested


def _check_device(op, input, first="input", **others):
    """Raise unless the tensors are where ``input`` is; a meta tensor would pass the dispatcher."""
    for name, t in others.items():
        if t is not None and t.device != input.device:
            raise RuntimeError(
                f"{op}: {name} is on {t.device}, {first} is on {input.device}; they must be the "
                "same"
            )


def _no_kernels(op, argument, t):
    if _supported(t):
        return NotImplementedError(
            f"{op}: {argument} is on {t.device}, where our kernels do not run; there is no such "
            "native op"
        )
    return NotImplementedError(
        f"{op}: {argument} has dtype {name_of(t.dtype)} and layout {t.layout}; allowed: strided "
        f"{ALLOWED_DTYPES}"
    )


def _fit_linear(op, input, weight, bias):
    """``input`` as a matrix and ``bias`` as a vector, checked before any kernel is chosen."""
    if not (input.is_cpu and weight.is_cpu and (bias is None or bias.is_cpu)):
        _check_device(op, input, weight=weight, bias=bias)
    if weight.dim() != 2:
        raise RuntimeError(
            f"{op}: weight has shape {list(weight.shape)}; allowed: (out_features, in_features)"
        )
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"{op}: mat1 and mat2 shapes cannot be multiplied: input has shape "
            f"{list(input.shape)}, "
            f"weight has {list(weight.shape)}; their last dimensions must be the same"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        if bias.dim() > 1 or bias.numel() != 1:
            raise RuntimeError(
                f"{op}: bias has shape {list(bias.shape)}; allowed: {[weight.shape[0]]} or one "
                "element"
            )
        bias = bias.expand(weight.shape[0])
    fits = weight.dtype is input.dtype and (bias is None or bias.dtype is input.dtype)
    for name, t in () if fits else (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != input.dtype:
            raise RuntimeError(
                f"{op}: expected input, weight and bias to have the same dtype, but input has "
                f"{name_of(input.dtype)} and {name} has {name_of(t.dtype)}"
            )
    if input.dim() == 1:
        return input.unsqueeze(0), bias
    return input if input.dim() == 2 else input.flatten(0, -2), bias


def _unflatten(y, input):
    return y if input.dim() == 2 else y.reshape(*input.shape[:-1], y.shape[-1])


def _full_precision(input):
    """Autocast's cast on a GPU to float32, of what it computes in that dtype there."""
    return input.float() if isinstance(input, Tensor) and _is_cast(input) else input


def _is_cast(t):
    return t.is_cuda and t.dtype in _HALVES and torch.is_autocast_enabled("cuda")


_HALVES = (torch.bfloat16, torch.float16)
_FULL = (torch.float32, torch.float64)


def _low_precision(*tensors):
    """Autocast's cast of linear's arguments, where autocast is on for their device."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
