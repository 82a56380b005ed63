"""Drop-in modules: torch.nn's constructor arguments, attributes and state_dict keys, our kernels.

Each class is a subclass of its torch.nn namesake, so isinstance checks hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional as F
from .kernels import resolve
from .kernels._arguments import check_p

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CELU",
    "ELU",
    "GELU",
    "GroupNorm",
    "SELU",
    "CrossEntropyLoss",
    "Dropout",
    "DropoutAdd",
    "GeGLU",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LinearActDropout",
    "LogSigmoid",
    "LogSoftmax",
    "Mish",
    "MultiheadAttention",
    "RMSNorm",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "SoftmaxDropout",
    "Softmin",
    "Softplus",
    "SwiGLU",
    "Tanh",
]


class Linear(torch.nn.Linear):
    """As :class:`torch.nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b``."""
        return F.linear(input, self.weight, self.bias)


class ReLU(torch.nn.ReLU):
    """As :class:`torch.nn.ReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.relu`."""
        return F.relu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """As :class:`torch.nn.LeakyReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.leaky_relu`."""
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class ELU(torch.nn.ELU):
    """As :class:`torch.nn.ELU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.elu`."""
        return F.elu(input, self.alpha, self.inplace)


class SELU(torch.nn.SELU):
    """As :class:`torch.nn.SELU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.selu`."""
        return F.selu(input, self.inplace)


class CELU(torch.nn.CELU):
    """As :class:`torch.nn.CELU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.celu`."""
        return F.celu(input, self.alpha, self.inplace)


class ReLU6(torch.nn.ReLU6):
    """As :class:`torch.nn.ReLU6`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.relu6`."""
        return F.relu6(input, self.inplace)


class Hardtanh(torch.nn.Hardtanh):
    """As :class:`torch.nn.Hardtanh`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.hardtanh`."""
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """As :class:`torch.nn.Sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.sigmoid`."""
        return F.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """As :class:`torch.nn.Tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.tanh`."""
        return F.tanh(input)


class GELU(torch.nn.GELU):
    """As :class:`torch.nn.GELU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.gelu`."""
        return F.gelu(input, self.approximate)


class SiLU(torch.nn.SiLU):
    """As :class:`torch.nn.SiLU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.silu`."""
        return F.silu(input, self.inplace)


class Softplus(torch.nn.Softplus):
    """As :class:`torch.nn.Softplus`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.softplus`."""
        return F.softplus(input, self.beta, self.threshold)


class Mish(torch.nn.Mish):
    """As :class:`torch.nn.Mish`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.mish`."""
        return F.mish(input, self.inplace)


class Hardswish(torch.nn.Hardswish):
    """As :class:`torch.nn.Hardswish`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.hardswish`."""
        return F.hardswish(input, self.inplace)


class Hardsigmoid(torch.nn.Hardsigmoid):
    """As :class:`torch.nn.Hardsigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.hardsigmoid`."""
        return F.hardsigmoid(input, self.inplace)


class LogSigmoid(torch.nn.LogSigmoid):
    """As :class:`torch.nn.LogSigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.logsigmoid`."""
        return F.logsigmoid(input)


class Softmax(torch.nn.Softmax):
    """As :class:`torch.nn.Softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.softmax`."""
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """As :class:`torch.nn.LogSoftmax`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.log_softmax`."""
        return F.log_softmax(input, self.dim, _stacklevel=5)


class Softmin(torch.nn.Softmin):
    """As :class:`torch.nn.Softmin`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.softmin`."""
        return F.softmin(input, self.dim, _stacklevel=5)


class LayerNorm(torch.nn.LayerNorm):
    """As :class:`torch.nn.LayerNorm`, right at every order of differentiation."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.layer_norm`."""
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(torch.nn.GroupNorm):
    """As :class:`torch.nn.GroupNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.group_norm`."""
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _BatchNorm:
    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.batch_norm`."""
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean of all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        running = self.running_mean, self.running_var
        if self.training and not self.track_running_stats:
            running = None, None
        training = self.training or running == (None, None)
        return F.batch_norm(input, *running, self.weight, self.bias, training, momentum, self.eps)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """As :class:`torch.nn.BatchNorm1d`, right at every order of differentiation."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """As :class:`torch.nn.BatchNorm2d`, right at every order of differentiation."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """As :class:`torch.nn.BatchNorm3d`, right at every order of differentiation."""


class _InstanceNorm:
    def _apply_instance_norm(self, input):
        return F.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """As :class:`torch.nn.InstanceNorm1d`, right at every order of differentiation."""


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """As :class:`torch.nn.InstanceNorm2d`, right at every order of differentiation."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """As :class:`torch.nn.InstanceNorm3d`, right at every order of differentiation."""


class RMSNorm(torch.nn.RMSNorm):
    """As :class:`torch.nn.RMSNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.rms_norm`."""
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """As :class:`torch.nn.CrossEntropyLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.cross_entropy`."""
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MultiheadAttention(torch.nn.MultiheadAttention):
    """As :class:`torch.nn.MultiheadAttention`, in tiles unless the weights are wanted.

    Asking for the weights (``need_weights``, True by default) builds the matrix of scores.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values, and the weights or None.

        Masks are torch's: True, or -inf, hides a key.  ``is_causal`` says that ``attn_mask`` is the
        causal one, which is then not read.

        Raises:
            AssertionError: A mask is neither bool nor floating, or ``key_padding_mask`` has another
                shape than (N, keys), or (keys) without a batch.
            RuntimeError: Other shapes or dtypes do not fit, or ``is_causal`` is given without a
                mask.
        """
        op = "MultiheadAttention"
        if is_causal and attn_mask is None:
            raise RuntimeError(f"{op}: is_causal is True and attn_mask is None; it needs the mask")
        alone = query.dim() == 2
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise RuntimeError(
                f"{op}: query, key and value have {query.dim()}, {key.dim()} and {value.dim()} "
                "dimensions; allowed: 3, or 2 without a batch, for all"
            )
        same = key is query and value is key
        q, k, v = (
            t.unsqueeze(0) if alone else t if self.batch_first else t.transpose(0, 1)
            for t in (query, key, value)
        )
        if not len(q) == len(k) == len(v):
            raise RuntimeError(
                f"{op}: query, key and value are batches of {len(q)}, {len(k)} and {len(v)}; "
                "allowed: the same for all"
            )
        self._check_masks(op, key_padding_mask, attn_mask, q, k, alone)
        if key_padding_mask is not None:
            padding = key_padding_mask.reshape(k.shape[0], 1, 1, k.shape[1])
        q, k, v = self._project(q, k, v, same)
        mask = None if attn_mask is None or is_causal else self._of_heads(attn_mask, q)
        extra = 0
        if self.bias_k is not None:
            k, v = (
                torch.cat([t, b.expand(len(t), 1, -1)], 1)
                for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
            extra += 1
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = (torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (k, v))
            extra += 1
        p = self.dropout if self.training else 0.0
        if is_causal and (need_weights or extra):
            mask = ~torch.ones(q.shape[2], k.shape[2] - extra, dtype=torch.bool).tril().to(q.device)
            is_causal = False
        if key_padding_mask is not None:
            mask = padding if mask is None else _both(padding, mask, q.dtype)
        if mask is not None:
            mask = _visible(torch.nn.functional.pad(mask, (0, extra)), q.dtype)
        weights = None
        if need_weights:
            scores = q.shape[-1] ** -0.5 * q @ k.mT
            if mask is not None:
                hidden = mask.dtype is torch.bool
                scores = scores.masked_fill(~mask, -torch.inf) if hidden else scores + mask
            weights = F.softmax_dropout(scores, -1, p)
            o = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if alone else weights
        else:
            o = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal)
        o = F.linear(o.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        o = o.squeeze(0) if alone else o if self.batch_first else o.transpose(0, 1)
        return o, weights

    def _check_masks(self, op, key_padding_mask, attn_mask, q, k, alone):
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and not (mask.dtype is torch.bool or mask.is_floating_point()):
                raise AssertionError(
                    f"{op}: {name} has dtype {str(mask.dtype).removeprefix('torch.')}; allowed: "
                    "bool, or a floating one that is added to the scores"
                )
        batch, queries, keys = len(q), q.shape[1], k.shape[1]
        if key_padding_mask is not None:
            shape = (keys,) if alone else (batch, keys)
            if key_padding_mask.shape != shape:
                raise AssertionError(
                    f"{op}: key_padding_mask has shape {list(key_padding_mask.shape)}; it must be "
                    f"{list(shape)}"
                )
        if attn_mask is not None:
            shapes = (queries, keys), (batch * self.num_heads, queries, keys)
            if attn_mask.shape not in shapes:
                raise RuntimeError(
                    f"{op}: attn_mask has shape {list(attn_mask.shape)}; allowed: "
                    f"{list(shapes[0])} or {list(shapes[1])}"
                )

    def _project(self, q, k, v, same):
        e = self.embed_dim
        bias = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(e)
        if not self._qkv_same_embed_dim:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif same:
            return F.linear(q, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.split(e)
        return tuple(map(F.linear, (q, k, v), weights, bias))

    def _of_heads(self, mask, q):
        """attn_mask (queries, keys) or (batch * heads, queries, keys) with four dimensions."""
        if mask.dim() == 2:
            return mask[None, None]
        return mask.unflatten(0, (q.shape[0], self.num_heads))


def _both(padding, mask, dtype):
    """Two masks of torch's kind, of which either hides."""
    if padding.dtype is torch.bool and mask.dtype is torch.bool:
        return padding | mask
    return _added(padding, dtype) + _added(mask, dtype)


def _added(mask, dtype):
    """What is added to scores for it."""
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


def _visible(mask, dtype):
    """As scaled_dot_product_attention takes it, where True is what is seen."""
    return ~mask if mask.dtype is torch.bool else mask.to(dtype)


class Dropout(torch.nn.Dropout):
    """As :class:`torch.nn.Dropout`, with a mask that is never stored."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.dropout`."""
        return F.dropout(input, self.p, self.training, self.inplace)


class LinearActDropout(Linear):
    """``Dropout(activation(Linear(x)))`` in one pass; state_dict keys of :class:`torch.nn.Linear`.

    A second argument, the residual, is added to the result in the same pass.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the result.
        bias: If False, no bias is learnt.
        activation: A name that :func:`jacobian_ops.functional.linear_act_dropout` takes.
        p: Dropout probability.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: ``activation`` is unknown, or ``p`` outside [0, 1].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "gelu",
        p: float = 0.0,
        device=None,
        dtype=None,
    ):
        resolve("LinearActDropout", activation)
        check_p("LinearActDropout", p)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.p = p

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply :func:`jacobian_ops.functional.linear_act_dropout`."""
        return F.linear_act_dropout(
            *(input, self.weight, self.bias, self.activation, self.p, self.training),
            residual=residual,
        )

    def extra_repr(self) -> str:
        """The arguments, for repr."""
        return f"{super().extra_repr()}, activation={self.activation!r}, p={self.p}"


class SoftmaxDropout(torch.nn.Module):
    """``Dropout(Softmax(x))`` in one pass, as attention uses it.

    Args:
        dim: The dimension that sums to one.
        p: Dropout probability.

    Raises:
        ValueError: ``p`` is outside [0, 1].
    """

    def __init__(self, dim: int = -1, p: float = 0.0):
        check_p("SoftmaxDropout", p)
        super().__init__()
        self.dim = dim
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.softmax_dropout`."""
        return F.softmax_dropout(input, self.dim, self.p, self.training)

    def extra_repr(self) -> str:
        """The arguments, for repr."""
        return f"dim={self.dim}, p={self.p}"


