"""group_norm, batch_norm and instance_norm beyond what tests/cases.py drives."""

import pytest
import torch
import torch.nn.functional as F

import jacobian_ops as jo
import jacobian_ops.functional as J
from jacobian_ops import kernels

from .cases import group_norm_primitive

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of less than a vector, whole and with a tail; in pieces; rows of channels side by side; few groups
# and many units, which blocks of a GPU share; and with one value a channel and sample in groups.
SHAPES = [
    ((3, 4, 3), 2),
    ((3, 4, 64), 2),
    ((2, 4, 7, 7), 1),
    ((2, 2, 3001), 2),
    ((5, 6), 3),
    ((3, 2, 3), 0),
    ((4, 3, 16), 0),
    ((2, 3, 2500), 0),
    ((70, 2, 33), 0),
    ((5, 3), 0),
    ((70, 40), 0),
]


def products(x, weight, bias, gy, tx, tweight, tbias, tgy, groups, eps, fixed=None):
    """What the kernels return, from a composition in float64."""
    f = group_norm_primitive(groups, eps, fixed)

    def vjp(x, weight, gy):
        return torch.func.vjp(f, x, weight, bias)[1](gy)

    y, ty = torch.func.jvp(f, (x, weight, bias), (tx, tweight, tbias))
    g, tg = torch.func.jvp(vjp, (x, weight, gy), (tx, tweight, tgy))
    return (y,), (y, ty), g, (*g, *tg)


def raw(x, weight, bias, gy, tx, tweight, tbias, tgy, groups, eps, fixed=None):
    rest = fixed, groups, eps
    gx, sums = kernels.group_norm_vjp(x, weight, gy, *rest)
    gx2, tgx, sums2 = kernels.group_norm_vjp_jvp(x, weight, gy, tx, tweight, tgy, *rest)
    return (
        (kernels.group_norm(x, weight, bias, *rest),),
        kernels.group_norm_jvp(x, weight, bias, tx, tweight, tbias, *rest),
        (gx, *sums),
        (gx2, *sums2[:2], tgx, *sums2[2:]),
    )


def compare(got, want, dtype):
    """Relative to the largest number of the result."""
    tolerance = 1e-13 if dtype is torch.float64 else max(2e-6, torch.finfo(dtype).eps)
    for results, exact in zip(got, want, strict=True):
        for a, b in zip(results, exact, strict=True):
            assert a.dtype == dtype
            assert ((a.double() - b).abs() <= tolerance * b.abs().max().clamp(min=1)).all()


def tensors_of(shape, dtype):
    x, gy, tx, tgy = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, bias, tweight, tbias = (torch.randn(shape[1]).to(dtype) for _ in range(4))
    return x + 2, weight, bias, gy, tx, tweight, tbias, tgy  # a mean that counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_products_of_many_sizes(ours, shape, groups, dtype):
    tensors = tensors_of(shape, dtype)
    want = products(*(t.double() for t in tensors), groups, 0.1)
    compare(raw(*tensors, groups, 0.1), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4, 7), (2, 3, 64), (5, 3), (70, 40)], ids=str)
