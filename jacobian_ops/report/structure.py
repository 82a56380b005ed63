"""What a layer's Jacobian is, by the kind of the layer or by the graph of its result."""

from __future__ import annotations

from torch import Tensor, nn

from .calls import Call

_DIAGONAL = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.GELU),
    *(nn.SiLU, nn.Softplus, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Softsign),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.modules.dropout._DropoutNd),
)
# Of each kind of layer, in words; the first that fits.
_STRUCTURES = (
    ((nn.Linear, nn.Bilinear), "dense"),
    (_DIAGONAL, "diagonal"),
    ((nn.Softmax, nn.Softmin, nn.Softmax2d), "diag(s) - s s^T"),
    (nn.LogSoftmax, "I - 1 s^T"),
    (nn.RMSNorm, "diagonal + rank 1"),
    ((nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm), "diagonal + rank 2"),
    (nn.modules.conv._ConvNd, "convolution"),
    ((nn.Identity, nn.Flatten, nn.Unflatten), "identity"),
    ((nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), "permutation"),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), "selection"),
    ((nn.Embedding, nn.EmbeddingBag), "lookup"),
)
# Of autograd's nodes: the edges along which a sum takes a term as it is.
_SUMS = {"AddBackward0": (0, 1), "SubBackward0": (0,), "DropoutAddBackward": (1,)}
_VIEWS = ("View", "UnsafeView", "Clone", "Alias", "Squeeze", "Unsqueeze", "ToCopy")
_BEHIND_SUMS = ("Relu", "Elu", "Activation", "Norm", "Dropout", "Mul", "Gelu", "Silu", "Sigmoid")


def structure_of(call: Call) -> str:
    """What J is, in words."""
    if call.calls_others:
        return "chain" if call.name == "model" else "residual: I + J"
    for kinds, words in _STRUCTURES:
        if isinstance(call.module, kinds):
            return words
    return "matrix-free"


def is_residual(x: Tensor, y: Tensor) -> bool:
    """Whether the leaf x reaches y as a term of a sum, with at most activations and norms behind.

    Read off the graph that autograd records.
    """
    if x.shape != y.shape:
        return False
    (source, _), *_ = x.view_as(x).grad_fn.next_functions
    # From the result back: nodes, and whether the sum is what x must come straight into.
    stack, seen = [(y.grad_fn, False)], set()
    while stack:
        node, summed = stack.pop()
        if node is None or (node, summed) in seen:
            continue
        seen.add((node, summed))
        if node is source and summed:
            return True
        name, edges = node.name(), [edge for edge, _ in node.next_functions]
        if name in _SUMS:
            stack += [(edges[i], True) for i in _SUMS[name] if i < len(edges)]
        elif name.startswith(_VIEWS):
            stack.append((edges[0], summed))
        elif any(word in name for word in _BEHIND_SUMS):
            stack.append((edges[0], False))
    return False
