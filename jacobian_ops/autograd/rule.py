"""One differentiable op from one rule.

A rule is a class that says what an op computes, what is saved for its derivative, its VJP, its JVP,
how primal and tangent are computed together (``dual``) and how it is batched.  :func:`define` makes
of it the three things that PyTorch needs, all driven by the same rule:

* a dispatcher op ``torch.ops.jacobian_ops.<name>`` with the rule on its Autograd key.  Every
  transform of ``torch.func``, forward AD and ``torch.compile`` sees one ordinary op;
* a ``torch.autograd.Function`` (``<Name>Backward`` in a graph), entered directly when no transform
  is active (the short way), and the fallback should the private names below be gone;
* the bare kernel, when nothing is differentiated.

A rule's functions call ops that are themselves differentiable, never kernels: a kernel call in a
VJP would pass gradcheck and yet drop every second-order term without a word.

Inside the Autograd kernel, at whatever level a transform has brought us to:

1. an input requires grad: a single-level function with VJP and JVP.  The engine gives the saved
   tensors their tangents, so they are not unpacked here (forward over reverse would go wrong);
2. otherwise, if a tangent is there: unpack, call the two-output op, make a dual again;
3. otherwise straight below.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from .. import lowering
from .._backend import AUTOCAST_KEYS, BACKENDS

_C = torch._C
LIBRARY = torch.library.Library("jacobian_ops", "DEF")
RULES: dict[str, type[Rule]] = {}  # by the op's name
CPU_KEYS = _C._dispatch_keys(torch.empty(0))
_KEYS = {"cpu": CPU_KEYS}


def _dense_keys(device: torch.device):
    """The dispatch keys of an ordinary tensor on ``device``; None where there are no kernels."""
    if device.type not in _KEYS:
        built = device.type in BACKENDS
        _KEYS[device.type] = _C._dispatch_keys(torch.empty(0, device=device)) if built else None
    return _KEYS[device.type]


def _only_default_device() -> bool:
    """Whether every mode for functions is torch.set_default_device's, which is about factories."""
    modes = torch.overrides._get_current_function_mode_stack()
    return all(type(mode) is DeviceContext for mode in modes)


class Rule:
    """What an op is, stated once.

    ``schema``'s tensor arguments come first; ``consts`` below is the tuple of the other arguments.
    A subclass defines ``kernel`` and ``fake`` (same arguments as the op), ``vmap`` where the
    default (batch dimension moved to the front of every tensor) does not fit, and either

    * ``save(args, out, needs) -> tensors``, what the VJP of the arguments in ``needs`` takes,
      ``vjp(saved, consts, needs, *gy) -> one gradient a tensor argument``,
      ``jvp(primals, out, tangents) -> tangents of the outputs`` and
      ``dual(primals, tangents) -> (out, tangents)``; absent tangents and cotangents are None; or
    * ``composite(*args)``: the same value from differentiable ops, used instead as soon as a
      derivative is asked for.  That ends the chain of derivatives of derivatives.  With
      ``deferred``, the kernel runs still, and the composite if the derivative is in fact taken:
      torch.func.grad makes every graph differentiable again, whether or not anybody does so.
    """

    schema: str
    composite: Callable | None = None
    not_differentiable: tuple[int, ...] = ()  # outputs: their tangents are None
    # Of an op that computes a primal and its tangent: the tangents among the outputs.  Those among
    # the arguments are called t<name of the primal>.
    tangent_outputs: tuple[int, ...] = ()

    deferred = False

    @classmethod
    def vmap(cls, info, dims, *args):
        """Every tensor with its batch dimension first; an unbatched one is expanded."""
        out = cls.op(*front(info, dims, args))
        return out, (0,) * len(out) if isinstance(out, tuple) else 0


def front(info, dims, args):
    """``args`` with the batch dimension of every tensor moved to the front, or made there."""
    return tuple(
        a
        if not isinstance(a, Tensor)
        else a.expand(info.batch_size, *a.shape)
        if d is None
        else a.movedim(d, 0)
        for a, d in zip(args, dims, strict=True)
    )


def add(*terms):
    """Sum of the terms that are there, or None."""
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


def needed(needs, gradients, constants=()):
    """The gradients that are asked for; None for the others, and for ``constants``."""
    kept = (g if needed else None for g, needed in zip(gradients, needs, strict=False))
    return (*kept, *(None for _ in constants))


def by_sample(op, info, dims, args):
    """The rule of vmap that calls ``op`` for each sample by itself."""
    results = [
        op(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], tuple):
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
    return torch.stack(results), 0


