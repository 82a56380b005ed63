"""torch.ops.jacobian_ops: opcheck on every op, and the public autograd Functions."""

import pytest
import torch

from jacobian_ops.autograd import (
    activation,
    attention,
    cross_entropy,
    dropout,
    gated,
    group_norm,
    linear,
    linear_cross_entropy,
    norm,
    rotary,
    softmax,
)

D = torch.float64


def leaf(*shape):
    return torch.randn(*shape, dtype=D).requires_grad_()


SEED = torch.tensor(7)
ACT = (None, "gelu", [], 0.0)
MASKED = (SEED, "tanh", [], 0.4)
CLASSES = torch.tensor([2, 0, -1])
LOSS = (1, -1, 0.2)  # dim, ignore_index, smoothing
CHUNKS = (-1, 0.2, 2)
WEIGHTS = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=D)
KEEP = torch.tensor([True, False, True])[None, None, None]
PLAIN = 0.5, False, 0.0


def attended(keep=None, bias=None, seed=None):
    return leaf(1, 2, 2, 2), leaf(1, 1, 3, 2), leaf(1, 1, 3, 1), keep, bias, seed


def results(n):
    """o and lse, each with its tangent if ``n`` is 2."""
    shapes = [(1, 2, 2, 1)] * n + [(1, 2, 2)] * n
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


