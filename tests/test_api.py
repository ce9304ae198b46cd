"""Every public name is documented, annotated and to be found."""

import importlib
import inspect
import pkgutil
import re
import types

import pytest

import pyro_ebm


def public_modules():
    """Return the modules whose names are for users, by dotted name."""
    walk = pkgutil.walk_packages(pyro_ebm.__path__, "pyro_ebm.")
    names = [module.name for module in walk if "._" not in module.name]
    return {name: importlib.import_module(name) for name in ["pyro_ebm", *names]}


MODULES = public_modules()
PUBLIC = {
    f"{name}.{attribute}": getattr(module, attribute)
    for name, module in MODULES.items()
    for attribute in getattr(module, "__all__", ())
}
OWN = {name: thing for name, thing in PUBLIC.items() if not isinstance(thing, types.ModuleType)}
CLASSES = {name: thing for name, thing in OWN.items() if inspect.isclass(thing)}
FUNCTIONS = {name: thing for name, thing in OWN.items() if inspect.isfunction(thing)}
CALLABLES = CLASSES | FUNCTIONS


def methods(cls):
    """Return the public methods that a class defines itself, with its constructor."""
    found = {n: getattr(v, "__func__", v) for n, v in vars(cls).items()}
    own = {n: f for n, f in found.items() if getattr(f, "__module__", "") == cls.__module__}
    shown = {n: f for n, f in own.items() if n == "__init__" or not n.startswith("_")}
    return {n: f for n, f in shown.items() if inspect.isfunction(f)}


def undocumented(thing):
    """Return the parameters of a function or constructor that its docstring does not name."""
    doc = inspect.getdoc(thing) or ""
    if hasattr(thing, "_fields"):  # a record: its fields may be named in running text
        return [name for name in thing._fields if not re.search(rf"\b{name}\b", doc)]
    function = thing.__init__ if inspect.isclass(thing) else thing
    if not getattr(function, "__module__", "").startswith(("pyro_ebm", __name__)):
        return []  # inherited, such as an exception's
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    section = doc.partition("Args:\n")[2]
    return [name for name in parameters if not re.search(rf"^\s+\**{name}:", section, re.M)]


def unannotated(function):
    """Return what lacks an annotation among the parameters and the result of a function."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name in {"self", "cls"}:
        parameters = parameters[1:]
    missing = [p.name for p in parameters if p.annotation is p.empty]
    return missing + ["return"] * (signature.return_annotation is signature.empty)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_module_says_what_it_is(module):
    assert module.__doc__


@pytest.mark.parametrize("name", [n for n, m in MODULES.items() if hasattr(m, "__path__")])
def test_a_package_lists_its_names(name):
    names = MODULES[name].__all__
    assert len(names) == len(set(names))
    assert set(names) <= set(vars(MODULES[name]))


@pytest.mark.parametrize("thing", CALLABLES.values(), ids=CALLABLES)
def test_it_has_a_docstring_of_its_own(thing):
    first = (thing.__doc__ or "").strip().partition("\n")[0]
    assert first.endswith("."), "the first line is one sentence"
    inherited = [base.__doc__ for base in thing.__mro__[1:]] if inspect.isclass(thing) else []
    assert thing.__doc__ not in inherited


@pytest.mark.parametrize("thing", CALLABLES.values(), ids=CALLABLES)
def test_its_arguments_are_described(thing):
    assert not undocumented(thing)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function_is_annotated(function):
    assert not unannotated(function)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_the_methods_are_annotated(cls):
    missing = {name: unannotated(function) for name, function in methods(cls).items()}
    assert not {name: gaps for name, gaps in missing.items() if gaps}


def test_these_tests_see_gaps():
    def bare(x, *rest):
        """Do something.

        Args:
            x: Something.
        """

    assert undocumented(bare) == ["rest"]
    assert unannotated(bare) == ["x", "rest", "return"]
