"""scaled_dot_product_attention beyond what tests/cases.py drives: sizes, masks, layouts, memory."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import jacobian_ops.functional as J
import jacobian_ops.nn as jnn
from jacobian_ops import kernels

from .cases import SEED, P, attention_primitive, mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (queries, keys, d, dv): less than a tile, odd widths, several tiles and parts of them.
SIZES = [(1, 1, 1, 1), (5, 7, 3, 9), (97, 65, 16, 17), (130, 200, 64, 32), (33, 64, 80, 80)]


def made(shapes, dtype=torch.float64):
    return [torch.randn(shape).to(dtype) for shape in shapes]


def products(tensors, tangents, go, tgo, **hidden):
    """Everything that the four kernels return, from a composition in float64."""
    f = attention_primitive(**hidden)

    def vjp(*args):
        return torch.func.vjp(f, *args[:-1])[1](args[-1])

    o, to = torch.func.jvp(f, tensors, tangents)
    g, tg = torch.func.jvp(vjp, (*tensors, go), (*tangents, tgo))
    return o, to, g, tg


def run(tensors, tangents, go, tgo, keep=None, bias=None, tbias=None, seed=None, **consts):
    """The same from the kernels, and the two forwards."""
    given = *tensors, keep, bias, seed
    o, lse = kernels.attention(*given, **consts)
    o2, to, lse2, mu = kernels.attention_jvp(*given, *tangents, tbias, **consts)
    g = kernels.attention_vjp(*given, o, lse, go, **consts)
    both = kernels.attention_vjp_jvp(*given, *tangents, tbias, o, to, lse, mu, go, tgo, **consts)
    torch.testing.assert_close(o2, o)
    torch.testing.assert_close(lse2, lse)
    torch.testing.assert_close(both[:3], g, rtol=1e-2 if o.element_size() == 2 else 1e-5, atol=1e-2)
    return o, to, g, both[3:]


def close(got, want, tolerance):
    """Relative to the largest number of each tensor."""
    for a, b in zip(got, want, strict=True):
        scale = b.abs().max().clamp(min=1) if b.numel() else 1.0
        assert ((a.double() - b).abs() <= tolerance * scale).all(), (a.double() - b).abs().max()


def check(got, want, dtype):
    eps = max(torch.finfo(dtype).eps, 2e-7)
    for a, b, times in zip(got, want, (4, 8, 16, 32), strict=True):
        if isinstance(a, torch.Tensor):
            a, b = (a,), (b,)
        assert all(t.dtype == dtype for t in a)
        close(a, b, 1e-12 if dtype is torch.float64 else times * eps)


def doubled(args):
    return tuple(t.double() for t in args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_of_many_sizes(ours, size, dtype):
    queries, keys, d, dv = size
    shapes = (1, 2, queries, d), (1, 2, keys, d), (1, 2, keys, dv)
    tensors, tangents = made(shapes, dtype), made(shapes, dtype)
    go, tgo = made([(1, 2, queries, dv)] * 2, dtype)
    want = products(doubled(tensors), doubled(tangents), go.double(), tgo.double())
    check(run(tensors, tangents, go, tgo, scale=d**-0.5), want, dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masks", ["none", "keep", "bias", "row", "dropout"])
def test_masks_and_groups(ours, masks, causal):
    """Four heads of q for two of k and v, a query without keys, and several tiles of each."""
    queries, keys, d, dv = 100, 70, 8, 5
    shapes = (2, 4, queries, d), (2, 2, keys, d), (2, 2, keys, dv)
    tensors, tangents = made(shapes), made(shapes)
    go, tgo = made([(2, 4, queries, dv)] * 2)
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    given, bias, tbias = {}, None, None
    if causal:
        hidden = ~torch.ones_like(hidden).tril()
    if masks == "keep":
        keep = torch.rand(2, 1, queries, keys) < 0.6
        keep[0, 0, 3] = False
        keep[1, 0, 64:] = False
        given["keep"], hidden = keep, hidden | ~keep
    elif masks == "row":  # keys that are padding
        keep = torch.arange(keys)[None, None, None] < torch.tensor([66, 7])[:, None, None, None]
        given["keep"], hidden = keep, hidden | ~keep
    elif masks == "bias":
        bias, tbias = made([(1, 4, queries, keys)] * 2)
        bias[0, 1, :, 5] = -torch.inf
        given |= {"bias": bias, "tbias": tbias}
    elif masks == "dropout":
        given |= {"seed": SEED, "p": P}
    multipliers = mask(2, 4, queries, keys) if masks == "dropout" else None
    f = attention_primitive(hidden, d**-0.5, multipliers)
    inputs, directions = tensors, tangents
    if bias is not None:
        inputs, directions = [*tensors, bias.clamp(min=-1e3)], [*tangents, tbias]

    def vjp(*args):
        return torch.func.vjp(f, *args[:-1])[1](args[-1])[:3]

    want_o, want_to = torch.func.jvp(f, tuple(inputs), tuple(directions))
    want_g, want_tg = torch.func.jvp(vjp, (*inputs, go), (*directions, tgo))
    got = run(tensors, tangents, go, tgo, scale=d**-0.5, causal=causal, **given)
    check(got, (want_o, want_to, want_g, want_tg), torch.float64)


def test_absent_tangents(ours):
    """None is a zero."""
    shapes = (1, 2, 9, 4), (1, 1, 11, 4), (1, 1, 11, 3)
    tensors, full, (go, tgo) = made(shapes), made(shapes), made([(1, 2, 9, 3)] * 2)
    for given in itertools.product([True, False], repeat=4):
        tangents = [t if g else None for t, g in zip(full, given, strict=False)]
        zeros = [t if g else 0 * t for t, g in zip(full, given, strict=False)]
        cotangent = (tgo, tgo) if given[3] else (None, 0 * tgo)
        got = run(tensors, tangents, go, cotangent[0], scale=0.5)
        check(got, run(tensors, zeros, go, cotangent[1], scale=0.5), torch.float64)


def test_needs(ours):
    shapes = (1, 2, 9, 4), (1, 2, 11, 4), (1, 2, 11, 3)
    tensors, (go,) = made(shapes), made([(1, 2, 9, 3)])
    given = *tensors, None, None, None
    o, lse = kernels.attention(*given, scale=0.5)
    want = kernels.attention_vjp(*given, o, lse, go, scale=0.5)
    for needs in itertools.product([True, False], repeat=3):
        got = kernels.attention_vjp(*given, o, lse, go, scale=0.5, needs=needs)
        for g, w, need in zip(got, want, needs, strict=True):
            assert torch.equal(g, w) if need else g is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_inside_rows(ours, dtype):
    """(b, s, h, d) seen as (b, h, s, d): read where it lies, and the result is laid out alike."""
    q, k, v = (torch.randn(2, n, 3, 16).to(dtype).transpose(1, 2) for n in (20, 70, 70))
    o = J.scaled_dot_product_attention(q, k, v)
    assert o.transpose(1, 2).is_contiguous()
    want = J.scaled_dot_product_attention(*(t.contiguous() for t in (q, k, v)))
    assert want.is_contiguous() and torch.equal(o, want)


def test_any_strides(ours):
    """Columns apart, rows that overlap, one row for all."""
    q = torch.randn(2, 2, 8, 9).mT
    k = torch.randn(40).as_strided((2, 2, 7, 8), (9, 5, 2, 1))
    v = torch.randn(1, 1, 1, 6).expand(2, 2, 7, 6)
    got = J.scaled_dot_product_attention(q, k, v)
    want = F.scaled_dot_product_attention(*(t.contiguous() for t in (q, k, v)))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 4), (7, 4), (7, 3)),
        ((3, 5, 4), (3, 7, 4), (3, 7, 3)),
        ((2, 3, 5, 4), (3, 7, 4), (3, 7, 3)),
        ((2, 3, 5, 4), (2, 1, 7, 4), (2, 1, 7, 3)),
        ((2, 1, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
        ((2, 1, 3, 5, 4), (1, 2, 3, 7, 4), (2, 2, 3, 7, 3)),
    ],
    ids=str,
)
def test_shapes_as_torch_takes_them(ours, shapes):
    q, k, v = made(shapes)
    o = J.scaled_dot_product_attention(q, k, v)
    if q.dim() > 2:
        q = q.expand(torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]) + q.shape[-2:])
    want = attention_primitive()(*(t[(None,) * max(0, 3 - t.dim())] for t in (q, k, v)))
    torch.testing.assert_close(o, want if q.dim() > 2 else want[0])


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 2, 3, 4), (0, 2, 5, 4), (0, 2, 5, 4)),
        ((2, 0, 3, 4), (2, 0, 5, 4), (2, 0, 5, 4)),
        ((2, 2, 0, 4), (2, 2, 5, 4), (2, 2, 5, 4)),
        ((2, 2, 3, 4), (2, 2, 0, 4), (2, 2, 0, 4)),
        ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 0)),
        ((2, 2, 3, 0), (2, 2, 5, 0), (2, 2, 5, 4)),
    ],
    ids=str,
)
def test_empty(ours, shapes):
    tensors = [t.requires_grad_() for t in made(shapes)]
    o = J.scaled_dot_product_attention(*tensors)
    assert o.shape == (*shapes[0][:-1], shapes[2][-1])
    if shapes[0][-1] == 0:
        torch.testing.assert_close(o, tensors[2].mean(-2, True).expand_as(o))
    elif o.numel():
        assert not o.any()
    gradients = torch.autograd.grad(o.sum(), tensors)
    assert [g.shape for g in gradients] == [t.shape for t in tensors]
    assert all(g.isfinite().all() for g in gradients)
    o, to = torch.func.jvp(
        J.scaled_dot_product_attention,
        tuple(t.detach() for t in tensors),
        tuple(torch.ones_like(t) for t in tensors),
    )
    assert to.shape == o.shape and to.isfinite().all()


def test_special_values(ours):
    """NaN and infinity come through, in their rows alone; what is hidden does not."""
    q, k, v = made(((1, 1, 4, 2), (1, 1, 3, 2), (1, 1, 3, 2)), torch.float32)
    q[0, 0, 1] = torch.nan
    o = J.scaled_dot_product_attention(q, k, v)
    assert o[0, 0, 1].isnan().all() and o[0, 0, [0, 2, 3]].isfinite().all()
    q[0, 0, 1] = 1.0
    k[0, 0, 2] = torch.nan
    keep = torch.tensor([True, True, False])
    v[0, 0, 2] = 0.0
    assert J.scaled_dot_product_attention(q, k, v, keep).isfinite().all()


def test_a_hidden_tangent_is_no_tangent(ours):
    q, k, v = made(((1, 1, 4, 2), (1, 1, 3, 2), (1, 1, 3, 2)))
    keep = torch.tensor([True, True, False])
    tk = torch.zeros_like(k)
    tk[..., 2, :] = torch.inf
    to = torch.func.jvp(lambda k: J.scaled_dot_product_attention(q, k, v, keep), (k,), (tk,))[1]
    assert not to.any()


def test_same_mask_for_every_product(ours):
    """Dropout's numbers are those of the scores' elements."""
    q, k = (torch.zeros(2, 2, n, 4) for n in (9, 70))
    v = torch.eye(70).expand(2, 2, 70, 70)
    o, _ = kernels.attention(q, k, v, seed=SEED, p=P, scale=1.0)
    torch.testing.assert_close(o, mask(2, 2, 9, 70).float() / 70)


def test_thread_count_changes_nothing():
    shapes = (1, 1, 300, 16), (1, 1, 300, 16), (1, 1, 300, 16)
    tensors, (go,) = made(shapes, torch.float32), made(shapes[:1], torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            given = *tensors, None, None, None
            o, lse = kernels.attention(*given, scale=0.25, causal=True)
            results.append((o, *kernels.attention_vjp(*given, o, lse, go, scale=0.25, causal=True)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_training_dropout(ours):
    q, k, v = made(((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4)))
    torch.manual_seed(0)
    a = J.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(a, J.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(a, J.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    generator = torch.Generator().manual_seed(1)
    b = J.scaled_dot_product_attention(q, k, v, dropout_p=0.5, generator=generator)
    generator.manual_seed(1)
    again = J.scaled_dot_product_attention(q, k, v, dropout_p=0.5, generator=generator)
    assert torch.equal(b, again)
    assert not J.scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()


def test_gradients_of_a_mask(ours):
    """Broadcast over batch and queries, first and second order."""
    q, k, v, bias = made(((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 1, 5)))

    def hvp(f):
        def loss(*args):
            return f(*args).pow(2).sum()

        return torch.func.jvp(
            torch.func.grad(loss, (0, 1, 2, 3)), (q, k, v, bias), (v[..., :3, :], k, v, 2 * bias)
        )

    torch.testing.assert_close(hvp(J.scaled_dot_product_attention), hvp(attention_primitive()))


def test_every_transform_of_second_order_stays_in_tiles(ours, monkeypatch):
    """None of them builds the matrix of scores."""
    from jacobian_ops.autograd import attention

    def forbidden(*_):
        raise AssertionError("elementary ops")

    monkeypatch.setattr(attention._Explicit, "__init__", forbidden)
    tensors = tuple(made(((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))))

    def loss(*args):
        return J.scaled_dot_product_attention(*args).pow(2).sum()

    def tangent(*args):
        return torch.func.jvp(J.scaled_dot_product_attention, args, args)[1].pow(2).sum()

    every = (0, 1, 2)
    torch.func.jvp(torch.func.grad(loss, every), tensors, tensors)  # forward over reverse
    torch.func.grad(tangent, every)(*tensors)  # reverse over forward
    torch.func.vjp(torch.func.grad(loss, every), *tensors)[1](tensors)  # reverse over reverse
    leaves = [t.clone().requires_grad_() for t in tensors]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)


@pytest.mark.parametrize("outer", ["jvp", "grad"])
@pytest.mark.parametrize("middle", ["jvp", "grad"])
@pytest.mark.parametrize("inner", ["jvp", "grad"])
def test_third_order_in_every_nesting(ours, inner, middle, outer):
    x, t = torch.randn(2, 1, 2, 3, 4, dtype=torch.float64)

    def derive(how, f):
        if how == "jvp":
            return lambda x: torch.func.jvp(f, (x,), (t.sin(),))[1]
        return lambda x: torch.func.grad(lambda x: (f(x) * t[..., :1]).sin().sum())(x)

    def run(f):
        def own(x):
            return f(1.1 * x, x.sin(), x.cos())

        return derive(outer, derive(middle, derive(inner, own)))(x)

    got, want = run(J.scaled_dot_product_attention), run(attention_primitive())
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)


MEMORY = """
import resource, torch, jacobian_ops.functional as J
torch.set_num_threads(2)
n = 32768
q, k, v, go = (torch.randn(1, 1, n, 16) for _ in range(4))
resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    + (6 << 30),) * 2)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
def f(q, k, v):
    return J.scaled_dot_product_attention(q, k, v, is_causal=True)
{product}
print(peak() - before)
"""


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "product",
    [
        "torch.func.vjp(f, q, k, v)[1](go)",
        "torch.func.jvp(f, (q, k, v), (k, v, q))",
        "torch.func.jvp(lambda *qkv: torch.func.vjp(f, *qkv)[1](go), (q, k, v), (k, v, q))",
    ],
    ids=["vjp", "jvp", "hvp"],
)
def test_memory_is_linear(product):
    """Where a matrix of scores would be 4 GiB."""
    out = subprocess.run(
        [sys.executable, "-c", MEMORY.format(product=product)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 256, f"{out.stdout} MiB"


def sdpa(**changed):
    given = {name: torch.randn(2, 4, 5, 8) for name in ("query", "key", "value")}
    return J.scaled_dot_product_attention(**(given | changed))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(query=torch.randn(8)), RuntimeError, r"query has shape \[8\]; allowed: at least two"),
        (dict(key=torch.randn(2, 4, 5, 7)), RuntimeError, r"\[2, 4, 5, 7\] and .*last dimension"),
        (dict(value=torch.randn(2, 4, 6, 8)), RuntimeError, "the same length of key and value"),
        (dict(key=torch.randn(2, 4, 5, 8).double()), RuntimeError, "key has float64"),
        (dict(query=torch.ones(2, 4, 5, 8).long()), NotImplementedError, "query has dtype int64"),
        (dict(key=torch.randn(2, 3, 5, 8)), RuntimeError, "before the last two that broadcast"),
        (
            dict(key=torch.randn(2, 3, 5, 8), value=torch.randn(2, 3, 5, 8), enable_gqa=True),
            RuntimeError,
            "heads of key and value that divide those of query",
        ),
        (dict(key=torch.randn(3, 4, 5, 8)), RuntimeError, "that broadcast"),
        (dict(attn_mask=torch.ones(4, 4)), RuntimeError, r"attn_mask has shape \[4, 4\]; allowed"),
        (dict(attn_mask=torch.ones(5, 5).long()), RuntimeError, "attn_mask has dtype int64"),
        (dict(dropout_p=1.5), RuntimeError, "dropout_p is 1.5"),
        (dict(dropout_p=-0.1), RuntimeError, "dropout_p is -0.1"),
        (dict(scale=math.inf), ValueError, "scale is inf"),
        (dict(key=[1.0]), TypeError, "key must be Tensor"),
    ],
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        sdpa(**changed)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(keep=torch.ones(3, 5)), "keep has dtype float32"),
        (dict(keep=torch.ones(3, 5, dtype=torch.bool)), r"keep has shape \[3, 5\]; allowed"),
        (dict(bias=torch.ones(1, 1, 3, 4)), r"bias has shape \[1, 1, 3, 4\]"),
        (
            dict(k=torch.ones(2, 3, 5, 4), v=torch.ones(2, 3, 5, 4)),
            "k has 3 heads; allowed: a divisor of the 2",
        ),
        (dict(k=torch.ones(2, 5, 4)), r"k has shape \[2, 5, 4\]"),
        (dict(v=torch.ones(2, 2, 6, 4)), r"v has shape \[2, 2, 6, 4\]; allowed: \[2, 2, 5, 4\]"),
        (dict(seed=torch.ones(2, 2, dtype=torch.int64), p=0.5), r"seed has shape \[2, 2\]"),
        (dict(q=torch.ones(3, 4)), r"q has shape \[3, 4\]"),
    ],
)
def test_errors_of_kernels(change, message):
    shapes = dict(q=(2, 2, 3, 4), k=(2, 2, 5, 4), v=(2, 2, 5, 4))
    given = {name: torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(RuntimeError, match=message):
        kernels.attention(**(given | change), scale=1.0)


def test_products_need_the_cotangent():
    q = torch.ones(1, 1, 3, 4)
    o, to, lse, mu = kernels.attention_jvp(*[q] * 3, *[None] * 3, q, None, None, None, scale=1.0)
    with pytest.raises((RuntimeError, ValueError), match="attention_vjp: go"):
        kernels.attention_vjp(q, q, q, None, None, None, o, lse, None, scale=1.0)
    forward = q, q, q, None, None, None, q, None, None, None
    for to_, go, name in ((None, o, "to"), (to, None, "go")):
        with pytest.raises((RuntimeError, ValueError), match=f"attention_vjp_jvp: {name}"):
            kernels.attention_vjp_jvp(*forward, o, to_, lse, mu, go, None, scale=1.0)


def test_a_hidden_key_may_hold_anything(ours):
    """By either mask, also where its score is infinite."""
    q, v = torch.ones(1, 1, 3, 4), torch.randn(1, 1, 5, 2)
    k = torch.ones(1, 1, 5, 4)
    k[..., 2, :] = torch.inf
    keep = torch.arange(5) != 2
    bias = torch.zeros(5).masked_fill(~keep, -torch.inf)
    want = v[..., keep, :].mean(-2, keepdim=True).expand(1, 1, 3, 2)
    shape = 1, 1, 3, 5
    for masks in ((keep.expand(shape), None), (None, bias.expand(shape))):
        torch.testing.assert_close(kernels.attention(q, k, v, *masks, scale=0.5)[0], want)


MODULES = {
    "plain": {},
    "batch_first": dict(batch_first=True),
    "no bias": dict(bias=False, batch_first=True),
    "other widths": dict(kdim=6, vdim=10),
    "bias_kv": dict(add_bias_kv=True, batch_first=True),
    "zero_attn": dict(add_zero_attn=True),
}
MASKS = ["none", "bool", "float", "heads", "causal", "padding", "padding and bool", "padding float"]


@pytest.mark.parametrize("need_weights", [False, True, "each"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kwargs", MODULES.values(), ids=MODULES.keys())
def test_multihead_attention(kwargs, masks, need_weights):
    """Values, weights and gradients are torch's."""
    n, queries, keys, e = 3, 5, 5 if masks == "causal" else 7, 8
    native = torch.nn.MultiheadAttention(e, 2, **kwargs).double()
    ours = jnn.MultiheadAttention(e, 2, **kwargs).double()
    ours.load_state_dict(native.state_dict())
    shapes = (queries, e), (keys, kwargs.get("kdim", e)), (keys, kwargs.get("vdim", e))
    first = kwargs.get("batch_first", False)
    inputs = [torch.randn(n, *s) if first else torch.randn(s[0], n, s[1]) for s in shapes]
    inputs = [x.double().requires_grad_() for x in inputs]
    given = {}
    if masks.endswith("bool"):
        given["attn_mask"] = torch.rand(queries, keys) < 0.3
        given["attn_mask"][:, 0] = False
    elif masks == "float":
        given["attn_mask"] = torch.randn(queries, keys).double()
    elif masks == "heads":
        given["attn_mask"] = torch.randn(n * 2, queries, keys).double()
    elif masks == "causal":
        given |= dict(attn_mask=~torch.ones(queries, keys).tril().bool(), is_causal=True)
    if masks.startswith("padding"):
        padding = torch.arange(keys) >= torch.tensor([7, 4, 1])[:, None]
        given["key_padding_mask"] = padding if masks != "padding float" else -3.0 * padding
    if masks == "padding float":
        given["key_padding_mask"] = given["key_padding_mask"].double()
    given |= dict(need_weights=bool(need_weights), average_attn_weights=need_weights != "each")
    results = []
    for module in (native, ours):
        if module is native and (native.bias_k is not None or native.add_zero_attn):
            hint = dict(is_causal=False)  # with it, torch hides the added key of the mask
        else:
            hint = {}
        o, weights = module(*inputs, **(given | hint))
        loss = o.pow(2).sum() + (weights.pow(2).sum() if need_weights else 0.0)
        gradients = torch.autograd.grad(loss, [*inputs, *module.parameters()])
        results.append((o, weights, gradients))
    torch.testing.assert_close(results[1], results[0])


