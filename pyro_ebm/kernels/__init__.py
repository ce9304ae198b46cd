"""Markov kernels: pure functions on an immutable state, batched over chains."""

from pyro_ebm.kernels.base import Dense, Diagonal, Kernel, MoveInfo, State, metropolis
from pyro_ebm.kernels.discrete import gibbs
from pyro_ebm.kernels.exchange import ExchangeInfo, ExchangeState, exchange
from pyro_ebm.kernels.hmc import TrajectoryInfo, hmc
from pyro_ebm.kernels.langevin import LangevinInfo, PhaseState, mala, sgld, ula, underdamped
from pyro_ebm.kernels.nuts import NutsInfo, nuts
from pyro_ebm.kernels.tempering import (
    TemperedInfo,
    TemperedState,
    adapt_ladder,
    communication_barrier,
    tempered,
)

__all__ = [
    "Dense",
    "Diagonal",
    "ExchangeInfo",
    "ExchangeState",
    "Kernel",
    "LangevinInfo",
    "MoveInfo",
    "NutsInfo",
    "PhaseState",
    "State",
    "TemperedInfo",
    "TemperedState",
    "TrajectoryInfo",
    "adapt_ladder",
    "communication_barrier",
    "exchange",
    "gibbs",
    "hmc",
    "mala",
    "metropolis",
    "nuts",
    "sgld",
    "tempered",
    "ula",
    "underdamped",
]
