"""The raw products: forward, VJP, JVP and second order of every op, without autograd.

Every function takes torch tensors, or numpy arrays without a copy, and returns what it was given.
``x -> y``; cotangents ``gy``, ``gx``; tangents ``tx``, ``ty``.  A ``*_jvp`` returns primal and
tangent.
"""

from .activation import (
    MAX_ORDER,
    NAMES,
    Activation,
    activation,
    activation_jvp,
    activation_vjp,
    activation_vjp_jvp,
    activation_vjp_sum,
    activation_vjp_vjp,
    resolve,
)
from .attention import attention, attention_jvp, attention_vjp, attention_vjp_jvp
from .cross_entropy import (
    cross_entropy,
    cross_entropy_jvp,
    cross_entropy_vjp,
    cross_entropy_vjp_jvp,
)
from .dropout import dropout, dropout_add, dropout_jvp, dropout_vjp
from .gated import GATES, gated, gated_jvp, gated_vjp, gated_vjp_jvp, gated_vjp_vjp
from .group_norm import (
    batch_norm,
    group_norm,
    group_norm_jvp,
    group_norm_vjp,
    group_norm_vjp_jvp,
)
from .linear import (
    column_sum,
    linear,
    linear_act_dropout,
    linear_act_dropout_jvp,
    linear_act_dropout_vjp,
    linear_jvp,
    linear_vjp,
)
from .linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_jvp,
    linear_cross_entropy_vjp,
    linear_cross_entropy_vjp_jvp,
    linear_cross_entropy_with_vjp,
)
from .norm import add_norm, add_norm_vjp, norm, norm_jvp, norm_vjp, norm_vjp_jvp
from .rotary import rotary
from .softmax import (
    log_softmax,
    log_softmax_jvp,
    log_softmax_tangent,
    log_softmax_vjp,
    log_softmax_vjp_jvp,
    log_softmax_vjp_vjp,
    softmax,
    softmax_dropout,
    softmax_dropout_jvp,
    softmax_dropout_vjp,
    softmax_jvp,
    softmax_vjp,
    softmax_vjp_jvp,
    softmax_vjp_vjp,
)

__all__ = [
    "GATES",
    "MAX_ORDER",
    "NAMES",
    "Activation",
    "activation",
    "activation_jvp",
    "activation_vjp",
    "activation_vjp_jvp",
    "activation_vjp_sum",
    "activation_vjp_vjp",
    "batch_norm",
    "attention",
    "attention_jvp",
    "attention_vjp",
    "attention_vjp_jvp",
    "add_norm",
    "add_norm_vjp",
    "column_sum",
    "cross_entropy",
    "cross_entropy_jvp",
    "cross_entropy_vjp",
    "cross_entropy_vjp_jvp",
    "dropout",
    "dropout_add",
    "dropout_jvp",
    "dropout_vjp",
    "group_norm",
    "group_norm_jvp",
    "group_norm_vjp",
    "group_norm_vjp_jvp",
    "gated",
    "gated_jvp",
    "gated_vjp",
    "gated_vjp_jvp",
    "gated_vjp_vjp",
    "linear",
    "linear_act_dropout",
    "linear_act_dropout_jvp",
    "linear_act_dropout_vjp",
    "linear_cross_entropy",
    "linear_cross_entropy_jvp",
    "linear_cross_entropy_vjp",
    "linear_cross_entropy_vjp_jvp",
    "linear_cross_entropy_with_vjp",
    "linear_jvp",
    "linear_vjp",
    "log_softmax",
    "log_softmax_jvp",
    "log_softmax_tangent",
    "log_softmax_vjp",
    "log_softmax_vjp_jvp",
    "log_softmax_vjp_vjp",
    "norm",
    "norm_jvp",
    "norm_vjp",
    "norm_vjp_jvp",
    "resolve",
    "rotary",
    "softmax",
    "softmax_dropout",
    "softmax_dropout_jvp",
    "softmax_dropout_vjp",
    "softmax_jvp",
    "softmax_vjp",
    "softmax_vjp_jvp",
    "softmax_vjp_vjp",
]
