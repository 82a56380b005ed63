"""jacobian_ops.report: its figures against dense Jacobians, and the models that it tells apart."""

import copy
import json
import math

import matplotlib.image
import pytest
import torch
from torch import nn

import jacobian_ops
import jacobian_ops.functional as J
from jacobian_ops.report.flops import flops_of

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)  # so small models gain nothing from more


def rows(model, x, **options):
    return {row.name: row for row in jacobian_ops.report(model, x, **options).layers}


def dense(f, x):
    J = torch.autograd.functional.jacobian(f, x)
    return J.reshape(-1, x.numel())


def deep(activation, scale, depth=8, width=24):
    """A deep network whose weights are normal with deviation scale / sqrt(width)."""
    layers = [nn.Linear(width, width) for _ in range(depth)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=scale / math.sqrt(width))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*(m for layer in layers for m in (layer, activation())))


class Residual(nn.Module):
    """x + body(x), the residual block of a ResNet."""

    def __init__(self, width, after=None):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.Dropout(0.1)
        )
        self.after = after

    def forward(self, x):
        y = x + self.body(x)
        return y if self.after is None else self.after(y)


LAYERS = [
    nn.Linear(6, 9),
    nn.Sigmoid(),
    nn.Softmax(-1),
    nn.LayerNorm(6),
    nn.RMSNorm(6),
    nn.BatchNorm1d(6),
    nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda m: type(m).__name__)
def test_gains(layer, replaced):
    """With as many steps as columns the largest singular value is exact."""
    model = nn.Sequential(layer.double())
    x = torch.randn(4, 6, dtype=torch.float64)
    s = torch.linalg.svdvals(dense(model, x))
    if replaced:
        model = jacobian_ops.replace(model)
    try:
        row = jacobian_ops.report(model, x, steps=24, samples=64).model
    finally:
        jacobian_ops.restore(model)
    assert (row.m, row.n) == (model(x).numel(), 24)
    assert row.largest_gain == pytest.approx(s[0].item(), rel=1e-6)
    # 64 samples of |J w|^2, whose relative deviation is sqrt(2 sum s^4) / sum s^2 each.
    error = (2 * s.pow(4).sum()).sqrt() / s.square().sum() / 8
    mean = s.square().mean().sqrt().item()
    assert row.mean_gain == pytest.approx(mean, rel=4 * error.item())


def test_costs():
    """Of one linear map: what native PyTorch runs, and what ours does."""
    model, x = nn.Sequential(nn.Linear(64, 32), nn.GELU()), torch.randn(8, 64)
    product = 2 * 8 * 64 * 32
    native = rows(model, x)["0"]
    assert native.vjp_flops == product
    assert 2 * product <= native.jvp_flops < 2.2 * product  # with a zero tangent of the weight
    assert native.saved_bytes == x.nbytes
    ours = rows(jacobian_ops.replace(model), x)["0"]
    assert product <= ours.vjp_flops < 1.1 * product
    assert product <= ours.jvp_flops < 1.1 * product
    assert ours.saved_bytes == x.nbytes


def test_costs_of_a_fused_loss():
    """The logits are made in forward and once more in backward."""
    h, weight = torch.randn(8, 16).requires_grad_(), torch.randn(64, 16)
    product = 2 * h.numel() * len(weight)
    loss, forward = flops_of(lambda: J.linear_cross_entropy(h, weight, torch.arange(8)))
    _, gradient = flops_of(lambda: torch.autograd.grad(loss, h))
    assert product <= forward < 1.1 * product
    assert 2 * product <= gradient < 2.1 * product


def test_costs_of_ours():
    """Attention, dropout and a fused block: two flops for each multiply-add, seeds for masks."""

    class Attention(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)

    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 16, 32)
    native, ours = [
        jacobian_ops.report(Attention(m), x).model
        for m in (attention, jacobian_ops.replace(attention))
    ]
    tokens = 2 * 16
    linear = 2 * tokens * 32 * (3 * 32 + 32)
    scores = 2 * tokens * 16 * 32  # of all heads
    assert linear + 4 * scores <= native.vjp_flops < 1.3 * (linear + 4 * scores)
    assert linear + 5 * scores <= ours.vjp_flops < 1.3 * (linear + 5 * scores)
    assert linear + 3 * scores <= ours.jvp_flops < 1.3 * (linear + 3 * scores)
    assert ours.largest_gain == pytest.approx(native.largest_gain, rel=1e-3)

    dropout = nn.Sequential(nn.Dropout(0.5))
    assert rows(dropout, x)["0"].saved_bytes == x.nbytes
    assert rows(jacobian_ops.replace(dropout), x)["0"].saved_bytes == 8


