"""What opaque kernels get wrong in silence, autocast, subclasses and modes."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, jvp, stack_module_state, vmap

import jacobian_ops
import jacobian_ops.functional as J
import jacobian_ops.nn as jnn

from .cases import CASES, POINTWISE

close = torch.testing.assert_close


@pytest.mark.parametrize("case", CASES, ids=str)
def test_create_graph_is_not_dropped(case):
    """A kernel called straight from backward() loses the second order without a word."""
    xs = case.inputs(requires_grad=True)

    def second(f):
        first = torch.autograd.grad((f(*xs).sin() * 2).sum(), xs, create_graph=True)
        assert all(g.requires_grad for g in first)
        return torch.autograd.grad(sum((g**2).sum() for g in first), xs)

    close(second(case.ours), second(case.primitive), atol=1e-9, rtol=1e-7)


def test_short_way_backward_inside_forward_ad():
    """The node was made in the plain state, its backward runs with a dual cotangent."""
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = J.gelu(x)
    with torch.autograd.forward_ad.dual_level():
        v = torch.autograd.forward_ad.make_dual(torch.randn_like(y), torch.ones_like(y))
        (gx,) = torch.autograd.grad(y, x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(gx).tangent
    close(tangent, torch.func.grad(lambda z: J.gelu(z).sum())(x.detach()))


def test_saved_tensor_overwritten_raises():
    for f in (J.gelu, J.relu, lambda z: J.softmax(z, 0)):
        x = torch.randn(5, requires_grad=True)
        z = x * 1
        y = f(z)
        (y if f is not J.gelu else z).data.add_(0)  # .data does not count as a change
        (y if f is not J.gelu else z).detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_backward_twice_raises():
    x = torch.randn(5, requires_grad=True)
    y = J.softmax(x, 0).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


INPLACE = ["relu", "leaky_relu", "elu", "selu", "celu", "relu6", "hardtanh", "silu", "mish"]
INPLACE += ["hardswish", "hardsigmoid"]


@pytest.mark.parametrize("name", INPLACE)
def test_inplace(name):
    ours, native = getattr(J, name), getattr(F, name)
    plain = torch.randn(3, 4)
    want = native(plain)
    assert ours(plain, inplace=True) is plain
    close(plain, want)
    for view in (lambda z: z, lambda z: z.T, lambda z: z[1:], lambda z: z[:, ::2]):
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

        def run(f, x=x, view=view):
            z = x * 2
            part = view(z)
            assert f(part, inplace=True) is part
            return z, torch.autograd.grad(z.sin().sum(), x)[0]

        close(run(ours), run(native), rtol=1e-6, atol=1e-7)


def test_inplace_dropout():
    x = torch.randn(40, 8, requires_grad=True)
    z = x * 1
    y = J.dropout(z, 0.5, inplace=True)
    assert y is z
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


def test_inplace_under_transforms():
    x, t = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for name in ("relu", "silu"):
        f = getattr(J, name)
        got = jvp(lambda z, f=f: f(z * 2, inplace=True), (x,), (t,))
        close(got, jvp(lambda z, f=f: f(z * 2), (x,), (t,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Dtypes as of native ops on the device; gradients keep theirs."""
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((6, 4), (5, 4), (5,)))
    with torch.autocast(torch.get_default_device().type, dtype):
        for ours, native in (
            (J.linear(x, w, b), F.linear(x, w, b)),
            (J.linear_act_dropout(x, w, b, "relu"), F.relu(F.linear(x, w, b))),
            (J.softmax(x, -1), F.softmax(x, -1)),
            (J.gelu(x), F.gelu(x)),
        ):
            assert ours.dtype == native.dtype
            close(ours, native)
        y = J.linear(x, w, b)
        # Rules run with autocast off, or a matmul in one would come out in bfloat16.
        g = torch.autograd.grad(y.float().sum(), (x, w, b), create_graph=True)
    assert [t.dtype for t in g] == [torch.float32] * 3
    double = torch.randn(3, 4, dtype=torch.float64)
    with torch.autocast(torch.get_default_device().type, dtype):
        f = torch.func.grad(
            lambda z: torch.func.grad(lambda u: J.softmax(u, -1).sin().sum())(z).sum()
        )
        close(f(double), f(double.clone()))
        assert f(double).dtype == torch.float64


