"""Dropout's randomness: one mask per seed, whatever recomputes it."""

import numpy as np
import pytest
import torch
from torch.func import grad, jacfwd, jvp, vmap
from torch.utils.checkpoint import checkpoint

import jacobian_ops.functional as J
from jacobian_ops import kernels

ONES = torch.ones(40, 8)

FORMS = {
    "dropout": lambda x, **k: J.dropout(x, 0.5, **k),
    "dropout_add": lambda x, **k: J.dropout_add(x, torch.zeros_like(x), 0.5, **k),
    "softmax_dropout": lambda x, **k: J.softmax_dropout(x, -1, 0.5, **k),
    "linear_act_dropout": lambda x, **k: J.linear_act_dropout(
        x, torch.eye(x.shape[-1], dtype=x.dtype), None, "sigmoid", 0.5, **k
    ),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


@every_form
def test_manual_seed_repeats_and_calls_differ(form):
    assert not torch.equal(form(ONES), form(ONES))
    torch.manual_seed(5)
    first = form(ONES)
    torch.manual_seed(5)
    assert torch.equal(form(ONES), first)


@every_form
def test_generator(form):
    def draw():
        return form(ONES, generator=torch.Generator(ONES.device).manual_seed(9))

    def state():  # of the default generator, which is left alone
        return (torch.cuda if ONES.is_cuda else torch).get_rng_state()

    before = state()
    assert torch.equal(draw(), draw())
    assert torch.equal(state(), before)


@every_form
def test_one_mask_for_all_products(form):
    x = torch.randn(40, 8, requires_grad=True)
    y = form(x)
    (y * 1).sum().backward()
    kept = y != 0
    if form is not FORMS["softmax_dropout"]:  # its J is not diagonal
        assert torch.equal(x.grad != 0, kept)
    y, ty = jvp(form, (x.detach(),), (torch.randn(40, 8),))
    assert torch.equal(ty != 0, y != 0)


@every_form
def test_checkpoint_recomputes_the_mask(form):
    for reentrant in (True, False):
        x = torch.randn(40, 8, requires_grad=True)
        torch.manual_seed(1)
        y = checkpoint(lambda z: form(z.sin() + 9) * 1, x, use_reentrant=reentrant)
        torch.manual_seed(1)
        z = x.detach().clone().requires_grad_()
        want = form(z.sin() + 9)
        y.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(x.grad, z.grad)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate_and_scale(p):
    y = J.dropout(torch.ones(1_000_000), p)
    kept = (y != 0).float().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / 1e6) ** 0.5
    torch.testing.assert_close(y.max().item(), 1 / (1 - p), rtol=1e-6, atol=0)
    assert set(y.unique().tolist()) == {0.0, y.max().item()}


def test_identity_and_nothing():
    x = torch.randn(5, requires_grad=True)
    assert J.dropout(x, 0.5, training=False) is x
    assert J.dropout(x, 0.0) is x
    y = J.dropout(x, 1.0)
    assert torch.equal(y, torch.zeros(5))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(5))
    r = torch.randn(5)
    assert torch.equal(J.dropout_add(x, r, 0.5, training=False), r + x)
    assert torch.equal(J.softmax_dropout(x, 0, 0.5, training=False), J.softmax(x, 0))
    w = torch.randn(4, 5)
    torch.testing.assert_close(
        J.linear_act_dropout(x, w, None, "relu", 0.5, training=False), (x @ w.T).relu()
    )


def test_dropped_infinity_is_nan_as_in_torch():
    x = torch.full((64,), float("inf"))
    y = J.dropout(x, 0.5)
    assert y.isnan().any() and y.isinf().any() and (y.isnan() | y.isinf()).all()


# Random123's known answers for philox4x32-10.
KNOWN = [
    (0x0, 0x0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
]


def philox(counter, key):
    """Philox4x32-10 of the paper, in Python integers."""
    c = [counter & 0xFFFFFFFF, counter >> 32 & 0xFFFFFFFF, 0, 0]
    k = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (b >> 32) ^ c[1] ^ k[0],
            b & 0xFFFFFFFF,
            (a >> 32) ^ c[3] ^ k[1],
            a & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_known_answers():
    for counter, key, words in KNOWN:
        assert philox(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345])
@pytest.mark.parametrize("p", [1e-10, 0.3, 0.5, 0.999])
def test_the_generator(seed, p):
    """Element i takes word i mod 4 of counter i / 4; kept below round((1 - p) 2^32)."""
    y = kernels.dropout(torch.ones(103), p, seed)
    words = [w for c in range(26) for w in philox(c, seed % 2**64)][:103]
    limit = round((1 - p) * 2**32)
    assert torch.equal(y != 0, torch.tensor([w < limit for w in words]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 3, 5, 17, 1023, 4099])
def test_mask_does_not_depend_on_dtype_layout_or_op(n, dtype):
    kept = kernels.dropout(torch.ones(n, 3), 0.4, 7) != 0
    x = torch.ones(n, 3, dtype=dtype)
    assert torch.equal(kernels.dropout(x, 0.4, 7) != 0, kept)
    assert torch.equal(kernels.dropout(x.T.contiguous().T, 0.4, 7) != 0, kept)
    assert torch.equal(kernels.dropout_add(x, x, 0.4, 7) != 1, kept)
    assert torch.equal(kernels.softmax_dropout(x, 0, 0.4, 7) != 0, kept)
    assert torch.equal(kernels.softmax_dropout(x, 1, 0.4, 7) != 0, kept)
    assert torch.equal(kernels.activation(x, "gelu", seed=7, p=0.4) != 0, kept)
    eye = torch.eye(3, dtype=dtype)
    assert torch.equal(kernels.linear_act_dropout(x, eye, None, "relu", 0.4, 7)[0] != 0, kept)


def test_a_stream_for_each_sample():
    seeds = torch.tensor([3, 5, 8])
    x = torch.ones(3, 6, 4)
    got = kernels.dropout(x, 0.5, seeds)
    for i, seed in enumerate(seeds.tolist()):
        assert torch.equal(got[i], kernels.dropout(x[i], 0.5, seed))


@every_form
def test_vmap_randomness(form):
    x = torch.ones(6, 10, 8)

    def differs(y):
        return bool(((y != 0) != (y != 0)[0]).any())

    assert not differs(vmap(form, randomness="same")(x))
    assert differs(vmap(form, randomness="different")(x))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(form)(x)


def test_jacobian_of_one_draw_is_diagonal():
    j = jacfwd(lambda z: J.dropout(z, 0.5), randomness="same")(torch.ones(40))
    assert torch.equal(j, j.diag().diag()) and set(j.diag().unique().tolist()) == {0.0, 2.0}


def test_gradient_of_each_sample():
    """grad inside vmap sees the mask that forward drew."""

    def masks(z):
        def loss(v):
            y = J.dropout(v, 0.5)
            return y.sum(), y != 0

        g, kept = grad(loss, has_aux=True)(z)
        return (g != 0) == kept

    assert vmap(masks, randomness="different")(torch.ones(6, 40)).all()


def test_numpy_seed():
    y = kernels.dropout(np.ones(100, dtype=np.float32), 0.5, 3)
    assert isinstance(y, np.ndarray)
    assert np.array_equal(y, kernels.dropout(torch.ones(100), 0.5, 3).cpu().numpy())
