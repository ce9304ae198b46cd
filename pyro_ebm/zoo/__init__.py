"""Models of the field, each an energy."""

from pyro_ebm.zoo.boltzmann import RBM, Ising, Potts
from pyro_ebm.zoo.deep import MLPEnergy

__all__ = ["RBM", "Ising", "MLPEnergy", "Potts"]
