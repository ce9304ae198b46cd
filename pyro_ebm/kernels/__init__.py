"""Markov kernels: pure functions on an immutable state, batched over chains."""

from pyro_ebm.kernels.base import Kernel, MoveInfo, State, metropolis
from pyro_ebm.kernels.discrete import gibbs
from pyro_ebm.kernels.langevin import mala, ula

__all__ = ["Kernel", "MoveInfo", "State", "gibbs", "mala", "metropolis", "ula"]
