"""Models of the field, each an energy."""

from pyro_ebm.zoo.deep import MLPEnergy

__all__ = ["MLPEnergy"]
