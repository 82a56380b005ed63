"""Bytes saved for backward, counted by autograd's own hooks."""

import pytest
import torch

import jacobian_ops.functional as J

from .cases import POINTWISE, SOFTMAX

N = 64 * 32 * 4  # bytes of one float32 tensor below


def saved(f, *args):
    """Bytes of the distinct storages that the graph of f(*args) keeps."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f(*args)
    return sum(kept.values()), kept, y


pytestmark = pytest.mark.usefixtures("ours")


@pytest.mark.parametrize("case", POINTWISE + SOFTMAX, ids=str)
def test_one_tensor(case):
    shape = (64, 32) if len(case.shapes[0]) == 2 else (8, 8, 32)
    x = torch.randn(shape, requires_grad=True)
    total, kept, y = saved(case.ours, x)
    assert total == N
    if case.name in ("relu", "sigmoid", "tanh"):
        assert y.data_ptr() in kept  # the result, which the next layer keeps anyway
    if case.name.startswith(("softmax", "log_softmax", "softmin")):
        assert y.data_ptr() in kept


def test_dropout_keeps_a_seed():
    x, r = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32)
    assert saved(lambda z: J.dropout(z, 0.5), x)[0] == 8
    assert saved(lambda z: J.dropout_add(z, r, 0.5), x)[0] == 8


def test_softmax_dropout_keeps_its_input_and_a_seed():
    x = torch.randn(64, 32, requires_grad=True)
    total, kept, _ = saved(lambda z: J.softmax_dropout(z, -1, 0.5), x)
    assert total == N + 8 and x.data_ptr() in kept


def test_linear_keeps_input_and_weight():
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((64, 16), (32, 16), (32,)))
    total, kept, _ = saved(J.linear, x, w, b)
    assert kept.keys() == {x.data_ptr(), w.data_ptr()}
    assert total == (64 + 32) * 16 * 4


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh"])
def test_linear_act_dropout_keeps_one_intermediate(name, p):
    """z, or the result where that is enough: never f(z), never a mask."""
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((64, 16), (32, 16), (32,)))
    total, kept, y = saved(lambda *a: J.linear_act_dropout(*a, name, p), x, w, b)
    assert total == (64 + 32) * 16 * 4 + N + (8 if p else 0)
    assert (y.data_ptr() in kept) == (name in ("relu", "tanh") and p == 0)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_linear_keeps_what_its_gradients_need(needs):
    """A frozen weight, as in LoRA, keeps no input; a first layer keeps no weight."""
    x, w, b = (
        torch.randn(s, requires_grad=bool(n))
        for s, n in zip(((64, 16), (32, 16), (32,)), needs, strict=True)
    )
    wanted = {w.data_ptr()} if needs[0] else {x.data_ptr()} if needs[1] else set()
    assert saved(J.linear, x, w, b)[1].keys() == wanted
    for name in ("gelu", "relu", "identity"):
        kept = saved(lambda *a: J.linear_act_dropout(*a, name), x, w, b)[1].keys()  # noqa: B023
        assert kept & {x.data_ptr(), w.data_ptr()} == wanted


def test_a_residual_alone_keeps_nothing():
    x, w, r = torch.randn(64, 16), torch.randn(32, 16), torch.randn(64, 32, requires_grad=True)
    total, _, y = saved(lambda r: J.linear_act_dropout(x, w, None, "gelu", residual=r), r)
    assert total == 0
    assert torch.equal(*torch.autograd.grad(y.sum(), r), torch.ones(64, 32))


def test_nothing_kept_without_grad():
    x, w = torch.randn(64, 16), torch.randn(32, 16)
    assert saved(lambda: J.linear_act_dropout(x, w, None, "gelu", 0.5))[0] == 0
    with torch.no_grad():
        assert saved(J.gelu, torch.randn(3, requires_grad=True))[0] == 0


def test_inplace_keeps_only_the_result():
    x = torch.randn(64, 32, requires_grad=True) * 1
    total, kept, y = saved(lambda z: J.relu(z, inplace=True), x)
    assert y is x and kept == {x.data_ptr(): N}
