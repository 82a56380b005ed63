"""jacobian_ops.checkpoint: the same derivatives for less memory."""

import copy
import gc
import pickle

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

import jacobian_ops
from bench.checkpoint import memory
from jacobian_ops.checkpointing import CheckpointedSequential

close = torch.testing.assert_close
POLICIES = ["sqrt", "all", "none", 1, 3, 100]


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)  # so small tensors gain nothing from more


def model(depth=9, width=16, p=0.3):
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(p)) for _ in range(depth))
    )


def flat(depth=4, width=16):
    """Linear, activation and dropout in one row, which replace makes one op of."""
    return nn.Sequential(*(layer for block in model(depth, width) for layer in block))


def gradients(m, x, seed=0):
    torch.manual_seed(seed)
    y = m(x)
    return y, torch.autograd.grad(y.square().sum(), [x, *m.parameters()])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", [model, flat])
@pytest.mark.parametrize("replaced", [False, True])
def test_same_gradients(policy, make, replaced):
    """With dropout: its masks are drawn again as they were."""
    m, x = make(), torch.randn(5, 16, requires_grad=True)
    if replaced:
        jacobian_ops.replace(m)
    expected = gradients(m, x)
    keys = list(m.state_dict())
    assert jacobian_ops.checkpoint(m, policy) is m and list(m.state_dict()) == keys
    given = gradients(m, x)
    exact = {} if replaced and make is flat else dict(rtol=0, atol=0)  # segments cut what is fused
    close(given, expected, **exact)
    assert not torch.equal(given[0], gradients(m, x, 1)[0])
    after = torch.rand(1)
    gradients(jacobian_ops.checkpoint(m, "none"), x, 1)
    assert torch.equal(after, torch.rand(1))  # recomputing leaves the generator where it was


def test_second_order():
    m, x = model(p=0), torch.randn(3, 16, requires_grad=True)

    def second():
        (g,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *m.parameters()], materialize_grads=True)

    expected = second()
    jacobian_ops.checkpoint(m)
    close(second(), expected)


def test_forward_mode_and_transforms():
    m, x, t = model(p=0), torch.randn(2, 3, 16).unbind(), None
    x, t = x

    def dual():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(m(forward_ad.make_dual(x, t))).tangent

    def trained_tangent():
        ty = torch.func.jvp(m, (x,), (t,))[1]
        return torch.autograd.grad(ty.square().sum(), list(m.parameters()), allow_unused=True)

    runs = (
        dual,
        trained_tangent,
        lambda: torch.func.grad(lambda x: m(x).sum())(x),
        lambda: torch.func.jvp(torch.func.grad(lambda x: m(x).sum()), (x,), (t,))[1],
        lambda: torch.func.vmap(torch.func.jacrev(m))(x),
    )
    expected = [run() for run in runs]
    jacobian_ops.checkpoint(m)
    close([run() for run in runs], expected)


@pytest.mark.cpu_only
def test_memory():
    """The segments' inputs and the last segment's tensors, and one segment more in backward."""
    x = torch.randn(2048, 16, requires_grad=True)
    m = nn.Sequential(*(jacobian_ops.nn.LinearActDropout(16, 16, p=0.1) for _ in range(16)))
    for policy, kept, peak in (
        ("none", 2 * 16, 2 * 16),
        ("sqrt", 4 + (2 * 4 - 1), 4 + 2 * 4),
        ("all", 1, 2 * 16),
        (8, 8 + (2 * 2 - 1), 8 + 2 * 2),
    ):
        gc.disable()  # memory is free at once, not at the next collection
        try:
            measured = memory(jacobian_ops.checkpoint(m, policy), x)
        finally:
            gc.enable()
        slack = 2.5 * x.nbytes + 16 * 5200  # what a layer's backward makes; generator states
        assert abs(measured[0] - kept * x.nbytes) < x.nbytes + 16 * 5200, policy
        assert 0 <= measured[1] - (peak - 1) * x.nbytes < x.nbytes + slack, policy


def test_in_place_and_back():
    m = flat()
    jacobian_ops.replace(m)
    fused = type(m)
    jacobian_ops.checkpoint(m, 2)
    assert isinstance(m, CheckpointedSequential) and [len(s) for s in m.segments()] == [6, 6]
    again = jacobian_ops.checkpoint(m, "all")
    assert again is m and [len(s) for s in m.segments()] == [12]
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), m):
        assert other.policy == "all"
        assert type(jacobian_ops.checkpoint(other, "none")) is fused
        assert type(jacobian_ops.restore(other)) is nn.Sequential
        assert not hasattr(other, "policy")
    assert [len(s) for s in jacobian_ops.checkpoint(model(10)).segments()] == [3, 4, 3]
    empty = jacobian_ops.checkpoint(nn.Sequential())
    assert empty.segments() == [] and empty(1) == 1


def test_hooks_of_layers_run():
    m, seen = model(4, p=0), []
    m[2].register_forward_hook(lambda *_: seen.append("again"))
    jacobian_ops.checkpoint(m, "all")
    m(torch.randn(3, 16, requires_grad=True)).sum().backward()
    assert seen == ["again", "again"]


class Own(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x


@pytest.mark.parametrize(
    "module,policy,error,words",
    [
        (nn.Linear(2, 2), "sqrt", TypeError, "without a forward of its own, got Linear"),
        (Own(), "sqrt", TypeError, "model is a Own"),
        (nn.Sequential(), "half", ValueError, "policy is 'half'; allowed: 'sqrt', 'all', 'none'"),
        (nn.Sequential(), 0, ValueError, "policy is 0"),
        (nn.Sequential(), True, ValueError, "policy is True"),
        (nn.Sequential(), 2.0, ValueError, "policy is 2.0"),
    ],
)
def test_errors(module, policy, error, words):
    before = type(module)
    with pytest.raises(error, match=f"checkpoint: .*{words}"):
        jacobian_ops.checkpoint(module, policy)
    assert type(module) is before
