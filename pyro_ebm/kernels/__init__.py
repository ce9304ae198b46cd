"""Markov kernels: pure functions on an immutable state, batched over chains."""

from pyro_ebm.kernels.base import (
    Dense,
    Diagonal,
    Kernel,
    MoveInfo,
    PointState,
    State,
    metropolis,
)
from pyro_ebm.kernels.discrete import colouring, gibbs, metropolis_flips
from pyro_ebm.kernels.exchange import ExchangeInfo, ExchangeState, exchange
from pyro_ebm.kernels.hmc import TrajectoryInfo, hmc
from pyro_ebm.kernels.informed import discrete_mala, gibbs_with_gradients
from pyro_ebm.kernels.langevin import LangevinInfo, PhaseState, mala, sgld, ula, underdamped
from pyro_ebm.kernels.mixed import MixedInfo, MixedState, augmented, mixed
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
    "MixedInfo",
    "MixedState",
    "MoveInfo",
    "NutsInfo",
    "PhaseState",
    "PointState",
    "State",
    "TemperedInfo",
    "TemperedState",
    "TrajectoryInfo",
    "adapt_ladder",
    "augmented",
    "colouring",
    "communication_barrier",
    "discrete_mala",
    "exchange",
    "gibbs",
    "gibbs_with_gradients",
    "hmc",
    "mala",
    "metropolis",
    "metropolis_flips",
    "mixed",
    "nuts",
    "sgld",
    "tempered",
    "ula",
    "underdamped",
]
