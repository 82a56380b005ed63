"""Gated units ``y = f(gate) * up`` and their products; ``f`` is one of :data:`GATES`.

All tensors of a call have one shape.  Rows along the last dimension may lie at any distance, so
that ``gate`` and ``up`` may be the halves of one tensor; other layouts are copied.  Results are
contiguous.

Reference: Shazeer, GLU variants improve transformer, 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from torch import Tensor

from .. import _backend
from ._arguments import arrays_too, check_operands, result_like
from .activation import native_act, resolve

GATES = ("silu", "gelu", "gelu_tanh")
# Shorter rows than this are copied: a row is one turn of the kernel's loop.
_SHORTEST = 64


def _matrix(t: Tensor, n: int) -> Tensor:
    """``t`` as rows of ``n`` elements."""
    t = t.resolve_neg()
    if n >= _SHORTEST and t.stride(-1) == 1:
        try:
            return t.view(-1, n)
        except RuntimeError:  # no one distance leads from row to row
            pass
    return t.contiguous().view(-1, n)


def _run(op, names, tensors, f, results):
    """Check, allocate ``results`` tensors and run the kernel ``op``."""
    if f not in GATES:
        raise ValueError(f"{op}: unknown activation {f!r}; allowed: {', '.join(GATES)}")
    check_operands(op, names, tensors)
    gate = tensors[0]
    out = tuple(result_like(gate, row_major=True) for _ in range(results))
    if gate.numel():
        plain = all(t is None or (t.is_contiguous() and not t.is_neg()) for t in tensors)
        n = gate.numel() if plain else gate.shape[-1]
        matrices = [None if t is None else _matrix(t, n) for t in (*tensors, *out)]
        described = [None if m is None else _backend.matrix(m) for m in matrices]
        _backend.run(op, "gate", gate, op, native_act(resolve(op, f)), *described)
    return out


@arrays_too
def gated(gate: Tensor, up: Tensor, f: str) -> Tensor:
    """``y = f(gate) * up``.

    Args:
        gate: Of any shape; float64, float32, bfloat16 or float16.
        up: Of the shape and dtype of ``gate``.
        f: One of :data:`GATES`.

    Returns:
        Contiguous tensor of the shape and dtype of ``gate``.

    Raises:
        RuntimeError: Shapes, dtypes or devices differ.
        ValueError: ``f`` is no gate.
    """
    return _run("gated", ("gate", "up"), (gate, up), f, 1)[0]


@arrays_too
def gated_jvp(
    gate: Tensor, up: Tensor, tgate: Tensor | None, tup: Tensor | None, f: str
) -> tuple[Tensor, Tensor]:
    """``y`` and ``ty = f'(gate) * up * tgate + f(gate) * tup``; an absent tangent is None."""
    return _run("gated_jvp", ("gate", "up", "tgate", "tup"), (gate, up, tgate, tup), f, 2)


@arrays_too
def gated_vjp(gate: Tensor, up: Tensor, gy: Tensor, f: str) -> tuple[Tensor, Tensor]:
    """``ggate = f'(gate) * up * gy`` and ``gup = f(gate) * gy`` in one pass."""
    return _run("gated_vjp", ("gate", "up", "gy"), (gate, up, gy), f, 2)


@arrays_too
def gated_vjp_vjp(
    gate: Tensor, up: Tensor, gy: Tensor, hggate: Tensor | None, hgup: Tensor | None, f: str
) -> tuple[Tensor, Tensor, Tensor]:
    """VJP of :func:`gated_vjp` along ``(hggate, hgup)``; an absent one is None.

    ``hgate = gy * (f'' * up * hggate + f' * hgup)``, ``hup = f' * gy * hggate`` and
    ``hgy = f' * up * hggate + f * hgup``.
    """
    names = ("gate", "up", "gy", "hggate", "hgup")
    return _run("gated_vjp_vjp", names, (gate, up, gy, hggate, hgup), f, 3)


@arrays_too
def gated_vjp_jvp(
    gate: Tensor,
    up: Tensor,
    gy: Tensor,
    tgate: Tensor | None,
    tup: Tensor | None,
    tgy: Tensor | None,
    f: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`gated_vjp` and its tangent along ``(tgate, tup, tgy)``, any of which may be None.

    ``tggate = f'' * up * gy * tgate + f' * (gy * tup + up * tgy)`` and
    ``tgup = f' * gy * tgate + f * tgy``.

    Returns:
        ``ggate``, ``gup``, ``tggate`` and ``tgup``.
    """
    names = ("gate", "up", "gy", "tgate", "tup", "tgy")
    return _run("gated_vjp_jvp", names, (gate, up, gy, tgate, tup, tgy), f, 4)
