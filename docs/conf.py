"""Sphinx: how the documentation is built (``make docs``)."""

import os

import pyro_ebm

project = "pyro_ebm"
author = "The pyro_ebm authors"
project_copyright = "The pyro_ebm authors"
release = version = pyro_ebm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autosummary_generate = True
# What the package itself shows is described there, and not again in the module it comes from.
autosummary_context = {"shown_by_package": pyro_ebm.__all__}

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Links into other projects' pages need the network: only where one asks for them.
if os.environ.get("DOCS_INTERSPHINX"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "pyro": ("https://docs.pyro.ai/en/stable", None),
    }

html_theme = "furo"
html_title = "pyro_ebm"


def setup(app):
    # A record's docstring says what its fields are; their own only number them.
    field = type(pyro_ebm.LogPartition.value)
    app.connect(
        "autodoc-skip-member", lambda app, what, name, thing, *_: isinstance(thing, field) or None
    )
