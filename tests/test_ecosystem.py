"""Models after replace(), with what else people use of PyTorch."""

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import jacobian_ops
import jacobian_ops.functional as J
from jacobian_ops import kernels, lowering
from jacobian_ops.kernels.gated import GATES

pytestmark = pytest.mark.cpu_only
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)  # small models gain nothing from more


def mlp(p=0.0):
    return nn.Sequential(
        nn.Linear(8, 16), nn.GELU(), nn.Dropout(p), nn.Linear(16, 4), nn.LogSoftmax(-1)
    )


def conv(p=0.0):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.GroupNorm(2, 4),
        nn.SiLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(p),
        nn.Linear(16, 4),
    )


def transformer(p=0.0):
    return nn.Transformer(8, 2, 1, 1, 16, dropout=p, batch_first=True)


MODELS = {
    "mlp": (mlp, ((5, 8),)),
    "conv": (conv, ((2, 3, 6, 6),)),
    "transformer": (transformer, ((2, 5, 8), (2, 3, 8))),
}
each = pytest.mark.parametrize("name", MODELS)


def made(name, dtype=torch.float32, p=0.0):
    """The native model, ours with the same weights, and an input of each argument."""
    torch.manual_seed(0)
    make, shapes = MODELS[name]
    native = make(p).to(dtype)
    return (
        native,
        jacobian_ops.replace(copy.deepcopy(native)),
        [torch.randn(shape, dtype=dtype) for shape in shapes],
    )


def gradients(model, xs):
    model.zero_grad()
    y = model(*xs)
    y.double().sin().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters()}


# ------------------------------------------------------------------- compile and export


@each
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_one_graph(name, p):
    _, model, xs = made(name, p=p)
    found = torch._dynamo.explain(model)(*xs)
    assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons


