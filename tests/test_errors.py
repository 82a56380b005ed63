"""Bad input: torch's exception, with a text that names op, argument, what is allowed, what came."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jacobian_ops.functional as J
import jacobian_ops.nn as jnn
from jacobian_ops import kernels

from .cases import POINTWISE

X = torch.randn(3, 4)
W = torch.randn(5, 4)


def raises(exception, match, f):
    with pytest.raises(exception, match=match):
        f()


NAMES = sorted({c.name.split("-")[0] for c in POINTWISE})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_do_what_torch_does(name, dtype):
    """relu of integers is a fine op; gelu of integers is not."""
    x = torch.ones(4).to(dtype)
    native = getattr(F, name)
    try:
        want = native(x)
    except (RuntimeError, TypeError) as e:
        with pytest.raises(
            type(e), match=f"{name}: input has dtype .*allowed: .*float32"
        ) as caught:
            getattr(J, name)(x)
        assert type(caught.value) is type(e)
    else:
        got = getattr(J, name)(x)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin"])
def test_softmax_errors(name):
    f = getattr(J, name)
    raises(IndexError, rf"{name}: dim is 2; .*\[-2, 1\], but got 2", lambda: f(X, 2))
    raises(IndexError, r"Dimension out of range", lambda: f(X, -3))
    raises(IndexError, r"\[-1, 0\]", lambda: f(torch.tensor(1.0), 1))
    raises(NotImplementedError, f"{name}: input has dtype int64", lambda: f(torch.arange(3), 0))
    raises(TypeError, "must be Tensor, not list", lambda: f([1.0], 0))
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        f(X)
    y = f(torch.arange(3), 0, dtype=torch.float32)
    torch.testing.assert_close(y, f(torch.arange(3.0), 0))


@pytest.mark.parametrize("name", NAMES)
def test_not_a_tensor(name):
    raises(TypeError, rf"{name}\(\): argument 'input'", lambda: getattr(J, name)([1.0]))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_p(p):
    text = "p, the dropout probability, has to be between 0 and 1, but got"
    for name, call in {
        "dropout": lambda: J.dropout(X, p),
        "dropout_add": lambda: J.dropout_add(X, X, p),
        "softmax_dropout": lambda: J.softmax_dropout(X, -1, p),
        "linear_act_dropout": lambda: J.linear_act_dropout(X, W, p=p),
        "LinearActDropout": lambda: jnn.LinearActDropout(4, 5, p=p),
        "SoftmaxDropout": lambda: jnn.SoftmaxDropout(p=p),
        "DropoutAdd": lambda: jnn.DropoutAdd(p),
    }.items():
        raises(ValueError, f"^{name}: {text}", call)
    raises(ValueError, text, lambda: kernels.dropout(X, p, 1))


def test_activation_parameters():
    raises(ValueError, "min_val cannot be greater than max_val", lambda: J.hardtanh(X, 2, 1))
    raises(RuntimeError, "approximate argument must be", lambda: J.gelu(X, approximate="fast"))
    raises(RuntimeError, "ZeroDivisionError: alpha", lambda: J.celu(X, 0.0))
    unknown = "linear_act_dropout: unknown activation 'swish'; allowed: .*gelu.*silu"
    raises(ValueError, unknown, lambda: J.linear_act_dropout(X, W, activation="swish"))
    raises(ValueError, "unknown activation", lambda: jnn.LinearActDropout(4, 5, activation="swish"))
    unknown = "activation_vjp: unknown activation 'swish'"
    raises(ValueError, unknown, lambda: kernels.activation_vjp(X, X, "swish"))
    raises(TypeError, "relu.*alpha", lambda: kernels.activation(X, "relu", alpha=1.0))


@pytest.mark.parametrize("name", ["linear", "linear_act_dropout"])
def test_linear_errors(name):
    f = getattr(J, name)
    shapes = rf"{name}: mat1 and mat2 shapes cannot be multiplied: input has shape \[3, 4\]"
    raises(RuntimeError, shapes, lambda: f(X, torch.randn(5, 3)))
    raises(RuntimeError, "mat1 and mat2", lambda: f(torch.tensor(1.0), W))
    raises(RuntimeError, rf"{name}: bias has shape \[4\]", lambda: f(X, W, torch.randn(4)))
    raises(RuntimeError, rf"{name}: weight has shape", lambda: f(X, torch.randn(2, 5, 4)))
    dtype = rf"{name}: expected input, weight and bias to have the same dtype.*weight has float64"
    raises(RuntimeError, dtype, lambda: f(X, W.double()))
    raises(RuntimeError, "bias has float64", lambda: f(X, W, torch.randn(5).double()))
    raises(RuntimeError, shapes, lambda: torch.compile(f, backend="eager")(X, torch.randn(5, 3)))


def test_linear_takes_what_torch_takes():
    torch.testing.assert_close(J.linear(X, W[0]), F.linear(X, W[0]))
    for shape in ((1,), (1, 5), (3, 5), (3, 1)):
        b = torch.randn(shape)
        torch.testing.assert_close(J.linear(X, W, b), F.linear(X, W, b))
    b = torch.randn(2, 3)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(J.linear(x, W[0], b), F.linear(x, W[0], b))
    ints = torch.ones(3, 4, dtype=torch.int64)
    torch.testing.assert_close(J.linear(ints, ints), F.linear(ints, ints))


def test_integers_in_fused_ops():
    ints = torch.ones(3, 4, dtype=torch.int64)
    text = "input has dtype int64 .*allowed: strided float64"
    raises(NotImplementedError, text, lambda: J.dropout_add(ints, ints, 0.5))
    raises(NotImplementedError, text, lambda: J.softmax_dropout(ints, -1, 0.5))
    raises(NotImplementedError, text, lambda: J.linear_act_dropout(ints, ints))
    raises(RuntimeError, "dropout: input has dtype int64", lambda: J.dropout(ints, 0.5))


def test_sparse():
    x = torch.eye(3).to_sparse()
    assert J.relu(x).is_sparse  # native takes it
    raises(RuntimeError, "gelu: input has dtype float32 and layout torch.sparse", lambda: J.gelu(x))


MISMATCHES = {
    "activation_vjp": lambda a, b: kernels.activation_vjp(a, b, "relu"),
    "activation_jvp": lambda a, b: kernels.activation_jvp(a, b, "relu"),
    "activation_vjp_vjp": lambda a, b: kernels.activation_vjp_vjp(a, a, b, "relu"),
    "activation_vjp_jvp": lambda a, b: kernels.activation_vjp_jvp(a, a, None, b, "relu"),
    "activation_vjp_sum": lambda a, b: kernels.activation_vjp_sum(a, b, "relu"),
    "softmax_vjp": lambda a, b: kernels.softmax_vjp(a, b, 0),
    "softmax_jvp": lambda a, b: kernels.softmax_jvp(a, b, 0),
    "softmax_vjp_vjp": lambda a, b: kernels.softmax_vjp_vjp(a, a, b, 0),
    "softmax_vjp_jvp": lambda a, b: kernels.softmax_vjp_jvp(a, a, b, None, 0),
    "log_softmax_vjp": lambda a, b: kernels.log_softmax_vjp(a, b, 0),
    "log_softmax_jvp": lambda a, b: kernels.log_softmax_jvp(a, b, 0),
    "log_softmax_tangent": lambda a, b: kernels.log_softmax_tangent(a, b, 0),
    "log_softmax_vjp_vjp": lambda a, b: kernels.log_softmax_vjp_vjp(a, a, b, 0),
    "log_softmax_vjp_jvp": lambda a, b: kernels.log_softmax_vjp_jvp(a, a, b, None, 0),
    "softmax_dropout_vjp": lambda a, b: kernels.softmax_dropout_vjp(a, b, 0, 0.5, 1),
    "softmax_dropout_jvp": lambda a, b: kernels.softmax_dropout_jvp(a, b, 0, 0.5, 1),
    "dropout_add": lambda a, b: kernels.dropout_add(a, b, 0.5, 1),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatched_tensors(name):
    f = MISMATCHES[name]
    shape = rf"{name}: \w+ has shape \[3, 5\], \w+ has shape \[3, 4\]"
    raises(RuntimeError, shape, lambda: f(X, torch.randn(3, 5)))
    raises(RuntimeError, f"{name}: .*float64.*float32", lambda: f(X, X.double()))
    raises(RuntimeError, f"{name}: .*meta.*cpu", lambda: f(X, X.to("meta")))
    ints = X.long()
    raises(NotImplementedError, f"{name}: \\w+ has dtype int64; allowed", lambda: f(ints, ints))


def test_linear_kernels_errors():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    shape = r"linear_vjp: gy has shape \[3, 4\] and weight \[5, 4\]; allowed"
    raises(RuntimeError, shape, lambda: kernels.linear_vjp(x, w, x))
    raises(RuntimeError, "linear: x has shape", lambda: kernels.linear(x[0], w))
    raises(RuntimeError, "linear_jvp: .*tx", lambda: kernels.linear_jvp(x, w, None, tx=x[:2]))
    raises(RuntimeError, "tweight", lambda: kernels.linear_jvp(x, w, None, tweight=w[:2]))
    short = r"linear_act_dropout: residual has shape \[3, 4\]; allowed: \[3, 5\]"
    raises(RuntimeError, short, lambda: kernels.linear_act_dropout(x, w, residual=x))
    raises(RuntimeError, "tresidual", lambda: kernels.linear_act_dropout_jvp(x, w, tresidual=x))
    vjp = kernels.linear_act_dropout_vjp
    raises(TypeError, "linear_act_dropout_vjp: s is None", lambda: vjp(x, w, None, x @ w.T))
    raises(RuntimeError, "s has shape", lambda: vjp(x, w, x, x @ w.T))
    raises(RuntimeError, r"gy has shape \[3, 4\] and weight", lambda: vjp(x, w, x, x))
    raises(RuntimeError, r"gy has shape \[4\]; allowed", lambda: vjp(x, w, x[0], x[0]))
    raises(RuntimeError, "column_sum: x has shape", lambda: kernels.column_sum(x[0]))
    batch = torch.randn(2, 3, 4)
    raises(RuntimeError, "same batch dimensions", lambda: kernels.linear(batch, w))


def test_seed_errors():
    raises(RuntimeError, "seed has dtype float32", lambda: kernels.dropout(X, 0.5, torch.ones(())))
    shape = r"seed has shape \[2\]; it must be a leading part of the input's shape, \[3, 4\]"
    raises(RuntimeError, shape, lambda: kernels.dropout(X, 0.5, torch.tensor([1, 2])))
    seeds = torch.tensor([1, 2, 3])
    w = torch.randn(5, 4)
    text = "linear_act_dropout: seed has shape"
    raises(RuntimeError, text, lambda: kernels.linear_act_dropout(X, w, p=0.5, seed=seeds))


def test_out_errors():
    raises(RuntimeError, "softmax: out has shape", lambda: kernels.softmax(X, 0, out=torch.ones(2)))
    strided = torch.ones(4, 3).T
    raises(RuntimeError, "strides", lambda: kernels.softmax(X, 0, out=strided))
    raises(RuntimeError, "out has dtype float64", lambda: kernels.softmax(X, 0, out=X.double()))


def test_in_place_of_a_leaf():
    x = torch.randn(3, requires_grad=True)
    for f in (J.relu, J.silu, lambda z, inplace: J.dropout(z, 0.5, inplace=inplace)):
        before = x.detach().clone()
        raises(RuntimeError, "leaf", lambda f=f: f(x, inplace=True))
        raises(RuntimeError, "leaf", lambda f=f: f(x[1:], inplace=True))
        assert torch.equal(x, before)  # nothing was written first


def test_each_argument_that_is_no_tensor_is_named():
    for op in ("linear", "linear_act_dropout"):
        f = getattr(J, op)
        raises(TypeError, f"{op}: weight must be Tensor, not NoneType", lambda f=f: f(X, None))
        raises(TypeError, f"{op}: bias must be Tensor, not float", lambda f=f: f(X, W, 1.0))
    raises(TypeError, "residual must be Tensor", lambda: J.dropout_add(X, None, 0.5))
    text = "linear_act_dropout: residual must be Tensor, not int"
    raises(TypeError, text, lambda: J.linear_act_dropout(X, W, residual=1))
    raises(TypeError, "must be Tensor, not NoneType", lambda: J.dropout(None, 0.5, False))
    raises(TypeError, "linear_vjp: gy must be Tensor", lambda: kernels.linear_vjp(X, W, None))
    raises(TypeError, "x must be Tensor, not list", lambda: kernels.activation([1.0], "relu"))
    raises(
        TypeError,
        "gy must be Tensor, not ndarray",
        lambda: kernels.softmax_vjp(X, X.cpu().numpy(), 1),
    )


def test_each_number_that_is_none_is_named(ours):
    raises(
        TypeError,
        "leaky_relu: negative_slope must be Number, not str",
        lambda: J.leaky_relu(X, "a"),
    )
    raises(TypeError, "softplus: beta must be Number, not NoneType", lambda: J.softplus(X, None))
    raises(TypeError, "dropout: p, .*must be Number, not str", lambda: J.dropout(X, "a"))
    raises(TypeError, "softmax: dim must be int, not float", lambda: J.softmax(X, 1.0))
    raises(TypeError, "softmax: dtype must be torch.dtype", lambda: J.softmax(X, 1, dtype="meta"))
    raises(ValueError, "unknown activation", lambda: J.linear_act_dropout(X, W, None, ["relu"]))
    raises(ValueError, "unknown", lambda: kernels.activation(X, kernels.Activation("swish")))


def test_devices_must_agree():
    """A meta tensor picks the dispatcher's meta kernel: nothing would be computed."""
    meta = torch.empty(5, device="meta")
    text = "bias is on meta, input is on cpu"
    raises(RuntimeError, f"linear: {text}", lambda: J.linear(X, W, meta))
    raises(RuntimeError, text, lambda: J.linear_act_dropout(X, W, meta))
    text = "residual is on meta, input is on cpu"
    raises(RuntimeError, text, lambda: J.linear_act_dropout(X, W, residual=meta))
    raises(RuntimeError, "weight is on meta", lambda: J.linear(X, W.to("meta")))
    raises(RuntimeError, "residual is on meta", lambda: J.dropout_add(X, X.to("meta"), 0.5))
    raises(RuntimeError, "weight is on cpu", lambda: J.linear(X.to("meta"), W))