def test_products_with_given_statistics(ours, shape, dtype):
    tensors = tensors_of(shape, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    fixed = torch.rand(2, shape[1], dtype=wide)
    want = products(*(t.double() for t in tensors), 0, 0.1, fixed.double())
    compare(raw(*tensors, 0, 0.1, fixed), want, dtype)


@pytest.mark.parametrize("groups", [0, 3])
def test_absent_operands(ours, groups):
    """None is one for the weight and zero for the others."""
    x, gy, tx, tgy = (torch.randn(4, 6, 5, dtype=torch.float64) for _ in range(4))
    one, zero = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    rest = None, groups, 1e-5
    same = torch.testing.assert_close
    same(kernels.group_norm(x, None, None, *rest), kernels.group_norm(x, one, zero, *rest))
    same(
        kernels.group_norm_jvp(x, one, None, None, gy[0, :, 0], None, *rest),
        kernels.group_norm_jvp(x, one, zero, 0 * x, gy[0, :, 0], zero, *rest),
    )
    for t in (tx, None):
        for tg in (tgy, None):
            full = [0 * x if a is None else a for a in (t, tg)]
            same(
                kernels.group_norm_vjp_jvp(x, None, gy, t, None, tg, *rest),
                kernels.group_norm_vjp_jvp(x, one, gy, full[0], zero, full[1], *rest),
            )


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 5), (3, 4, 0)])
def test_empty(ours, shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(shape[1:2], requires_grad=True) for _ in range(2))
    running = torch.zeros(shape[1]), torch.ones(shape[1])
    for f in (
        lambda *a: J.batch_norm(x, None, None, *a, training=True),
        lambda *a: J.batch_norm(x, *running, *a, training=True),
        lambda *a: J.batch_norm(x, *running, *a),
        lambda *a: J.group_norm(x, 2, *a),
    ):
        y = f(weight, bias)
        assert y.shape == shape
        g = torch.autograd.grad(y.sum(), (x, weight, bias))
        assert g[0].shape == shape and not g[1].any() and not g[2].any()
    assert not running[0].any() and torch.equal(running[1], torch.ones(shape[1]))


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_long_channels_far_from_zero(ours, offset):
    """The variance is that of float64, though the first samples are far from the others."""
    x = torch.randn(64, 2, 40, 40) + offset
    x[:2] -= offset
    y, stats = kernels.batch_norm(x, None, None, 1e-5)
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
    torch.testing.assert_close(stats.double(), torch.stack([mean, var]), rtol=1e-5, atol=1e-6)
    exact = F.batch_norm(x.double(), None, None, training=True)
    native = F.batch_norm(x, None, None, training=True)
    allowed = 2 * (native - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (y - exact).abs().max() <= allowed


def test_huge_channels(ours):
    """What lies past the end of a vector does not overflow."""
    x = torch.full((2, 1, 5), 1e33)
    gx, (gw, gb) = kernels.group_norm_vjp(x, None, torch.ones_like(x), None, 0, 1e-12)
    assert torch.equal(gx, torch.zeros_like(x)) and gw == 0 and gb == 10


@pytest.mark.parametrize("period", [2048, 1000])
def test_positions_apart_from_the_rest(ours, period):
    """Rows at a regular distance that are far from all others, as a token that begins a text."""
    x = torch.randn(32 * period, 3)
    x[::period] += 1000
    y = kernels.group_norm(x, None, None, None, 0, 1e-5)
    wide = x.double()
    want = (wide - wide.mean(0)) / (wide.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(y.double(), want, rtol=2e-6, atol=2e-6)


def test_constant_channels(ours):
    """x^ is 0, everything is finite."""
    for value in (3.0, 0.1):
        x = torch.full((5, 3, 7), value, requires_grad=True)
        bias = torch.randn(3)
        y = J.batch_norm(x, None, None, None, bias, training=True)
        torch.testing.assert_close(y.detach(), bias[:, None].expand(5, 3, 7))
        (g,) = torch.autograd.grad(y.square().sum(), x)
        assert g.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics(ours, dtype):
    """As the native op moves them, float32 ones of a bfloat16 input too."""
    x = (torch.randn(6, 3, 5) * 2 + 1).to(dtype)
    got, want = ([torch.zeros(3), torch.ones(3)] for _ in range(2))
    for f, running in ((J.batch_norm, got), (F.batch_norm, want)):
        for momentum in (0.1, 0.7):
            f(x, *running, training=True, momentum=momentum)
    torch.testing.assert_close(got, want)
    J.instance_norm(x, *got, use_input_stats=True)
    F.instance_norm(x.float(), *want, use_input_stats=True)  # which rounds them to bfloat16
    torch.testing.assert_close(got, want)
    weight, bias = torch.randn(3), torch.randn(3)
    for mode in (True, False):
        torch.testing.assert_close(
            J.instance_norm(x.float(), *got, weight, bias, mode),
            F.instance_norm(x.float(), *want, weight, bias, mode),
        )
    before = got[0]._version
    J.batch_norm(x, *got, training=True)
    assert got[0]._version > before


def test_gradients_of_instance_norm(ours):
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    running = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for args in ((None, None), running):
        got, want = (f(x, *args, weight, bias) for f in (J.instance_norm, F.instance_norm))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got.pow(3).sum(), (x, weight, bias)),
            torch.autograd.grad(want.pow(3).sum(), (x, weight, bias)),
        )


