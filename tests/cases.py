"""The table of ops that drives the suite: a new op is a row here.

``ours`` is the function under test; ``primitive`` is the same function composed of elementary
native ops, right at every order of differentiation; ``native`` is the fused native op (or the usual
composition of native ops) whose accuracy and special values ours is compared with.  Dropout cases
have a fixed seed, and their references the mask that belongs to it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import jacobian_ops.functional as J
from jacobian_ops import kernels
from jacobian_ops.autograd import activation, attention, dropout, linear, softmax

SEED = torch.tensor(20240501)
P = 0.4


@dataclass(frozen=True)
class Case:
    name: str
    ours: Callable
    primitive: Callable
    native: Callable
    shapes: tuple[tuple[int, ...], ...]
    kinks: tuple[float, ...] = ()  # gradcheck stays away from these
    third: bool = True  # third order is claimed

    def inputs(self, dtype=torch.float64, requires_grad=False, scale=1.5):
        """Random tensors of the case's shapes, at a distance from the kinks."""
        made = []
        for shape in self.shapes:
            x = torch.randn(shape, dtype=torch.float64) * scale
            for kink in self.kinks:
                near = (x - kink).abs() < 0.05
                x = torch.where(near, x + 0.2, x)
            made.append(x.to(dtype))
        return tuple(x.requires_grad_() for x in made) if requires_grad else tuple(made)

    def __str__(self):
        return self.name


def mask(*shape):
    """The multipliers of SEED and P for one sample of this shape, in float64."""
    return kernels.dropout(torch.ones(shape, dtype=torch.float64), P, SEED)


def elu(x, alpha=1.0, scale=1.0, rate=1.0):
    return torch.where(x > 0, scale * x, scale * alpha * torch.expm1(rate * x.clamp(max=0)))


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def hard(x):
    return torch.where(x <= -3, 0 * x, torch.where(x >= 3, 0 * x + 1, x / 6 + 0.5))


def softmax_primitive(x, dim):
    e = x.exp()
    return e / e.sum(dim, keepdim=True)


def pointwise(name, primitive, kinks=(), suffix="", **params):
    ours, native = getattr(J, name), getattr(F, name, None) or getattr(torch, name)
    return Case(
        name + suffix,
        lambda x: ours(x, **params),
        primitive,
        lambda x: native(x, **params),
        ((3, 5),),
        kinks,
    )


