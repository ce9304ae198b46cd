"""What an energy refers to, and how its Pyro parameters are bound to one value."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pyro
import torch
from pyro.nn.module import PyroModule
from pyro.poutine.lift_messenger import LiftMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.Size)
_LIBRARIES = ("torch", "pyro", "numpy")


def _global_names(code: CodeType) -> Iterator[str]:
    """Yield the names that code looks up, also in the functions and loops inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _global_names(constant)


def _of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        with contextlib.suppress(ValueError):  # an empty cell
            yield name, cell.cell_contents
    names = inspect.signature(function).parameters if function.__defaults__ else {}
    yield from ((n, p.default) for n, p in names.items() if p.default is not p.empty)
    for name in _global_names(function.__code__):
        thing = function.__globals__.get(name)
        if isinstance(thing, (Tensor, list, tuple, dict)) or callable(thing):
            yield name, thing


def _inside(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield the named things that one thing holds: closures, defaults, attributes, items."""
    if isinstance(thing, functools.partial):
        yield "func", thing.func
        yield from ((str(i), part) for i, part in enumerate(thing.args))
        yield from thing.keywords.items()
    elif inspect.ismethod(thing):
        yield "self", thing.__self__
        yield "func", thing.__func__
    elif inspect.isfunction(thing):
        if str(thing.__module__).partition(".")[0] not in _LIBRARIES:
            yield from _of_function(thing)
    elif isinstance(thing, (list, tuple)):
        yield from ((str(i), part) for i, part in enumerate(thing))
    elif isinstance(thing, dict):
        yield from ((str(key), part) for key, part in thing.items())
    elif not inspect.ismodule(thing) and not isinstance(thing, Tensor):
        yield from ((k, v) for k, v in getattr(thing, "__dict__", {}).items() if k[:1] != "_")


def referenced(energy: Any) -> Iterator[tuple[str, Tensor | nn.Module]]:
    """Yield the tensors and modules that an energy reaches, with the names they have there.

    Closures, defaults, globals, partials, bound methods, attributes and nested callables are
    searched; modules yield themselves, and their parameters are theirs to list.
    """
    seen: set[int] = set()
    queue: list[tuple[str, Any, int]] = [("energy", energy, 0)]
    while queue:
        name, thing, depth = queue.pop()
        if id(thing) in seen or isinstance(thing, _PLAIN) or depth > 6:
            continue
        seen.add(id(thing))
        if isinstance(thing, (Tensor, nn.Module)):
            yield name, thing
        queue += [(name, part, depth + 1) for name, part in _inside(thing)]


def modules_of(energy: Any) -> dict[str, nn.Module]:
    """Return the outermost modules that an energy reaches, by the names they have there."""
    found = [(name, m) for name, m in referenced(energy) if isinstance(m, nn.Module)]
    below = {id(sub) for _, m in found for sub in m.modules() if sub is not m}
    tops: dict[str, nn.Module] = {}
    for name, module in found:
        if id(module) not in below:
            while name in tops:  # two closures may call two networks "net"
                name += "'"
            tops[name] = module
    return tops


def _all_modules(energy: Any) -> list[nn.Module]:
    """Return the modules that an energy reaches, in an order that copies of it share."""
    modules = {id(m): m for top in modules_of(energy).values() for m in top.modules()}
    return list(modules.values())


@contextlib.contextmanager
def evaluating(energy: Any) -> Iterator[None]:
    """Put the modules of an energy in evaluation mode, and back into the mode each had.

    While chains run, dropout must not make the energy random, nor batch norm learn from them.
    """
    modules = [m for top in modules_of(energy).values() for m in top.modules() if m.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextlib.contextmanager
def sampling(energy: Any) -> Iterator[None]:
    """As :func:`evaluating`, with parameters that autograd does not record.

    Those of modules and leaf tensors of closures: chains need gradients in their points only.
    """
    found = [thing for _, thing in referenced(energy)]
    tops = [thing for thing in found if isinstance(thing, nn.Module)]
    modules = {id(m): m for top in tops for m in top.modules()}.values()
    training = [m for m in modules if m.training]
    tensors = [thing for thing in found if isinstance(thing, Tensor)]
    tensors += [p for m in modules for p in m._parameters.values() if p is not None]
    learned = [t for t in tensors if t.requires_grad and t.is_leaf]
    for module in training:
        module.training = False
    for tensor in learned:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for tensor in learned:
            tensor.requires_grad_(True)


def _lifted_values() -> dict[str, Any]:
    """Return what the ``poutine.lift`` handlers in force have drawn for parameters, by name."""
    lifts = [m for m in _PYRO_STACK if isinstance(m, LiftMessenger)]
    return {name: msg["value"] for lift in lifts for name, msg in lift._samples_cache.items()}


def _of_pyro_module(module: PyroModule, lifted: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Read every Pyro attribute of a module once, inside its context."""
    for name in [*module._pyro_samples, *module._pyro_params]:
        yield name, getattr(module, name)
    for name, value in list(module._parameters.items()):
        if value is not None and not name.endswith("_unconstrained"):
            getattr(module, name)  # a pyro.param statement, whose value Pyro drops
            full = module._pyro_get_fullname(name)
            if full in lifted or full in _lifted_values():
                yield name, _lifted_values()[full]
    for name in list(module._modules):
        getattr(module, name)  # a pyro.module statement, where it is a plain module


def _of_plain_module(
    module: nn.Module, lifted: dict[str, Any]
) -> Iterator[tuple[nn.Module, str, Any]]:
    """Match parameters with what ``pyro.module`` registered under a lift, by name and shape.

    The module that was registered may be a part of this one, or the reverse.

    Raises:
        ValueError: If a parameter has several matches.
    """
    drawn = [(full, path) for full in lifted for path in full.split("$$$")[1:]]
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:  # pyro.module passes them over
            continue
        n = parameter.dim()
        exact = {full for full, path in drawn if path == name}
        similar = {
            full
            for full, path in drawn
            if f".{path}".endswith(f".{name}") or f".{name}".endswith(f".{path}")
        }
        # Plates and vectorised particles add dimensions in front.
        fits = {full for full in similar if lifted[full].shape[-n:] == parameter.shape or not n}
        found = exact & fits or fits or exact
        if len(found) > 1:
            listed = ", ".join(map(repr, sorted(found)))
            raise ValueError(
                f"poutine.lift: parameter {name!r} of {type(module).__name__} must match one "
                f"lifted parameter, got {listed}; make the energies PyroModules, each with a name"
            )
        owner, _, leaf = name.rpartition(".")
        yield from ((module.get_submodule(owner), leaf, lifted[full]) for full in found)


class Binding:
    """The Pyro parameters of an energy, each bound to the value that it has in this trace.

    Reading a ``PyroSample`` or ``PyroParam`` attribute is a Pyro statement: outside the trace
    it is drawn anew, or never registered. A binding reads each once, while the model runs, and
    :meth:`active` lets the energy see those values whenever it is evaluated.
    """

    def __init__(self, energy: Any) -> None:
        self.energy = energy
        self.values: list[tuple[nn.Module, str, Any]] = []
        modules = _all_modules(energy)
        pyros = [m for m in modules if isinstance(m, PyroModule)]
        samples = [name for m in pyros for name in m._pyro_samples]
        self.drawn_outside = () if _PYRO_STACK else tuple(samples)
        lifted = _lifted_values()
        with contextlib.ExitStack() as stack:
            for context in {id(m._pyro_context): m._pyro_context for m in pyros}.values():
                stack.enter_context(context)
            for module in pyros:
                self.values += [(module, n, v) for n, v in _of_pyro_module(module, lifted)]
        for top in modules_of(energy).values() if lifted else []:
            self.values += _of_plain_module(top, lifted)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let the energy's modules show the bound values."""
        # An entry in the instance's own dictionary goes before any module attribute.
        before = [
            (module, name, module.__dict__.get(name, ...)) for module, name, _ in self.values
        ]
        for module, name, value in self.values:
            module.__dict__[name] = value
        try:
            yield
        finally:
            for module, name, value in before:
                if value is ...:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = value

    # A copy of an energy shares the modules that it reaches through functions and has copies of
    # the others. So copies and pickles remember places, and the values without their graph.
    def __getstate__(self) -> tuple[Any, ...]:
        place = {id(module): i for i, module in enumerate(_all_modules(self.energy))}
        values = [(place[id(module)], name, _cut(value)) for module, name, value in self.values]
        return self.energy, values, self.drawn_outside

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.energy, values, self.drawn_outside = state
        modules = _all_modules(self.energy)
        self.values = [(modules[i], name, value) for i, name, value in values]


def _cut(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def registered_name(leaf: Tensor) -> str | None:
    """Return the name of a parameter in Pyro's parameter store, if it is there."""
    return pyro.get_param_store()._param_to_name.get(leaf)


def python_state(energy: Any) -> dict[str, str]:
    """Describe the plain Python values that an energy reaches: counters, lists, flags.

    An energy that changes them as it runs is more than its tensor operations.
    """
    seen: set[int] = set()
    found: dict[str, str] = {}
    queue: list[tuple[str, Any, int]] = [("energy", energy, 0)]
    while queue:
        path, thing, depth = queue.pop()
        plain = isinstance(thing, (int, float, str, bool, itertools.count))
        if plain or (isinstance(thing, (list, dict, set, tuple)) and id(thing) not in seen):
            found[path] = repr(thing) if plain else str(len(thing))
        if plain or id(thing) in seen or isinstance(thing, Tensor) or depth > 6:
            continue
        seen.add(id(thing))
        queue += [(f"{path}.{name}", part, depth + 1) for name, part in _inside(thing)]
        code = getattr(thing, "__code__", None)
        if code is not None and str(thing.__module__).partition(".")[0] not in _LIBRARIES:
            names = set(_global_names(code))
            values = {n: thing.__globals__[n] for n in names if n in thing.__globals__}
            queue += [
                (f"{path}.{n}", v, depth + 1)
                for n, v in values.items()
                if isinstance(v, (int, float, str, bool, itertools.count))
            ]
    return found