def test_higher_orders_of_batch_norm(ours):
    """Where the native op is wrong: jvp of jvp, reverse over forward, and third order."""
    x, u, w = (torch.randn(4, 2, 3, dtype=torch.float64) for _ in range(3))

    def orders(f):
        def along(f, v):
            return lambda z: torch.func.jvp(f, (z,), (v,))[1]

        twice = along(along(f, u), w)(x)
        over = torch.func.grad(lambda z: along(f, u)(z).pow(2).sum())(x)
        third = along(along(torch.func.grad(lambda z: f(z).pow(4).sum()), u), w)(x)
        return twice, over, third

    right = orders(group_norm_primitive(0, 1e-5))
    torch.testing.assert_close(orders(lambda x: J.batch_norm(x, None, None, training=True)), right)
    running = torch.zeros(2).double(), torch.ones(2).double()
    torch.testing.assert_close(orders(lambda x: J.batch_norm(x, *running, training=True)), right)


@pytest.mark.parametrize("mode", ["grad", "jvp", "vmap", "forward_ad"])
def test_running_statistics_under_transforms(ours, mode):
    """Buffers are moved below the transform, as the native op does."""
    x = torch.randn(5, 3)
    got, want = ([torch.zeros(3), torch.ones(3)] for _ in range(2))
    F.batch_norm(x, *want, training=True)

    def f(x):
        return J.batch_norm(x, *got, training=True).pow(3).sum()

    if mode == "grad":
        torch.func.grad(f)(x)
    elif mode == "jvp":
        torch.func.jvp(f, (x,), (x,))
    elif mode == "forward_ad":
        with torch.autograd.forward_ad.dual_level():
            f(torch.autograd.forward_ad.make_dual(x, x))
    else:
        with pytest.raises(RuntimeError, match="running_mean or running_var is not batched"):
            torch.vmap(f)(torch.stack([x, x]))
        running = [torch.stack([t, t]) for t in (torch.zeros(3), torch.ones(3))]
        xs = torch.stack([x, x + 1])
        torch.vmap(lambda x, *r: J.batch_norm(x, *r, training=True))(xs, *running)
        for sample, mean, var in zip(xs, *running, strict=True):
            one = [torch.zeros(3), torch.ones(3)]
            F.batch_norm(sample, *one, training=True)
            torch.testing.assert_close([mean, var], one)
        return
    torch.testing.assert_close(got, want)


