"""jacobian_ops.nn beside torch.nn: arguments, state, results, gradients, errors."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch

import jacobian_ops.nn as jnn

# Every drop-in class with the arguments to try it with; {} is the defaults.
ARGUMENTS = {
    "Linear": [
        dict(in_features=64, out_features=5),
        dict(in_features=64, out_features=5, bias=False),
    ],
    "ReLU": [{}],
    "LeakyReLU": [{}, dict(negative_slope=0.3), dict(negative_slope=-0.3)],
    "ELU": [{}, dict(alpha=0.5)],
    "SELU": [{}],
    "CELU": [{}, dict(alpha=0.5)],
    "ReLU6": [{}],
    "Hardtanh": [{}, dict(min_val=-0.5, max_val=2.0)],
    "Sigmoid": [{}],
    "Tanh": [{}],
    "GELU": [{}, dict(approximate="tanh")],
    "SiLU": [{}],
    "Softplus": [{}, dict(beta=2.0, threshold=3.0)],
    "Mish": [{}],
    "Hardswish": [{}],
    "Hardsigmoid": [{}],
    "LogSigmoid": [{}],
    "Softmax": [dict(dim=-1), dict(dim=0)],
    "LogSoftmax": [dict(dim=-1), dict(dim=0)],
    "Softmin": [dict(dim=-1), dict(dim=0)],
    "LayerNorm": [
        dict(normalized_shape=64),
        dict(normalized_shape=(64,), eps=0.1, bias=False),
        dict(normalized_shape=64, elementwise_affine=False),
    ],
    "RMSNorm": [dict(normalized_shape=64), dict(normalized_shape=(64,), eps=0.1)],
    "CrossEntropyLoss": [
        {},
        dict(ignore_index=3, label_smoothing=0.1),
        dict(reduction="none", weight=torch.linspace(0.5, 2, 64)),
    ],
    "GroupNorm": [
        dict(num_groups=8, num_channels=64),
        dict(num_groups=4, num_channels=64, eps=0.1, affine=False),
    ],
    "BatchNorm1d": [
        dict(num_features=64),
        dict(num_features=64, eps=0.1, momentum=0.5, affine=False),
        dict(num_features=64, track_running_stats=False),
    ],
    "BatchNorm2d": [dict(num_features=64, momentum=0.3)],
    "BatchNorm3d": [dict(num_features=64)],
    "InstanceNorm1d": [
        dict(num_features=64),
        dict(num_features=64, eps=0.1, momentum=0.5, affine=True, track_running_stats=True),
    ],
    "InstanceNorm2d": [dict(num_features=64, affine=True)],
    "InstanceNorm3d": [dict(num_features=64, track_running_stats=True)],
    "Dropout": [{}, dict(p=0.0), dict(p=0.2), dict(p=1.0)],
}
OWN = {
    "LinearActDropout": [
        dict(in_features=64, out_features=5, activation="silu", p=0.25),
        dict(in_features=64, out_features=5, bias=False),
    ],
    "SoftmaxDropout": [dict(dim=0, p=0.25)],
    "DropoutAdd": [dict(p=0.25)],
    "SwiGLU": [{}],
    "GeGLU": [{}, dict(approximate="tanh")],
}


ACTIVATIONS = {
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU("tanh"),
    "silu": torch.nn.SiLU(),
    "relu": torch.nn.ReLU(),
    "tanh": torch.nn.Tanh(),
}


PARAMETRIC = {"in_features", "normalized_shape", "num_channels", "num_features"}


def rows(table):
    return [
        pytest.param(name, kwargs, id=f"{name}-{'-'.join(f'{k}{v}' for k, v in kwargs.items())}")
        for name, variants in table.items()
        for kwargs in variants
    ]


drop_ins = pytest.mark.parametrize("name", ARGUMENTS)
each = pytest.mark.parametrize("name,kwargs", rows(ARGUMENTS))
each_but_dropout = pytest.mark.parametrize(
    "name,kwargs", rows({k: v for k, v in ARGUMENTS.items() if k != "Dropout"})
)
each_and_own = pytest.mark.parametrize("name,kwargs", rows(ARGUMENTS | OWN))


def pair(name, kwargs):
    """The torch module, and ours with its state."""
    native, ours = getattr(torch.nn, name)(**kwargs), getattr(jnn, name)(**kwargs)
    ours.load_state_dict(native.state_dict())
    return native, ours


def call(module, *args):
    """The result, and the gradients of inputs and parameters for a fixed cotangent."""
    args = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
    y = module(*args)
    leaves = [a for a in (*args, *module.parameters()) if a.requires_grad]
    return y, torch.autograd.grad(y, leaves, cotangent(y))


def cotangent(y):
    return torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)


def x_of(dtype=torch.float32):
    """More elements than the threshold below which plain calls go to the native op."""
    return (3 * torch.randn(80, 64)).to(dtype)


def input_of(name, dtype=torch.float32):
    """The same in the dimensions that the module takes."""
    shapes = {"1d": (20, 64, 4), "2d": (20, 64, 2, 2), "3d": (10, 64, 2, 2, 2)}
    rows = name == "BatchNorm1d" or name[-2:] not in shapes
    return x_of(dtype).reshape((80, 64) if rows else shapes[name[-2:]])


def extra(name):
    """Further arguments of forward."""
    if name == "CrossEntropyLoss":
        return (torch.arange(80) % 64,)
    return (x_of(),) if name == "DropoutAdd" else ()


# Of several inputs, in a file of its own.
ELSEWHERE = {"MultiheadAttention": "tests/test_attention.py"}


def test_the_tables_have_every_module():
    assert sorted(ARGUMENTS | OWN | ELSEWHERE) == sorted(jnn.__all__)


@drop_ins
def test_class_and_constructor(name):
    native, ours = getattr(torch.nn, name), getattr(jnn, name)
    assert issubclass(ours, native) and ours is not native and ours.__name__ == name
    assert inspect.signature(ours) == inspect.signature(native)


@each
def test_repr_and_state(name, kwargs):
    native, ours = getattr(torch.nn, name)(**kwargs), getattr(jnn, name)(**kwargs)
    assert repr(ours) == repr(native)
    assert native.__dict__.keys() == ours.__dict__.keys()
    for source, target in ((native, ours), (ours, native)):
        for p in source.parameters():
            torch.nn.init.normal_(p)
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        torch.testing.assert_close(
            dict(target.state_dict()), dict(source.state_dict()), rtol=0, atol=0
        )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_but_dropout
def test_results_and_gradients(name, kwargs, training):
    native, ours = (m.train(training) for m in pair(name, kwargs))
    args = input_of(name), *extra(name)
    torch.testing.assert_close(call(ours, *args), call(native, *args))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(native.named_buffers()))


@each_but_dropout
def test_bfloat16(name, kwargs):
    """Beside float64, from which the native module is often the farther one."""
    native, ours = (m.bfloat16() for m in pair(name, kwargs))
    x, more = input_of(name, torch.bfloat16), extra(name)
    (y, grads), (y_native, grads_native) = call(ours, x, *more), call(native, x, *more)
    want, want_grads = call(native.double(), x.double(), *more)
    for got, other, exact in zip(
        (y, *grads), (y_native, *grads_native), (want, *want_grads), strict=True
    ):
        assert got.dtype == torch.bfloat16
        rounding = 2**-9 * exact.norm()
        assert (got.double() - exact).norm() <= (other.double() - exact).norm() + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_dropout(p, dtype):
    module, x = jnn.Dropout(p), x_of(dtype)
    y, (gx,) = call(module, x)
    kept, gy, count = y != 0, cotangent(y), x.numel()
    assert abs(kept.sum().item() - (1 - p) * count) <= 5 * (p * (1 - p) * count) ** 0.5
    torch.testing.assert_close(y, torch.where(kept, x / (1 - p), 0 * x))
    torch.testing.assert_close(gx, torch.where(kept, gy / (1 - p), 0 * gy))
    assert module.eval()(x) is x


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_act_dropout(activation):
    module, x = jnn.LinearActDropout(64, 5, activation=activation, p=0.25), x_of()
    native = torch.nn.Sequential(torch.nn.Linear(64, 5), ACTIVATIONS[activation])
    native[0].load_state_dict(module.state_dict())
    torch.testing.assert_close(call(module.eval(), x), call(native, x))
    y, want = module.train()(x), native(x) / 0.75
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, want, 0 * want))
    drawn = kept[want != 0]  # elsewhere it cannot be told what was dropped
    assert abs(drawn.float().mean().item() - 0.75) < 5 * (0.25 * 0.75 / drawn.numel()) ** 0.5


@pytest.mark.parametrize("shape", [(7, 3, 5), (5,), (1, 1), (2, 7, 3, 5)])
@pytest.mark.parametrize("activation", ["identity", "tanh", "gelu"])
def test_linear_act_dropout_and_residual(activation, shape):
    """Of the result's shape it joins the kernel; another one broadcasts, as + does."""
    module = jnn.LinearActDropout(64, 5, activation=activation, p=0.25).eval()
    x = torch.randn(7, 3, 64, requires_grad=True)
    residual = torch.randn(shape, requires_grad=True)
    inputs = (x, residual, *module.parameters())
    got, want = module(x, residual), residual + module(x)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)
    gy = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, gy), torch.autograd.grad(want, inputs, gy)
    )
    wide = residual.detach().double()
    assert module(x, wide).dtype == torch.float64