def plain(tensors) -> bool:
    """True when no transform, mode, subclass or lazy view stands between us and the kernel."""
    if (
        _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack()
        or (_C._len_torch_function_stack() and not _only_default_device())
        or forward_ad._current_level >= 0
        # torch.jit.trace and make_fx(pre_dispatch=True) see dispatcher ops only.
        or _C._get_tracing_state() is not None
        or _C._dispatch_tls_is_dispatch_key_included(_C.DispatchKey.PreDispatch)
    ):
        return False
    for t in tensors:
        if t is not None:
            kind = type(t)
            if kind is not Tensor and kind is not Parameter:
                return False
            dense = CPU_KEYS if t.is_cpu else _dense_keys(t.device)
            if dense is None or _C._dispatch_keys(t) != dense:
                return False
    return True


def reverse_may_follow(tensors) -> bool:
    """Whether to keep what a VJP wants: a hint, as a tensor may hide its levels."""
    if not torch.is_grad_enabled() or _C._get_tracing_state() is not None:
        return False
    if torch.compiler.is_compiling() or _C._any_requires_grad(*tensors):
        return True
    levels = _C._functorch.get_interpreter_stack() or ()
    return any(level.key() == _C._functorch.TransformType.Grad for level in levels)


class _Tangents(threading.local):
    """Which level of torch.func.jvp has tangents without a graph, and whether one is computed."""

    level: int | None = None
    constant = False


_tangents = _Tangents()


@contextlib.contextmanager
def constant_tangents():
    """The tangents of torch.func's innermost level, a jvp's, are constants for what is outside.

    The ops then keep for a VJP what the primal's needs, and nothing of the tangents.
    """
    outer, _tangents.level = _tangents.level, _level()
    try:
        yield
    finally:
        _tangents.level = outer


def _level() -> int | None:
    stack = _C._functorch.get_interpreter_stack()
    return stack[-1].level() if stack else None


@contextlib.contextmanager
def _constant():
    outer, _tangents.constant = _tangents.constant, True
    try:
        yield
    finally:
        _tangents.constant = outer


def _of_tangents():
    """A context for the product of primal and tangent at this level."""
    if _tangents.level is None or _tangents.level != _level():
        return contextlib.nullcontext()
    return _constant()


def _tangent_inputs(schema: str) -> tuple[int, ...]:
    """The places of the arguments t<name> for which there is a <name>."""
    declared = schema.split("(", 1)[1].split(")")[0].split(",")
    names = [argument.split()[-1] for argument in declared]
    return tuple(i for i, name in enumerate(names) if name[0] == "t" and name[1:] in names)


def define(rule: type[Rule]) -> Callable:
    """Register ``rule`` and return the callable that picks the way for each call."""
    name = rule.schema.split("(")[0]
    RULES[name] = rule
    tensors = rule.tensors = rule.schema.split("->")[0].count("Tensor")
    rule.tangent_inputs = _tangent_inputs(rule.schema) if rule.tangent_outputs else ()
    if rule.deferred:
        _differentiate_composite(rule)
    LIBRARY.define(rule.schema)
    op = getattr(torch.ops.jacobian_ops, name).default
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, rule.kernel, key)
    LIBRARY.impl(name, _autograd_kernel(rule, op, tensors), "Autograd")

    def fake(*args):  # the first that is called when a graph is traced
        lowering.register()
        return rule.fake(*args)

    torch.library.register_fake(f"jacobian_ops::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"jacobian_ops::{name}", lambda *a: rule.vmap(*a), lib=LIBRARY)
    if rule.composite is None or rule.deferred:

        def kernel(*args):  # torch binds the signature of forward: no defaults here
            return rule.kernel(*args)

        function = _function(rule, torch.autograd.Function, kernel, tensors)
        differentiable = _short_way(rule, function, tensors)
        transformable = function.apply
    else:
        function = None
        differentiable = transformable = _composite(rule)

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)
        inputs = args[:tensors]
        if not plain(inputs):
            return op(*args) if _dispatcher_composes else transformable(*args)
        if torch.is_grad_enabled() and _C._any_requires_grad(*inputs):
            return differentiable(*args)
        return rule.kernel(*args)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = rule.__doc__
    call.Function = function
    rule.op = staticmethod(call)
    return call


def define_inplace(rule: type[Rule]) -> Callable:
    """``call(x, *rest)`` that overwrites ``x``: plain state, and a rule that saves no old ``x``."""
    tensors = rule.tensors

    def forward(x, *rest):
        return rule.kernel(x, *rest, out=x)

    def setup_context(ctx, inputs, output):
        ctx.mark_dirty(inputs[0])
        rule.op.Function.setup_context(ctx, inputs, output)

    body = {"forward": staticmethod(forward), "setup_context": staticmethod(setup_context)}
    function = type(f"{rule.__name__}Inplace", (rule.op.Function,), body)
    differentiable = super(torch.autograd.Function, function).apply

    def call(*args):
        if torch.is_grad_enabled() and _C._any_requires_grad(*args[:tensors]):
            return differentiable(*args)
        return forward(*args)

    return call


