"""Classes of ours for layers of others: a recipe of ours in front of the class as it is."""

from __future__ import annotations

import bisect
import builtins
import dis
import functools
import inspect

# Where a swapped layer keeps its former class, so that restore leaves alone what was built as ours.
FORMER = "_jacobian_ops_former"


class Recipe:
    """What to run in place of a class's own method, where that is known to give the same.

    It is no base of the classes that are made with it: their attributes are those of the layer.  A
    subclass has the function ``ours(module, *args)`` to run as ``method`` of the class, which
    returns NotImplemented where the class's own is to run.

    Attributes:
        natives: The methods that are known.
        method: Which one of the class it is.
        is_linear: Whether it is a linear layer, with a weight (in, out) and a bias.
        activation: The name of the activation that it is, in linear_act_dropout.
        fuses: What runs as one op, in words; empty if it is a layer.
    """

    natives: tuple = ()
    method: str = "forward"
    is_linear: bool = False
    activation: str | None = None
    fuses: str = ""

    @classmethod
    def fits(cls, module) -> bool:
        """Whether the recipe gives what the module gives now.

        By default if the method compiles to the same code as one of ``natives``.
        """
        own = getattr(type(module), cls.method, None)
        return any(_same_code(own, native) for native in cls.natives)


@functools.cache
def derived(former: type, recipe: type[Recipe]) -> type:
    """A class that is ``former`` but for one method; isinstance checks and its name hold."""
    native, ours = getattr(former, recipe.method), recipe.ours
    parameters = list(inspect.signature(native).parameters.values())[1:]
    names = [p.name for p in parameters]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    @functools.wraps(native)
    def method(self, *args, **kwargs):
        given, named = args, dict(kwargs)
        for name in names[len(args) :]:  # ours has other names, in the same order
            if not named or name not in named and name not in defaults:
                break
            given = (*given, named.pop(name, defaults.get(name)))
        result = NotImplemented if named else ours(self, *given)
        return native(self, *args, **kwargs) if result is NotImplemented else result

    body = {"__module__": __name__, "__doc__": recipe.__doc__, "_made_of": (former, recipe)}
    body |= {"__reduce_ex__": _reduce, recipe.method: method}
    return type(former.__name__, (former,), body)


def _reduce(module, protocol):
    """For pickle: the class is made at run time, so it gets what that is made of."""
    reduced = super(type(module), module).__reduce_ex__(max(protocol, 2))
    return (_blank, type(module)._made_of, *reduced[2:])


def _blank(former, recipe):
    cls = derived(former, recipe)
    return cls.__new__(cls)


def recipe_of(module) -> type[Recipe] | None:
    """The recipe of a module's class itself, not of what it derives from."""
    made_of = type(module).__dict__.get("_made_of")
    return None if made_of is None else made_of[1]


def _same_code(f, g) -> bool:
    """Whether two plain functions do the same; what is None under a global name is any."""
    a, b = getattr(f, "__code__", None), g.__code__
    if a is None or hasattr(f, "__wrapped__") or a.co_freevars or b.co_freevars:
        return False
    variadic = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    if (a.co_argcount, a.co_kwonlyargcount) != (b.co_argcount, b.co_kwonlyargcount):
        return False
    if (a.co_flags ^ b.co_flags) & variadic or _instructions(a) != _instructions(b):
        return False
    if f.__defaults__ != g.__defaults__ or f.__kwdefaults__ != g.__kwdefaults__:
        return False
    names = {i.argval for i in dis.get_instructions(b) if i.opname == "LOAD_GLOBAL"}
    return all(_global(f, n) is _global(g, n) for n in names if _global(g, n) is not None)


@functools.lru_cache(maxsize=1024)
def _instructions(code) -> tuple:
    """What it runs, however it was broken into lines and whatever its local variables' names."""
    kept = [i for i in dis.get_instructions(code) if i.opname not in ("NOP", "EXTENDED_ARG")]
    offsets = [i.offset for i in kept]

    def argument(i):
        if i.opcode in dis.hasjrel or i.opcode in dis.hasjabs:
            return bisect.bisect_left(offsets, i.argval)
        return i.arg if "FAST" in i.opname else (type(i.argval), i.argval)

    return tuple((i.opname, argument(i)) for i in kept)


def _global(f, name):
    return f.__globals__.get(name, getattr(builtins, name, None))
