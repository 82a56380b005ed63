"""layer_norm and rms_norm beyond what tests/cases.py drives: sizes, errors, orders, batches."""

import pytest
import torch
import torch.nn.functional as F

import jacobian_ops as jo
import jacobian_ops.functional as J
from jacobian_ops import kernels

from .cases import norm_primitive

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of less than a vector; held by a warp and by a block; read again, with and without whole packs.
LENGTHS = [1, 2, 7, 64, 100, 1000, 1024, 3001, 9000, 20000]


def products(x, weight, bias, gy, tx, tweight, tbias, tgy, eps, centred):
    """What the kernels return, from a composition in float64."""
    f = norm_primitive(1, eps, centred)

    def vjp(x, weight, gy):
        return torch.func.vjp(f, x, weight, bias)[1](gy)

    y, ty = torch.func.jvp(f, (x, weight, bias), (tx, tweight, tbias))
    g, tg = torch.func.jvp(vjp, (x, weight, gy), (tx, tweight, tgy))
    return {"norm": (y,), "norm_jvp": (y, ty), "norm_vjp": g, "norm_vjp_jvp": (*g, *tg)}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_products_of_many_sizes(ours, n, dtype, centred):
    """Every kernel against float64, relative to the largest number of the result."""
    rows = 3 if n > 1024 else 21
    x, gy, tx, tgy = (torch.randn(rows, n).to(dtype) for _ in range(4))
    weight, bias, tweight, tbias = (torch.randn(n).to(dtype) for _ in range(4))
    x += 2  # so that the mean counts
    eps = 0.1  # rows of two close numbers stay well conditioned
    tensors = x, weight, bias, gy, tx, tweight, tbias, tgy
    want = products(*(t.double() for t in tensors), eps, centred)
    consts = 1, eps, centred
    gx, sums = kernels.norm_vjp(x, weight, gy, *consts)
    gx2, tgx, sums2 = kernels.norm_vjp_jvp(x, weight, gy, tx, tweight, tgy, *consts)
    got = {
        "norm": (kernels.norm(x, weight, bias, *consts),),
        "norm_jvp": kernels.norm_jvp(x, weight, bias, tx, tweight, tbias, *consts),
        "norm_vjp": (gx, *sums),
        "norm_vjp_jvp": (gx2, *sums2[:2], tgx, *sums2[2:]),
    }
    tolerance = 1e-13 if dtype is torch.float64 else max(2e-6, torch.finfo(dtype).eps)
    for name, results in got.items():
        for a, b in zip(results, want[name], strict=True):
            assert a.dtype == dtype
            scale = b.abs().max().clamp(min=1)
            assert ((a.double() - b).abs() <= tolerance * scale).all(), name