def overwritable(x: Tensor) -> bool:
    """Whether a kernel may write its result into ``x`` and leave the rest to autograd.

    A leaf that requires grad, or a view of one, would raise only after the kernel wrote.
    """
    return (
        not torch.compiler.is_compiling()
        and plain((x,))
        and x.is_contiguous()
        and not (torch.is_grad_enabled() and (x._is_view() or (x.is_leaf and x.requires_grad)))
    )


def _function(rule, base, forward, tensors):
    """The rule as a subclass of ``base``: torch.autograd.Function or its single-level kin."""

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.consts = inputs[tensors:]
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.without_tangent = rule.not_differentiable
        if rule.tangent_outputs and _tangents.constant:
            ctx.without_tangent = rule.tangent_outputs
            needed = _without(ctx.needs_input_grad, rule.tangent_inputs, False)
            kept = _without(inputs, rule.tangent_inputs), _without(outputs, rule.tangent_outputs)
            ctx.save_for_backward(*rule.save(*kept, needed))
        else:
            ctx.save_for_backward(*rule.save(inputs, output, ctx.needs_input_grad))
        if ctx.without_tangent:
            ctx.mark_non_differentiable(*(outputs[i] for i in ctx.without_tangent))
        # Held during this call only, and only for jvp.
        ctx.save_for_forward(*inputs[:tensors], *outputs)

    def backward(ctx, *gy):
        consts = ctx.consts
        gradients = (None,) * tensors
        if any(g is not None for g in gy):
            with _autocast_off():
                gradients = rule.vjp(ctx.saved_tensors, consts, ctx.needs_input_grad, *gy)
        return (*gradients, *(None,) * len(consts))

    def jvp(ctx, *tangents):
        saved = [None if s is None else _split(s)[0] for s in ctx.saved_tensors]
        primals = (*saved[:tensors], *ctx.consts)
        out = saved[tensors] if len(saved) == tensors + 1 else tuple(saved[tensors:])
        with (
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
            _autocast_off(),
        ):
            ty = rule.jvp(primals, out, tangents[:tensors])
            if isinstance(ty, tuple):  # the engine wants a tangent for each of several outputs
                ty = _without(ty, ctx.without_tangent)
                ty = tuple(
                    torch.zeros_like(o) if t is None and i not in ctx.without_tangent else t
                    for i, (o, t) in enumerate(zip(out, ty, strict=True))
                )
            return ty

    def vmap(info, dims, *args):
        return rule.vmap(info, dims, *args)

    methods = dict(
        forward=forward,
        setup_context=setup_context,
        backward=backward,
        jvp=jvp,
        vmap=vmap,
    )
    body = {name: staticmethod(method) for name, method in methods.items()}
    return type(rule.__name__, (base,), body | {"__doc__": rule.__doc__})


def _short_way(rule, function, tensors):
    """The rule where no transform is active: entered below Function.apply, which asks for them.

    No forward mode can follow, so nothing is kept for it.
    """

    def forward(ctx, *args):
        out = rule.kernel(*args)
        ctx.set_materialize_grads(False)
        ctx.consts = args[tensors:]
        if rule.not_differentiable:
            ctx.mark_non_differentiable(*(out[i] for i in rule.not_differentiable))
        ctx.save_for_backward(*rule.save(args, out, ctx.needs_input_grad))
        return out

    body = {"forward": forward, "setup_context": _SingleLevelFunction.setup_context}
    body = {name: staticmethod(method) for name, method in body.items()}
    short = type(rule.__name__, (function,), body | {"__doc__": rule.__doc__})
    return super(torch.autograd.Function, short).apply


def _without(values, places, nothing=None):
    return tuple(nothing if i in places else v for i, v in enumerate(values))


def _forward_mode_may_follow():
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _autograd_kernel(rule, op, tensors):
    def below(*args):
        return _below(op, args)

    if rule.composite is None or rule.deferred:
        apply = _function(rule, _SingleLevelFunction, below, tensors).apply

        def differentiable(*args):
            with enable_single_level_autograd_function():
                return apply(*args)
    else:
        differentiable = _composite(rule)

    def kernel(*args):
        inputs = args[:tensors]
        if torch.is_grad_enabled() and _C._any_requires_grad(*inputs):
            return differentiable(*args)
        if _C._is_fwd_grad_enabled():
            pairs = [_split(a) for a in inputs]
            tangents = tuple(t for _, t in pairs)
            live = [t for t in tangents if t is not None]
            if live:
                if rule.composite is not None:
                    return _composite(rule)(*args)
                primals = (*(p for p, _ in pairs), *args[tensors:])
                with _autocast_off():
                    if any(map(_batched_by_autograd, live)):
                        # The primal must not become batched: two calls instead of a dual.
                        y = op(*primals)
                        return _join(y, rule.jvp(primals, y, tangents))
                    # The op's own tangents, where it has such, belong to the primal here.
                    with contextlib.nullcontext() if rule.tangent_outputs else _of_tangents():
                        return _join(*rule.dual(primals, tangents))
        with _C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