SAMPLES = {
    "activation": [(leaf(3, 4), *ACT), (leaf(3, 4), *MASKED), (leaf(3, 4).T, *ACT)],
    "activation_vjp": [
        (leaf(3, 4), leaf(3, 4), *ACT, 1),
        (leaf(3, 4), leaf(3, 4), *MASKED, 2),
        (torch.randn(3, 4), torch.randn(3, 4), *ACT, 3),
    ],
    "activation_jvp": [(leaf(3, 4), leaf(3, 4), *ACT), (leaf(3, 4), leaf(3, 4), *MASKED)],
    "activation_vjp_vjp": [(leaf(3, 4), leaf(3, 4), leaf(3, 4), *MASKED, 1)],
    "activation_vjp_jvp": [
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(3, 4), *MASKED, 1),
        (leaf(3, 4), leaf(3, 4), None, leaf(3, 4), *ACT, 1),
        (torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4), None, *ACT, 2),
    ],
    "softmax": [(leaf(3, 4), 1, 1.0), (leaf(3, 4).T, 0, -1.0)],
    "softmax_vjp": [(leaf(3, 4), leaf(3, 4), 0, -1.0)],
    "softmax_jvp": [(leaf(3, 4), leaf(3, 4), 1, 1.0)],
    "softmax_vjp_vjp": [(leaf(3, 4), leaf(3, 4), leaf(3, 4), 1, -1.0)],
    "softmax_vjp_jvp": [
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(3, 4), 1, -1.0),
        (leaf(3, 4), leaf(3, 4), None, leaf(3, 4), 1, 1.0),
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), None, 1, 1.0),
    ],
    "log_softmax": [(leaf(3, 4), 0)],
    "log_softmax_vjp": [(leaf(3, 4), leaf(3, 4), 1)],
    "log_softmax_tangent": [(leaf(3, 4), leaf(3, 4), 1)],
    "log_softmax_jvp": [(leaf(3, 4), leaf(3, 4), 1)],
    "log_softmax_vjp_vjp": [(leaf(3, 4), leaf(3, 4), leaf(3, 4), 1)],
    "log_softmax_vjp_jvp": [
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(3, 4), 1),
        (leaf(3, 4), leaf(3, 4), None, leaf(3, 4), 1),
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), None, 1),
    ],
    "softmax_dropout": [(leaf(3, 4), SEED, 1, 0.4)],
    "softmax_dropout_vjp": [(leaf(3, 4), leaf(3, 4), SEED, 1, 0.4)],
    "softmax_dropout_jvp": [(leaf(3, 4), leaf(3, 4), SEED, 1, 0.4)],
    "dropout": [(leaf(3, 4), SEED, 0.4), (leaf(3, 4), torch.tensor([1, 2, 3]), 0.4)],
    "dropout_add": [(leaf(3, 4), leaf(3, 4), SEED, 0.4)],
    "norm": [
        (leaf(2, 3, 4), leaf(4), leaf(4), 1, 0.1, True),
        (leaf(2, 3, 4), leaf(3, 4), None, 2, 0.1, False),
        (leaf(3, 4), None, leaf(4), 1, 0.1, True),
    ],
    "norm_jvp": [
        (leaf(3, 4), leaf(4), leaf(4), leaf(3, 4), leaf(4), leaf(4), 1, 0.1, True),
        (leaf(3, 4), leaf(4), None, None, leaf(4), None, 1, 0.1, False),
        (leaf(3, 4), None, None, leaf(3, 4), None, None, 1, 0.1, True),
    ],
    "norm_vjp": [
        (leaf(2, 3, 4), leaf(4), leaf(2, 3, 4), 1, 0.1, True),
        (leaf(2, 3, 4), None, leaf(2, 3, 4), 2, 0.1, False),
    ],
    "norm_vjp_jvp": [
        (leaf(3, 4), leaf(4), leaf(3, 4), leaf(3, 4), leaf(4), leaf(3, 4), 1, 0.1, True),
        (leaf(3, 4), leaf(4), leaf(3, 4), leaf(3, 4), None, None, 1, 0.1, False),
        (leaf(3, 4), None, leaf(3, 4), None, leaf(4), leaf(3, 4), 1, 0.1, True),
    ],
    "cross_entropy": [
        (leaf(3, 4), CLASSES, WEIGHTS, *LOSS),
        (leaf(4, 3), CLASSES, None, 0, -1, 0.0),
        (leaf(3, 4), leaf(3, 4), WEIGHTS, *LOSS),
    ],
    "cross_entropy_jvp": [
        (leaf(3, 4), CLASSES, WEIGHTS, leaf(3, 4), *LOSS),
        (leaf(3, 4), leaf(3, 4), None, leaf(3, 4), *LOSS),
    ],
    "cross_entropy_vjp": [
        (leaf(3, 4), CLASSES, WEIGHTS, leaf(3), *LOSS),
        (leaf(3, 4), leaf(3, 4), None, leaf(3), *LOSS),
    ],
    "cross_entropy_vjp_jvp": [
        (leaf(3, 4), CLASSES, WEIGHTS, leaf(3), leaf(3, 4), leaf(3), *LOSS),
        (leaf(3, 4), leaf(3, 4), None, leaf(3), leaf(3, 4), None, *LOSS),
    ],
    "linear_cross_entropy": [(leaf(3, 2), leaf(4, 2), CLASSES, leaf(4), WEIGHTS, *CHUNKS)],
    "linear_cross_entropy_jvp": [
        (leaf(3, 2), leaf(4, 2), CLASSES, leaf(4), None, leaf(3, 2), leaf(4, 2), leaf(4), *CHUNKS),
        (leaf(3, 2), leaf(4, 2), CLASSES, None, WEIGHTS, None, leaf(4, 2), None, *CHUNKS),
    ],
    "linear_cross_entropy_vjp": [
        (leaf(3, 2), leaf(4, 2), CLASSES, leaf(4), None, leaf(3), [True] * 3, *CHUNKS),
        (leaf(3, 2), leaf(4, 2), CLASSES, None, WEIGHTS, leaf(3), [True, False, False], *CHUNKS),
    ],
    "linear_cross_entropy_vjp_jvp": [
        (
            *(leaf(3, 2), leaf(4, 2), CLASSES, leaf(4), WEIGHTS, leaf(3)),
            *(leaf(3, 2), leaf(4, 2), leaf(4), leaf(3), [True] * 3, *CHUNKS),
        ),
        (
            *(leaf(3, 2), leaf(4, 2), CLASSES, None, None, leaf(3)),
            *(leaf(3, 2), None, None, None, [True, True, False], *CHUNKS),
        ),
    ],
    "group_norm": [
        (leaf(2, 4, 3), leaf(4), leaf(4), None, 2, 0.1),
        (leaf(3, 4), leaf(4), None, None, 0, 0.1),
        (leaf(2, 4, 3), None, leaf(4), torch.rand(2, 4, dtype=D), 0, 0.1),
    ],
    "group_norm_jvp": [
        (leaf(2, 4, 2), leaf(4), leaf(4), leaf(2, 4, 2), leaf(4), leaf(4), None, 2, 0.1),
        (leaf(3, 4), leaf(4), None, None, leaf(4), None, None, 0, 0.1),
        (leaf(3, 4), leaf(4), None, leaf(3, 4), leaf(4), None, torch.rand(2, 4, dtype=D), 0, 0.1),
    ],
    "group_norm_vjp": [
        (leaf(2, 4, 3), leaf(4), leaf(2, 4, 3), None, 2, 0.1),
        (leaf(2, 4, 3), None, leaf(2, 4, 3), None, 0, 0.1),
        (leaf(3, 4), leaf(4), leaf(3, 4), torch.rand(2, 4, dtype=D), 0, 0.1),
    ],
    "group_norm_vjp_jvp": [
        (
            leaf(2, 4, 2),
            leaf(4),
            leaf(2, 4, 2),
            leaf(2, 4, 2),
            leaf(4),
            leaf(2, 4, 2),
            None,
            2,
            0.1,
        ),
        (leaf(3, 4), None, leaf(3, 4), None, leaf(4), leaf(3, 4), None, 0, 0.1),
        (
            *(leaf(3, 4), leaf(4), leaf(3, 4), leaf(3, 4), None, None),
            *(torch.rand(2, 4, dtype=D), 0, 0.1),
        ),
    ],
    "batch_norm": [(leaf(3, 4), leaf(4), leaf(4), 0.1), (leaf(3, 4, 2), None, None, 0.1)],
    "attention": [
        (*attended(KEEP, leaf(1, 1, 2, 3)), *PLAIN),
        (*attended(seed=SEED), 0.5, True, 0.4),
        (*(t.mT.contiguous().mT for t in attended()[:3]), None, None, None, *PLAIN),
    ],
    "attention_jvp": [
        (*attended(KEEP, seed=SEED), *attended()[:3], None, 0.5, True, 0.4),
        (*attended(), None, leaf(1, 1, 3, 2), None, None, *PLAIN),
    ],
    "attention_vjp": [
        (*attended(KEEP), *results(1), leaf(1, 2, 2, 1), *PLAIN),
        (*attended(seed=SEED), *results(1), leaf(1, 2, 2, 1), 0.5, True, 0.4),
    ],
    "attention_vjp_jvp": [
        (
            *(*attended(seed=SEED), *attended()[:3], None, *results(2)),
            *(leaf(1, 2, 2, 1), leaf(1, 2, 2, 1), 0.5, False, 0.4, True),
        ),
        (
            *(*attended(), leaf(1, 2, 2, 2), None, None, None, *results(2)),
            *(leaf(1, 2, 2, 1), None, *PLAIN, False),
        ),
    ],
    "add_norm": [
        (leaf(2, 3, 4), leaf(2, 3, 4), leaf(4), leaf(4), 1, 0.1, True),
        (leaf(2, 3, 4), leaf(2, 3, 4), leaf(3, 4), None, 2, 0.1, False),
    ],
    "add_norm_vjp": [
        (leaf(2, 3, 4), leaf(4), leaf(2, 3, 4), leaf(2, 3, 4), 1, 0.1, True),
        (leaf(3, 4), None, leaf(3, 4), leaf(3, 4), 1, 0.1, False),
    ],
    "gated": [(leaf(3, 4), leaf(3, 4), "silu"), (leaf(3, 4).T, leaf(4, 3), "gelu")],
    "gated_jvp": [
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(3, 4), "silu"),
        (leaf(3, 4), leaf(3, 4), None, leaf(3, 4), "gelu"),
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), None, "gelu_tanh"),
    ],
    "gated_vjp": [(leaf(3, 4), leaf(3, 4), leaf(3, 4), "gelu")],
    "gated_vjp_vjp": [
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(3, 4), "silu"),
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), None, leaf(3, 4), "silu"),
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(3, 4), None, "gelu"),
    ],
    "gated_vjp_jvp": [
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(3, 4), "silu"),
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), None, leaf(3, 4), None, "silu"),
        (leaf(3, 4), leaf(3, 4), leaf(3, 4), leaf(3, 4), None, leaf(3, 4), "gelu"),
    ],
    "rotary": [
        (leaf(2, 3, 6), leaf(1, 3, 3), leaf(1, 3, 3), False, False),
        (leaf(2, 3, 5), leaf(2, 1, 2), leaf(2, 1, 2), True, True),
        (leaf(3, 2, 6).transpose(0, 1), leaf(1, 3, 3), leaf(1, 3, 3), False, True),
    ],
    "linear": [(leaf(3, 4), leaf(5, 4), leaf(5)), (leaf(2, 3, 4), leaf(2, 5, 4), None)],
    "linear_vjp": [
        (leaf(3, 5), leaf(3, 4), leaf(5, 4), True),
        (leaf(2, 3, 5), None, leaf(2, 5, 4), False),
        (leaf(3, 5), leaf(3, 4), None, True),
    ],
    "linear_jvp": [
        (leaf(3, 4), leaf(5, 4), leaf(5), leaf(3, 4), leaf(5, 4), leaf(5)),
        (leaf(3, 4), leaf(5, 4), None, None, leaf(5, 4), None),
        (leaf(3, 4), leaf(5, 4), leaf(5), None, None, leaf(5)),
    ],
    "column_sum": [(leaf(3, 4),), (leaf(2, 3, 4),)],
    "linear_act_dropout": [
        (leaf(3, 4), leaf(5, 4), leaf(5), leaf(3, 5), SEED, "gelu", [], 0.4, True),
        (leaf(3, 4), leaf(5, 4), None, None, None, "relu", [], 0.0, False),
        (leaf(3, 4), leaf(5, 4), None, leaf(3, 5), None, "tanh", [], 0.0, False),
        (leaf(3, 4), leaf(5, 4), leaf(5), leaf(3, 5), SEED, "identity", [], 0.4, False),
        (leaf(3, 4), leaf(5, 4), leaf(5), None, SEED, "gelu", [], 0.4, False),
    ],
    "linear_act_dropout_vjp": [
        (leaf(3, 5), leaf(3, 5), leaf(3, 4), leaf(5, 4), SEED, True, "gelu", [], 0.4),
        (leaf(2, 3, 5), leaf(2, 3, 5), None, leaf(2, 5, 4), None, False, "tanh", [], 0.0),
        (leaf(3, 5), None, leaf(3, 4), None, SEED, True, "identity", [], 0.4),
    ],
    "linear_act_dropout_jvp": [
        (
            *(leaf(3, 4), leaf(5, 4), leaf(5), leaf(3, 5)),
            *(leaf(3, 4), leaf(5, 4), leaf(5), leaf(3, 5)),
            *(SEED, "gelu", [], 0.4),
        ),
        (
            *(leaf(3, 4), leaf(5, 4), None, leaf(3, 5), None, leaf(5, 4), None, None),
            *(None, "tanh", [], 0.0),
        ),
    ],
}
# The highest derivative of the activation in the op.
ORDERS = {
    "activation": lambda args: 0,
    "activation_vjp": lambda args: args[-1],
    "activation_jvp": lambda args: 1,
    "linear_act_dropout_vjp": lambda args: 1,
    "linear_act_dropout_jvp": lambda args: 1,
    "gated_vjp_vjp": lambda args: 1 + (args[3] is not None),
    "gated_vjp_jvp": lambda args: 1 + (args[3] is not None),
    "activation_vjp_vjp": lambda args: args[-1] + 1,
    "activation_vjp_jvp": lambda args: args[-1] + (args[2] is not None),
}
MODULES = (
    activation,
    attention,
    cross_entropy,
    dropout,
    gated,
    group_norm,
    linear,
    linear_cross_entropy,
    norm,
    rotary,
    softmax,
)
# Writes into its arguments, and has no derivative.
UPDATE = "batch_norm_update"
CALLS = {
    n: getattr(m, n) for m in MODULES for n in SAMPLES if hasattr(getattr(m, n, None), "Function")
}