@pytest.mark.parametrize("centred", [True, False])
def test_absent_operands(ours, centred):
    """None is one for the weight and zero for the others."""
    x, gy, tx, tgy = (torch.randn(4, 9, dtype=torch.float64) for _ in range(4))
    one, zero = torch.ones(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    consts = 1, 1e-5, centred
    same = torch.testing.assert_close
    same(kernels.norm(x, None, None, *consts), kernels.norm(x, one, zero, *consts))
    same(
        kernels.norm_jvp(x, None, None, tx, None, None, *consts),
        kernels.norm_jvp(x, one, zero, tx, zero, zero, *consts),
    )
    same(
        kernels.norm_jvp(x, one, None, None, gy[0], None, *consts),
        kernels.norm_jvp(x, one, zero, 0 * x, gy[0], zero, *consts),
    )
    same(kernels.norm_vjp(x, None, gy, *consts), kernels.norm_vjp(x, one, gy, *consts))
    for t in (tx, None):
        for tg in (tgy, None):
            full = [0 * x if a is None else a for a in (t, tg)]
            same(
                kernels.norm_vjp_jvp(x, None, gy, t, None, tg, *consts),
                kernels.norm_vjp_jvp(x, one, gy, full[0], zero, full[1], *consts),
            )


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_added_to_a_residual(ours, n, dtype, centred):
    """The sum is rounded once, and what is normalized is the rounded one."""
    rows = 3 if n > 1024 else 21
    x, residual, gy, gsum = (torch.randn(rows, n).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(n).to(dtype) for _ in range(2))
    consts = 1, 0.1, centred
    same = torch.testing.assert_close
    y, total = kernels.add_norm(x, residual, weight, bias, *consts)
    same(total, x + residual, rtol=0, atol=0)
    same(y, kernels.norm(total, weight, bias, *consts), rtol=0, atol=0)
    gx, sums = kernels.add_norm_vjp(total, weight, gy, gsum, *consts)
    alone, same_sums = kernels.norm_vjp(total, weight, gy, *consts)
    same(sums, same_sums, rtol=0, atol=0)
    want = alone.double() + gsum.double()
    assert (gx.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


def test_one_result_alone(ours):
    """A loss of the normalized sum, or of the sum."""
    x, residual, weight = (torch.randn(s, requires_grad=True) for s in ((4, 6), (4, 6), (6,)))
    inputs = x, residual, weight
    for i in range(2):
        got = J.add_layer_norm(x, residual, (6,), weight)[i].sin().sum()
        total = x + residual
        want = (F.layer_norm(total, (6,), weight), total)[i].sin().sum()
        for a, b in zip(
            torch.autograd.grad(got, inputs, allow_unused=True),
            torch.autograd.grad(want, inputs, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_only_the_sum_is_saved(ours):
    x, residual, weight = (torch.randn(s, requires_grad=True) for s in ((4, 6), (4, 6), (6,)))
    y, total = J.add_rms_norm(x, residual, (6,), weight)
    saved = [t.data_ptr() for t in y.grad_fn.saved_tensors]
    assert saved == [total.data_ptr(), weight.data_ptr()]


def test_residual_of_another_shape_and_dtype(ours):
    x, residual = torch.randn(3, 4, 5), torch.randn(4, 5, dtype=torch.float64)
    y, total = J.add_rms_norm(x, residual, (5,))
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, F.rms_norm(total, (5,)))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)])
def test_empty(ours, shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(shape[-1:], requires_grad=True) for _ in range(2))
    y = J.layer_norm(x, shape[-1:], weight, bias)
    y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape
    assert not weight.grad.any() and not bias.grad.any()


def test_constant_rows(ours):
    """x^ is 0, everything is finite."""
    x = torch.full((2, 6), 3.0, requires_grad=True)
    bias = torch.randn(6)
    y = J.layer_norm(x, (6,), None, bias)
    assert torch.equal(y.detach(), bias.expand(2, 6))
    (g,) = torch.autograd.grad(y.square().sum(), x)
    assert g.isfinite().all()
    assert not J.rms_norm(torch.zeros(2, 6), 6).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_epsilon_of_rms_norm(ours, dtype):
    x = (torch.randn(3, 8) * 1e-4).to(dtype)
    torch.testing.assert_close(J.rms_norm(x, (8,)), F.rms_norm(x, (8,)))


