"""jacobian(f, x): the right operator for modules and functions, and the structure it finds."""

import pytest
import torch
from torch import nn

import jacobian_ops
import jacobian_ops.functional as J
import jacobian_ops.nn as ours
from jacobian_ops import jacobian

pytestmark = pytest.mark.cpu_only

close = torch.testing.assert_close
F = nn.functional


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def expected(f, x):
    """The matrix by plain autograd, one output at a time."""
    A = torch.autograd.functional.jacobian(f, x.clone())
    return A.reshape(-1, x.numel())


def kinds(J):
    """The names of all operators of a tree, without those of branches more than once."""
    return [type(J).__name__, *(kind for part in J.parts for kind in kinds(part))]


class Residual(nn.Module):
    """x + W2 gelu(W1 norm(x)), as transformers have it."""

    def __init__(self, n, inplace=False):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(n), nn.Linear(n, 2 * n), nn.Linear(2 * n, n)
        self.inplace = inplace

    def forward(self, x):
        h = self.down(F.gelu(self.up(self.norm(x))))
        if self.inplace:
            h += x
            return h
        return x + h


class Attention(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.norm, self.attention = nn.RMSNorm(n), nn.MultiheadAttention(n, 2, batch_first=True)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]


def randomized(module):
    """With weights of norms and running statistics that are not the initial ones."""
    for p in (*module.double().parameters(), *module.buffers()):
        if p.is_floating_point():
            nn.init.uniform_(p.data, 0.2, 0.9)
    return module