class Logged(torch.Tensor):
    calls: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_torch_function_gets_the_call_first():
    x = torch.randn(4, 4).as_subclass(Logged)
    calls = {
        J.relu: lambda: J.relu(x),
        J.softmax: lambda: J.softmax(x, 0),
        J.dropout: lambda: J.dropout(x, 0.5),
        J.dropout_add: lambda: J.dropout_add(x, x, 0.5),
        J.softmax_dropout: lambda: J.softmax_dropout(x, -1, 0.5),
        J.linear: lambda: J.linear(x, x),
        J.linear_act_dropout: lambda: J.linear_act_dropout(x, x),
        J.gelu: lambda: J.gelu(x),
        J.layer_norm: lambda: J.layer_norm(x, (4,)),
        J.group_norm: lambda: J.group_norm(x, 2),
        J.batch_norm: lambda: J.batch_norm(x, None, None, training=True),
        J.swiglu: lambda: J.swiglu(x, x),
        J.rotary_embedding: lambda: J.rotary_embedding(x, *torch.ones(2, 4, 2)),
        J.cross_entropy: lambda: J.cross_entropy(x, torch.arange(4)),
        J.linear_cross_entropy: lambda: J.linear_cross_entropy(x, x, torch.arange(4)),
        J.scaled_dot_product_attention: lambda: J.scaled_dot_product_attention(
            x, x, x, torch.eye(4).bool(), scale=0.0
        ),
    }
    for f, call in calls.items():
        Logged.calls.clear()
        assert isinstance(call(), Logged)
        assert Logged.calls[0] is f


def test_function_modes():
    with torch.device(torch.get_default_device()):
        assert J.relu(torch.ones(3)).sum() == 3
        assert J.linear(torch.ones(3, 3), torch.ones(3, 3)).sum() == 27
        q, hidden = torch.ones(2, 3), torch.tensor([[False]])
        assert J.scaled_dot_product_attention(q, q, q, hidden).sum() == 0
        assert J.scaled_dot_product_attention(q, q, q, torch.eye(2).bool()).sum() == 6


def test_inference_mode_and_inference_tensors():
    x = torch.randn(3, 4)
    with torch.inference_mode():
        y = J.softmax(J.gelu(x), -1)
        assert y.is_inference()
    close(J.relu(y), y)


def test_parameters_and_deepcopy():
    net = torch.nn.Sequential(jnn.Linear(4, 8), jnn.GELU(), jnn.LinearActDropout(8, 3, p=0.1))
    twin = copy.deepcopy(net).eval()
    net.eval()
    x = torch.randn(5, 4)
    assert torch.equal(net(x), twin(x))


def test_meta_tensors():
    x, w = torch.randn(3, 4, device="meta"), torch.randn(5, 4, device="meta")
    assert J.softmax(J.gelu(x), -1).shape == (3, 4)
    assert J.linear(x, w).shape == (3, 5)
    assert J.linear_act_dropout(x, w, None, "relu", 0.5).shape == (3, 5)
    y, ty = jvp(lambda z: J.softmax(z, -1), (x,), (x,))
    assert ty.is_meta


def test_fake_tensors_have_the_real_strides(ours):
    from torch._subclasses import FakeTensorMode

    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for case in POINTWISE:
        with FakeTensorMode() as mode:
            fake = case.ours(mode.from_tensor(x))
        assert fake.stride() == case.ours(x).stride()


def test_ensemble():
    """vmap over parameters: model ensembling through stack_module_state."""
    nets = [torch.nn.Sequential(jnn.Linear(4, 8), jnn.SiLU(), jnn.Linear(8, 3)) for _ in range(3)]
    params, buffers = stack_module_state(nets)
    x = torch.randn(5, 4)
    got = vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(params, buffers)
    close(got, torch.stack([net(x) for net in nets]))


def test_hooks_and_accumulation():
    x = torch.randn(4, requires_grad=True)
    seen = []
    y = J.gelu(x)
    y.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    y.sum().backward()
    want = torch.autograd.grad(F.gelu(x).sum(), x)[0]
    close(x.grad, 2 * want)
    assert len(seen) == 1