def test_wider_parameters(ours):
    """float32 parameters of a bfloat16 input, as torch takes them."""
    x, weight, bias = torch.randn(4, 8).bfloat16(), torch.randn(8), torch.randn(8)
    weight.requires_grad_()
    y = J.layer_norm(x, (8,), weight, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_forward_mode_of_second_order(ours):
    """Where the native op is wrong: jvp of jvp, reverse over forward, and third order."""
    x, u, w = (torch.randn(2, 5, dtype=torch.float64) for _ in range(3))

    def orders(f):
        def along(f, v):
            return lambda z: torch.func.jvp(f, (z,), (v,))[1]

        twice = along(along(f, u), w)(x)
        over = torch.func.grad(lambda z: along(f, u)(z).pow(2).sum())(x)
        third = torch.func.grad(
            lambda z: (torch.func.hessian(lambda a: f(a).pow(3).sum())(z).sum((0, 1)) * u).sum()
        )(x)
        return twice, over, third

    right = orders(norm_primitive(1, 1e-5, True))
    torch.testing.assert_close(orders(lambda x: J.layer_norm(x, (5,))), right)
    right = orders(norm_primitive(1, 1e-5, False))
    torch.testing.assert_close(orders(lambda x: J.rms_norm(x, (5,), eps=1e-5)), right)


@pytest.mark.parametrize("batched", range(3))
def test_vmap_over_each_argument(ours, batched):
    """Each sample's own weight gradient, second order included."""
    tensors = [torch.randn(3, 5), torch.randn(5), torch.randn(5)]
    dims = [None] * 3
    tensors[batched] = torch.randn(4, *tensors[batched].shape)
    dims[batched] = 0
    tensors = [t.double() for t in tensors]

    def hvp(f):
        def loss(*args):
            return f(*args).pow(2).sum()

        def run(*args):
            first = torch.func.grad(loss, (0, 1, 2))
            return torch.func.jvp(first, args, args)

        return torch.func.vmap(run, tuple(dims))(*tensors)

    ours_ = hvp(lambda x, w, b: J.layer_norm(x, (5,), w, b))
    torch.testing.assert_close(ours_, hvp(norm_primitive(1, 1e-5, True)))


def test_modules():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, requires_grad=True)
    for ours, native in (
        (jo.nn.LayerNorm((3, 6)), torch.nn.LayerNorm((3, 6))),
        (jo.nn.LayerNorm(6, bias=False), torch.nn.LayerNorm(6, bias=False)),
        (jo.nn.LayerNorm(6, elementwise_affine=False), torch.nn.LayerNorm(6, 1e-5, False)),
        (jo.nn.RMSNorm(6, eps=1e-4), torch.nn.RMSNorm(6, eps=1e-4)),
    ):
        native.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), native(x))
        parameters = list(ours.parameters())
        got = torch.autograd.grad(ours(x).pow(3).sum(), [x, *parameters])
        want = torch.autograd.grad(native(x).pow(3).sum(), [x, *native.parameters()])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: J.layer_norm(x, (3,)), RuntimeError, r"normalized_shape is \[3\]; allowed"),
        (lambda x: J.layer_norm(x, ()), RuntimeError, r"normalized_shape is \[\]"),
        (lambda x: J.layer_norm(x, (2, 3, 4)), RuntimeError, r"which has shape \[3, 4\]"),
        (lambda x: J.rms_norm(x, (4,), torch.ones(3)), RuntimeError, r"weight has shape \[3\]"),
        (lambda x: J.layer_norm(x, (4,), None, torch.ones(1)), RuntimeError, "bias has shape"),
        (
            lambda x: J.layer_norm(x, (4,), None, torch.ones(4).double()),
            RuntimeError,
            "bias has dtype float64; allowed: that of input, float32, or float32 where",
        ),
        (lambda x: J.layer_norm(x, (4,), [1.0] * 4), TypeError, "weight must be Tensor"),
        (lambda x: J.layer_norm(x, (4,), eps=-1.0), ValueError, "eps is -1.0; it must be"),
        (lambda x: J.rms_norm(x.long(), (4,)), RuntimeError, "input has dtype int64"),
        (lambda x: J.add_rms_norm(x, 1.0, (4,)), TypeError, "residual must be Tensor, not float"),
        (lambda x: J.add_layer_norm(x, x.long(), (4,)), NotImplementedError, "residual has dtype"),
        (lambda x: J.add_layer_norm(x, x, (3,)), RuntimeError, "add_layer_norm: normalized_shape"),
        (
            lambda x: kernels.add_norm(x, x[:2], None, None, 1, 0.1, True),
            RuntimeError,
            r"add_norm: residual has shape \[2, 4\], x has shape",
        ),
        (lambda x: kernels.norm(x, None, None, 3, 0.1, True), RuntimeError, "dims is 3; allowed"),
        (lambda x: kernels.norm(x, None, None, 1, -0.1, True), ValueError, "eps is -0.1"),
        (
            lambda x: kernels.norm_vjp(x, torch.ones(5), x, 1, 0.1, True),
            RuntimeError,
            r"weight has shape \[5\]; it must be that of a row, \[4\]",
        ),
        (
            lambda x: kernels.norm_vjp(x, None, x[:2], 1, 0.1, True),
            RuntimeError,
            r"gy has shape \[2, 4\]",
        ),
        (
            lambda x: kernels.norm_jvp(x, x[0].double(), None, x, None, None, 1, 0.1, True),
            RuntimeError,
            "weight has dtype float64, x has float32",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4))