@pytest.mark.parametrize("dim", [-1, 0])
def test_softmax_dropout(dim):
    module, x = jnn.SoftmaxDropout(dim, 0.25), x_of()
    torch.testing.assert_close(call(module.eval(), x), call(torch.nn.Softmax(dim), x))
    y, want = module.train()(x), x.softmax(dim) / 0.75
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, want, 0 * want))
    assert abs(kept.float().mean().item() - 0.75) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5


def test_dropout_add():
    module, x, r = jnn.DropoutAdd(0.25), x_of(), x_of()
    assert torch.equal(module.eval()(x, r), r + x)
    y, (gx, gr) = call(module.train(), x, r)
    kept = y != r
    torch.testing.assert_close(y, torch.where(kept, r + x / 0.75, r))
    torch.testing.assert_close(gx, torch.where(kept, gr / 0.75, 0 * gr))
    assert abs(kept.float().mean().item() - 0.75) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5


INPLACE = [n for n in ARGUMENTS if "inplace" in inspect.signature(getattr(jnn, n)).parameters]


@pytest.mark.parametrize("name", INPLACE)
def test_inplace(name):
    native, ours = pair(name, dict(inplace=True))
    results = []
    for module in (native, ours):
        torch.manual_seed(1)
        x = torch.linspace(-4, 8, 80 * 64).reshape(80, 64).requires_grad_()
        z = x * 1
        y = module(z)
        assert y is z and ("inplace=True" in repr(module)) == ("inplace=True" in repr(native))
        (gx,) = torch.autograd.grad(y.sum(), x)
        results.append((y, gx))
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            module(x)
    if name == "Dropout":
        y, gx = results[1]
        torch.testing.assert_close(y, x * gx)
        assert set(gx.unique().tolist()) == {0.0, 2.0}
    else:
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("shape", [(2, 70, 64), (80, 64), (2, 2, 32, 64), (5000,)], ids=str)
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax", "Softmin"])
def test_implicit_dim(name, shape):
    x, seen = torch.randn(shape), []
    for module in pair(name, {}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = module(x)
        seen.append((y, [(str(w.message), w.category, w.filename, w.lineno) for w in caught]))
    (want, wanted), (got, given) = seen
    assert given == wanted and len(wanted) == 1
    torch.testing.assert_close(got, want)


@each_and_own
def test_deepcopy_and_pickle(name, kwargs):
    module = getattr(jnn, name)(**kwargs).eval()
    args = input_of(name), *extra(name)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module) and repr(other) == repr(module)
        assert other.state_dict().keys() == module.state_dict().keys()
        torch.testing.assert_close(other(*args), module(*args), rtol=0, atol=0)
        assert not {p.data_ptr() for p in other.parameters()} & {
            p.data_ptr() for p in module.parameters()
        }


