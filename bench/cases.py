"""What is measured: an op, its shapes, and what it must at least read, write and compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import jacobian_ops.functional as J
from jacobian_ops import kernels

P = 0.1  # dropout probability
SEED = 1
# Tensors that a pointwise op must read and write; hvp is jvp(grad): x, gy, tx in, gx, tgx out.
POINTWISE_TRAFFIC = {"forward": 2, "vjp": 3, "forward+vjp": 5, "jvp": 4, "hvp": 5}
# Products of a linear map; hvp: gx and gw, and the tangent of each.
PRODUCTS = {"forward": 1, "vjp": 2, "forward+vjp": 3, "jvp": 3, "hvp": 4}


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    ``functions`` holds the op as each provider writes it, and ``dropouts`` the dropout whose mask
    that function draws, where it draws one.  ``prepared`` holds, for a mode, each provider's way to
    write into memory that the caller gives: it takes inputs and cotangent and returns what to call.
    """

    op: str
    label: str
    shapes: tuple[tuple[int, ...], ...]
    functions: dict[str, Callable]
    traffic: dict[str, float]  # elements read and written
    flops: dict[str, float] = field(default_factory=dict)
    random: bool = False
    prepared: dict[str, dict[str, Callable]] = field(default_factory=dict)
    quick: bool = False
    deviation: float = 1.0  # of the inputs

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        if self.op.endswith("cross_entropy"):
            return ()
        if len(self.shapes) > 1 and self.op.startswith("linear"):
            return (*self.shapes[0][:-1], self.shapes[1][0])
        return self.shapes[0]


SATURATED = 40.0
DROPOUTS = {"jacobian_ops": J.dropout, "eager": F.dropout}