def test_every_op_is_here():
    registered = {
        s.name.split("::")[1]
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("jacobian_ops::")
    }
    assert registered - {UPDATE} == SAMPLES.keys() == CALLS.keys()


CHECKS = (
    *("test_schema", "test_autograd_registration", "test_faketensor"),
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    """Everything for the first sample; the slow check, of compiled graphs, for it alone."""
    op = getattr(torch.ops.jacobian_ops, name).default
    checks = CHECKS
    for args in SAMPLES[name]:
        results = torch.library.opcheck(op, args, test_utils=checks)
        assert results == dict.fromkeys(checks, "SUCCESS")
        checks = CHECKS[:-1]


def test_opcheck_of_the_update():
    op = getattr(torch.ops.jacobian_ops, UPDATE).default
    args = torch.rand(2, 3), torch.rand(3), torch.rand(3), 0.1
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def whole(name, op):
    """``op``, called ``name``, as a function of variables alone.

    Attention's products take its results, which belong to q, k and v; its statistics are for them.
    """
    ops = torch.ops.jacobian_ops
    if name == "attention":
        return lambda *a: op(*a)[:1]
    if name == "attention_jvp":
        return lambda *a: op(*a)[:2]
    if name == "attention_vjp":
        return lambda *a: op(*a[:6], *ops.attention(*a[:6], *a[9:]), *a[8:])
    if name == "attention_vjp_jvp":
        return lambda *a: op(*a[:10], *ops.attention_jvp(*a[:10], *a[16:19]), *a[14:])
    return op


@pytest.mark.parametrize("name", SAMPLES)
def test_every_op_is_differentiable(name):
    """Each op of the closed set by itself: reverse, forward and both, as gradcheck sees it.

    In random directions, which see every element of the Jacobians: test_gradients.py has all rows.
    """
    op = whole(name, getattr(torch.ops.jacobian_ops, name).default)
    for args in SAMPLES[name]:
        where = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]
        # Where an argument is absent, a result can be zeros.
        y = op(*args)
        results = (y,) if isinstance(y, torch.Tensor) else y
        kept = [i for i, t in enumerate(results) if t.requires_grad]

        def f(*tensors, args=args, where=where, kept=kept):
            full = list(args)
            for i, t in zip(where, tensors, strict=True):
                full[i] = t
            y = op(*full)
            return y if isinstance(y, torch.Tensor) else tuple(y[i] for i in kept)

        leaves = [args[i].detach().requires_grad_() for i in where]
        # Up to the third order, where derivatives of an activation end.
        order = ORDERS[name](args) if name in ORDERS else name.count("_vjp") + name.count("_jvp")
        left = 3 - order
        if left >= 1:
            torch.autograd.gradcheck(f, leaves, check_forward_ad=True, fast_mode=True)
        if left >= 2:
            torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", [n for n, c in CALLS.items() if c.Function is not None])
