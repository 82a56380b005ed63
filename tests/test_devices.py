"""What the CPU and a device have in common to the bit: the masks of dropout.

The device is a GPU, or the CUDA kernels on the host (make test-cuda-on-host).
"""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from jacobian_ops import _backend, _cpu, kernels

from .conftest import DEVICES, ON_HOST

if not ON_HOST and "cuda" not in DEVICES:
    pytest.skip("no GPU, and not make test-cuda-on-host", allow_module_level=True)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def on_cpu(run, *tensors):
    """The results of the CPU's kernels."""
    before = _backend.BACKENDS["cpu"]
    _backend.BACKENDS["cpu"] = _cpu
    try:
        return run(*(t.cpu() for t in tensors))
    finally:
        _backend.BACKENDS["cpu"] = before


def on_device(run, *tensors):
    """Those of the device's."""
    device = "cpu" if ON_HOST else "cuda"
    return run(*(t.to(device) for t in tensors))


def kept(y):
    """Which elements of one or several results are not zero."""
    tensors = (t for t in (y if isinstance(y, tuple) else (y,)) if t is not None)
    return [t.ne(0).cpu() for t in tensors]


FORMS = {
    "dropout": lambda x, seed, p: kernels.dropout(x, p, seed),
    "dropout_add": lambda x, seed, p: kernels.dropout_add(x, torch.zeros_like(x), p, seed),
    "activation": lambda x, seed, p: kernels.activation(x, "sigmoid", seed=seed, p=p),
    "activation_vjp": lambda x, seed, p: kernels.activation_vjp(x, x, "elu", seed=seed, p=p),
    "activation_vjp_sum": lambda x, seed, p: kernels.activation_vjp_sum(
        x, x, "elu", seed=seed, p=p
    )[0],
    "activation_jvp": lambda x, seed, p: kernels.activation_jvp(x, x, "sigmoid", seed=seed, p=p),
    "softmax_dropout": lambda x, seed, p: kernels.softmax_dropout(x, -1, p, seed),
    "softmax_dropout over columns": lambda x, seed, p: kernels.softmax_dropout(x, 1, p, seed),
    "linear_act_dropout": lambda x, seed, p: kernels.linear_act_dropout(
        x, torch.ones_like(x[:, :3]), None, "sigmoid", p, seed
    )[0],
    "linear_act_dropout_vjp": lambda x, seed, p: kernels.linear_act_dropout_vjp(
        torch.eye(x.shape[1]).to(x).expand(len(x), -1, -1),
        *(None, None, x, "identity", p, seed, (False, True, False)),
    )[1],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_masks(form, dtype):
    """Samples that begin anywhere in a counter's four words, rows in registers and longer ones."""
    for shape in ((1, 1, 1), (3, 5, 7), (2, 1, 4096), (5, 3, 33), (2, 2, 9000)):
        x, seed = torch.ones(shape, dtype=dtype), torch.randint(1 << 62, shape[:1])
        for p in (0.1, 0.5, 1.0):
            here, there = (
                kept(on(lambda x, seed, p=p: form(x, seed, p), x, seed))
                for on in (on_cpu, on_device)
            )
            assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@hypothesis.given(
    seed=st.integers(-(2**63), 2**63 - 1),
    p=st.floats(0, 1),
    size=st.integers(1, 3000),
    dtype=st.sampled_from(DTYPES),
)
def test_any_mask(seed, p, size, dtype):
    x, seeds = torch.ones(size, dtype=dtype), torch.tensor(seed)
    here, there = (
        on(lambda x, s: kernels.dropout(x, p, s), x, seeds) for on in (on_cpu, on_device)
    )
    assert torch.equal(here, there.cpu())
