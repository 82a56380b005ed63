"""Results that are written past the caches: the bits of the same work in small pieces."""

import numpy as np
import pytest
import torch

from jacobian_ops import kernels

pytestmark = pytest.mark.cpu_only

MIB = 1 << 20
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def filled(shape, dtype):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator).to(dtype)


def offset(t, by):
    """A copy of ``t`` that starts ``by`` elements after an aligned address."""
    room = torch.empty(t.numel() + 64, dtype=t.dtype)
    start = -room.data_ptr() % 64 // t.element_size() + by
    return room[start : start + t.numel()].view(t.shape).copy_(t)


def equal(large, small):
    for a, b in zip(large, small, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", [0, 3])
def test_rows(dtype, by):
    """Rows of an odd length start anywhere in a vector."""
    n = 12347
    rows = 40 * MIB // (n * dtype.itemsize)
    x, t = (offset(filled((rows, n), dtype), by) for _ in range(2))
    cut = slice(rows // 2, rows // 2 + 5)
    equal((kernels.softmax(x, 1)[cut],), (kernels.softmax(x[cut], 1),))
    out = offset(x, 2 * by + 1)
    equal((kernels.softmax(x, 1, out=out)[cut],), (kernels.softmax(x[cut], 1),))
    large, small = (kernels.log_softmax_jvp(a, b, 1) for a, b in ((x, t), (x[cut], t[cut])))
    equal([r[cut] for r in large], small)


def test_rows_between_elements():
    """An array may start at any byte."""
    n = 1024
    rows = 40 * MIB // (4 * n)
    x = np.random.default_rng(0).standard_normal((rows, n), dtype=np.float32)
    out = np.empty(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    kernels.softmax(x, 1, out=out)
    np.testing.assert_array_equal(out[-3:], kernels.softmax(x[-3:], 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns(dtype):
    n, inner = 517, 1001
    outer = 40 * MIB // (n * inner * dtype.itemsize) + 1
    x, t = (filled((outer, n, inner), dtype) for _ in range(2))
    large, small = kernels.softmax_jvp(x, t, 1), kernels.softmax_jvp(x[1:2], t[1:2], 1)
    equal([r[1:2] for r in large], small)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", [0, 3])
def test_pointwise(dtype, by):
    samples, n = 5, 8 * MIB // dtype.itemsize + 13
    x, t = (offset(filled((samples, n), dtype), by) for _ in range(2))
    seeds = torch.arange(samples)
    for p in (0.0, 0.3):
        large = kernels.activation_jvp(x, t, "gelu", seed=seeds, p=p)
        for i in (0, samples - 1):
            one = kernels.activation_jvp(x[i], t[i], "gelu", seed=int(seeds[i]), p=p)
            equal([r[i] for r in large], one)
            if not p:
                small = kernels.activation_jvp(x[i, -999:], t[i, -999:], "gelu")
                equal([r[i, -999:] for r in large], small)
    y = kernels.dropout(x, 0.3, seeds)
    ones = kernels.dropout(torch.ones_like(x), 0.3, seeds)
    assert 0.69 < (ones != 0).double().mean() < 0.71
    assert torch.equal(y != 0, (ones != 0) & (x != 0))
    for i in (0, samples - 1):
        assert torch.equal(y[i], kernels.dropout(x[i], 0.3, int(seeds[i])))


@pytest.mark.parametrize("by", [0, 3])
def test_linear(by):
    x, w = filled((3000, 40), torch.float32), filled((3501, 40), torch.float32)
    out = offset(torch.empty(3000, 3501), by)
    y = kernels.linear(x, w, out=out)
    assert torch.equal(y[1400:1500], kernels.linear(x[1400:1500], w))


def test_arrays_of_numpy():
    x = np.random.default_rng(0).standard_normal((3, 4 * MIB), dtype=np.float32)[:, 1:]
    y = kernels.activation(np.ascontiguousarray(x), "silu")
    np.testing.assert_array_equal(y[2, -9:], kernels.activation(x[2, -9:].copy(), "silu"))
