"""replace and restore: what is swapped, that a model goes on as before, and the way back."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import jacobian_ops.functional as J
import jacobian_ops.nn as jnn
from jacobian_ops import replace, replacements, restore
from jacobian_ops.replace import FusedSequential

from .copies import copies

MODULE = importlib.import_module("jacobian_ops.replace.swap")  # the function hides the package
SWAPPED = sorted(set(jnn.__all__) & set(dir(nn)))


class MyLinear(nn.Linear):
    pass


class MySequential(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


class Block(nn.Module):
    """A layer of its own beside a Sequential, one inside the other."""

    def __init__(self, p=0.0):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.act = nn.SiLU()
        self.inner = nn.Sequential(mlp(p), nn.LayerNorm(8))
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return self.drop(self.inner(self.act(self.first(x))))


def mlp(p=0.0):
    """All three things that are fused, in one row."""
    return nn.Sequential(
        nn.Linear(64, 70),
        nn.GELU(),
        nn.Dropout(p),
        nn.Linear(70, 66),
        nn.Tanh(),
        nn.Linear(66, 8),
        nn.Softmax(-1),
        nn.Dropout(p),
    )


def twins(model):
    """The model, and a copy on our ops."""
    return model, replace(copy.deepcopy(model))


def x_of(rows=80, cols=64):
    """More elements than the threshold below which plain calls go to the native op."""
    return torch.randn(rows, cols)


def call(model, x):
    """The result and all gradients."""
    x = x.clone().requires_grad_()
    y = model(x)
    loss = (y * torch.linspace(-1, 1, y.shape[-1])).sum()
    return y, torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)


def same(model, other, x):
    torch.testing.assert_close(call(other, x), call(model, x))


def classes(model):
    return [type(m) for m in model.modules()]


def attributes(model):
    return [list(m.__dict__) for m in model.modules()]


@pytest.fixture
def fused(monkeypatch):
    """What ran as one op, in order."""
    ran = []

    def spy(name):
        run = getattr(J, name)

        def call(*args, **kwargs):
            ran.append(args[3] if name == "linear_act_dropout" else "softmax")
            return run(*args, **kwargs)

        monkeypatch.setattr(J, name, call)

    spy("linear_act_dropout")
    spy("softmax_dropout")
    return ran


# ---------------------------------------------------------------------- what is swapped


@pytest.mark.parametrize("name", SWAPPED)
def test_bare_layer(name):
    sizes = {"Linear": (3, 4), "GroupNorm": (2, 4), "MultiheadAttention": (4, 2)}
    args = sizes.get(name, (3,) if "Norm" in name else ())
    layer = getattr(nn, name)(*args)
    before = list(layer.__dict__)
    assert replace(layer) is layer and type(layer) is getattr(jnn, name)
    assert restore(layer) is layer and type(layer) is getattr(nn, name)
    assert list(layer.__dict__) == before


def test_every_layer_of_ours_is_swapped():
    own = {"DropoutAdd", "GeGLU", "LinearActDropout", "SoftmaxDropout", "SwiGLU"}
    assert set(jnn.__all__) - set(SWAPPED) == own


def test_exact_classes_only():
    model = nn.ModuleList(
        [
            MyLinear(64, 64),
            MySequential(nn.Linear(64, 64), nn.ReLU()),
            nn.PReLU(),
            nn.Dropout1d(),
            nn.Softmax2d(),
            nn.Bilinear(3, 3, 3),
            nn.SyncBatchNorm(3),
        ]
    )
    before = classes(model)
    replace(model)
    changed = {model[1][0]: jnn.Linear, model[1][1]: jnn.ReLU}
    assert classes(model) == [
        changed.get(m, c) for m, c in zip(model.modules(), before, strict=True)
    ]
    assert not isinstance(model[1], FusedSequential)
    assert classes(restore(model)) == before


def test_what_is_left_is_listed_with_the_reason():
    class Quantized(nn.Parameter):
        pass

    model = nn.ModuleDict(
        dict(
            linear=nn.Linear(64, 64),
            own=nn.ReLU(),
            subclass=MyLinear(64, 64),
            quantized=nn.Linear(64, 64),
            lazy=nn.LazyLinear(3),
            conv=nn.Conv2d(1, 1, 1),
            parametrized=weight_norm(nn.Linear(64, 64)),
            row=row(nn.GELU(), nn.Dropout(0.0)),
            nothing=nn.Identity(),
        )
    )
    model["own"].forward = torch.sin
    model["quantized"].weight = Quantized(torch.ones(64, 64))
    rows = {r.name: r for r in replacements(replace(model)).layers}
    left = {name: r.detail for name, r in rows.items() if r.action == "left"}
    assert left == {
        "own": "it has a forward of its own",
        "subclass": "a subclass of Linear, which may do something else",
        "quantized": "its weight is of class Quantized, which our ops do not know",
        "lazy": "it has no parameters yet",
        "conv": "there is no op of ours for it",
        "parametrized": "it was parametrized before",
        "parametrized.parametrizations.weight.0": "there is no op of ours for it",
    }
    assert rows["row"].action == "fused" and rows["row"].detail == "linear, activation, dropout"
    assert rows["linear"].action == "swapped" and rows["linear"].parameters == 64 * 65
    assert "nothing" not in rows
    assert type(model["quantized"]) is nn.Linear
    model["late"] = nn.Tanh()
    assert replacements(model).layers[-1].detail == "it came after replace"
    with pytest.raises(TypeError, match="^replacements: model must be a torch.nn.Module, got int$"):
        replacements(3)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_saved_bytes_of_replacements(training):
    model = replace(mlp(0.5).train(training))
    x, before = x_of(), [p.clone() for p in model.parameters()]
    result = replacements(model, x)
    assert result.layers[0].name == "model" and result.layers[0].action == "fused"
    assert 0 < result.saved_bytes <= result.native_saved_bytes
    if training:
        assert result.saved_bytes < result.native_saved_bytes
    assert all(map(torch.equal, model.parameters(), before))
    assert "linear, activation, dropout; linear, activation" in str(result)


def test_linear_and_dropout_that_drops_are_one(fused):
    native, ours = twins(nn.Sequential(nn.Linear(64, 66), nn.Dropout(0.25), nn.ReLU()))
    ours, x = replace(ours), x_of()
    y = ours(x)
    assert fused == ["identity"]
    kept, want = y != 0, native.eval()(x) / 0.75
    torch.testing.assert_close(y, torch.where(kept, want, 0 * want))
    del fused[:]
    same(native, ours.eval(), x)
    assert not fused


def test_subclass_of_sequential_that_runs_as_it_does(fused):
    class Row(nn.Sequential):
        def depth(self):
            return len(self)

    native, ours = twins(Row(*mlp()))
    assert isinstance(ours, Row) and type(ours) is not Row and ours.depth() == 8
    same(native, ours, x_of())
    assert fused == ["gelu", "tanh", "softmax"]
    assert type(restore(ours)) is Row


@pytest.mark.parametrize("activation", [torch.relu, nn.functional.relu, nn.functional.gelu])
def test_compile_of_a_layer_whose_activation_is_a_function(activation):
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, activation, batch_first=True)
    native, ours = twins(layer)
    x = torch.randn(6, 30, 32)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), native(x))


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_decoder_layer(norm_first, fused):
    native, ours = twins(
        nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=norm_first)
    )
    x, memory = torch.randn(2, 6, 30, 32).unbind()
    torch.testing.assert_close(ours(x, memory=memory), native(x, memory))
    assert fused == ["relu"]
    assert type(restore(ours)) is nn.TransformerDecoderLayer


def test_nested():
    native, ours = twins(Block().double())
    for m in ours.modules():
        assert [*m.children()] or type(m).__module__.startswith("jacobian_ops")
    assert type(ours.inner) is nn.Sequential  # nothing in a row to fuse
    assert type(ours.inner[0]) is FusedSequential
    same(native, ours, x_of().double())


def test_a_module_in_two_places(fused):
    act, layer = nn.ReLU(), nn.Linear(64, 64)
    native, ours = twins(nn.Sequential(layer, act, layer, act, nn.Sequential(layer, act)))
    assert ours[0] is ours[2] is ours[4][0] and ours[1] is ours[3] is ours[4][1]
    same(native, ours, x_of())
    assert fused == ["relu"] * 3
    restore(ours)
    assert classes(ours) == classes(native) and attributes(ours) == attributes(native)


def test_tied_weights():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh())
    model[2].weight = model[0].weight
    native, ours = twins(model)
    assert ours[2].weight is ours[0].weight and len([*ours.parameters()]) == 3
    same(native, ours, x_of())


@pytest.mark.parametrize("argument", [None, "model", torch.ones(3), nn.Linear, [nn.ReLU()]])
@pytest.mark.parametrize("function", [replace, restore])
def test_no_module(function, argument):
    kind = type(argument).__name__
    with pytest.raises(TypeError, match=f"^{function.__name__}: model must be .*, got {kind}$"):
        function(argument)


# -------------------------------------------------------------------- the model goes on


def test_fused_sequential_is_a_sequential():
    native, ours = twins(mlp())
    assert type(ours) is FusedSequential and isinstance(ours, nn.Sequential)
    assert len(ours) == len(native) and list(ours._modules) == list(native._modules)
    children = list(ours)
    assert ours[1] is children[1] and ours[-1] is children[-1]
    assert list(ours[2:5]) == children[2:5] and list(ours[1:2] + ours[3:4]) == [
        children[1],
        children[3],
    ]
    x = x_of()
    for part in (slice(0, 2), slice(5), slice(None, None, 7)):
        torch.testing.assert_close(ours[part](x), native[part](x))
    with pytest.raises(IndexError):
        ours[8]
    assert repr(ours) == repr(native).replace("Sequential", "FusedSequential", 1)
    for model in (native, ours):
        del model[1]
        model.append(nn.Linear(8, 3)).insert(1, nn.ELU())
        model[2] = nn.Identity()
    with torch.no_grad():
        ours.load_state_dict(native.state_dict())
    same(native, ours, x)


def test_what_is_changed_between_calls_is_heeded(fused):
    native, ours = twins(mlp())
    x = x_of()
    same(native, ours, x)
    assert fused == ["gelu", "tanh", "softmax"]
    for model in (native, ours):
        model[1] = nn.Identity()
        model[4].forward = torch.sin
    del fused[:]
    same(native, ours, x)
    assert fused == ["softmax"]


def test_state_dict_stays():
    model = Block().double()
    before = model.state_dict()
    after = replace(model).state_dict()
    assert list(after) == list(before)
    assert all(after[k].data_ptr() == t.data_ptr() for k, t in before.items())
    other = Block().double()
    other.load_state_dict(after)
    model.load_state_dict(other.state_dict())
    same(other, model, x_of().double())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_from_before_trains(optimizer):
    models, target = [Block()], torch.randn(80, 8)
    models.append(copy.deepcopy(models[0]))
    optimizers = [optimizer(m.parameters(), lr=0.01) for m in models]
    replace(models[1])
    x, losses = x_of(), [[], []]
    for _ in range(5):
        for model, o, curve in zip(models, optimizers, losses, strict=True):
            loss = (model(x) - target).square().mean()
            o.zero_grad()
            loss.backward()
            o.step()
            curve.append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert losses[1][-1] < losses[1][0]


def row(*layers):
    return nn.Sequential(nn.Linear(64, 66), *layers)


# Models without randomness, and what of them runs as one op.
MODELS = {
    "relu": (row(nn.ReLU()), ["relu"]),
    "leaky_relu": (row(nn.LeakyReLU()), ["leaky_relu"]),
    "elu": (row(nn.ELU()), ["elu"]),
    "selu": (row(nn.SELU()), ["selu"]),
    "celu": (row(nn.CELU()), ["celu"]),
    "relu6": (row(nn.ReLU6()), ["relu6"]),
    "hardtanh": (row(nn.Hardtanh()), ["hardtanh"]),
    "sigmoid": (row(nn.Sigmoid()), ["sigmoid"]),
    "tanh": (row(nn.Tanh()), ["tanh"]),
    "gelu": (row(nn.GELU()), ["gelu"]),
    "gelu tanh": (row(nn.GELU("tanh")), ["gelu_tanh"]),
    "silu": (row(nn.SiLU()), ["silu"]),
    "softplus": (row(nn.Softplus()), ["softplus"]),
    "mish": (row(nn.Mish()), ["mish"]),
    "hardswish": (row(nn.Hardswish()), ["hardswish"]),
    "hardsigmoid": (row(nn.Hardsigmoid()), ["hardsigmoid"]),
    "logsigmoid": (row(nn.LogSigmoid()), ["logsigmoid"]),
    "inplace": (row(nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True)), ["relu"]),
    "no bias": (nn.Sequential(nn.Linear(64, 66, bias=False), nn.SiLU()), ["silu"]),
    "slope": (row(nn.LeakyReLU(0.3)), []),
    "elu alpha": (row(nn.ELU(0.5)), []),
    "celu alpha": (row(nn.CELU(0.5)), []),
    "bounds": (row(nn.Hardtanh(-0.5, 2.0)), []),
    "beta": (row(nn.Softplus(beta=2)), []),
    "threshold": (row(nn.Softplus(threshold=1)), []),
    "no activation": (row(nn.Dropout(0.0), nn.ReLU()), []),
    "unknown activation": (row(nn.PReLU(), nn.Dropout(0.0)), []),
    "log_softmax": (row(nn.LogSoftmax(-1), nn.Dropout(0.0)), []),
    "softmax": (row(nn.Softmax(-1), nn.Dropout(0.0)), ["softmax"]),
    "softmax dim 0": (row(nn.Softmax(0), nn.Dropout(0.0)), ["softmax"]),
    "softmax alone": (row(nn.Softmax(-1), nn.ReLU()), []),
    "two": (row(nn.ReLU(), nn.Linear(66, 70), nn.GELU(), nn.Dropout(0.0)), ["relu", "gelu"]),
    "mlp": (mlp(), ["gelu", "tanh", "softmax"]),
    "empty": (nn.Sequential(nn.Sequential(), nn.Linear(64, 3)), []),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("model,expected", MODELS.values(), ids=MODELS.keys())
def test_results_and_gradients(model, expected, training, fused):
    native, ours = twins(model.train(training))
    same(native, ours, x_of())
    assert fused == expected and (type(ours) is FusedSequential) == bool(expected)
    x = torch.randn(2, 40, 64)
    torch.testing.assert_close(ours(x), native(x))
    if "dim 0" not in str(model):
        torch.testing.assert_close(ours(x[0, 0]), native(x[0, 0]))


DROPPED = {
    "linear": row(nn.GELU(), nn.Dropout(0.25)),
    "linear inplace": row(nn.SiLU(inplace=True), nn.Dropout(0.25, inplace=True)),
    "softmax": row(nn.Softmax(-1), nn.Dropout(0.25)),
    "dropout": row(nn.Dropout(0.25)),
}


@pytest.mark.parametrize("model", DROPPED.values(), ids=DROPPED.keys())
def test_dropout(model):
    native, ours = twins(model)
    x = x_of()
    y = ours(x)
    kept, want = y != 0, native.eval()(x) / 0.75
    torch.testing.assert_close(y, torch.where(kept, want, 0 * want))
    assert abs(kept.float().mean().item() - 0.75) < 5 * (0.25 * 0.75 / y.numel()) ** 0.5
    assert not torch.equal(ours(x), y)
    same(native, ours.eval(), x)
    ours.train()
    ours[-1].eval()  # the flag that counts is the dropout's
    torch.testing.assert_close(ours(x), native(x))
    ours[-1].train().p = 1.0
    assert not ours(x).any()
    ours[-1].p = 0.0
    torch.testing.assert_close(ours(x), native(x))
    ours[-1].p = 1.5
    with pytest.raises(ValueError, match="between 0 and 1, but got 1.5"):
        ours(x)


# --------------------------------------------------- children that are more than their class

HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *a: seen.append(type(m))),
    "forward always": lambda m, seen: m.register_forward_hook(
        lambda *a: seen.append(type(m)), always_call=True
    ),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda *a: seen.append(type(m))),
    "pre kwargs": lambda m, seen: m.register_forward_pre_hook(
        lambda *a: seen.append(type(m)), with_kwargs=True
    ),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *a: seen.append(type(m))),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(
        lambda *a: seen.append(type(m))
    ),
}


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("child", [0, 1, 2])
@pytest.mark.parametrize("kind", HOOKS)
def test_hook_on_a_child(kind, child, early, fused):
    model, seen = row(nn.GELU(), nn.Dropout(0.0)), []
    native = copy.deepcopy(model)
    if early:
        handle = HOOKS[kind](model[child], seen)
    ours = replace(model)
    if not early:
        handle = HOOKS[kind](ours[child], seen)
    same(native, ours, x_of())
    assert seen == [type(ours[child])]
    assert fused == (["gelu"] if child == 2 else [])
    handle.remove()
    del fused[:]
    same(native, replace(ours), x_of())
    assert len(seen) == 1 and fused == ["gelu"]


@pytest.mark.parametrize("child", [0, 1])
def test_hook_on_a_child_of_softmax_dropout(child, fused):
    ours, seen = replace(row(nn.Softmax(-1), nn.Dropout(0.0))), []
    ours[1 + child].register_forward_hook(lambda *a: seen.append(1))
    ours(x_of())
    assert seen == [1] and not fused


def test_a_hook_that_changes_the_result():
    native, ours = twins(mlp())
    for model in (native, ours):
        model[1].register_forward_hook(lambda m, args, y: 2 * y)
        model[6].register_forward_pre_hook(lambda m, args: (3 * args[0],))
    same(native, ours, x_of())


def test_hooks_on_the_sequential(fused):
    ours, seen = replace(row(nn.GELU())), []
    for kind in HOOKS:
        HOOKS[kind](ours, seen)
    call(ours, x_of())
    assert seen == [FusedSequential] * len(HOOKS) and fused == ["gelu"]


@pytest.mark.parametrize(
    "register",
    [
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
        torch.nn.modules.module.register_module_full_backward_hook,
        torch.nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_global_hook(register, fused):
    ours, seen = replace(row(nn.GELU(), nn.Dropout(0.0))), set()
    handle = register(lambda m, *a: seen.add(m))
    try:
        call(ours, x_of())
    finally:
        handle.remove()
    assert seen == set(ours.modules()) and not fused


@pytest.mark.parametrize("child", [0, 1, 2])
def test_forward_of_one_object(child, fused):
    model = row(nn.GELU(), nn.Dropout(0.0))
    model[child].forward = lambda x: x + 1
    before = classes(model)
    native, ours = twins(model)
    assert type(ours[child]) is type(native[child])
    same(native, ours, x_of())
    assert fused == (["gelu"] if child == 2 else [])
    assert classes(restore(ours)) == before and ours[child].forward(1) == 2


def test_forward_of_one_sequential():
    model = row(nn.GELU())
    model.forward = lambda x: x + 1
    assert type(replace(model)) is nn.Sequential
    assert torch.equal(model(torch.ones(3)), torch.full((3,), 2.0))


class Positive(nn.Module):
    def forward(self, w):
        return w.abs()


PARAMETRIZATIONS = {
    "weight_norm": weight_norm,
    "spectral_norm": lambda m: spectral_norm(m).eval(),  # training would go on iterating
    "own": lambda m: parametrize.register_parametrization(m, "weight", Positive()),
    "a swapped class": lambda m: parametrize.register_parametrization(
        m, "weight", nn.Softplus(), unsafe=True
    ),
}


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("register", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS.keys())
def test_parametrization(register, early, fused):
    native = row(nn.GELU(), nn.Linear(66, 66), nn.GELU())
    ours = copy.deepcopy(native)
    for model in (native, ours):
        if model is ours and not early:
            replace(ours)
        torch.manual_seed(3)  # spectral_norm draws
        register(model[0])
        if model is ours and early:
            replace(ours)
    x = x_of()
    same(native, ours, x)
    assert fused == ["gelu"]
    restore(ours)
    assert attributes(ours) == attributes(native)
    assert [c.__mro__[1:] for c in classes(ours)] == [c.__mro__[1:] for c in classes(native)]
    assert type(ours[0]).__name__ == "ParametrizedLinear"
    assert parametrize.is_parametrized(ours[0], "weight")
    same(native, ours, x)
    for model in (native, ours):
        parametrize.remove_parametrizations(model[0], "weight")
    assert classes(ours) == classes(native)
    same(native, ours, x)


def test_parametrization_removed_before_restore():
    native, ours = twins(row(nn.GELU()))
    for model in (native, ours):
        weight_norm(model[0])
    restore(copy.deepcopy(ours))  # which has the very class that torch made for the first
    for model in (native, ours):
        parametrize.remove_parametrizations(model[0], "weight")
    assert type(ours[0]) is jnn.Linear
    same(native, ours, x_of())
    assert classes(restore(ours)) == classes(native)


def test_another_class_since_replace():
    """Not ours to undo; once it is gone, restore goes on."""
    layer = replace(nn.Linear(3, 4))
    layer.__class__ = type("Wrapped", (jnn.Linear,), {})
    assert type(restore(layer)).__name__ == "Wrapped"
    layer.__class__ = jnn.Linear
    assert type(restore(layer)) is nn.Linear


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_pruning(early, fused):
    native, ours = (copy.deepcopy(row(nn.GELU())) for _ in range(2))
    ours.load_state_dict(native.state_dict())
    for model in (native, ours):
        if model is ours and not early:
            replace(ours)
        prune.l1_unstructured(model[0], "weight", 0.5)
    replace(ours)
    x = x_of()
    same(native, ours, x)
    assert not fused and (ours[0].weight == 0).float().mean() == 0.5
    for model in (native, ours):
        prune.remove(model[0], "weight")
    same(native, replace(ours), x)
    assert fused == ["gelu"]
    assert classes(restore(ours)) == classes(native) and attributes(ours) == attributes(native)


def test_lazy(fused):
    native, ours = twins(nn.Sequential(nn.LazyLinear(66), nn.ReLU(), nn.LazyLinear(3)))
    assert classes(ours)[1:] == [nn.LazyLinear, jnn.ReLU, nn.LazyLinear]
    x = x_of()
    for model in (native, ours):
        torch.manual_seed(0)
        assert model(x).shape == (80, 3)
    same(native, ours, x)
    assert classes(ours)[1:] == [nn.Linear, jnn.ReLU, nn.Linear] and not fused
    same(native, replace(ours), x)
    assert fused == ["relu"]
    assert classes(restore(ours)) == classes(native)


# ------------------------------------------------------------------------- the way back


def test_restore_gives_back_what_was():
    model = Block()
    before, names, keys = classes(model), attributes(model), list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    x = x_of()
    want = call(model, x)
    replace(model)
    assert classes(model) != before
    assert restore(model) is model
    assert classes(model) == before and attributes(model) == names
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    torch.testing.assert_close(call(model, x), want, rtol=0, atol=0)


def test_replace_twice_and_restore_twice():
    model = Block()
    before, names = classes(model), attributes(model)
    after, marked = classes(replace(model)), attributes(model)
    replace(model)
    assert classes(model) == after and attributes(model) == marked
    for _ in range(2):
        restore(model)
        assert classes(model) == before and attributes(model) == names


def test_restore_of_a_part_and_of_a_slice():
    model = replace(mlp())
    part = restore(model[:3])
    assert type(part) is nn.Sequential and type(model) is FusedSequential
    assert classes(part)[1:] == [nn.Linear, nn.GELU, nn.Dropout]
    assert type(model[3]) is jnn.Linear
    assert classes(restore(model)) == classes(mlp())


def test_what_was_built_as_ours_stays(fused):
    model = nn.Sequential(
        jnn.Linear(64, 66),
        nn.ReLU(),
        nn.Linear(66, 66),
        jnn.Tanh(),
        jnn.LinearActDropout(66, 66, activation="silu"),
        FusedSequential(jnn.Linear(66, 8), jnn.Sigmoid()),
        FusedSequential(nn.Linear(8, 8), nn.SELU()),
        jnn.SoftmaxDropout(),
    )
    before, names, x = classes(model), attributes(model), x_of()
    want = call(model, x)
    assert fused == ["silu", "sigmoid", "softmax"]
    del fused[:]
    torch.testing.assert_close(call(replace(model), x), want)
    assert fused == ["relu", "tanh", "silu", "sigmoid", "selu", "softmax"]
    restore(model)
    assert classes(model) == before and attributes(model) == names
    assert type(restore(model[5][:1])) is FusedSequential


@pytest.mark.parametrize("function,step", [(replace, "_become"), (restore, "_revert")])
def test_a_failure_midway_leaves_nothing_half_swapped(function, step, monkeypatch):
    real, swaps = getattr(MODULE, step), 0
    start = Block() if function is replace else replace(Block())

    def count(*args):
        nonlocal swaps
        swaps += 1
        real(*args)

    monkeypatch.setattr(MODULE, step, count)
    function(copy.deepcopy(start))
    assert swaps == 13
    for n in range(swaps):
        model, left = copy.deepcopy(start), n

        def fail(*args):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            real(*args)

        monkeypatch.setattr(MODULE, step, fail)
        with pytest.raises(KeyboardInterrupt):
            function(model)
        assert classes(model) == classes(start) and attributes(model) == attributes(start)


@copies
def test_copies(duplicate):
    model, x = replace(Block().double()), x_of().double()
    other = duplicate(model)
    assert classes(other) == classes(model)
    torch.testing.assert_close(call(other, x), call(model, x), rtol=0, atol=0)
    restore(other)
    assert classes(other) == classes(Block()) and attributes(other) == attributes(Block())
    assert type(model.first) is jnn.Linear
    same(other, model, x)


# ------------------------------------------------------------------ beside the rest of torch


def test_compile():
    native, ours = twins(mlp())
    same(native, torch.compile(ours, fullgraph=True), x_of())


def test_replace_inside_a_compiled_model():
    native, x = row(nn.GELU()), x_of()
    compiled = torch.compile(copy.deepcopy(native), fullgraph=True, backend="eager")
    same(native, compiled, x)
    same(native, replace(compiled), x)
    assert type(compiled._orig_mod[1]) is jnn.GELU
    same(native, restore(compiled), x)
    assert type(compiled._orig_mod[1]) is nn.GELU


def test_compile_of_one_child(fused):
    native, ours = twins(row(nn.GELU()))
    ours[1].compile(fullgraph=True, backend="eager")
    same(native, ours, x_of())
    assert not fused  # the child's compiled call is run


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_call_and_jvp(training):
    native, ours = twins(Block().double().train(training))
    x, tx = torch.randn(2, 80, 64, dtype=torch.float64)
    weights = dict(native.named_parameters())
    tangents = {k: torch.randn_like(w) for k, w in weights.items()}

    def product(model):
        return jvp(lambda w, x: functional_call(model, w, x), (weights, x), (tangents, tx))

    torch.testing.assert_close(product(ours), product(native))


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU()], ids=str)
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_layer(activation, norm_first):
    native, ours = twins(
        nn.TransformerEncoderLayer(
            32, 4, 64, 0.0, activation, batch_first=True, norm_first=norm_first
        )
    )
    assert type(ours.linear1) is jnn.Linear and type(ours.dropout1) is jnn.Dropout
    x = torch.randn(6, 30, 32)
    same(native, ours, x)
    native.eval(), ours.eval()
    same(native, ours, x)
    mask = torch.zeros(6, 30, dtype=torch.bool)
    mask[:, 25:] = True
    with torch.no_grad():  # the fast path
        torch.testing.assert_close(ours(x), native(x))
        got, want = (m(x, src_key_padding_mask=mask)[:, :25] for m in (ours, native))
        torch.testing.assert_close(got, want)


def test_multihead_attention():
    results, x = [], torch.randn(6, 30, 32)
    for model in twins(nn.MultiheadAttention(32, 4, batch_first=True)):
        results.append(model(x, x, x))
    torch.testing.assert_close(results[1], results[0])


BAD = {
    "int64": lambda: torch.ones(80, 64, dtype=torch.int64),
    "bool": lambda: torch.ones(80, 64, dtype=torch.bool),
    "complex": lambda: torch.ones(80, 64, dtype=torch.complex64),
    "another dtype": lambda: torch.ones(80, 64, dtype=torch.float64),
    "another shape": lambda: torch.ones(80, 63),
    "no dimension": lambda: torch.ones(()),
    "list": lambda: [1.0],
    "none": lambda: None,
}


@pytest.mark.parametrize("model", [row(nn.ReLU()), mlp()], ids=["relu", "mlp"])
@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_bad_input(make, model):
    native, ours = twins(model)
    with pytest.raises(Exception) as wanted:  # noqa: B017  whatever torch raises
        native(make())
    with pytest.raises(wanted.type) as raised:
        ours(make())
    assert raised.type is wanted.type


def test_complex_model(fused):
    native, ours = twins(row(nn.Tanh(), nn.Dropout(0.0)).to(torch.complex64))
    x = x_of().to(torch.complex64)
    torch.testing.assert_close(ours(x), native(x))
    assert not fused


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_softmax_dropout_of_other_dtypes(dtype):
    native, ours = twins(nn.Sequential(nn.Softmax(-1), nn.Dropout(0.0)))
    x = torch.ones(80, 64, dtype=dtype)
    try:
        want = native(x)
    except (RuntimeError, NotImplementedError) as e:
        with pytest.raises(type(e)):
            ours(x)
    else:
        torch.testing.assert_close(ours(x), want)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_input(layout):
    native, ours = twins(mlp())
    dense = x_of().relu()
    x = dense.to_sparse(layout=layout)
    torch.testing.assert_close(ours(x), native(x))
    torch.testing.assert_close(ours(x), ours(dense))


@pytest.mark.parametrize("name", [k for k in MODELS if k != "empty"])
def test_autocast(name):
    native, ours = twins(MODELS[name][0])
    x = x_of()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        want, got = native(x), ours(x)
    assert got.dtype == want.dtype
    exact = native(x)
    rounding = 2**-9 * exact.norm()
    assert (got - exact).norm() <= (want - exact).norm() + rounding


def test_autocast_trains():
    native, ours = twins(mlp())
    x = x_of()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        (y, grads), (want, want_grads) = call(ours, x), call(native, x)
    assert y.dtype == want.dtype
    for g, w in zip(grads, want_grads, strict=True):
        assert g.dtype == w.dtype and (g - w).norm() < 0.05 * w.norm()