def _composite(rule):
    def composite(*args):
        with _autocast_off():
            return rule.composite(*args)

    return composite


def _differentiate_composite(rule):
    """Give ``rule`` the derivatives of its composite."""

    def pulled(args, live):
        """The composite's results, and its VJP for the tensors numbered ``live``."""

        def results(*tensors):
            full = list(args)
            for i, t in zip(live, tensors, strict=True):
                full[i] = t
            return rule.composite(*full)

        return torch.func.vjp(results, *(args[i] for i in live))

    def vjp(saved, consts, needs, *gy):
        live = [i for i, t in enumerate(saved) if t is not None and needs[i]]
        out, pull = pulled((*saved, *consts), live)
        gy = (torch.zeros_like(o) if g is None else g for o, g in zip(out, gy, strict=True))
        gradients = dict(zip(live, pull(tuple(gy)), strict=True))
        return tuple(gradients.get(i) for i in range(len(saved)))

    def jvp(primals, out, tangents):
        # A VJP is linear in its cotangents, and its own VJP is the JVP: torch.func.jvp cannot be
        # entered inside another level of forward mode.
        live = [i for i, t in enumerate(tangents) if t is not None]
        out, pull = pulled(primals, live)
        _, push = torch.func.vjp(lambda *gy: pull(gy), *map(torch.zeros_like, out))
        return push(tuple(tangents[i] for i in live))

    def dual(primals, tangents):
        out = rule.op(*primals)
        return out, jvp(primals, out, tangents)

    rule.save = staticmethod(lambda args, out, needs: args[: rule.tensors])
    rule.vjp, rule.jvp, rule.dual = map(staticmethod, (vjp, jvp, dual))


def _below(op, args):
    """Run ``op`` under this level.  Outer torch.func levels, if any, must still record."""
    if not _C._are_functorch_transforms_active():
        with _C._AutoDispatchBelowAutograd():
            return op(*args)
    with (
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),
        _C._AutoDispatchBelowAutograd(),
    ):
        return op(*args)


def _batched_by_autograd(t):
    """Whether ``t`` comes from the older vmap, which is_grads_batched and gradcheck use."""
    return _C._functorch.is_legacy_batchedtensor(t)


def _split(t):
    """(primal, tangent or None) at this level.

    Always asks: forward_ad._current_level is not set when a compiled graph is replayed.  The older
    vmap has no rule for the view that unpacking makes.
    """
    if not isinstance(t, Tensor) or _batched_by_autograd(t):
        return t, None
    return torch._VF._unpack_dual(t, level=0)


def _join(y, ty):
    if isinstance(y, tuple):
        return tuple(map(_join, y, ty))
    return y if ty is None else torch._VF._make_dual(y, ty, level=0)


def _autocast_off():
    """The primitives in a rule keep the dtype of the op: a matmul there must not turn bf16."""
    if _C._is_any_autocast_enabled():
        return _C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS)
    return contextlib.nullcontext()


# Whether dispatcher ops may be used: they are, until the self-test finds otherwise.
_dispatcher_composes = True


def self_test(f: Callable, reference: Callable) -> None:
    """Check that the private parts of torch used above still mean what they did.

    If not, every op becomes its torch.autograd.Function: right under all eager transforms, while
    torch.compile of a function that differentiates inside is then not available.

    Args:
        f: One of our ops, from (1, 3) tensors to the same.
        reference: The same function made of native ops.
    """
    global _dispatcher_composes
    x = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    t = torch.tensor([[1.0, 3.0, -2.0]], dtype=torch.float64)

    def second(g):
        return torch.func.grad(lambda z: (torch.func.jvp(g, (z,), (t,))[1] * t).sum())(x)

    try:
        with warnings.catch_warnings():  # torch's own, which some programs turn into errors
            warnings.simplefilter("ignore")
            ok = torch.allclose(second(f), second(reference))
    except Exception:
        ok = False
    if not ok:
        _dispatcher_composes = False
        warnings.warn(
            f"jacobian_ops: torch {torch.__version__} changed internals that dispatcher ops rely "
            "on; falling back to torch.autograd.Function (eager only)",
            stacklevel=2,
        )