@each
def test_compiled_training(name):
    native, model, xs = made(name, torch.float64)
    expected = gradients(native, xs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    y = compiled(*xs)
    y.double().sin().sum().backward()
    close((y.detach(), {n: p.grad for n, p in model.named_parameters()}), expected)


@each
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(name, training):
    _, model, xs = made(name)
    model.train(training)
    program = torch.export.export(copy.deepcopy(model), tuple(xs))
    close(program.module()(*xs), model(*xs))


def test_export_survives_a_file(tmp_path):
    """In another process, which needs ``import jacobian_ops``."""
    _, model, xs = made("mlp")
    model.eval()
    torch.export.save(torch.export.export(model, tuple(xs)), tmp_path / "model.pt2")
    torch.save((xs, model(*xs)), tmp_path / "example.pt")
    code = (
        "import sys, torch, jacobian_ops; folder = sys.argv[1]\n"
        "xs, y = torch.load(folder + '/example.pt')\n"
        "program = torch.export.load(folder + '/model.pt2')\n"
        "torch.testing.assert_close(program.module()(*xs), y)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=120)


@pytest.mark.parametrize("name", kernels.NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_inductor_gets_is_the_same_function(name, dtype):
    """Value, VJP and JVP of every activation, at kinks and far out too."""
    f, params = kernels.resolve("tests", name)
    x = torch.tensor([-30.0, -6, -3, -1, -0.5, 0, 0.5, 1, 3, 6, 30], dtype=dtype)
    g = torch.randn(11).to(dtype)
    left, calls = lowering.DECOMPOSITIONS, torch.ops.jacobian_ops
    given = [left["activation"](x, None, f, params, 0.0)]
    if given[0] is NotImplemented:
        assert name in ("identity", "logsigmoid")
        return
    at = [(x, f)]
    if f in ("sigmoid", "tanh"):
        at.append((given[0], f"{f}_y"))
    given += [left["activation_vjp"](z, g, None, h, params, 0.0, 1) for z, h in at]
    given += left["activation_jvp"](x, g, None, f, params, 0.0)
    expected = [calls.activation(x, None, f, params, 0.0)]
    expected += [calls.activation_vjp(z, g, None, h, params, 0.0, 1) for z, h in at]
    expected += calls.activation_jvp(x, g, None, f, params, 0.0)
    if f in GATES:
        given += [left["gated"](x, g, f), *left["gated_vjp"](x, g, g, f)]
        expected += [calls.gated(x, g, f), *calls.gated_vjp(x, g, g, f)]
    tolerance = {torch.bfloat16: 4e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    close(given, expected, atol=tolerance, rtol=tolerance)


def test_inductor_leaves_masks_and_second_derivatives_to_us():
    x, seed, left = torch.randn(3), torch.tensor(1), lowering.DECOMPOSITIONS
    assert left["activation"](x, seed, "relu", (), 0.5) is NotImplemented
    assert left["activation_vjp"](x, x, seed, "relu", (), 0.5, 1) is NotImplemented
    assert left["activation_vjp"](x, x, None, "gelu", (), 0.0, 2) is NotImplemented
    assert left["activation_jvp"](x, x, seed, "relu", (), 0.5) is NotImplemented


def test_inductor_fuses_elementwise_ops():
    """No call of ours is left in the code of a training step."""
    x = torch.randn(8, 16, requires_grad=True)

    def elementwise(x):
        return J.swiglu(J.gelu(x * 2), J.relu(x)).sum()

    def train(f):
        return torch.autograd.grad(f(x), x)

    with torch._inductor.config.patch(force_disable_caches=True):
        given, code = run_and_get_code(lambda: train(torch.compile(elementwise, fullgraph=True)))
        assert len(code) == 2 and not any("jacobian_ops" in c for c in code)
        close(given, train(elementwise), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------- mixed precision


SQUARE = torch.randn(6, 6)
CLASSES = torch.arange(6)
POLICIES = {
    "linear": lambda m, x: m.linear(x, SQUARE, SQUARE[0]),
    "relu": lambda m, x: m.relu(x),
    "gelu": lambda m, x: m.gelu(x),
    "softplus": lambda m, x: m.softplus(x),
    "softmax": lambda m, x: m.softmax(x, -1),
    "log_softmax": lambda m, x: m.log_softmax(x, -1),
    "dropout": lambda m, x: m.dropout(x, 0.5),
    "layer_norm": lambda m, x: m.layer_norm(x, (6,)),
    "rms_norm": lambda m, x: m.rms_norm(x, (6,)),
    "group_norm": lambda m, x: m.group_norm(x, 2),
    "batch_norm": lambda m, x: m.batch_norm(x, None, None, training=True),
    "cross_entropy": lambda m, x: m.cross_entropy(x, CLASSES),
    "attention": lambda m, x: m.scaled_dot_product_attention(x[None], x[None], x[None]),
}


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, "low"], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_autocast_casts_as_the_native_op(name, given, low):
    x = torch.randn(6, 6).to(low if given == "low" else given).requires_grad_()
    with torch.autocast("cpu", low):
        ours, native = (POLICIES[name](module, x) for module in (J, F))
    assert ours.dtype == native.dtype
    (g,) = torch.autograd.grad(ours.float().sum(), x)
    assert g.dtype == x.dtype
    if name != "dropout":
        close(ours, native, atol=2e-2, rtol=2e-2)


@each
def test_autocast_with_master_weights(name):
    """Weights and their gradients stay float32; the gradients are native's to 16 bits."""
    native, model, xs = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        expected, given = (gradients(m, xs) for m in (native, model))
    assert given[0].dtype == expected[0].dtype
    close(given[0], expected[0], atol=0.1, rtol=0.1)
    assert all(g.dtype == torch.float32 for g in given[1].values())
    exact, native_16, ours_16 = (
        torch.cat([g.flatten() for g in run.values()])
        for run in (gradients(native, xs)[1], expected[1], given[1])
    )
    error, native_error = ((g - exact).norm() for g in (ours_16, native_16))
    assert error <= 1.25 * native_error < 0.1 * exact.norm()


def test_autocast_tangents():
    """Of the dtype of the result, and as right as that allows."""
    _, model, (x,) = made("mlp")
    t = torch.randn_like(x)
    exact = jvp(model, (x,), (t,))[1]
    with torch.autocast("cpu", torch.bfloat16):
        y, ty = jvp(model, (x,), (t,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, t)))
    assert ty.dtype == y.dtype == dual.tangent.dtype == dual.primal.dtype
    close(dual.tangent, ty)
    close(ty.float(), exact, atol=0.05, rtol=0.05)


def test_grad_scaler():
    """fp16 with loss scaling: skips the step that overflows, and trains as native does."""
    x = torch.randn(32, 8)
    target = torch.randint(4, (32,))

    def train(model, loss):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
        losses, scales = [], []
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                value = loss(model(x), target)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(value.item())
            scales.append(scaler.get_scale())
        return torch.tensor(losses), scales

    native, model, _ = made("mlp")
    expected, _ = train(native, F.cross_entropy)
    given, scales = train(model, J.cross_entropy)
    assert min(scales) < 2.0**24  # one step at least was skipped
    assert given[-1] < 0.9 * given[0]
    close(given, expected, atol=0.05, rtol=0.05)


# ------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@each
def test_checkpoint_around(ours, name, reentrant):
    """The mask is drawn again from the same seed: gradients are bitwise those without.

    Where tiny calls go to torch, some do so only while no graph is recorded, and round otherwise.
    """
    _, model, xs = made(name, p=0.4)
    if name == "conv":
        model[1].track_running_stats = False  # they would be moved a second time
    xs = [x.requires_grad_() for x in xs]

    def run(f):
        torch.manual_seed(3)
        for x in xs:
            x.grad = None
        model.zero_grad()
        y = f(*xs)
        y.square().sum().backward()
        return y, *(t.grad for t in (*xs, *model.parameters()))

    expected = run(model)
    given = run(lambda *xs: checkpoint(model, *xs, use_reentrant=reentrant))
    for a, b in zip(given, expected, strict=True):
        assert torch.equal(a, b)


def test_checkpoint_keeps_the_mask_where_the_seed_is_kept():
    """Without the state of the generator: a policy keeps what randint drew."""

    def keep_random(ctx, op, *args, **kwargs):
        kept = op is torch.ops.aten.randint.low
        return torch.utils.checkpoint.CheckpointPolicy(1 if kept else 3)

    x = torch.ones(64, 64, requires_grad=True)
    for keep in (True, False):
        torch.manual_seed(0)
        context = {}
        if keep:
            context["context_fn"] = lambda: create_selective_checkpoint_contexts(keep_random)
        y = checkpoint(
            lambda x: J.dropout(x.sin(), 0.5),
            *(x,),
            use_reentrant=False,
            preserve_rng_state=False,
            **context,
        )
        (g,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(g != 0, y != 0) == keep


def test_checkpoint_around_a_jvp():
    _, model, (x,) = made("mlp", torch.float64)
    t = torch.randn_like(x)

    def loss(x):
        y, ty = jvp(model, (x,), (t,))
        return (y - ty).square().sum()

    expected = torch.autograd.grad(loss(x), list(model.parameters()))
    for reentrant in (True, False):
        z = x.clone().requires_grad_()
        model.zero_grad()
        checkpoint(loss, z, use_reentrant=reentrant).backward()
        close([p.grad for p in model.parameters()], list(expected))


def test_checkpoint_inside_a_jvp():
    """Ours works; torch's own drops out of forward mode, and says so rather than be wrong."""
    _, model, (x,) = made("mlp", torch.float64)
    t = torch.randn_like(x)

    def train(f):
        return torch.autograd.grad(
            jvp(f, (x,), (t,))[1].square().sum(), list(model.parameters()), allow_unused=True
        )

    expected = train(model)
    close(train(jacobian_ops.checkpoint(copy.copy(model), "all")), expected)
    for reentrant in (True, False):
        with pytest.raises(RuntimeError):
            train(lambda x: checkpoint(model, x, use_reentrant=reentrant))  # noqa: B023


# ------------------------------------------------------------------- processes and threads


class Rows(torch.utils.data.Dataset):
    """A model in the workers: features by our ops."""

    def __init__(self):
        self.model = jacobian_ops.replace(mlp().eval())

    def __len__(self):
        return 8

    def __getitem__(self, i):
        with torch.no_grad():
            return self.model(torch.full((8,), float(i)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method):
    data = Rows()
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, num_workers=1, multiprocessing_context=method, timeout=120
    )
    close(torch.cat(list(loader)), torch.stack([data[i] for i in range(8)]))


def test_threads_train_replicas():
    """Each thread its own copy, all at once, with dropout's seeds from generators of their own."""
    _, model, (x,) = made("mlp")
    target = torch.arange(5) % 4

    def train(seed):
        replica = copy.deepcopy(model)
        optimizer = torch.optim.SGD(replica.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(10):
            optimizer.zero_grad()
            loss = J.cross_entropy(J.dropout(replica(x), 0.3, generator=generator), target)
            loss.backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in replica.parameters()])

    expected = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for given, alone in zip(pool.map(train, range(4)), expected, strict=True):
            assert torch.equal(given, alone)


# ------------------------------------------------------------------- kinds of tensors


@each
def test_inference_mode(name):
    native, model, xs = made(name)
    for m in (native, model):
        m.eval()
    with torch.inference_mode():
        close(model(*xs), native(*xs), atol=1e-5, rtol=1e-5)
        made_inside = [x.clone() for x in xs]
    close(model(*xs), native(*xs), atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        assert model(*made_inside).is_inference()


def test_channels_last():
    native, model, (x,) = made("conv", torch.float64)
    expected = gradients(native, [x])
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    close(gradients(model, [x]), expected)
    for layer in (J.relu, lambda x: J.group_norm(x, 1), J.silu):
        z = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
        close(layer(z), layer(z.contiguous()))


@each
def test_meta_and_fake(name):
    _, model, xs = made(name)
    shape = model(*xs).shape
    on_meta = copy.deepcopy(model).to("meta")
    y = on_meta(*(x.to("meta") for x in xs))
    assert y.is_meta and y.shape == shape
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y = model(*(torch.empty(x.shape) for x in xs))
        assert isinstance(y, torch._subclasses.FakeTensor) and y.shape == shape
        y.sum().backward()


def test_built_on_meta_and_materialized():
    with torch.device("meta"):
        model = jacobian_ops.replace(transformer())
    model.to_empty(device="cpu")
    native, _, xs = made("transformer")
    model.load_state_dict(native.state_dict())
    close(model(*xs), native(*xs), atol=1e-5, rtol=1e-5)


@each
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_ensemble(name, transform):
    """Models stacked by stack_module_state run as one."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = MODELS[name][0]().double()
        models.append(jacobian_ops.replace(model.train(name != "conv")))
    xs = [torch.randn(shape, dtype=torch.float64) for shape in MODELS[name][1]]
    params, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])

    def call(params, buffers):
        return functional_call(base, (params, buffers), tuple(xs))

    if transform == "vmap":
        close(vmap(call)(params, buffers), torch.stack([m(*xs) for m in models]))
        return
    loss = torch.func.grad(lambda p, b: call(p, b).sin().sum())
    given = vmap(loss)(params, buffers)
    for i, model in enumerate(models):
        close({n: g[i] for n, g in given.items()}, gradients(model, xs)[1])
