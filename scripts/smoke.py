"""Smoke test of an installed jacobian_ops: each op and each transform once, on small inputs.

Needs torch and numpy alone.  The test-suite has the rest; this is what scripts/check_wheel.py runs
beside each torch version.
"""

import os
import re
import warnings

os.environ["JACOBIAN_OPS_NATIVE_BELOW"] = "0"  # every call goes to our own kernels

import numpy as np
import torch
import torch.nn.functional as F

import jacobian_ops
import jacobian_ops.functional as jF
from jacobian_ops import kernels

X = torch.linspace(-2.9, 3.1, 24, dtype=torch.float64).reshape(4, 6).sin().mul(2)
V = torch.linspace(1, -1, 24, dtype=torch.float64).reshape(4, 6).cos()
W = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6).sin()
B = torch.linspace(-1, 1, 5, dtype=torch.float64)

ACTIVATIONS = (
    "relu leaky_relu elu selu celu relu6 hardtanh sigmoid tanh gelu silu softplus mish hardswish "
    "hardsigmoid logsigmoid"
).split()


# Written out where the native op has no forward mode in its backward.
WRITTEN_OUT = {
    "hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
}


def pairs():
    """Yield (name, ours, native): functions of one tensor of X's shape."""
    for name in ACTIVATIONS:
        native = getattr(torch, name, None) or getattr(F, name)
        yield name, getattr(jF, name), WRITTEN_OUT.get(name, native)
    yield "gelu tanh", lambda x: jF.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")
    for name in ("softmax", "log_softmax", "softmin"):
        for dim in (0, -1):
            ours, native = getattr(jF, name), getattr(F, name)
            yield (
                f"{name} {dim}",
                lambda x, f=ours, d=dim: f(x, d),
                lambda x, f=native, d=dim: f(x, d),
            )
    yield "linear", lambda x: jF.linear(x, W, B), lambda x: F.linear(x, W, B)
    yield (
        "linear_act_dropout",
        lambda x: jF.linear_act_dropout(x, W, B, "silu"),
        lambda x: F.silu(F.linear(x, W, B)),
    )
    yield "softmax_dropout", jF.softmax_dropout, lambda x: F.softmax(x, -1)
    yield "dropout_add", lambda x: jF.dropout_add(x.sin(), x), lambda x: x.sin() + x


def check_products(name, ours, native):
    """Value, VJP, JVP, Hessian-vector product, vmap and compile agree with the native op."""
    jvp, vjp, grad = torch.func.jvp, torch.func.vjp, torch.func.grad

    def answers(f):
        def loss(x):
            return f(x).sin().sum()

        y, pull = vjp(f, X)
        gy = y.cos()
        return {
            "value": y,
            "vjp": pull(gy)[0],
            "jvp": jvp(f, (X,), (V,))[1],
            "hvp, forward over reverse": jvp(grad(loss), (X,), (V,))[1],
            "hvp, reverse over reverse": vjp(grad(loss), X)[1](V)[0],
            "vmap": torch.vmap(f)(torch.stack([X, V])),
            "float32": f(X.float()) if "linear" not in name else y,
        }

    expected = answers(native)
    for what, ours_answer in answers(ours).items():
        torch.testing.assert_close(
            ours_answer, expected[what], msg=lambda text, what=what: f"{name}, {what}: {text}"
        )


def check_compile():
    """Training, and a function that calls jvp inside, compile in one graph."""

    def loss(x, w, b):
        return jF.softmax(jF.linear_act_dropout(x, w, b), -1).square().sum()

    def jvp(x, v):
        return torch.func.jvp(lambda x: jF.gelu(jF.softmax(x, -1)), (x,), (v,))[1]

    inputs = [t.clone().requires_grad_() for t in (X, W, B)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)
    compiled = torch.compile(jvp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, V), jvp(X, V))


def check_gradients():
    """Gradcheck of all kinds, and dropout's mask that derivatives must share."""
    for f in (jF.gelu, lambda x: jF.softmax(x, -1), lambda x: jF.linear(x, W, B)):
        x = X[:2].clone().requires_grad_()
        torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
        torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True)
    x = torch.ones(8, 1000, requires_grad=True)
    y = jF.dropout(x, 0.25)
    (gx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gx, y.detach())
    assert 0.6 < (gx != 0).float().mean() < 0.9


def check_modules():
    """A model gives the same answers after replace, and after restore."""
    layers = torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 3), torch.nn.Softmax(-1)
    model = torch.nn.Sequential(*layers)
    x = X.float()
    expected = model(x)
    torch.testing.assert_close(jacobian_ops.replace(model)(x), expected)
    torch.testing.assert_close(jacobian_ops.restore(model)(x), expected)


def check_kernels():
    """The raw products take numpy arrays, and say so when sizes do not fit."""
    x, gy = X.numpy(), V.numpy()
    y = kernels.softmax(x, -1)
    gx = kernels.softmax_vjp(y, gy, -1)
    assert isinstance(gx, np.ndarray)
    np.testing.assert_allclose(gx, y * (gy - (y * gy).sum(-1, keepdims=True)), rtol=1e-12)
    try:
        kernels.softmax_vjp(y, gy[:, :5], -1)
    except (RuntimeError, ValueError) as error:
        assert "softmax_vjp" in str(error) and "gy" in str(error)
    else:
        raise AssertionError("a cotangent of the wrong shape was taken")


def check_one_openmp():
    """One GNU OpenMP runtime in the process: torch's, shared."""
    torch.ones(1 << 20).exp()
    with open("/proc/self/maps") as maps:
        runtimes = set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)\S*\.so\S*", maps.read()))
    assert len(runtimes) == 1, f"several OpenMP runtimes: {runtimes}"


def main():
    """Run the checks; the first that fails raises."""
    warnings.simplefilter("error", RuntimeWarning)
    facts = jacobian_ops.build_info()
    names = [name for name, ours, native in pairs() if not check_products(name, ours, native)]
    for check in (check_gradients, check_compile, check_modules, check_kernels, check_one_openmp):
        check()
    print(
        f"smoke test passed: jacobian_ops {facts['version']}, torch {facts['torch']}, "
        f"{facts['isa']}, {len(names)} functions, from {os.path.dirname(jacobian_ops.__file__)}"
    )


if __name__ == "__main__":
    main()