def test_running_statistics_are_compiled(ours):
    native, module = torch.nn.BatchNorm1d(3), jo.nn.BatchNorm1d(3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 3, requires_grad=True)
    for _ in range(2):
        y, want = compiled(x), native(x)
        torch.testing.assert_close(y, want)
        y.sum().backward()
    torch.testing.assert_close(dict(module.named_buffers()), dict(native.named_buffers()))
    module.eval(), native.eval()
    torch.testing.assert_close(compiled(x), native(x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_modules_in_training(ours, momentum):
    for name, shape in (
        ("1d", (6, 3)),
        ("1d", (6, 3, 4)),
        ("2d", (6, 3, 2, 2)),
        ("3d", (4, 3, 2, 1, 2)),
    ):
        native = getattr(torch.nn, f"BatchNorm{name}")(3, momentum=momentum)
        module = getattr(jo.nn, f"BatchNorm{name}")(3, momentum=momentum)
        for _ in range(3):
            x = torch.randn(shape)
            torch.testing.assert_close(module(x), native(x))
        torch.testing.assert_close(module.state_dict(), native.state_dict())
        with pytest.raises(ValueError, match="expected"):
            module(torch.randn(3))
        module.load_state_dict(native.eval().state_dict())
        torch.testing.assert_close(module.eval()(x), native(x))


def test_wider_parameters(ours):
    """float32 parameters of a bfloat16 input, as torch takes them."""
    x, weight, bias = torch.randn(4, 6).bfloat16(), torch.randn(6), torch.randn(6)
    weight.requires_grad_()
    for y in (
        J.group_norm(x, 2, weight, bias),
        J.batch_norm(x, torch.zeros(6), torch.ones(6), weight, bias),
        J.batch_norm(x, torch.zeros(6), torch.ones(6), weight, bias, training=True),
    ):
        assert y.dtype == torch.bfloat16
        assert torch.autograd.grad(y.float().sum(), weight)[0].dtype == torch.float32


def test_threads_do_not_matter(ours):
    x, gy = torch.randn(40, 5, 33), torch.randn(40, 5, 33)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(kernels.group_norm_vjp(x, None, gy, None, 0, 1e-5))
    assert all(map(torch.equal, *results))


def test_no_sync_batch_norm():
    assert type(jo.replace(torch.nn.SyncBatchNorm(3))) is torch.nn.SyncBatchNorm
    with pytest.raises(AttributeError, match="no SyncBatchNorm, .* replace leaves it"):
        _ = jo.nn.SyncBatchNorm


ROWS, WEIGHT = torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda x: J.group_norm(x, 2),
            RuntimeError,
            r"divisible by num_groups, .*\[4, 3\] and num",
        ),
        (lambda x: J.group_norm(x, -1), RuntimeError, "greater than 0, got num_groups=-1"),
        (lambda x: J.group_norm(x, 1.0), TypeError, "num_groups must be int, not float"),
        (
            lambda x: J.group_norm(x[0], 1),
            RuntimeError,
            "at least 2 dimensions for input tensor but",
        ),
        (lambda x: J.group_norm(x[:1], 3), ValueError, "Expected more than 1 value per channel"),
        (lambda x: J.group_norm(x, 3, x[0, :2]), RuntimeError, r"weight has shape \[2\]"),
        (lambda x: J.group_norm(x, 3, eps=-1.0), ValueError, "eps must be non-negative, but got"),
        (lambda x: J.group_norm(x.long(), 3), RuntimeError, "input has dtype int64"),
        (lambda x: J.batch_norm(x[:1], None, None, training=True), ValueError, "more than 1 value"),
        (
            lambda x: J.batch_norm(x, None, None),
            RuntimeError,
            "running_mean must be defined in eval",
        ),
        (
            lambda x: J.batch_norm(x, ROWS, None),
            RuntimeError,
            "running_var must be defined in eval",
        ),
        (
            lambda x: J.batch_norm(x, ROWS, None, training=True),
            ValueError,
            "must either both be None or neither",
        ),
        (lambda x: J.batch_norm(x, ROWS[:2], ROWS), RuntimeError, "should contain 3 elements not"),
        (
            lambda x: J.batch_norm(x, ROWS.double(), ROWS),
            RuntimeError,
            "running_mean has dtype float64; allowed: that of input",
        ),
        (
            lambda x: J.batch_norm(x, ROWS.clone().requires_grad_(), ROWS),
            RuntimeError,
            "running_mean requires grad, but",
        ),
        (
            lambda x: J.batch_norm(x, None, None, training=True, eps=0.0),
            ValueError,
            "eps must be positive during training",
        ),
        (lambda x: J.instance_norm(x), ValueError, "more than 1 spatial element when training"),
        (
            lambda x: kernels.group_norm(x, None, None, None, 2, 0.1),
            RuntimeError,
            "groups is 2; allowed: a divisor of 3",
        ),
        (
            lambda x: kernels.group_norm(x, None, None, ROWS, 0, 0.1),
            RuntimeError,
            r"stats has shape \[3\] and dtype float32; it must be mean and variance",
        ),
        (
            lambda x: kernels.group_norm(x, None, None, torch.rand(2, 3), 3, 0.1),
            RuntimeError,
            "these are for 0 groups",
        ),
        (
            lambda x: kernels.group_norm_vjp(x, WEIGHT[:2], x, None, 0, 0.1),
            RuntimeError,
            r"weight has shape \[2\]; it must have a number for each channel of x, \[3\]",
        ),
        (
            lambda x: kernels.group_norm_vjp(x, None, x[:2], None, 0, 0.1),
            RuntimeError,
            r"gy has shape \[2, 3\]",
        ),
        (lambda x: kernels.batch_norm(x[0], None, None, 0.1), RuntimeError, r"x has shape \[3\]"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 3))
