"""One call of a layer: its Jacobian's structure, gain and cost."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .calls import Call, dot, first_floating, is_floating, mapped, norm, seeded
from .flops import flops_of
from .structure import is_residual, structure_of
from .table import Layer


class Linearized:
    """A call's result as a function of its first floating-point input, and products with J."""

    def __init__(self, call: Call, seed: int):
        self.call, self.seed = call, seed
        self.x = first_floating((call.args, call.kwargs))
        self.leaf = self.x.clone().requires_grad_()
        self.y = self.run(self.leaf.clone())  # a copy, as the module may work in place
        self.jvp = self.forward_jvp

    def run(self, x: Tensor) -> Tensor:
        """The result for ``x`` instead, with the dropout masks of every run."""
        args, kwargs = mapped(
            lambda t: x if t is self.x else t.clone(), (self.call.args, self.call.kwargs)
        )
        with seeded((self.x,), self.seed):
            return first_floating(self.call.module(*args, **kwargs))

    def vjp(self, gy: Tensor) -> Tensor:
        """J^T gy."""
        return _gradient(self.y, self.leaf, gy)

    def forward_jvp(self, tx: Tensor) -> Tensor:
        """J tx in forward mode, the result computed along."""
        with forward_ad.dual_level(), torch.no_grad():
            y = self.run(forward_ad.make_dual(self.x.clone(), tx.clone()))
            ty = forward_ad.unpack_dual(y).tangent
            return torch.zeros_like(y) if ty is None else ty.clone()

    def reverse_jvp(self, tx: Tensor) -> Tensor:
        """J tx in reverse mode: a VJP is linear in its cotangent, and its own VJP is the JVP."""
        gy = torch.zeros_like(self.y, requires_grad=True)
        return _gradient(_gradient(self.y, self.leaf, gy, create_graph=True), gy, tx)

    def choose_jvp(self, gy: Tensor) -> tuple[int, int | None]:
        """Pick a JVP that is the VJP's adjoint.

        Returns:
            The flops of a VJP, and those of a JVP beyond the forward pass; None if there is none.
        """
        gx, vjp_flops = flops_of(lambda: self.vjp(gy))
        size = norm(gx)
        tx = gx / size if size else gx
        tolerance = 0.05 * size + 10 * torch.finfo(gx.dtype).eps * norm(gy)
        for jvp in (self.forward_jvp, self.reverse_jvp):
            # A layer without a rule for forward mode raises, or has a tangent of zeros.
            with contextlib.suppress(RuntimeError):
                ty, jvp_flops = flops_of(lambda jvp=jvp: jvp(tx))
                if abs(dot(gy, ty) - size) <= tolerance:
                    self.jvp = jvp
                    if jvp == self.forward_jvp:
                        jvp_flops -= self.forward_flops()
                    return vjp_flops, jvp_flops
        return vjp_flops, None

    @torch.no_grad()
    def forward_flops(self) -> int:
        """Of the forward pass alone."""
        return flops_of(lambda: self.run(self.x.clone()))[1]


def _gradient(y, x, gy, create_graph=False):
    if not y.requires_grad:
        return torch.zeros_like(x)
    (gx,) = torch.autograd.grad(
        y, x, gy, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return gx


def measure(call: Call, samples: int, steps: int, seed: int) -> Layer:
    """The row of one call, as :func:`jacobian_ops.report` describes it."""
    row = Layer(
        name=call.name,
        kind=type(call.module).__name__,
        structure=structure_of(call),
        m=call.m,
        n=None,
        saved_bytes=_saved_bytes(call, seed),
        gradient=call.gradient,
        dead=call.dead,
        saturated=call.saturated,
    )
    x = first_floating((call.args, call.kwargs))
    if x is None or not call.m or not x.numel():
        return row
    row.n = x.numel()
    with _frozen(call.module), sdpa_kernel(SDPBackend.MATH):
        layer = Linearized(call, seed)
        random = torch.Generator(x.device).manual_seed(seed)

        def normal(like):
            return torch.randn(like.shape, generator=random, dtype=like.dtype, device=like.device)

        row.vjp_flops, row.jvp_flops = layer.choose_jvp(normal(layer.y))
        if row.jvp_flops is None:
            row.flags.append("no JVP")
            squares = sum(norm(layer.vjp(normal(layer.y))) ** 2 for _ in range(samples)) / samples
            row.mean_gain = math.sqrt(squares / min(row.m, row.n))
            return row
        probes = [normal(x) for _ in range(samples)]
        images = [layer.jvp(w) for w in probes]
        squares = sum(norm(jw) ** 2 for jw in images) / samples
        row.mean_gain = math.sqrt(squares / min(row.m, row.n))
        row.largest_gain = _largest_singular_value(layer, normal(x), steps)
        if call.calls_others and row.m == row.n and squares:
            pairs = zip(probes, images, strict=True)
            trace = sum(dot(w, jw.reshape(w.shape)) for w, jw in pairs) / samples
            row.identity = trace / math.sqrt(squares * row.n)
    return row


def _largest_singular_value(layer, v, steps) -> float:
    """Of J on the Krylov space of J^T J and v, orthogonalised in full."""
    basis, images = [], []
    for _ in range(min(steps, v.numel())):
        whole = norm(v)
        for _ in range(2):  # once more for what rounding left
            for b in basis:
                v = v - dot(b, v) * b
        size = norm(v)
        if not 1e-6 * whole < size < math.inf:  # the space is complete, to rounding
            break
        v = v / size
        basis.append(v)
        images.append(layer.jvp(v))
        v = layer.vjp(images[-1])
    if not images:
        return 0.0
    image = torch.stack([y.flatten() for y in images])
    image = image if image.dtype == torch.float64 else image.float()
    return torch.linalg.eigvalsh(image @ image.mT)[-1].clamp(min=0).sqrt().item()


def _saved_bytes(call, seed) -> int:
    own = {p.untyped_storage().data_ptr() for p in call.module.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return t

    def prepared(t):
        return t.clone().requires_grad_().clone() if is_floating(t) else t.clone()

    args, kwargs = mapped(prepared, (call.args, call.kwargs))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with seeded((args, kwargs), seed), hooks:
        call.module(*args, **kwargs)
    return sum(storage.nbytes() for storage in kept.values())


@contextlib.contextmanager
def _frozen(module):
    """Parameters that need no gradient, so that only J's products are computed."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_()


def is_block(call: Call, seed: int) -> bool:
    """Whether a call of other modules is that of a residual block."""
    x = first_floating((call.args, call.kwargs))
    if x is None or x.numel() != call.m:
        return False
    layer = Linearized(call, seed)
    return is_residual(layer.leaf, layer.y)