POINTWISE = [
    pointwise("relu", lambda x: torch.where(x > 0, x, 0 * x), (0.0,)),
    pointwise("leaky_relu", lambda x: torch.where(x > 0, x, 0.01 * x), (0.0,)),
    pointwise(
        "leaky_relu",
        lambda x: torch.where(x > 0, x, -0.5 * x),
        (0.0,),
        "-negative_slope",
        negative_slope=-0.5,
    ),
    pointwise("elu", elu, (0.0,)),
    pointwise("elu", lambda x: elu(x, 0.7), (0.0,), "-alpha", alpha=0.7),
    pointwise("selu", lambda x: elu(x, 1.6732632423543772, 1.0507009873554805), (0.0,)),
    pointwise("celu", elu, (0.0,)),
    pointwise("celu", lambda x: elu(x, 1.3, 1.0, 1 / 1.3), (0.0,), "-alpha", alpha=1.3),
    pointwise("relu6", lambda x: x.clamp(0, 6), (0.0, 6.0)),
    pointwise("hardtanh", lambda x: x.clamp(-1, 1), (-1.0, 1.0)),
    pointwise(
        "hardtanh",
        lambda x: x.clamp(0.5, 2.0),
        (0.5, 2.0),
        "-bounds",
        min_val=0.5,
        max_val=2.0,
    ),
    pointwise("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
    pointwise("tanh", lambda x: 1 - 2 / (torch.exp(2 * x) + 1)),
    pointwise("gelu", lambda x: x * normal_cdf(x)),
    pointwise("gelu", gelu_tanh, (), "-tanh", approximate="tanh"),
    pointwise("silu", lambda x: x / (1 + torch.exp(-x))),
    pointwise("softplus", lambda x: torch.log1p(torch.exp(x))),
    pointwise(
        "softplus",
        lambda x: torch.where(2 * x > 3, x, torch.log1p(torch.exp(2 * x)) / 2),
        (1.5,),
        "-beta",
        beta=2.0,
        threshold=3.0,
    ),
    pointwise("mish", lambda x: x * torch.tanh(torch.log1p(torch.exp(x)))),
    pointwise("hardswish", lambda x: x * hard(x), (-3.0, 3.0)),
    pointwise("hardsigmoid", hard, (-3.0, 3.0)),
    pointwise("logsigmoid", lambda x: -torch.log1p(torch.exp(-x))),
]


def along(name, dim, shape, primitive):
    ours, native = getattr(J, name), getattr(F, name)
    label = f"{name}-dim{dim}"
    return Case(label, lambda x: ours(x, dim), primitive, lambda x: native(x, dim), (shape,))


SOFTMAX = [
    along("softmax", -1, (2, 3, 5), lambda x: softmax_primitive(x, -1)),
    along("softmax", 0, (4, 3), lambda x: softmax_primitive(x, 0)),
    along("softmax", 1, (2, 4, 3), lambda x: softmax_primitive(x, 1)),
    along("softmin", -1, (3, 5), lambda x: softmax_primitive(-x, -1)),
    along("softmin", 0, (4, 3), lambda x: softmax_primitive(-x, 0)),
    along("log_softmax", -1, (3, 5), lambda x: x - x.exp().sum(-1, True).log()),
    along("log_softmax", 1, (2, 4, 3), lambda x: x - x.exp().sum(1, True).log()),
]

M35, M45 = mask(3, 5), mask(4, 5)


def scaled(m):
    """Multiply by a mask in the dtype of the tensor."""
    return lambda x: x * m.to(x.dtype)


DROPOUT = [
    Case(
        "dropout",
        lambda x: dropout.dropout(x, SEED, P),
        scaled(M35),
        scaled(M35),
        ((3, 5),),
    ),
    Case(
        "dropout_add",
        lambda x, r: dropout.dropout_add(x, r, SEED, P),
        lambda x, r: r + x * M35,
        lambda x, r: r + x * M35.to(x.dtype),
        ((3, 5), (3, 5)),
    ),
    Case(
        "softmax_dropout-dim1",
        lambda x: softmax.softmax_dropout(x, SEED, 1, P),
        lambda x: softmax_primitive(x, 1) * M35,
        lambda x: F.softmax(x, 1) * M35.to(x.dtype),
        ((3, 5),),
    ),
    Case(
        "softmax_dropout-dim0",
        lambda x: softmax.softmax_dropout(x, SEED, 0, P),
        lambda x: softmax_primitive(x, 0) * M35,
        lambda x: F.softmax(x, 0) * M35.to(x.dtype),
        ((3, 5),),
    ),
]


def fused(name, p, residual=False):
    """linear_act_dropout with a fixed seed: (4, 3) x (5, 3) + (5), and a residual (4, 5)."""
    f = kernels.resolve("tests", name)
    act = next(c for c in POINTWISE if c.name == name.replace("_tanh", "-tanh"))

    def ours(x, weight, bias, residual=None):
        keep_z = activation.from_result(f.function, p) is None
        seed = SEED if p else None
        rest = seed, f.function, f.params, p, keep_z or residual is not None
        return linear.linear_act_dropout(x, weight, bias, residual, *rest)[0]

    def reference(f):
        def run(x, weight, bias, residual=None):
            y = f(F.linear(x, weight, bias))
            y = y * M45.to(x.dtype) if p else y
            return y if residual is None else residual + y

        return run

    return Case(
        f"linear_{name}_dropout-p{p}" + ("-residual" if residual else ""),
        ours,
        reference(act.primitive),
        reference(act.native),
        ((4, 3), (5, 3), (5,), (4, 5))[: 4 if residual else 3],
        third=name not in ("relu", "leaky_relu", "relu6"),
    )


LINEAR = [
    Case("linear", J.linear, lambda x, w, b: x @ w.T + b, F.linear, ((4, 3), (5, 3), (5,))),
    Case("linear-no_bias", J.linear, lambda x, w: x @ w.mT, F.linear, ((2, 4, 3), (5, 3))),
    Case("linear-vector", J.linear, lambda x, w, b: x @ w.T + b, F.linear, ((3,), (5, 3), (5,))),
    fused("gelu", 0.0),
    fused("gelu", P),
    fused("silu", P),
    fused("relu", 0.0),
    fused("relu", P),
    fused("relu6", P),
    fused("tanh", 0.0),
    fused("tanh", P),
    fused("tanh", 0.0, residual=True),
    fused("gelu", P, residual=True),
]


def norm_primitive(dims, eps, centred):
    axes = tuple(range(-dims, 0))

    def run(x, weight=None, bias=None):
        c = x - x.mean(axes, True) if centred else x
        y = c / (c.square().mean(axes, True) + eps).sqrt()
        y = y if weight is None else weight * y
        return y if bias is None else y + bias

    return run


def normalized(name, shape, *columns, suffix="", **params):
    """layer_norm or rms_norm of (2, 3, *shape), with as many columns as are given."""
    ours, native = getattr(J, name), getattr(F, name)
    eps = params.get("eps") or (1e-5 if name == "layer_norm" else torch.finfo(torch.float64).eps)
    return Case(
        name + suffix,
        lambda x, *c: ours(x, shape, *c, **params),
        norm_primitive(len(shape), eps, name == "layer_norm"),
        lambda x, *c: native(x, shape, *c, **params),
        ((2, 3, *shape), *columns),
    )


NORM = [
    normalized("layer_norm", (5,), (5,), (5,)),
    normalized("layer_norm", (5,), suffix="-plain", eps=0.1),
    normalized("layer_norm", (2, 3), (2, 3), suffix="-two_dims"),
    normalized("rms_norm", (5,), (5,), eps=1e-3),
    normalized("rms_norm", (2, 3), suffix="-plain"),
]


def group_norm_primitive(groups, eps, fixed=None):
    """Over groups of channels, or with 0 over a channel of all samples."""

    def run(x, weight=None, bias=None):
        n, c, *rest = x.shape
        view = (n, groups, c // groups, *rest) if groups else x.shape
        channel = (*view[1:3], *(1 for _ in rest)) if groups else (c, *(1 for _ in rest))
        axes = tuple(range(2, len(view))) if groups else (0, *range(2, x.dim()))
        z = x.reshape(view)
        if fixed is None:
            z = z - z.mean(axes, True)
            y = z / (z.square().mean(axes, True) + eps).sqrt()
        else:
            mean, var = (t.to(x.dtype).reshape(channel) for t in fixed)
            y = (z - mean) / (var + eps).sqrt()
        y = y if weight is None else weight.reshape(channel) * y
        return (y if bias is None else y + bias.reshape(channel)).reshape(x.shape)

    return run


def attention_primitive(hidden=None, scale=None, multipliers=None):
    """``hidden`` are the scores that are -inf."""

    def run(q, k, v, bias=None):
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        s = factor * q @ k.mT
        s = s if bias is None else s + bias
        e = s.exp() if hidden is None else s.exp().masked_fill(hidden, 0)
        total = e.sum(-1, True)
        weights = e / total.masked_fill(total == 0, 1)
        return (weights if multipliers is None else weights * multipliers.to(v.dtype)) @ v

    return run


# Small: a Jacobian of a Jacobian is a call on hundreds of samples, each a slow block on the host.
Q, K, V = (1, 2, 2, 3), (1, 2, 3, 3), (1, 2, 3, 2)
HIDDEN = torch.tensor([[True, False, False], [True] * 3])
M1223 = mask(1, 2, 2, 3)


def attended(suffix, shapes=(Q, K, V), hidden=None, multipliers=None, **params):
    dropped = attention_primitive(hidden, params.get("scale"), multipliers)

    def ours(q, k, v, bias=None):
        if multipliers is None:
            masks = params if bias is None else params | {"attn_mask": bias}
            return J.scaled_dot_product_attention(q, k, v, **masks)
        given = q, k, v, None, bias, SEED
        return attention.attention(*given, q.shape[-1] ** -0.5, False, P)[0]

    # The fused native op has no forward mode.
    return Case(f"attention{suffix}", ours, dropped, dropped, shapes)


ATTENTION = [
    attended(""),
    attended(
        "-causal",
        hidden=~torch.ones(2, 3, dtype=torch.bool).tril(),
        is_causal=True,
        scale=0.7,
    ),
    attended("-keep", hidden=HIDDEN, attn_mask=~HIDDEN),
    attended("-groups_bias", ((1, 2, 2, 3), (1, 1, 3, 3), (1, 1, 3, 2), (2, 3)), enable_gqa=True),
    attended("-dropout", multipliers=M1223),
]


def grouped(name, shape, groups=0, *columns, suffix="", eps=1e-5, training=True):
    """group_norm, or batch_norm in training or with running statistics."""
    ours, native = getattr(J, name), getattr(F, name)
    fixed = None
    if groups:
        args = (groups,)
    elif training:
        args = (None, None)
    else:
        fixed = args = torch.linspace(-1, 1, shape[1]), torch.linspace(0.5, 2, shape[1])

    def call(f):
        def run(x, *c):
            a = args if groups or training else (t.to(x) for t in args)
            rest = {} if groups else {"training": training}
            return f(x, *a, *c, eps=eps, **rest)

        return run

    primitive = group_norm_primitive(groups, eps, fixed)
    return Case(name + suffix, call(ours), primitive, call(native), (shape, *columns))


GROUPED = [
    grouped("group_norm", (2, 4, 3), 2, (4,), (4,)),
    grouped("group_norm", (2, 4, 2, 2), 1, suffix="-plain", eps=0.1),
    grouped("batch_norm", (3, 2, 2), 0, (2,), (2,)),
    grouped("batch_norm", (4, 3), 0, (3,), suffix="-rows", eps=0.1),
    grouped("batch_norm", (3, 2, 2), 0, (2,), (2,), suffix="-eval", training=False),
]


def class_dim(x):
    return min(1, x.dim() - 1)


def classes_of(x, classes=None):
    """A class of each row of the logits ``x``, or of each of its rows of anything."""
    if classes is None:
        dim = class_dim(x)
        shape, classes = x.shape[:dim] + x.shape[dim + 1 :], x.shape[dim]
    else:
        shape = x.shape[:-1]
    return ((torch.arange(math.prod(shape), device=x.device) * 2 + 1) % classes).reshape(shape)


def class_weights(classes, like):
    return torch.linspace(0.5, 2, classes, dtype=like.dtype, device=like.device)


def entropy_primitive(
    x, target, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    """cross_entropy from elementary ops, for classes or probabilities."""
    dim, n = class_dim(x), x.shape[class_dim(x)]
    column = [-1 if i == dim else 1 for i in range(x.dim())]
    w = torch.ones((), dtype=x.dtype) if weight is None else weight.reshape(column)
    counts = torch.ones((), dtype=x.dtype)
    of_probabilities = target.is_floating_point()
    if of_probabilities:
        p = target
    else:
        counts = (target != ignore_index).to(x.dtype)
        p = (torch.arange(n).reshape(column) == target.unsqueeze(dim)).to(x.dtype)
        rows = ((w * p).sum(dim) * counts).sum()  # what the mean divides by
    q = w * ((1 - label_smoothing) * p + label_smoothing / n)
    losses = -(q * (x - x.exp().sum(dim, True).log())).sum(dim) * counts
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if of_probabilities else losses.sum() / rows


def entropy(suffix, shape, weighted=False, probabilities=False, **options):
    """cross_entropy of logits of this shape; probabilities are a second input."""

    def rest(x, target):
        target = target[0] if target else classes_of(x)
        weight = class_weights(x.shape[class_dim(x)], x) if weighted else None
        return target, weight

    def run(f):
        def call(x, *target):
            target, weight = rest(x, target)
            return f(x, target, weight, **options)

        return call

    return Case(
        "cross_entropy" + suffix,
        run(J.cross_entropy),
        run(entropy_primitive),
        run(F.cross_entropy),
        (shape, shape)[: 1 + probabilities],
    )


ENTROPY = [
    entropy("", (4, 3)),
    entropy("-none", (4, 5), reduction="none"),
    entropy("-vector", (5,), weighted=True, reduction="sum"),
    entropy("-ignored", (4, 3), weighted=True, ignore_index=1),
    entropy("-smooth", (4, 3), weighted=True, label_smoothing=0.3, ignore_index=1),
    entropy("-maps", (2, 3, 4), label_smoothing=0.2, reduction="none"),
    entropy("-probabilities", (3, 4), probabilities=True, reduction="none"),
    entropy(
        "-probabilities_maps", (2, 3, 2), weighted=True, probabilities=True, label_smoothing=0.1
    ),
]


def linear_entropy(suffix, *shapes, weighted=False, **options):
    """linear_cross_entropy in chunks of two rows."""

    def rest(x, weight):
        return classes_of(x, len(weight)), class_weights(len(weight), x) if weighted else None

    def ours(x, linear_weight, bias=None):
        target, weight = rest(x, linear_weight)
        return J.linear_cross_entropy(
            x, linear_weight, target, bias, weight=weight, chunk_size=2, **options
        )

    def reference(f):
        def run(x, linear_weight, bias=None):
            target, weight = rest(x, linear_weight)
            z = x @ linear_weight.mT
            return f(z if bias is None else z + bias, target, weight, **options)

        return run

    return Case(
        "linear_cross_entropy" + suffix,
        ours,
        reference(entropy_primitive),
        reference(F.cross_entropy),
        shapes,
    )


LINEAR_ENTROPY = [
    linear_entropy("", (5, 3), (4, 3), (4,)),
    linear_entropy("-none", (3, 2), (4, 2), label_smoothing=0.2, reduction="none"),
    linear_entropy("-ignored", (5, 3), (4, 3), (4,), weighted=True, ignore_index=1),
]


def both(results):
    """A norm and its sum as one tensor, so that a case has one output."""
    return torch.stack(tuple(results))


def added(name, *columns, eps=1e-3):
    """add_layer_norm or add_rms_norm of two (2, 3, 5)."""
    ours, native = getattr(J, name), getattr(F, name.removeprefix("add_"))
    primitive = norm_primitive(1, eps, name == "add_layer_norm")
    return Case(
        name,
        lambda x, r, *c: both(ours(x, r, (5,), *c, eps=eps)),
        lambda x, r, *c: both((primitive(x + r, *c), x + r)),
        lambda x, r, *c: both((native(x + r, (5,), *c, eps=eps), x + r)),
        ((2, 3, 5), (2, 3, 5), *columns),
    )


ADD_NORM = [added("add_layer_norm", (5,), (5,)), added("add_rms_norm", (5,))]

GATED = [
    Case(
        "swiglu",
        J.swiglu,
        lambda a, b: a / (1 + torch.exp(-a)) * b,
        lambda a, b: F.silu(a) * b,
        ((3, 5), (3, 5)),
    ),
    Case(
        "swiglu-halves",
        lambda x: J.swiglu(*x.chunk(2, -1)),
        lambda x: x[:, :3] / (1 + torch.exp(-x[:, :3])) * x[:, 3:],
        lambda x: F.silu(x[:, :3]) * x[:, 3:],
        ((4, 6),),
    ),
    Case(
        "geglu",
        J.geglu,
        lambda a, b: a * normal_cdf(a) * b,
        lambda a, b: F.gelu(a) * b,
        ((3, 5), (3, 5)),
    ),
    Case(
        "geglu-tanh",
        lambda a, b: J.geglu(a, b, "tanh"),
        lambda a, b: gelu_tanh(a) * b,
        lambda a, b: F.gelu(a, approximate="tanh") * b,
        ((3, 5), (3, 5)),
    ),
    Case(
        "linear_swiglu",
        J.linear_swiglu,
        lambda x, w, v, b, c: (lambda z: z / (1 + torch.exp(-z)))(x @ w.T + b) * (x @ v.T + c),
        lambda x, w, v, b, c: F.silu(F.linear(x, w, b)) * F.linear(x, v, c),
        ((4, 3), (5, 3), (5, 3), (5,), (5,)),
    ),
]


def rotary_primitive(interleaved):
    def run(x, cos, sin):
        half = cos.shape[-1]
        rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
        if interleaved:
            a, b = rotated.unflatten(-1, (half, 2)).unbind(-1)
        else:
            a, b = rotated[..., :half], rotated[..., half:]
        a, b = a * cos - b * sin, b * cos + a * sin
        y = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
        return torch.cat((y, rest), -1)

    return run


def rotary(name, interleaved, *shapes):
    primitive = rotary_primitive(interleaved)
    return Case(
        "rotary_embedding-" + name,
        lambda x, c, s: J.rotary_embedding(x, c, s, interleaved),
        primitive,
        primitive,
        shapes,
    )


ROTARY = [
    rotary("halves", False, (2, 2, 3, 6), (3, 3), (3, 3)),
    rotary("interleaved", True, (2, 3, 6), (3, 3), (3, 3)),
    rotary("partial", False, (2, 2, 3, 5), (2, 1, 3, 2), (2, 1, 3, 2)),
]

CASES = (
    POINTWISE
    + SOFTMAX
    + DROPOUT
    + LINEAR
    + NORM
    + ENTROPY
    + LINEAR_ENTROPY
    + GROUPED
    + ATTENTION
    + ADD_NORM
    + GATED
    + ROTARY
)

# Below their public functions all activations are one op: what is about the op takes one of each
# kind (without a kink, with one, with a parameter).
KINDS = ("relu", "gelu", "leaky_relu-negative_slope")
OPS = [c for c in CASES if c not in POINTWISE or c.name in KINDS]
# Of those, cases that take rules and ways through vmap that another one takes: the tests that nest
# transforms and compile graphs, the slowest, leave them to the tests of gradients.
ALIKE = {
    *("softmax-dim0", "softmax-dim1", "softmin-dim-1", "log_softmax-dim-1", "softmax_dropout-dim0"),
    *("linear_gelu_dropout-p0.0", "linear_silu_dropout-p0.4", "linear_relu_dropout-p0.4"),
    *("linear_relu6_dropout-p0.4", "linear_tanh_dropout-p0.0", "linear_tanh_dropout-p0.4"),
    *("layer_norm-plain", "rms_norm", "add_rms_norm", "group_norm-plain", "batch_norm-rows"),
    *("cross_entropy", "cross_entropy-none", "cross_entropy-vector"),
    *("cross_entropy-probabilities_maps", "linear_cross_entropy-none"),
    *("attention", "attention-keep", "swiglu", "geglu-tanh", "rotary_embedding-halves"),
}
NESTED = [c for c in OPS if c.name not in ALIKE]
# Those of which some calls go to torch, as installed.
ROUTED = [c for c in POINTWISE if c.name in KINDS] + SOFTMAX + LINEAR
ROUTED += [c for c in NORM if c.name.startswith("layer_norm")]