BRANCH = ["Chain", "Dense", "Diagonal", "Dense", "DiagonalPlusLowRank"]
LAYERS = [
    # module, shape of x, the operators that its Jacobian is made of
    (nn.Linear(4, 3), (4,), ["Dense"]),
    (nn.Linear(4, 3, bias=False), (5, 4), ["BlockDiagonal", "Dense"]),
    (nn.Linear(4, 3), (2, 5, 4), ["BlockDiagonal", "Dense"]),
    *((getattr(nn, name)(), (3, 2), ["Diagonal"]) for name in (
        "ReLU", "LeakyReLU", "ELU", "SELU", "CELU", "ReLU6", "Hardtanh", "Sigmoid", "Tanh", "GELU",
        "SiLU", "Softplus", "Mish", "Hardswish", "Hardsigmoid", "LogSigmoid", "Softsign",
        "Tanhshrink", "PReLU", "Hardshrink", "Softshrink",
    )),
    (nn.GELU("tanh"), (4,), ["Diagonal"]),
    (nn.Softmax(-1), (4,), ["DiagonalPlusLowRank"]),
    (nn.Softmax(-1), (3, 4), ["BlockDiagonal", "DiagonalPlusLowRank"]),
    (nn.Softmin(-1), (3, 4), ["BlockDiagonal", "DiagonalPlusLowRank"]),
    (nn.LogSoftmax(-1), (3, 4), ["BlockDiagonal", "DiagonalPlusLowRank"]),
    (
        nn.Softmax(1),
        (2, 4, 3),
        ["Chain", "Permutation", "BlockDiagonal", "DiagonalPlusLowRank", "Permutation"],
    ),
    (nn.LayerNorm(4), (4,), ["DiagonalPlusLowRank"]),
    (nn.LayerNorm(4, elementwise_affine=False), (3, 4), ["BlockDiagonal", "DiagonalPlusLowRank"]),
    (
        nn.LayerNorm((2, 3)),
        (4, 2, 3),
        ["Chain", "Permutation", "BlockDiagonal", "DiagonalPlusLowRank", "Permutation"],
    ),
    (nn.RMSNorm(4), (3, 4), ["BlockDiagonal", "DiagonalPlusLowRank"]),
    (nn.RMSNorm(4, eps=0.3, elementwise_affine=False), (4,), ["DiagonalPlusLowRank"]),
    (
        nn.BatchNorm1d(3),
        (4, 3),
        ["Chain", "Permutation", "BlockDiagonal", "DiagonalPlusLowRank", "Permutation"],
    ),
    (
        nn.BatchNorm2d(3, affine=False, track_running_stats=False),
        (2, 3, 2, 2),
        ["Chain", "Permutation", "BlockDiagonal", "DiagonalPlusLowRank", "Permutation"],
    ),
    (nn.BatchNorm2d(3).eval(), (2, 3, 2, 2), ["Diagonal"]),
    (
        nn.GroupNorm(2, 4),
        (3, 4, 2),
        ["Chain", "Permutation", "BlockDiagonal", "DiagonalPlusLowRank", "Permutation"],
    ),
    (nn.Identity(), (3, 2), ["Identity"]),
    (nn.Dropout(0.5).eval(), (3, 2), ["Identity"]),
    (nn.Flatten(), (2, 3, 2), ["Permutation"]),
    (nn.Unflatten(1, (3, 2)), (2, 6), ["Permutation"]),
    (nn.PixelShuffle(2), (1, 4, 2, 2), ["Permutation"]),
    (nn.Conv1d(2, 3, 2), (1, 2, 4), ["MatrixFree"]),
    (nn.AvgPool1d(2), (1, 2, 4), ["MatrixFree"]),
    (
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
        (4,),
        ["Chain", "Dense", "Diagonal", "Dense"],
    ),
    (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Softmax(-1)),
        (6, 4),
        ["BlockDiagonal", "Chain", "DiagonalPlusLowRank", "Dense", "Diagonal", "Dense"],
    ),
    (Residual(4), (3, 4), ["BlockDiagonal", "Sum", "Identity", *BRANCH]),
    (Residual(4, inplace=True), (3, 4), ["BlockDiagonal", "Sum", *BRANCH, "Identity"]),
    (
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3).eval(), nn.ReLU(inplace=True)),
        (2, 2, 3, 3),
        ["Chain", "Diagonal", "MatrixFree"],
    ),
    (ours.SoftmaxDropout(-1), (3, 4), ["BlockDiagonal", "DiagonalPlusLowRank"]),
    (ours.LinearActDropout(4, 3), (4,), ["Chain", "Diagonal", "Dense"]),
    (ours.LinearActDropout(4, 3, activation="gelu_tanh"), (4,), ["Chain", "Diagonal", "Dense"]),
    (ours.LinearActDropout(4, 3, activation="identity"), (4,), ["Dense"]),
    (
        ours.SwiGLU(),
        (4,),
        ["Sum", "Chain", "Diagonal", "Selection", "Chain", "Diagonal", "Selection"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("replaced", [False, True], ids=["native", "replaced"])
@pytest.mark.parametrize("module, shape, tree", LAYERS, ids=lambda v: type(v).__name__)
def test_layers(module, shape, tree, replaced):
    module = randomized(module)
    x = torch.randn(shape)
    A = expected(module, x)
    if replaced:
        jacobian_ops.replace(module)
    try:
        operator = jacobian(module, x)
    finally:
        jacobian_ops.restore(module)
    assert kinds(operator) == tree, operator.structure
    assert operator.in_shape == shape and operator.dtype is torch.float64
    close(operator.dense(), A)
    u, v = torch.randn(shape), torch.randn(operator.out_shape)
    close((operator @ u).flatten(), A @ u.flatten())
    close((v @ operator).flatten(), v.flatten() @ A)


W = torch.randn(4, 4, dtype=torch.float64)


class Straight(torch.autograd.Function):
    """Rounds, with a derivative of its own."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gy):
        return 3 * gy


def written_into(x):
    y = torch.zeros(4, dtype=x.dtype)
    y[1] = x[0] * x[1]
    return y


def overwritten_view(x):
    h = x @ W
    part = h[:2]
    part.mul_(x[:2])
    return h


def overwritten_below_a_view(x):
    h = x @ W
    pairs = h.unfold(0, 2, 1)
    h.mul_(2)
    return pairs.flatten()


def overwritten_below_a_reshape(x):
    h = x @ W
    matrix = h.reshape(2, 2)
    h.sin_()
    return matrix.flatten()


def overwritten_below_itself(x):
    h = x @ W
    same = F.dropout(h, 0.5, training=False)
    h.mul_(x)
    return same


def without_grad(x):
    with torch.no_grad():
        scale = x.square().sum()
    return scale * x


def branches(x):
    return x.sin() if x.sum() > 0 else x.cos()


FUNCTIONS = [
    (lambda x: W @ x, ["Dense"]),
    (lambda x: x @ W + 1, ["Dense"]),
    (lambda x: 2 * x - x / 4, ["Scaled", "Identity"]),
    (lambda x: 1 - x, ["Scaled", "Identity"]),
    (lambda x: x - x, ["Scaled", "Identity"]),
    (lambda x: 1 / (2 + x * x).exp() ** 2, ["Diagonal"]),
    (lambda x: x.sigmoid() * x, ["Diagonal"]),
    (lambda x: torch.where(x > 0, x, 0.1 * x), ["Diagonal"]),
    (lambda x: torch.rsub(x, W[0], alpha=2), ["Diagonal"]),
    (lambda x: x[:, None] * W, ["Chain", "MatrixFree", "Permutation"]),
    (lambda x: x.flip(0), ["Permutation"]),
    (lambda x: x.flip(0).reshape(2, 2).T.T.reshape(4).flip(0), ["Identity"]),
    (lambda x: x.chunk(2)[1], ["Selection"]),
    (lambda x: x[torch.tensor([0, 0, 3])], ["Selection"]),
    (lambda x: torch.cat([x[2:], x[:2]]), ["Sum"]),
    (lambda x: torch.cat([x, W[0], x.sin()]), ["Sum"]),
    (lambda x: torch.cat([x, x]), ["Sum"]),
    (lambda x: x.detach() * x, ["Diagonal"]),
    (lambda x: x * x.shape[0] + len(x), ["Scaled", "Identity"]),
    (lambda x: torch.ones(3, dtype=x.dtype), ["Zero"]),
    (lambda x: x.detach().sin(), ["Zero"]),
    (lambda x: x.sum(), ["MatrixFree"]),
    (lambda x: x.sort().values[:3], ["Chain", "Selection", "MatrixFree"]),
    (lambda x: torch.einsum("i,j->ij", x.sin(), x.cos()), ["Joined"]),
    (lambda x: J.geglu(x, x.cos()) + J.dropout_add(x, x, 0.0), ["Diagonal"]),
    (lambda x: J.linear_act_dropout(x, W, W[0], "silu", residual=x), ["Sum"]),
    (lambda x: F.linear(W, x), ["MatrixFree"]),
    (lambda x: F.layer_norm(W, (4,), x), ["MatrixFree"]),
    (lambda x: Straight.apply(2 * x), ["MatrixFree"]),
    (written_into, ["MatrixFree"]),
    (overwritten_view, ["MatrixFree"]),
    (overwritten_below_a_view, ["MatrixFree"]),
    (overwritten_below_a_reshape, ["MatrixFree"]),
    (overwritten_below_itself, ["MatrixFree"]),
    (without_grad, ["MatrixFree"]),
    (branches, ["Diagonal"]),
]


@pytest.mark.parametrize("f, tree", FUNCTIONS)
def test_functions(f, tree):
    x = torch.randn(4)
    operator = jacobian(f, x)
    assert kinds(operator)[: len(tree)] == tree, operator.structure
    A = expected(f, x)
    close(operator.dense(), A)
    u = torch.randn(4)
    close((operator @ u).flatten(), A @ u)
    close((torch.ones(operator.out_shape) @ operator).flatten(), A.sum(0))


def test_norms_of_a_sum():
    x = torch.randn(4)
    for f, g, reference in (
        (J.add_layer_norm, F.layer_norm, (W[0], W[1], 0.1)),
        (J.add_rms_norm, F.rms_norm, (W[0], 0.1)),
    ):
        operator = jacobian(lambda x, f=f, rest=reference: f(x.sin(), x, (4,), *rest)[0], x)
        assert kinds(operator) == ["DiagonalPlusLowRank"]
        total = x.sin() + x
        A = expected(lambda t, g=g, rest=reference: g(t, (4,), *rest), total)
        close(operator.dense(), A * (1 + x.cos()))
        close(jacobian(lambda x, f=f: f(x.sin(), x, (4,))[1], x).diagonal(), 1 + x.cos())


BATCHED = [
    (nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3), nn.Softmax(-1)), (5, 4), 1),
    (nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)), (2, 3, 4), 2),
    (Residual(4), (5, 3, 4), 1),
    (nn.Sequential(Attention(4), Residual(4)), (3, 3, 4), 1),
    (nn.Sequential(nn.Conv2d(2, 3, 2), nn.GroupNorm(3, 3), nn.Flatten()), (3, 2, 3, 3), 1),
    (nn.BatchNorm1d(4).eval(), (5, 4), 1),
    (lambda x: x.mT.flip(-1).softmax(-2), (5, 3, 2), 1),
    (lambda x: torch.cat([x.cumsum(-1), x[:, 1:]], -1), (5, 4), 1),
    (lambda x: x.transpose(0, 1).sin().cumsum(-1).transpose(0, 1), (3, 3, 2), 1),
    (lambda x: x.square().sum(-1), (5, 4), 1),
    (torch.tanh, (2, 3), 2),
    (nn.Linear(4, 3), (1, 4), 1),
]


@pytest.mark.parametrize("f, shape, dims", BATCHED)
def test_a_jacobian_each_sample(f, shape, dims):
    f = randomized(f) if isinstance(f, nn.Module) else f
    x = torch.randn(shape)
    operator = jacobian(f, x, batch_dims=dims)
    assert operator.batch_shape == shape[:dims]
    flat, one = x.flatten(0, dims - 1), (1,) * dims
    each = [expected(f, sample.reshape(*one, *shape[dims:])) for sample in flat]
    close(operator.dense(), torch.stack(each).reshape(operator.shape))


@pytest.mark.parametrize("replaced", [False, True], ids=["native", "replaced"])
def test_attention(replaced):
    """Torch's fused attention has no JVP: its Jacobian is that of the unfused one."""
    model, x, u = Attention(4), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    A = expected(model, x)
    if replaced:
        jacobian_ops.replace(model)
    operator = jacobian(model, x)
    assert kinds(operator)[:2] == ["Sum", "Identity"]
    close((operator @ u).flatten(), A @ u.flatten())
    close((u @ operator).flatten(), u.flatten() @ A)
    close(operator.dense(), A)


def test_evaluated_once():
    """One evaluation whatever is asked: hooks, statistics and dropout masks are those of one."""
    calls = []
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    model[0].register_forward_hook(lambda *_: calls.append(1))
    operator = jacobian(model, torch.randn(5, 4))
    A = operator.dense()
    u = torch.randn(5, 4)
    for _ in range(2):
        close((operator @ u).flatten(), A @ u.flatten())
    assert calls == [1] and model[1].num_batches_tracked == 1
    masked = jacobian(lambda x: F.dropout(x, 0.5), torch.ones(64))
    close(masked.diagonal().unique(), torch.tensor([0.0, 2.0]))
    close(masked.dense(), masked.dense())


@pytest.mark.parametrize("dropout", [J.dropout, F.dropout])
def test_matrix_free_dropout_has_one_mask(dropout):
    operator = jacobian(lambda x: dropout(torch.logcumsumexp(x, 0), 0.5).cumsum(0), torch.ones(8))
    u, v = torch.randn(8), torch.randn(8)
    close(v @ (operator @ u), (v @ operator) @ u)
    A = operator.dense()
    close(operator @ u, A @ u)


def test_derivatives_of_products():
    """By x and by parameters, for operators with a structure and without one."""
    x, u, v = torch.randn(3, 4)
    model = nn.Sequential(Residual(4), nn.Softmax(-1))
    inputs = [x.requires_grad_(), *model.parameters()]

    def gradients(value):
        return torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)

    for f in (model, lambda x: torch.einsum("i,j->i", model(x), x.exp())):
        operator = jacobian(f, x)
        with torch.no_grad():  # which does not take the graph from later products
            operator @ u
        A = torch.func.jacrev(f)(x)
        close(gradients((operator @ u).sin().sum()), gradients((A @ u).sin().sum()))
        close(gradients((v @ operator).sin().sum()), gradients((v @ A).sin().sum()))
        close(gradients(operator.dense().sin().sum()), gradients(A.sin().sum()))


def test_without_grad_there_is_no_graph():
    x = torch.randn(4)
    with torch.no_grad():
        operator = jacobian(nn.Sequential(Residual(4), nn.Softmax(-1)), x)
    assert "Sum" in kinds(operator)
    assert not (operator @ x).requires_grad and not operator.dense().requires_grad


def test_inside_transforms():
    x = torch.randn(3, 4)

    def logdet(x):
        return jacobian(lambda x: torch.tanh(W @ x) + x, x).slogdet().logabsdet

    def reference(x):
        return torch.linalg.slogdet(torch.func.jacrev(lambda x: torch.tanh(W @ x) + x)(x))[1]

    close(torch.func.vmap(logdet)(x), torch.func.vmap(reference)(x))
    close(torch.func.grad(logdet)(x[0]), torch.func.grad(reference)(x[0]))
    close(torch.func.jacfwd(logdet)(x[0]), torch.func.jacfwd(reference)(x[0]))


def test_depth_alone_is_no_reason():
    """A long chain of residual blocks keeps its structure."""
    model, x = nn.Sequential(*(Residual(4) for _ in range(40))), torch.randn(4)
    operator = jacobian(model, x)
    assert len(operator.factors) == 40 and kinds(operator).count("Identity") == 40
    close(operator.dense(), torch.func.jacrev(model)(x))


def test_many_branches_are_left_to_autograd():
    """Where paths multiply with depth, products cost no more than those of the function."""

    def f(x):
        a, b = x.chunk(2)
        for _ in range(30):
            a, b = a + b.sin(), b + a.cos()
        return torch.cat([a, b])

    x = torch.randn(4) / 8
    operator = jacobian(f, x)
    assert kinds(operator) == ["MatrixFree"]
    close(operator.dense(), torch.func.jacrev(f)(x))


ERRORS = [
    (lambda: jacobian(3, torch.ones(2)), TypeError, "f must be callable, got int"),
    (lambda: jacobian(abs, [1.0]), TypeError, "x must be a Tensor, got list"),
    (lambda: jacobian(abs, torch.arange(3)), TypeError, "x has dtype torch.int64; allowed: float"),
    (lambda: jacobian(abs, torch.ones(2) * 1j), TypeError, "x has dtype torch.complex128"),
    (
        lambda: jacobian(abs, torch.ones(2), batch_dims=2),
        ValueError,
        r"batch_dims is 2 and x has shape \[2\]; allowed: 0 to 1",
    ),
    (lambda: jacobian(torch.argmax, torch.ones(2)), TypeError, r"f\(x\) has dtype torch.int64"),
    (lambda: jacobian(torch.Tensor.float, torch.ones(2)), TypeError, "has dtype torch.float32"),
    (lambda: jacobian(lambda x: (x, x), torch.ones(2)), TypeError, "must be a Tensor, got tuple"),
    (lambda: jacobian(torch.Tensor.relu_, torch.ones(2)), ValueError, "changes its input in place"),
    (
        lambda: jacobian(nn.ReLU(inplace=True), torch.ones(2)),
        ValueError,
        "changes its input in place",
    ),
    (
        lambda: jacobian(lambda x: x.view(-1).mul_(2), torch.ones(2, 2)),
        ValueError,
        "changes its input in place",
    ),
    (
        lambda: jacobian(lambda x: x.cumsum(0), torch.ones(2, 3), batch_dims=1),
        ValueError,
        r"mixes the samples of the batch \[2\]; allowed: functions that map each by itself",
    ),
    (
        lambda: jacobian(nn.BatchNorm1d(3), torch.ones(2, 3), batch_dims=1),
        ValueError,
        r"batch_norm in training mixes the samples of the batch \[2\]",
    ),
    (
        lambda: jacobian(lambda x: x.sum(0), torch.ones(2, 3), batch_dims=1),
        ValueError,
        r"f\(x\) has shape \[3\]; allowed: the batch \[2\] of x first",
    ),
    (lambda: jacobian(nn.Linear(3, 2), torch.ones(4)), RuntimeError, "cannot be multiplied"),
    (
        lambda: jacobian(lambda x: torch.from_numpy(x.numpy()), torch.ones(2)),
        RuntimeError,
        "numpy",
    ),
]


@pytest.mark.parametrize("call, error, match", ERRORS)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_no_derivative():
    """What has no VJP says so, with the name of the op."""

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gy):
            raise RuntimeError("no backward here")

    operator = jacobian(lambda x: Opaque.apply(x), torch.ones(2))
    with pytest.raises(RuntimeError, match="<lambda> cannot be differentiated: no backward here"):
        operator.dense()


def test_the_input_is_left_alone():
    x = torch.randn(3, requires_grad=True)
    before = x.detach().clone()
    with pytest.raises(ValueError, match="in place"):
        jacobian(lambda x: x.relu_().mul_(0), x)
    close(x.detach(), before)


def test_package_and_function():
    assert jacobian(torch.sin, torch.zeros(2)).trace() == 2
    assert callable(jacobian.hvp) and jacobian.jacobian is type(jacobian).__call__
    assert set(jacobian.__all__) <= set(dir(jacobian))