def test_multihead_attention_without_a_batch():
    module = jnn.MultiheadAttention(8, 2)
    x = torch.randn(5, 8)
    o, weights = module(x, x, x)
    assert o.shape == (5, 8) and weights.shape == (5, 5)
    torch.testing.assert_close(o, module(x[:, None], x[:, None], x[:, None])[0][:, 0])
    with pytest.raises(RuntimeError, match="is_causal is True and attn_mask is None"):
        module(x, x, x, is_causal=True)
    for padding, text in (
        (torch.zeros(3, 5).long(), "key_padding_mask has dtype int64; allowed: bool, or"),
        (torch.zeros(5, 3).bool(), r"key_padding_mask has shape \[5, 3\]; it must be \[3, 5\]"),
    ):
        with pytest.raises(AssertionError, match=text):
            module(*[torch.randn(5, 3, 8)] * 3, key_padding_mask=padding)
    with pytest.raises(AssertionError, match="attn_mask has dtype uint8"):
        module(*[torch.randn(5, 3, 8)] * 3, attn_mask=torch.zeros(5, 5, dtype=torch.uint8))
    allowed = r"attn_mask has shape \[1, 5\]; allowed: \[5, 5\] or \[6, 5, 5\]"
    with pytest.raises(RuntimeError, match=allowed):
        module(*[torch.randn(5, 3, 8)] * 3, attn_mask=torch.zeros(1, 5))
    with pytest.raises(RuntimeError, match="batches of 3, 1 and 1"):
        module(torch.randn(5, 3, 8), *[torch.randn(5, 1, 8)] * 2)
    with pytest.raises(RuntimeError, match="have 2, 3 and 2 dimensions"):
        module(x, x[None], x)


@pytest.mark.cpu_only
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_by_torch_as_by_ours(monkeypatch, causal, inside):
    """In bfloat16, where torch has the faster kernel: results, layouts, and the VJP on them."""
    shape = (2, 9, 3, 16) if inside else (2, 3, 9, 16)
    tensors = [torch.randn(shape).bfloat16() for _ in range(4)]
    q, k, v, go = (t.transpose(1, 2) if inside else t for t in tensors)
    options = dict(scale=0.3, causal=causal)
    found = {}
    for choice in ("own", "torch"):
        monkeypatch.setattr(kernels._gemm, "CHOICE", choice)
        o, lse = kernels.attention(q, k, v, **options)
        gradients = kernels.attention_vjp(q, k, v, None, None, None, o, lse, go, **options)
        found[choice] = o, lse, *gradients
    for got, want in zip(found["torch"], found["own"], strict=True):
        assert got.stride() == want.stride() and got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)