def test_vanishing():
    """Sigmoids shrink the gradient at least fourfold a layer."""
    report = jacobian_ops.report(deep(nn.Sigmoid, 1.0), torch.randn(32, 24))
    gradients = [row.gradient for row in report.layers if row.kind == "Sigmoid"]
    assert gradients[-1] == pytest.approx(1)
    assert all(a < 0.4 * b for a, b in zip(gradients, gradients[1:], strict=False))
    assert "vanishing gradient" in report.layers[0].flags and not report.layers[-1].flags
    assert all(r.largest_gain <= 0.2501 for r in report.layers if r.kind == "Sigmoid")


def test_exploding():
    report = jacobian_ops.report(deep(nn.ReLU, 5.0), torch.randn(32, 24))
    assert report.layers[0].gradient > 1e3 and "exploding gradient" in report.layers[0].flags
    assert report.layers[-1].gradient == pytest.approx(1)
    assert not any("vanishing" in flag for row in report.layers for flag in row.flags)


@pytest.mark.parametrize("after", [None, nn.ReLU, nn.LayerNorm])
def test_residual(after):
    """A ResNet does neither: the identity carries the gradient."""
    made = {None: lambda: None, nn.ReLU: nn.ReLU, nn.LayerNorm: lambda: nn.LayerNorm(24)}[after]
    model = nn.Sequential(nn.Linear(8, 24), *(Residual(24, made()) for _ in range(5)))
    x = torch.randn(32, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = rows(model, x)
    blocks = [table[str(i)] for i in range(1, 6)]
    for row in blocks:
        assert row.structure == "residual: I + J" and 0.5 < row.identity <= 1.01
        assert "identity carries" in row.flags
    assert not any("ing gradient" in flag for row in table.values() for flag in row.flags)
    assert all(0.05 < row.gradient < 20 for row in table.values())
    # One row for each block and each layer, none for the Sequential inside.
    assert "1.body" not in table and "1.body.2" in table
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "forward",
    [lambda x, f: f(x) * x, lambda x, f: f(x) + x.flip(0), lambda x, f: f(x) + f(x).relu()],
)
def test_not_residual(forward):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x):
            return forward(x, self.f)

    table = rows(nn.Sequential(Block(), nn.Tanh()), torch.randn(3, 4))
    assert {"0.f", "1"} <= set(table) <= {"0.f", "0.f#2", "1"}


def test_dead_and_saturated():
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 6), nn.Sigmoid())
    with torch.no_grad():
        model[0].bias[:3] = -100
        model[2].bias[:4] = torch.tensor([50.0, -50, 50, 50])
    table = rows(model, torch.randn(256, 4))
    assert table["1"].dead == pytest.approx(0.3, abs=1e-6) and "30% dead" in table["1"].flags
    assert table["3"].saturated == pytest.approx(4 / 6, abs=1e-6)
    assert "67% saturated" in table["3"].flags
    softmax = rows(nn.Sequential(nn.Softmax(-1)), torch.eye(4) * torch.tensor([9.0, 9, 9, 0]))
    assert softmax["0"].saturated == pytest.approx(0.75)
    tokens = rows(nn.Sequential(nn.ReLU()), torch.tensor([-1.0, 1.0]).expand(5, 7, 2))
    assert tokens["0"].dead == pytest.approx(0.5)  # units are columns of the last dimension