def test_sparse_arguments_of_fused_ops():
    text = "weight has dtype float32 and layout torch.sparse_coo; allowed: strided"
    raises(NotImplementedError, text, lambda: J.linear_act_dropout(X, W.to_sparse()))
    raises(NotImplementedError, "residual has", lambda: J.dropout_add(X, X.to_sparse(), 0.5))
    sparse = (X @ W.T).to_sparse()
    raises(NotImplementedError, "residual has", lambda: J.linear_act_dropout(X, W, residual=sparse))


def test_dropout_needs_a_seed():
    text = "seed is None and p is 0.5"
    raises(TypeError, f"activation: {text}", lambda: kernels.activation(X, "relu", p=0.5))
    raises(TypeError, text, lambda: kernels.linear_act_dropout(X, W, p=0.5))
    raises(TypeError, text, lambda: kernels.softmax_dropout(X, 1, 0.5, None))
    raises(TypeError, text, lambda: kernels.dropout(X, 0.5, None))
    raises(ValueError, "between 0 and 1", lambda: kernels.activation(X, "relu", p=7.0))


def test_out_of_linear_may_not_overlap():
    x, w = torch.randn(4, 4), torch.randn(4, 4)
    raises(RuntimeError, "linear: out overlaps x", lambda: kernels.linear(x, w, out=x))
    raises(RuntimeError, "linear: out overlaps weight", lambda: kernels.linear(x, w, out=w))


def test_read_only_out():
    memory = bytes(48)
    array = np.frombuffer(memory, np.float32).reshape(3, 4)
    x = np.ones((3, 4), np.float32)
    raises(
        ValueError, "softmax: out is a read-only array", lambda: kernels.softmax(x, 1, out=array)
    )
    raises(ValueError, "read-only", lambda: kernels.softmax_jvp(x, x, 1, out=(array, x.copy())))
    assert not any(memory)


@pytest.mark.cpu_only  # where operands are packed
def test_more_elements_than_memory_has(ours):
    """Strides of 0 make any number of elements out of one."""
    wide = torch.ones(1).expand(20, 2**58)
    raises(MemoryError, "", lambda: J.linear(torch.ones(1).expand(20, 2**43), wide[:, : 2**43]))
    raises(ValueError, "linear: x: allowed at most 2\\^48 elements", lambda: J.linear(wide, wide))
