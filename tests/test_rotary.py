"""rotary_embedding beyond what tests/cases.py drives: sizes, layouts, tables, errors."""

import pytest
import torch

import jacobian_ops.functional as J
from jacobian_ops import kernels

from .cases import rotary_primitive

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (D, R/2): of less than a vector, whole vectors and packs, tails, and features passed through.
SIZES = [(2, 1), (6, 3), (64, 32), (80, 20), (100, 50), (128, 64), (130, 33), (9, 0)]
close = torch.testing.assert_close


def tables(*shape, dtype=torch.float64):
    angle = torch.randn(shape, dtype=torch.float64) * 3
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d,half", SIZES)
def test_many_sizes(ours, d, half, dtype, interleaved):
    x = torch.randn(2, 3, 7, d, dtype=torch.float64).to(dtype)
    cos, sin = tables(7, half, dtype=dtype)
    y = J.rotary_embedding(x, cos, sin, interleaved)
    want = rotary_primitive(interleaved)(*(t.double() for t in (x, cos, sin)))
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert (y.double() - want).abs().max() <= 4 * eps * want.abs().max()
    cos, sin = (t.expand(1, 1, 7, half) for t in (cos, sin))
    back = kernels.rotary(y, cos, sin, interleaved, True)
    assert (back - x).abs().max() <= 16 * eps * want.abs().max()


LAYOUTS = {
    "contiguous": lambda b, h, s, d: torch.randn(b, h, s, d),
    "heads": lambda b, h, s, d: torch.randn(b, s, h, d).transpose(1, 2),
    "of a projection": lambda b, h, s, d: torch.randn(b, s, 3, h, d)[:, :, 1].transpose(1, 2),
    "features first": lambda b, h, s, d: torch.randn(b, d, h, s).permute(0, 2, 3, 1),
    "every other": lambda b, h, s, d: torch.randn(b, h, s, 2 * d)[..., ::2],
    "expanded": lambda b, h, s, d: torch.randn(1, h, s, d).expand(b, h, s, d),
    "negated": lambda b, h, s, d: torch._neg_view(torch.randn(b, h, s, d)),
}
TABLES = {
    "of positions": (5, 8),
    "of samples": (2, 1, 5, 8),
    "of heads": (3, 5, 8),
    "of all": (2, 3, 5, 8),
    "of one position": (1, 8),
    "of features": (8,),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts(ours, layout, table, interleaved):
    x = LAYOUTS[layout](2, 3, 5, 18)
    cos, sin = tables(*TABLES[table], dtype=torch.float32)
    want = rotary_primitive(interleaved)(x, cos, sin)
    close(J.rotary_embedding(x, cos, sin, interleaved), want)
    turned = cos.mT.contiguous().mT if cos.dim() > 1 else cos
    close(J.rotary_embedding(x, turned, sin, interleaved), want)


def test_heads_keep_their_layout(ours):
    x = LAYOUTS["heads"](2, 3, 5, 16)
    y = J.rotary_embedding(x, *tables(5, 8, dtype=torch.float32))
    assert y.stride() == x.stride()


def test_more_dimensions_than_a_grid(ours):
    x = torch.randn(2, 3, 2, 3, 2, 4)[:, :2, :, :2]
    cos, sin = tables(2, 1, 2, 1, 2, 2, dtype=torch.float32)
    close(J.rotary_embedding(x, cos, sin), rotary_primitive(False)(x, cos, sin))


def test_orthogonal(ours):
    """Lengths stay, and the VJP is the inverse."""
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    y = J.rotary_embedding(x, *tables(4, 5))
    close(y.norm(), x.norm())
    close(torch.autograd.grad(y, x, y)[0], x.detach())


def test_wider_tables(ours):
    """float32 tables of a bfloat16 input, and their gradients."""
    x = torch.randn(2, 4, 6).bfloat16()
    cos, sin = (t.requires_grad_() for t in tables(4, 3, dtype=torch.float32))
    y = J.rotary_embedding(x, cos, sin)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert cos.grad.dtype == sin.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_empty(ours, shape):
    x = torch.randn(shape, requires_grad=True)
    cos, sin = tables(shape[-2], shape[-1] // 2, dtype=torch.float32)
    y = J.rotary_embedding(x, cos, sin)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, c: J.rotary_embedding([1.0], c, c), TypeError, "input"),
        (lambda x, c: J.rotary_embedding(x, c, 1.0), TypeError, "sin must be Tensor"),
        (lambda x, c: J.rotary_embedding(x, c, c[:1]), RuntimeError, r"sin has shape \[1, 2\]"),
        (lambda x, c: J.rotary_embedding(x, c[:2], c[:2]), RuntimeError, r"cos has shape \[2, 2\]"),
        (lambda x, c: J.rotary_embedding(x, x, x), RuntimeError, "R at most"),
        (lambda x, c: J.rotary_embedding(x[0], c, c), RuntimeError, "what broadcasts to"),
        (lambda x, c: J.rotary_embedding(x.long(), c, c), NotImplementedError, "dtype int64"),
        (lambda x, c: kernels.rotary(x, c[0], c[0]), RuntimeError, r"cos has shape \[2\], x has"),
        (lambda x, c: kernels.rotary(x, c, c.double()), RuntimeError, "sin has dtype float64"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4), torch.randn(3, 2))
