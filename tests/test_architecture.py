"""Imports point downwards, every module has a layer, and importing changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "pyro_ebm"

# From the ground up: a module imports only from layers below its own. A package is one module.
LAYERS = [
    {
        "_arviz",
        "_bennett",
        "_binding",
        "_chart",
        "_cholesky",
        "_curve",
        "_elimination",
        "_keep",
        "_log_einsum",
        "_math",
        "_signs",
        "_sites",
        "energy",
    },
    {"_contraction", "_factors", "_guard", "_measure", "flat", "kernels", "losses"},
    {"_known", "_short_run"},
    {"_descent", "distribution"},
    {"_free"},
    {"_mode", "_replicas"},
    {"_audit", "_engine", "_model_energy", "_potential", "adaptation", "factor_graph"},
    {"_guide", "_path", "_search", "_traced"},
    {"_auxiliary", "_climb", "_ladder", "_rungs", "_starts", "minimize", "zoo"},
    {"negatives"},
    {"partition"},
    {"free_energy"},
    {"sampling"},
    {"checkpoint", "diagnostics", "monitor"},
    {"_results", "_run"},
    {"infer"},
    {""},  # the package itself, which gathers the public names
    {"_job"},  # what the command line does
    {"cli"},
    {"__main__"},
]
LAYER_OF = {name: height for height, names in enumerate(LAYERS) for name in names}


def modules(root=ROOT):
    """Return the modules of the package: dotted name below the package -> file."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name, source, known, is_package=False):
    """Return the modules of the package that a module's source imports, anywhere in it."""
    package = ["pyro_ebm", *name.split(".")] if name else ["pyro_ebm"]
    if not is_package:
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                found.add(submodule if submodule.removeprefix("pyro_ebm.") in known else origin)
    inside = {n for n in found if n.split(".")[0] == "pyro_ebm"}
    return {n.removeprefix("pyro_ebm").removeprefix(".") for n in inside}


def breach(importer, imported):
    """Say what is wrong with an import between two modules of the package, if anything is."""
    (home, *inner), (away, *part) = importer.split("."), imported.split(".")
    if home != away:
        upwards = LAYER_OF[away] >= LAYER_OF[home]
        return f"{importer} imports {imported}, which is not below it" if upwards else None
    if not inner or (part == ["base"] and inner != ["base"]):
        return None
    return f"{importer} imports {imported}: inside a package all import 'base', and it nothing"


MODULES = modules()


def test_every_module_has_a_layer():
    assert {name.split(".")[0] for name in MODULES} <= set(LAYER_OF)


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "pyro_ebm")
def test_imports_point_downwards(name):
    path = MODULES[name]
    found = imports(name, path.read_text(), MODULES, path.name == "__init__.py")
    assert not [breach(name, other) for other in found if breach(name, other)]


FAULTS = {
    "upwards": ("distribution", "from pyro_ebm.partition import Exact"),
    "sideways": ("minimize", "import pyro_ebm.zoo.deep"),
    "to the package": ("energy", "import pyro_ebm as ebm"),
    "from the package": ("energy", "from pyro_ebm import distribution"),
    "relative": ("energy", "from . import distribution"),
    "relative with a name": ("kernels.base", "from ..distribution import Flat"),
    "in a function": ("energy", "def f():\n    from pyro_ebm.zoo import RBM"),
    "between siblings": ("kernels.hmc", "from pyro_ebm.kernels.langevin import mala"),
    "between siblings, relative": ("kernels.hmc", "from .langevin import mala"),
    "from its own package": ("kernels.hmc", "from pyro_ebm.kernels import mala"),
    "of base": ("kernels.base", "from pyro_ebm.kernels.hmc import hmc"),
    "of the command line": ("", "from pyro_ebm.cli import main"),
}


@pytest.mark.parametrize(("name", "source"), FAULTS.values(), ids=FAULTS)
def test_it_sees_a_wrong_import(name, source):
    known = [*LAYER_OF, "kernels.base", "kernels.hmc", "kernels.langevin"]
    assert any(breach(name, other) for other in imports(name, source, known))


RIGHT = {
    "downwards": ("partition.exact", "from pyro_ebm.distribution import GibbsBoltzmann"),
    "of base": ("kernels.hmc", "from .base import Kernel"),
    "of others": ("energy", "import torch\nfrom pyro.nn import PyroModule"),
    "of the package": ("cli", "import pyro_ebm as ebm\nfrom pyro_ebm import infer, MCMC"),
}


@pytest.mark.parametrize(("name", "source"), RIGHT.values(), ids=RIGHT)
def test_it_lets_right_imports_pass(name, source):
    known = [*LAYER_OF, "kernels.base", "kernels.hmc"]
    assert not [breach(name, o) for o in imports(name, source, known) if breach(name, o)]


def test_a_package_may_import_its_modules():
    source = "from .base import Kernel\nfrom pyro_ebm.kernels import hmc"
    found = imports("kernels", source, ["kernels", "kernels.base", "kernels.hmc"], True)
    assert found == {"kernels.base", "kernels.hmc"}
    assert not [breach("kernels", other) for other in found if breach("kernels", other)]


def python(code):
    """Run code in a fresh interpreter, in which warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


NAMES = [f"pyro_ebm.{name}".rstrip(".") for name in MODULES if name != "__main__"]


def test_importing_imports_nothing_heavy():
    code = f"""
import importlib, sys
for name in {NAMES}:
    importlib.import_module(name)
heavy = ["arviz", "h5netcdf", "matplotlib", "pandas", "scipy", "sklearn", "xarray"]
assert not [name for name in heavy if name in sys.modules], sorted(sys.modules)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_importing_changes_no_global_state():
    code = f"""
import importlib, logging, os, random, signal, sys, warnings
import numpy, pyro, torch
import pyro.infer
from pyro.distributions.distribution import Distribution

def state():
    return {{
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "torch seed": torch.get_rng_state().tolist(),
        "numpy seed": str(numpy.random.get_state()),
        "python seed": random.getstate(),
        "numpy errors": numpy.geterr(),
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro validation": (pyro.settings.get(), pyro.poutine.util.is_validation_enabled()),
        "handlers": list(pyro.poutine.runtime._PYRO_STACK),
        "parameters": list(pyro.get_param_store()),
        "warnings": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "logging": (logging.root.level, list(logging.root.handlers)),
        "environment": dict(os.environ),
        "hook": sys.excepthook,
        "interrupt": signal.getsignal(signal.SIGINT),
    }}

before = state()
for name in {NAMES}:
    importlib.import_module(name)
after = state()
assert not [key for key in before if before[key] != after[key]], after
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_the_page_for_readers_names_every_module():
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    tops = {name.split(".")[0] for name in MODULES} - {"", "__main__"}
    assert not [name for name in sorted(tops) if f"`{name}" not in page]