def test_few_elements_take_native_kernels(monkeypatch):
    """Whose graph is ours: the native op's third derivative is wrong."""
    monkeypatch.setattr(J, "NATIVE_BELOW", 32768)
    kwargs = dict(dtype=torch.float64, requires_grad=True)
    x, weight, bias = (
        torch.randn(3, 5, **kwargs),
        torch.randn(5, **kwargs),
        torch.randn(5, **kwargs),
    )
    assert J.layer_norm(x, (5,), weight, bias).grad_fn.name() == "NativeLayerNormBackward"
    assert J.layer_norm(x.detach(), (5,)).grad_fn is None

    def orders(f):
        found = f(x, weight, bias).pow(3).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(found, x, create_graph=True)
            yield g
            found = g.pow(2).sum()

    wanted = orders(norm_primitive(1, 1e-5, True))
    for got, want in zip(orders(lambda *a: J.layer_norm(a[0], (5,), *a[1:])), wanted, strict=True):
        torch.testing.assert_close(got, want)
    y = J.layer_norm(x, [5], weight, bias)
    batched = torch.autograd.grad(
        y, (x, weight), torch.eye(15).view(15, 3, 5).double(), is_grads_batched=True
    )
    rows = [
        torch.autograd.grad(J.layer_norm(x, 5, weight, bias), (x, weight), g)
        for g in torch.eye(15).view(15, 3, 5).double()
    ]
    for got, want in zip(batched, map(torch.stack, zip(*rows, strict=True)), strict=True):
        torch.testing.assert_close(got, want)


def test_few_elements_inside_transforms_of_other_arguments(monkeypatch):
    """A transform is there, though the tensors are ordinary ones."""
    monkeypatch.setattr(J, "NATIVE_BELOW", 32768)
    x, z = torch.randn(3, 5), torch.randn(2, 3, 5)
    y = F.layer_norm(x, (5,))

    def f(z):
        return (J.layer_norm(x, (5,)) * z).sum()

    torch.testing.assert_close(torch.vmap(f)(z), (y * z).sum((1, 2)))
    torch.testing.assert_close(torch.func.grad(f)(z[0]), y)
    torch.testing.assert_close(torch.func.vjp(f, z[0])[1](torch.tensor(1.0))[0], y)
    torch.testing.assert_close(torch.func.jvp(f, (z[0],), (z[1],))[1], (y * z[1]).sum())


def test_16_bits_keep_statistics_in_32(monkeypatch):
    """Native kernels round them, so they do not stand in for ours there."""
    monkeypatch.setattr(J, "NATIVE_BELOW", 32768)
    x = (torch.randn(8, 64) + 100).bfloat16().requires_grad_()
    weight = torch.randn(64).bfloat16().requires_grad_()
    gy = torch.randn(8, 64).bfloat16()
    got = torch.autograd.grad(J.layer_norm(x, (64,), weight), (x, weight), gy)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = torch.autograd.grad(F.layer_norm(exact[0], (64,), exact[1]), exact, gy.double())
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() < 2**-8 * w.abs().max()