@each_and_own
def test_meta(name, kwargs):
    parametric = PARAMETRIC & kwargs.keys()
    factory = dict(device="meta") if parametric else {}
    module = getattr(jnn, name)(**kwargs, **factory)
    if kwargs.get("weight") is not None:
        module = module.to("meta")
    assert all(p.is_meta for p in module.parameters())
    args = [a.to("meta") for a in (input_of(name), *extra(name))]
    y = module(*args)
    shape = (80, 5) if "in_features" in kwargs else args[0].shape
    if name == "CrossEntropyLoss":
        shape = (80,) if kwargs.get("reduction") == "none" else ()
    elif name.endswith("GLU"):
        shape = (80, 32)
    assert y.is_meta and y.shape == shape
    real = module.to_empty(device=torch.get_default_device())
    assert real(input_of(name), *extra(name)).shape == y.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Linear", "LinearActDropout"])
def test_dtype_argument(name, dtype):
    module = getattr(jnn, name)(64, 5, dtype=dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module(x_of(dtype)).dtype == dtype


def test_own_repr_and_state():
    made = jnn.LinearActDropout(3, 4, activation="silu", p=0.1)
    assert repr(made) == (
        "LinearActDropout(in_features=3, out_features=4, bias=True, activation='silu', p=0.1)"
    )
    assert list(made.state_dict()) == list(torch.nn.Linear(3, 4).state_dict())
    assert list(jnn.LinearActDropout(3, 4, bias=False).state_dict()) == ["weight"]
    assert isinstance(made, torch.nn.Linear)
    assert repr(jnn.SoftmaxDropout(1, 0.1)) == "SoftmaxDropout(dim=1, p=0.1)"
    assert repr(jnn.DropoutAdd(0.1)) == "DropoutAdd(p=0.1)"
    assert repr(jnn.GeGLU("tanh")) == "GeGLU(approximate='tanh')"


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", [name for name in OWN if not name.endswith("GLU")])
def test_p_outside(name, p):
    sizes = dict(in_features=3, out_features=4) if name == "LinearActDropout" else {}
    with pytest.raises(ValueError, match=f"{name}: p, .* between 0 and 1, but got {p}"):
        getattr(jnn, name)(**sizes, p=p)


def test_unknown_activation():
    with pytest.raises(ValueError, match="LinearActDropout: .*'swish9'.*gelu"):
        jnn.LinearActDropout(3, 4, activation="swish9")
    with pytest.raises(ValueError, match="LinearActDropout: .*'softmax'"):
        jnn.LinearActDropout(3, 4, activation="softmax")