class SwiGLU(torch.nn.Module):
    """``silu(gate) * up`` of the halves of the last dimension: the first half is the gate."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.swiglu`."""
        return F.swiglu(*_halves("SwiGLU", input))


class GeGLU(torch.nn.Module):
    """``gelu(gate) * up`` of the halves of the last dimension: the first half is the gate.

    Args:
        approximate: As of :class:`torch.nn.GELU`.
    """

    def __init__(self, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.geglu`."""
        return F.geglu(*_halves("GeGLU", input), self.approximate)

    def extra_repr(self) -> str:
        """The arguments, for repr."""
        return f"approximate={self.approximate!r}"


def _halves(op, input):
    if input.dim() == 0 or input.shape[-1] % 2:
        raise RuntimeError(
            f"{op}: input has shape {list(input.shape)}; allowed: an even last dimension"
        )
    return input.chunk(2, -1)


class DropoutAdd(torch.nn.Module):
    """``residual + Dropout(x)`` in one pass: the end of a residual block.

    Args:
        p: Dropout probability.

    Raises:
        ValueError: ``p`` is outside [0, 1].
    """

    def __init__(self, p: float = 0.0):
        check_p("DropoutAdd", p)
        super().__init__()
        self.p = p

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """Apply :func:`jacobian_ops.functional.dropout_add`."""
        return F.dropout_add(input, residual, self.p, self.training)

    def extra_repr(self) -> str:
        """The arguments, for repr."""
        return f"p={self.p}"


def __getattr__(name):
    if name == "SyncBatchNorm":
        raise AttributeError(
            "jacobian_ops.nn has no SyncBatchNorm, as it has no statistics over processes; "
            "torch.nn.SyncBatchNorm goes on as it is, and replace leaves it"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
