"""Models of the field, each an energy."""

from pyro_ebm.zoo.boltzmann import RBM, Ising
from pyro_ebm.zoo.deep import MLPEnergy

__all__ = ["RBM", "Ising", "MLPEnergy"]