def test_transformer():
    """Whatever calls a layer: integers in, in-place layers, dropout, several inputs."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.act = nn.ReLU(inplace=True)
            self.head = nn.Linear(16, 3)

        def forward(self, tokens, scale):
            return self.head(self.act(self.encoder(self.embed(tokens)) * scale))

    model, tokens = Model(), torch.randint(0, 11, (4, 6))
    torch.manual_seed(1)
    after = torch.rand(1)
    for m in (model, jacobian_ops.replace(model), model.eval()):
        torch.manual_seed(1)
        report = jacobian_ops.report(m, (tokens, torch.ones(())))
        assert torch.equal(torch.rand(1), after)  # the generator is where it was
        table = {row.name: row for row in report.layers}
        assert table["embed"].structure == "lookup" and table["embed"].n is None
        assert table["embed"].gradient > 0
        assert {"encoder.layers.0", "encoder.layers.1.self_attn", "encoder.layers.1"} < set(table)
        for name in ("encoder.layers.0", "encoder.layers.1", "encoder"):
            assert "identity carries" in table[name].flags
        assert 0.3 < table["act"].mean_gain < 0.99  # the share of positive units
        assert table["act"].largest_gain == pytest.approx(1)
        for row in report.layers[1:]:
            assert row.jvp_flops > 0 and math.isfinite(row.largest_gain)


def test_gain_of_a_small_jacobian():
    """However small: what is compared is relative."""
    layer = nn.Linear(6, 5, dtype=torch.float64)
    largest = torch.linalg.svdvals(layer.weight)[0].item()
    for scale in (1e-12, 1e12):
        model = nn.Sequential(copy.deepcopy(layer))
        model[0].weight.data *= scale
        row = jacobian_ops.report(model, torch.randn(4, 6, dtype=torch.float64)).model
        assert row.largest_gain == pytest.approx(scale * largest, rel=1e-3)


def test_same_masks():
    """Every product of a dropout layer is with the same J, so its gains are 1 / (1 - p)."""
    for model in (nn.Sequential(nn.Dropout(0.5)), nn.Sequential(jacobian_ops.nn.Dropout(0.5))):
        row = rows(model, torch.randn(40, 50))["0"]
        assert row.largest_gain == pytest.approx(2, rel=1e-3)
        assert row.mean_gain == pytest.approx(math.sqrt(2), rel=0.1)


def test_without_forward_mode():
    """J u comes from reverse mode where forward mode has no rule, and is missing without either."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, gy):
            return 2 * ctx.saved_tensors[0] * gy

    class Once(Square):
        backward = staticmethod(torch.autograd.function.once_differentiable(Square.backward))

    class Layer(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function.apply(x)

    x = torch.arange(1.0, 4.0)
    table = rows(nn.Sequential(Layer(Square), Layer(Once)), x, samples=1000)
    assert table["0"].largest_gain == pytest.approx(6, rel=1e-5)
    assert table["0"].jvp_flops > 0 and table["0"].flags == []
    assert table["1"].largest_gain is None and table["1"].jvp_flops is None
    assert "no JVP" in table["1"].flags
    assert table["1"].mean_gain == pytest.approx(math.sqrt(4 * 98 / 3), rel=0.15)


def test_printed_dict_and_plot(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), Residual(4), nn.Linear(4, 2))
    report = jacobian_ops.report(model, torch.randn(8, 4))
    printed = str(report).splitlines()
    for row in [*report.layers, report.model]:
        (line,) = [line for line in printed if line.split()[:2] == [row.name, row.kind]]
        assert f"{row.m} x {row.n}" in line and row.structure in line
    again = json.loads(json.dumps(report.to_dict()))
    assert [row["name"] for row in again["layers"]] == [row.name for row in report.layers]
    assert again["model"]["largest_gain"] == report.model.largest_gain

    figure = report.plot(tmp_path / "gains.png")
    gains, gradients = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in gains.lines}
    assert drawn["largest, residual block"] == [report.layers[1].largest_gain]
    plain = [row.mean_gain for row in report.layers if row.identity is None]
    assert drawn["root mean square"] == plain
    assert list(gradients.lines[0].get_ydata()) == [row.gradient for row in report.layers]
    names = [label.get_text() for label in gradients.get_xticklabels()]
    assert names == [row.name for row in report.layers]
    height, width, _ = matplotlib.image.imread(tmp_path / "gains.png").shape
    assert width > 600 and height > 600


def test_one_layer():
    report = jacobian_ops.report(nn.Linear(3, 2), torch.randn(5, 3))
    (row,) = report.layers
    assert row.name == report.model.name == "model" and row.structure == "dense"


def test_low_precision():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.GELU()), torch.randn(16, 32)
    wide = rows(model, x)
    narrow = rows(model.bfloat16(), x.bfloat16())
    for name, row in wide.items():
        assert narrow[name].largest_gain == pytest.approx(row.largest_gain, rel=0.03)
        assert narrow[name].saved_bytes < row.saved_bytes


@pytest.mark.parametrize(
    "model,options,error,words",
    [
        (torch.relu, {}, TypeError, "model must be a torch.nn.Module, got builtin"),
        (nn.ReLU(), dict(samples=0), ValueError, "samples is 0; it must be at least 1"),
        (nn.ReLU(), dict(steps=0), ValueError, "steps is 0; it must be at least 1"),
    ],
)
def test_errors(model, options, error, words):
    with pytest.raises(error, match=f"report: {words}"):
        jacobian_ops.report(model, torch.randn(3), **options)


def test_no_result():
    class Argmax(nn.Module):
        def forward(self, x):
            return x.argmax()

    with pytest.raises(ValueError, match="report: the model returns no floating-point tensor"):
        jacobian_ops.report(Argmax(), torch.randn(3))
