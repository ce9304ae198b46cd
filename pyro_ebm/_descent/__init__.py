"""Descents on the tensor level, a module each."""

from pyro_ebm._descent.annealing import anneal, anneal_states
from pyro_ebm._descent.base import Found, descend
from pyro_ebm._descent.lbfgs import lbfgs
from pyro_ebm._descent.newton import newton
from pyro_ebm._descent.plain import by_torch
from pyro_ebm._descent.proximal import proximal
from pyro_ebm._descent.saddles import to_minimum
from pyro_ebm._descent.states import Code, coordinate_descent, enumerate_states

__all__ = [
    "Code",
    "Found",
    "anneal",
    "anneal_states",
    "by_torch",
    "coordinate_descent",
    "descend",
    "enumerate_states",
    "lbfgs",
    "newton",
    "proximal",
    "to_minimum",
]