def _label(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def _pointwise_traffic(shape) -> dict[str, float]:
    n = math.prod(shape)
    return {mode: n * count for mode, count in POINTWISE_TRAFFIC.items()}


def _into(run: Callable) -> Callable:
    """A prepared call that writes a result like the first input."""

    def prepare(inputs, gy):
        out = torch.empty_like(inputs[0])
        return lambda: run(inputs[0], gy, out)

    return prepare


# Native ops that write into given memory, with the arguments after x or (gy, x).
_ATEN = {
    "relu": (lambda x, out: torch.ops.aten.relu.out(x, out=out), None),
    "sigmoid": (lambda x, out: torch.ops.aten.sigmoid.out(x, out=out), None),
    "tanh": (lambda x, out: torch.ops.aten.tanh.out(x, out=out), None),
    "gelu": (
        lambda x, out: torch.ops.aten.gelu.out(x, out=out),
        lambda x, gy, out: torch.ops.aten.gelu_backward.grad_input(gy, x, grad_input=out),
    ),
    "silu": (
        lambda x, out: torch.ops.aten.silu.out(x, out=out),
        lambda x, gy, out: torch.ops.aten.silu_backward.grad_input(gy, x, grad_input=out),
    ),
    "mish": (lambda x, out: torch.ops.aten.mish.out(x, out=out), None),
    "softplus": (
        lambda x, out: torch.ops.aten.softplus.out(x, out=out),
        lambda x, gy, out: torch.ops.aten.softplus_backward.grad_input(
            gy, x, 1, 20, grad_input=out
        ),
    ),
}


def activation(name: str, shape, quick: bool = False, **params) -> Case:
    """One activation; ``params`` as in torch.nn.functional."""
    ours, native = getattr(J, name), getattr(F, name, None) or getattr(torch, name)
    prepared = {}
    forward, vjp = (None, None) if params else _ATEN.get(name, (None, None))
    if forward:
        prepared["forward"] = {
            "jacobian_ops": _into(lambda x, gy, out: kernels.activation(x, name, out=out)),
            "eager": _into(lambda x, gy, out: forward(x, out)),
        }
    if vjp:
        prepared["vjp"] = {
            "jacobian_ops": _into(lambda x, gy, out: kernels.activation_vjp(x, gy, name, out=out)),
            "eager": _into(vjp),
        }
    return Case(
        name,
        _label(*shape) + "".join(f", {value}" for value in params.values()),
        (shape,),
        {"jacobian_ops": lambda x: ours(x, **params), "eager": lambda x: native(x, **params)},
        _pointwise_traffic(shape),
        prepared=prepared,
        quick=quick,
    )


def saturated(case: Case) -> Case:
    """The case with inputs whose exponentials are often too small for a normal number."""
    label = f"{case.label}, deviation {SATURATED:g}"
    return replace(case, label=label, deviation=SATURATED)


def softmax(name: str, shape, dim: int = -1, quick: bool = False) -> Case:
    """One softmax over ``dim``."""
    ours, native = getattr(J, name), getattr(F, name)
    prepared = {}
    if name != "softmin":
        kernel, kernel_vjp = getattr(kernels, name), getattr(kernels, f"{name}_vjp")
        aten = getattr(torch.ops.aten, f"_{name}")
        aten_vjp = getattr(torch.ops.aten, f"_{name}_backward_data")

        def prepare_vjp(run):
            def prepare(inputs, gy):
                y, out = native(inputs[0], dim), torch.empty_like(gy)
                return lambda: run(y, gy, out)

            return prepare

        # One of the two calls the argument that takes the result grad_input, the other out.
        result = next(
            a.name
            for a in aten_vjp.out._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        )
        prepared = {
            "forward": {
                "jacobian_ops": _into(lambda x, gy, out: kernel(x, dim, out=out)),
                "eager": _into(lambda x, gy, out: aten.out(x, dim, False, out=out)),
            },
            "vjp": {
                "jacobian_ops": prepare_vjp(lambda y, gy, out: kernel_vjp(y, gy, dim, out=out)),
                "eager": prepare_vjp(
                    lambda y, gy, out: aten_vjp.out(gy, y, dim, y.dtype, **{result: out})
                ),
            },
        }
    return Case(
        name,
        _label(*shape) + ("" if dim == -1 else f" dim {dim}"),
        (shape,),
        {"jacobian_ops": lambda x: ours(x, dim), "eager": lambda x: native(x, dim)},
        _pointwise_traffic(shape),
        prepared=prepared,
        quick=quick,
    )


def dropout(shape, quick: bool = False) -> Case:
    """Dropout."""
    return Case(
        "dropout",
        _label(*shape),
        (shape,),
        {"jacobian_ops": lambda x: J.dropout(x, P), "eager": lambda x: F.dropout(x, P)},
        _pointwise_traffic(shape),
        random=True,
        quick=quick,
    )


def dropout_add(shape) -> Case:
    """Dropout and a residual."""
    n = math.prod(shape)
    return Case(
        "dropout_add",
        _label(*shape),
        (shape, shape),
        {
            "jacobian_ops": lambda x, r: J.dropout_add(x, r, P),
            "eager": lambda x, r: r + F.dropout(x, P),
        },
        # The cotangent of the residual is gy itself.
        {"forward": 3 * n, "vjp": 2 * n, "forward+vjp": 5 * n, "jvp": 6 * n, "hvp": 2 * n},
        random=True,
    )


def norm(name: str, shape, quick: bool = False) -> Case:
    """layer_norm or rms_norm of the last dimension, with its parameters."""
    ours, native = getattr(J, name), getattr(F, name)
    columns = 2 if name == "layer_norm" else 1
    return Case(
        name,
        _label(*shape),
        (shape, *(shape[-1:],) * columns),
        {
            "jacobian_ops": lambda x, *c: ours(x, x.shape[-1:], *c, eps=1e-5),
            "eager": lambda x, *c: native(x, x.shape[-1:], *c, eps=1e-5),
        },
        _pointwise_traffic(shape),
        quick=quick,
    )


# Times the logits are read or written. A loss that was computed once is not read again for hvp.
LOSS_TRAFFIC = {"forward": 1, "vjp": 2, "forward+vjp": 3, "jvp": 2, "hvp": 4}


def _classes(rows: int, classes: int, device) -> Tensor:
    return torch.arange(rows, device=device) * 7919 % classes


def cross_entropy(shape, quick: bool = False) -> Case:
    """The losses of classes, summed."""

    def run(f):
        return lambda x: f(x, _classes(*x.shape, x.device), reduction="sum")

    n = math.prod(shape)
    return Case(
        "cross_entropy",
        _label(*shape),
        (shape,),
        {"jacobian_ops": run(J.cross_entropy), "eager": run(F.cross_entropy)},
        {mode: n * count for mode, count in LOSS_TRAFFIC.items()},
        quick=quick,
    )


def attention(shape, causal: bool = False, quick: bool = False) -> Case:
    """Attention of (batch, heads, length, width); no fused native op has a JVP."""
    batch, heads, length, width = shape
    product = 2 * batch * heads * length * length * width // (2 if causal else 1)
    n = math.prod(shape)
    products = {"forward": 2, "vjp": 5, "forward+vjp": 7, "jvp": 6, "hvp": 21}
    traffic = {"forward": 4, "vjp": 8, "forward+vjp": 12, "jvp": 8, "hvp": 18}
    return Case(
        "attention",
        _label(*shape) + (" causal" if causal else ""),
        (shape,) * 3,
        {
            "jacobian_ops": lambda *qkv: J.scaled_dot_product_attention(*qkv, is_causal=causal),
            "eager": lambda *qkv: _native_attention(*qkv, causal=causal),
        },
        {mode: n * count for mode, count in traffic.items()},
        {mode: product * count for mode, count in products.items()},
        quick=quick,
    )


def linear_cross_entropy(m: int, k: int, n: int, quick: bool = False) -> Case:
    """The summed losses of a linear layer's logits: traffic is that of the layer's own tensors."""

    def given(x, weight):
        return len(x), len(weight), x.device

    def eager(x, weight):
        return F.cross_entropy(F.linear(x, weight), _classes(*given(x, weight)), reduction="sum")

    def ours(x, weight):
        return J.linear_cross_entropy(x, weight, _classes(*given(x, weight)), reduction="sum")

    return Case(
        "linear_cross_entropy",
        _label(m, k, n),
        ((m, k), (n, k)),
        {"jacobian_ops": ours, "eager": eager},
        {mode: (m * k + n * k) * count for mode, count in PRODUCTS.items()},
        {mode: 2.0 * m * k * n * count for mode, count in PRODUCTS.items()},
        quick=quick,
    )


def channel_norm(name: str, shape, quick: bool = False) -> Case:
    """batch_norm in training, or group_norm of eight channels a group, with parameters."""
    ours, native, channels = getattr(J, name), getattr(F, name), shape[1]

    def call(f):
        if name == "group_norm":
            return lambda x, w, b: f(x, max(1, x.shape[1] // 8), w, b)
        return lambda x, w, b: f(x, None, None, w, b, training=True)

    return Case(
        name,
        _label(*shape),
        (shape, (channels,), (channels,)),
        {"jacobian_ops": call(ours), "eager": call(native)},
        _pointwise_traffic(shape),
        quick=quick,
    )


def add_norm(name: str, shape) -> Case:
    """add_layer_norm or add_rms_norm of the last dimension, with its parameters."""
    ours, native, n = getattr(J, name), getattr(F, name.removeprefix("add_")), shape[-1]
    columns = 2 if name == "add_layer_norm" else 1
    size = math.prod(shape)

    def eager(x, r, *c):
        total = x + r
        return native(total, (n,), *c, eps=1e-5) + total

    def fused(x, r, *c):
        y, total = ours(x, r, (n,), *c, eps=1e-5)
        return y + total

    return Case(
        name,
        _label(*shape) + " + its sum",
        (shape, shape, *((n,),) * columns),
        {"jacobian_ops": fused, "eager": eager},
        # Both results are used, by a sum that reads and writes 3.  The residual's cotangent is x's.
        {
            "forward": 7 * size,
            "vjp": 4 * size,
            "forward+vjp": 11 * size,
            "jvp": 14 * size,
            "hvp": 8 * size,
        },
    )


def gated(name: str, shape, quick: bool = False) -> Case:
    """A gated unit, swiglu or geglu."""
    ours, n = getattr(J, name), math.prod(shape)
    native = F.silu if name == "swiglu" else F.gelu
    return Case(
        name,
        _label(*shape),
        (shape, shape),
        {"jacobian_ops": ours, "eager": lambda gate, up: native(gate) * up},
        {"forward": 3 * n, "vjp": 5 * n, "forward+vjp": 8 * n, "jvp": 6 * n, "hvp": 9 * n},
        quick=quick,
    )


def _native_attention(q, k, v, causal):
    """The fused op, or what it computes where that has no derivative."""
    if not torch._C._are_functorch_transforms_active():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    s = q.shape[-1] ** -0.5 * q @ k.mT
    if causal:
        s = s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    return s.softmax(-1) @ v


def linear_swiglu(m: int, k: int, n: int) -> Case:
    """(m, k) times two of (k, n), gated."""
    traffic, flops = _linear_work(m, k, n)
    return Case(
        "linear_swiglu",
        f"{m}x{k} -> {n}",
        ((m, k), (n, k), (n, k)),
        {
            "jacobian_ops": J.linear_swiglu,
            "eager": lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v),
        },
        {mode: 2 * count for mode, count in traffic.items()},
        {mode: 2 * count for mode, count in flops.items()},
    )


def _rotary(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * torch.cat((cos, cos), -1) + torch.cat((-b, a), -1) * torch.cat((sin, sin), -1)


def _with_tables(run: Callable) -> Callable:
    """``run(x, cos, sin)`` as a function of x, with tables that are made once."""
    made = {}

    def call(x):
        key = x.shape[-2:], x.dtype, x.device
        if key not in made:
            s, d = x.shape[-2:]
            angle = torch.linspace(0, 100, s).outer(torch.linspace(1, 0.01, d // 2))
            made[key] = tuple(t.to(x.device, x.dtype) for t in (angle.cos(), angle.sin()))
        return run(x, *made[key])

    return call


def rotary_embedding(shape) -> Case:
    """Heads (b, h, s, d), with the tables of their positions."""
    n = math.prod(shape)
    return Case(
        "rotary_embedding",
        _label(*shape),
        (shape,),
        {"jacobian_ops": _with_tables(J.rotary_embedding), "eager": _with_tables(_rotary)},
        # The VJP needs no x, and the second derivative is that of what follows.
        {"forward": 2 * n, "vjp": 2 * n, "forward+vjp": 4 * n, "jvp": 4 * n, "hvp": 2 * n},
    )


def softmax_dropout(shape) -> Case:
    """Softmax and dropout of its result."""
    return Case(
        "softmax_dropout",
        _label(*shape),
        (shape,),
        {
            "jacobian_ops": lambda x: J.softmax_dropout(x, -1, P),
            "eager": lambda x: F.dropout(F.softmax(x, -1), P),
        },
        _pointwise_traffic(shape),
        random=True,
    )


def _linear_work(m: int, k: int, n: int) -> tuple[dict[str, float], dict[str, float]]:
    x, w, y = m * k, n * k, m * n
    traffic = {
        "forward": x + w + y,
        "vjp": 2 * x + 2 * w + y,
        "forward+vjp": 3 * x + 3 * w + 2 * y,
        "jvp": 2 * (x + w + y),
        "hvp": 4 * x + 4 * w + y,
    }
    return traffic, {mode: 2.0 * m * k * n * count for mode, count in PRODUCTS.items()}


def linear(m: int, k: int, n: int, quick: bool = False) -> Case:
    """(m, k) times (k, n), and a bias."""
    traffic, flops = _linear_work(m, k, n)

    def prepare(run):
        def into(inputs, gy):
            out = torch.empty_like(gy)
            return lambda: run(*inputs, out)

        return into

    return Case(
        "linear",
        f"{m}x{k} -> {n}",
        ((m, k), (n, k), (n,)),
        {"jacobian_ops": J.linear, "eager": F.linear},
        traffic,
        flops,
        prepared={
            "forward": {
                "jacobian_ops": prepare(lambda x, w, b, out: kernels.linear(x, w, b, out=out)),
                "eager": prepare(lambda x, w, b, out: torch.addmm(b, x, w.T, out=out)),
            }
        },
        quick=quick,
    )


def linear_act_dropout(name: str, m: int, k: int, n: int, p: float, quick: bool = False) -> Case:
    """A linear layer, an activation and dropout."""
    native = getattr(F, name)
    traffic, flops = _linear_work(m, k, n)

    def eager(x, w, b):
        y = native(F.linear(x, w, b))
        return F.dropout(y, p) if p else y

    return Case(
        "linear_act_dropout",
        f"{m}x{k} -> {n}, {name}, p={p:g}",
        ((m, k), (n, k), (n,)),
        {
            "jacobian_ops": lambda x, w, b: J.linear_act_dropout(x, w, b, name, p),
            "eager": eager,
        },
        traffic,
        flops,
        random=p > 0,
        quick=quick,
    )


LARGE, SMALL = (4096, 1024), (64, 512)
ACTIVATIONS = (
    *("relu", "leaky_relu", "elu", "selu", "celu", "relu6", "hardtanh", "sigmoid", "tanh", "gelu"),
    *("silu", "softplus", "mish", "hardswish", "hardsigmoid", "logsigmoid"),
)

CASES = (
    linear(2048, 1024, 4096),
    linear(4096, 256, 1024),
    linear(16384, 64, 256),
    linear(64, 4096, 4096),
    linear(256, 256, 256, quick=True),
    *(activation(name, LARGE) for name in ACTIVATIONS),
    activation("relu", SMALL, quick=True),
    activation("gelu", SMALL, quick=True),
    softmax("softmax", (8192, 1024)),
    softmax("softmax", (512, 32768)),
    softmax("softmax", (64, 1024, 64), dim=1),
    softmax("softmax", (64, 1024), quick=True),
    softmax("log_softmax", (8192, 1024)),
    softmax("log_softmax", (512, 32768)),
    softmax("softmin", (8192, 1024)),
    norm("layer_norm", (8192, 1024)),
    norm("layer_norm", (64, 1024), quick=True),
    norm("rms_norm", (8192, 1024)),
    cross_entropy((2048, 32000)),
    cross_entropy((64, 1000), quick=True),
    linear_cross_entropy(1024, 512, 32000),
    channel_norm("batch_norm", (64, 128, 56, 56)),
    channel_norm("batch_norm", (16, 64, 14, 14), quick=True),
    channel_norm("group_norm", (16, 128, 56, 56)),
    attention((2, 8, 1024, 64)),
    attention((2, 8, 1024, 64), causal=True),
    attention((1, 4, 4096, 64)),
    attention((1, 2, 64, 16), quick=True),
    add_norm("add_layer_norm", (8192, 1024)),
    add_norm("add_rms_norm", (8192, 1024)),
    gated("swiglu", LARGE),
    gated("swiglu", SMALL, quick=True),
    gated("geglu", LARGE),
    linear_swiglu(2048, 1024, 2816),
    rotary_embedding((4, 16, 1024, 128)),
    dropout((4096, 4096)),
    dropout((256, 1024), quick=True),
    dropout_add((4096, 1024)),
    softmax_dropout((8192, 1024)),
    linear_act_dropout("gelu", 2048, 1024, 4096, 0.0),
    linear_act_dropout("gelu", 2048, 1024, 4096, P),
    linear_act_dropout("gelu", 4096, 256, 1024, 0.0),
    linear_act_dropout("gelu", 4096, 256, 1024, P),
    linear_act_dropout("gelu", 16384, 64, 256, P),
    linear_act_dropout("gelu", 256, 256, 256, P, quick=True),
)


def mask(case: Case, provider: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The float64 multipliers that the provider draws after ``torch.manual_seed(SEED)``."""
    torch.manual_seed(SEED)
    kept = DROPOUTS[provider](torch.ones(case.output_shape, dtype=dtype, device=device), P) != 0
    return kept.double() / (1 - P)


def _layer_norm(x, weight, bias):
    c = x - x.mean(-1, True)
    return c * (c.square().mean(-1, True) + 1e-5).rsqrt() * weight + bias


def _batch_norm(x, weight, bias):
    axes, channel = (0, *range(2, x.dim())), (-1, *(1 for _ in x.shape[2:]))
    c = x - x.mean(axes, True)
    y = c * (c.square().mean(axes, True) + 1e-5).rsqrt()
    return y * weight.view(channel) + bias.view(channel)


def _rms_norm(x, weight):
    return x * (x.square().mean(-1, True) + 1e-5).rsqrt() * weight


# Written out where the backward of the native op has no forward mode, or a wrong one.
_WRITTEN_OUT = {
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
    "hardswish": lambda x: x * ((x + 3).clamp(0, 6) / 6),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "silu": lambda x: x * torch.sigmoid(x),
    "swiglu": lambda gate, up: gate * torch.sigmoid(gate) * up,
    "linear_swiglu": lambda x, w, v: (lambda z: z * torch.sigmoid(z))(x @ w.T) * (x @ v.T),
    "add_layer_norm": lambda x, r, *c: _layer_norm(x + r, *c) + x + r,
    "add_rms_norm": lambda x, r, weight: _rms_norm(x + r, weight) + x + r,
}


def reference(case: Case, multipliers: Tensor | None) -> Callable:
    """The op of float64 tensors, with a given mask."""
    if multipliers is None:
        return _WRITTEN_OUT.get(case.op, case.functions["eager"])
    m, name = multipliers, case.op
    if name == "dropout":
        return lambda x: x * m
    if name == "dropout_add":
        return lambda x, r: r + x * m
    if name == "softmax_dropout":
        return lambda x: F.softmax(x, -1) * m
    return lambda x, w, b: F.gelu(F.linear(x, w, b)) * m