def test_channels_last_training():
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = J.silu(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert g.is_contiguous(memory_format=torch.channels_last)


def test_native_below(monkeypatch):
    """Tiny plain calls take the native op; transforms and larger ones are ours."""
    monkeypatch.setattr(J, "NATIVE_BELOW", 100)
    small = torch.randn(9, requires_grad=True)
    for f, crossing in ((J.tanh, 100), (J.gelu, 400), (J.relu, 12800)):
        below, above = (torch.randn(n, requires_grad=True) for n in (crossing - 1, crossing))
        assert type(f(below).grad_fn).__name__ != "ActivationBackward"
        assert type(f(above).grad_fn).__name__ == "ActivationBackward"
    y, ty = jvp(J.silu, (small.detach(),), (small.detach(),))
    close(ty, torch.func.jvp(F.silu, (small.detach(),), (small.detach(),))[1])
    with torch.autograd.forward_ad.dual_level():  # the native op raises here
        z = torch.autograd.forward_ad.make_dual(small, torch.ones(9))
        torch.autograd.forward_ad.unpack_dual(J.silu(z)).tangent.sum().backward()


@pytest.mark.parametrize("grad", [False, True])
def test_jit_trace_records_the_ops(grad):
    """A trace follows the dispatcher: a kernel called past it would leave uninitialised memory."""
    model = jacobian_ops.replace(
        torch.nn.Sequential(
            *(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 32), torch.nn.ReLU()),
            torch.nn.Softmax(-1),
        )
    )
    x = torch.randn(5, 8)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(model, torch.randn(5, 8))
        torch.testing.assert_close(traced(x), model(x))


def test_nested_and_sparse_tensors_go_to_the_native_op():
    rows = [torch.randn(n, 4) for n in (2, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested and CSR tensors are prototypes
        nested, w = torch.nested.nested_tensor(rows), torch.randn(5, 4)
        for y, x in zip(J.gelu(nested).unbind(), rows, strict=True):
            torch.testing.assert_close(y, F.gelu(x))
        for y, x in zip(J.softmax(nested, -1).unbind(), rows, strict=True):
            torch.testing.assert_close(y, F.softmax(x, -1))
        for y, x in zip(J.linear(nested, w).unbind(), rows, strict=True):
            torch.testing.assert_close(y, F.linear(x, w))
        torch.testing.assert_close(J.linear(rows[0], w.to_sparse_csr()), F.linear(rows[0], w))


def test_pre_dispatch_trace_records_the_ops():
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(2, 3)
    graph = make_fx(lambda z: J.softmax(J.linear(z, z), -1), pre_dispatch=True)(x)
    close(graph(x), J.softmax(J.linear(x, x), -1))


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "relu6", "hardtanh", "silu", "gelu"])
def test_result_or_input_may_be_overwritten_where_native_allows(ours, name):
    """A program that overwrites x, or y, after the op runs as it does natively."""

    def runs(f, which):
        z = torch.randn(5, requires_grad=True)
        x = z * 1
        y = f(x)
        (y if which == "y" else x).add_(1)
        try:
            y.sum().backward()
        except RuntimeError as e:
            assert "modified by an inplace operation" in str(e)
            return False
        return True

    for which in ("x", "y"):
        assert runs(getattr(J, name), which) == runs(getattr(F, name), which)


def test_residual_added_in_place_after_a_fused_block():
    block = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.ReLU(), torch.nn.Dropout(0.5))
    x = torch.randn(4, 5)
    y = jacobian_ops.replace(block)(x)
    y += x
    y.sum().backward()
    assert block[0].weight.grad.isfinite().all()


def test_weight_of_a_first_layer_may_be_updated_before_backward():
    x, w = torch.randn(4, 5), torch.randn(3, 5, requires_grad=True)
    y = J.linear(x, w)
    with torch.no_grad():
        w.sub_(0.1)
    y.sum().backward()
    close(w.grad, x.sum(0).expand(3, 5))


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "relu6", "hardtanh", "silu"])
def test_inplace_in_reverse_over_forward(name):
    """The input's tangent is overwritten with the input."""
    x = torch.randn(4, 5)

    def second(f):
        def loss(z):
            y, ty = jvp(lambda a: f(a * 2, inplace=True), (z,), (x,))
            return (y * ty).sin().sum()

        return torch.func.grad(loss)(x)

    close(second(getattr(J, name)), second(lambda a, inplace: getattr(J, name)(a)))


def test_dual_cotangent_of_a_tiny_op(monkeypatch):
    """A backward of a native op may have no forward mode: it must not stand in for ours."""
    monkeypatch.setattr(J, "NATIVE_BELOW", 32768)
    forward_ad = torch.autograd.forward_ad
    for case in CASES:
        xs = case.inputs(requires_grad=True)
        y = case.ours(*xs)
        with forward_ad.dual_level():
            gy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
            for g in torch.autograd.grad(y, xs, gy):
                assert forward_ad.unpack_dual(g).tangent is not None
