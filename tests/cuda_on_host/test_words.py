"""The device's words on the host, compared with what CUDA says of them.

The module ``_words`` is beside the backend that is tested.  Under the sanitizers it is there too,
and the whole of pytest runs with them.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from ..conftest import ON_HOST

if not ON_HOST:
    pytest.skip(
        "the CUDA kernels run on the host in make test-cuda-on-host", allow_module_level=True
    )
BACKEND = os.environ["JACOBIAN_OPS_TEST_BACKEND"]


@pytest.fixture(scope="module")
def words():
    path = next(Path(BACKEND).resolve().parent.glob("_words*.so"))
    spec = importlib.util.spec_from_file_location("_words", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_product(words, dtype, transposed):
    """Fragments as ldmatrix loads them and mma takes them: (16, 16) times (16, 16)."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).to(dtype)
    c = torch.full((16, 16), torch.nan)
    words.product(dtype == torch.bfloat16, transposed, a.data_ptr(), b.data_ptr(), c.data_ptr())
    expected = a.double() @ (b.T if transposed else b).double()
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 8, 32])
@pytest.mark.parametrize("operand", [0, 1, 3, 8, 31])
def test_shuffles(words, width, operand):
    """A source outside the lane's part of the warp gives the lane's own value."""
    x = torch.arange(100, 132, dtype=torch.int32)
    y = torch.zeros(6, 32, dtype=torch.int32)
    words.shuffles(operand, width, x.data_ptr(), y.data_ptr())
    lane = torch.arange(32)
    first = lane // width * width
    last = first + width - 1
    index = first + operand % width
    xor = torch.where((lane ^ operand) > last, lane, lane ^ operand)
    down = torch.where(lane + operand > last, lane, lane + operand)
    up = torch.where(lane - operand < first, lane, lane - operand)
    for got, source in zip(y, (index, xor, down, up, xor), strict=False):
        assert torch.equal(got, x[source])
    votes = sum(1 << i for i in range(32) if x[i] % 3 == 0)
    assert all(int(v) & 0xFFFFFFFF == votes for v in y[5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions(words, dtype):
    """All numbers of 16 bits keep their value; others are rounded to the nearest, ties to even."""
    exact = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    torch.manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(torch.float32)
    near = torch.nextafter(exact, torch.tensor(torch.inf))
    ties = (exact.double() + exact.roll(-1).double()).div(2).float()
    x = torch.cat([exact, anything, near, ties, torch.tensor([65519.996, 65520.0, -65520.0])])
    y = torch.empty_like(x)
    words.conversions(dtype == torch.bfloat16, x.data_ptr(), y.data_ptr(), x.numel())
    torch.testing.assert_close(y, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_copies_that_are_not_valid_give_zeros(words):
    x, y = torch.arange(128.0), torch.full((128,), torch.nan)
    words.sparse_copy(x.data_ptr(), y.data_ptr())
    assert torch.equal(y.view(32, 4)[::2], x.view(32, 4)[::2])
    assert not y.view(32, 4)[1::2].any()


def test_every_thread_of_every_block_runs_once(words):
    y = torch.zeros(12 * 60, dtype=torch.int32)
    words.places(y.data_ptr())
    assert torch.equal(y, torch.arange(1, y.numel() + 1, dtype=torch.int32))


def test_an_empty_grid_runs_nothing(words):
    y = torch.zeros(12 * 60, dtype=torch.int32)
    words.nothing(y.data_ptr())
    assert not y.any()
