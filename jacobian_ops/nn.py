"""Drop-in for torch.nn: the same modules, run by jacobian_ops.functional.

Each class is the torch.nn class of its name with another ``forward``: constructor arguments,
attributes, state_dict keys, ``isinstance`` checks and printing are torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional as F
from .kernels import resolve
from .kernels._arguments import check_p

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "Dropout",
    "DropoutAdd",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "Linear",
    "LinearActDropout",
    "LogSigmoid",
    "LogSoftmax",
    "Mish",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "SoftmaxDropout",
    "Softmin",
    "Softplus",
    "Tanh",
]


class Linear(nn.Linear):
    """``y = x W^T + b``; see :func:`jacobian_ops.functional.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        return F.linear(input, self.weight, self.bias)


class ReLU(nn.ReLU):
    """``max(x, 0)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.relu(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """See :func:`jacobian_ops.functional.leaky_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class ELU(nn.ELU):
    """See :func:`jacobian_ops.functional.elu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.elu(input, self.alpha, self.inplace)


class SELU(nn.SELU):
    """See :func:`jacobian_ops.functional.selu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.selu(input, self.inplace)


class CELU(nn.CELU):
    """See :func:`jacobian_ops.functional.celu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.celu(input, self.alpha, self.inplace)


class Hardtanh(nn.Hardtanh):
    """See :func:`jacobian_ops.functional.hardtanh`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLU6(nn.ReLU6):
    """See :func:`jacobian_ops.functional.relu6`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.relu6(input, self.inplace)


class Sigmoid(nn.Sigmoid):
    """``1 / (1 + exp(-x))``."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.sigmoid(input)


class Tanh(nn.Tanh):
    """Hyperbolic tangent."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.tanh(input)


class GELU(nn.GELU):
    """See :func:`jacobian_ops.functional.gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.gelu(input, approximate=self.approximate)


class SiLU(nn.SiLU):
    """``x * sigmoid(x)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.silu(input, self.inplace)


class Softplus(nn.Softplus):
    """See :func:`jacobian_ops.functional.softplus`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.softplus(input, self.beta, self.threshold)


class Mish(nn.Mish):
    """``x * tanh(softplus(x))``."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.mish(input, self.inplace)


class Hardswish(nn.Hardswish):
    """See :func:`jacobian_ops.functional.hardswish`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.hardswish(input, self.inplace)


class Hardsigmoid(nn.Hardsigmoid):
    """See :func:`jacobian_ops.functional.hardsigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.hardsigmoid(input, self.inplace)


class LogSigmoid(nn.LogSigmoid):
    """``log(sigmoid(x))``."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.logsigmoid(input)


class Softmax(nn.Softmax):
    """See :func:`jacobian_ops.functional.softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        """Along ``dim``."""
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(nn.LogSoftmax):
    """See :func:`jacobian_ops.functional.log_softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        """Along ``dim``."""
        return F.log_softmax(input, self.dim, _stacklevel=5)


class Softmin(nn.Softmin):
    """See :func:`jacobian_ops.functional.softmin`."""

    def forward(self, input: Tensor) -> Tensor:
        """Along ``dim``."""
        return F.softmin(input, self.dim, _stacklevel=5)


class Dropout(nn.Dropout):
    """See :func:`jacobian_ops.functional.dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.dropout(input, self.p, self.training, self.inplace)


class LinearActDropout(Linear):
    """``dropout(activation(x W^T + b), p)`` in one kernel, with the parameters of nn.Linear.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the result.
        bias: Whether there is an additive bias.
        activation: A name in :data:`jacobian_ops.kernels.NAMES`.
        p: Dropout probability, in training.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        resolve("LinearActDropout", activation)
        check_p("LinearActDropout", p)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        return F.linear_act_dropout(
            input, self.weight, self.bias, self.activation, self.p, self.training
        )

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"{super().extra_repr()}, activation={self.activation}, p={self.p}"


class SoftmaxDropout(nn.Module):
    """``dropout(softmax(x, dim), p)`` in one kernel.

    Args:
        dim: The dimension that sums to one.
        p: Dropout probability, in training.

    Raises:
        ValueError: ``p`` is outside [0, 1].
    """

    def __init__(self, dim: int = -1, p: float = 0.0):
        check_p("SoftmaxDropout", p)
        super().__init__()
        self.dim = dim
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """Along ``dim``."""
        return F.softmax_dropout(input, self.dim, self.p, self.training)

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"dim={self.dim}, p={self.p}"


class DropoutAdd(nn.Module):
    """``residual + dropout(x, p)`` in one kernel.

    Args:
        p: Dropout probability, in training.

    Raises:
        ValueError: ``p`` is outside [0, 1].
    """

    def __init__(self, p: float = 0.0):
        check_p("DropoutAdd", p)
        super().__init__()
        self.p = p

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """Elementwise, on tensors of one shape."""
        return F.dropout_add(input, residual, self.p, self.training)

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"p={self.p}"
