"""A small vision transformer, written with torch.nn alone."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with the softmax written out."""

    def __init__(self, width: int, heads: int, p: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.attend = nn.Sequential(nn.Softmax(-1), nn.Dropout(p))
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, patches, width) -> the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attend(q @ k.mT * q.shape[-1] ** -0.5)
        return self.project((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, width: int, heads: int, p: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, p)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(p), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, patches, width) -> the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Classifier of images that come as rows of patches.

    Args:
        patches: Number of patches in an image.
        pixels: Number of pixels in a patch.
        classes: Number of classes.
        width: Size of a token.
        depth: Number of blocks.
        heads: Attention heads in a block.
        p: Dropout probability.
    """

    def __init__(
        self,
        patches: int = 16,
        pixels: int = 4,
        classes: int = 10,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        p: float = 0.0,
    ):
        super().__init__()
        self.embed = nn.Linear(pixels, width)
        nn.init.normal_(self.embed.weight)  # few pixels in a patch: the default is too small
        self.position = nn.Parameter(0.5 * torch.randn(patches, width))
        self.blocks = nn.Sequential(*(Block(width, heads, p) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, patches, pixels) -> (batch, classes)."""
        x = self.blocks(self.embed(x) + self.position)
        return self.head(self.norm(x).mean(1))