def test_public_function(name):
    """The torch.autograd.Function of an op is right by itself, under torch.func too."""
    function = CALLS[name].Function
    assert issubclass(function, torch.autograd.Function)
    op = whole(name, getattr(torch.ops.jacobian_ops, name).default)
    args = SAMPLES[name][0]
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]

    def apply(call):
        def f(*tensors):
            tensors = iter(tensors)
            y = call(
                *(
                    next(tensors) if isinstance(a, torch.Tensor) and a.requires_grad else a
                    for a in args
                )
            )
            return y[0] if isinstance(y, tuple) else y

        return f

    ours, theirs = apply(whole(name, function.apply)), apply(op)
    xs = tuple(x.detach() for x in leaves)
    ts = tuple(torch.randn_like(x) for x in xs)
    torch.testing.assert_close(torch.func.jvp(ours, xs, ts), torch.func.jvp(theirs, xs, ts))
    for run in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(run(ours)(*xs), run(theirs)(*xs))
    stacked = [torch.stack([x, -x]) for x in xs]
    torch.testing.assert_close(torch.vmap(ours)(*stacked), torch.vmap(theirs)(*stacked))


def test_grad_fn_bears_the_name():
    x = leaf(3)
    assert type(activation.activation(x, *ACT).grad_fn).__name__ == "ActivationBackward"
    assert type(softmax.softmax(x, 0, 1.0).grad_fn).__name__ == "SoftmaxBackward"


def test_raw_op_under_jvp_is_not_zero():
    """custom_op with register_autograd gives silent zero tangents here."""
    op = torch.ops.jacobian_ops.softmax.default
    x = torch.tensor([[0.1, 0.7, -0.3]], dtype=D)
    t = torch.tensor([[1.0, 0.0, -1.0]], dtype=D)
    _, ty = torch.func.jvp(lambda z: op(z, 1, 1.0), (x,), (t,))
    y = x.softmax(1)
    torch.testing.assert_close(ty, y * (t - (y * t).sum()))
    assert ty.abs().max() > 0.1
