"""Energy-based models as full citizens of Pyro."""

from pyro_ebm import energy, infer, kernels, losses, partition, zoo
from pyro_ebm._guard import UnnormalizedError, UnnormalizedWarning
from pyro_ebm.diagnostics import ConvergenceWarning, to_arviz
from pyro_ebm.distribution import Flat, GibbsBoltzmann
from pyro_ebm.energy import Clamped, Energy, Given, Scaled, Sum, force
from pyro_ebm.factor_graph import FactorGraph
from pyro_ebm.free_energy import FreeEnergy, FreeEnergyEstimate
from pyro_ebm.infer import HMC, MALA, MCMC, NUTS, ChEES, Exchange, SamplingError, Tempered, audit
from pyro_ebm.minimize import Minimum, MinimumWarning, minimize
from pyro_ebm.monitor import Monitor, TrainingError, TrainingWarning
from pyro_ebm.negatives import Negatives
from pyro_ebm.partition import (
    Estimate,
    LogPartition,
    entropy,
    kl_divergence,
    log_bayes_factor,
    log_partition,
)

__version__ = "0.1.0"
__all__ = [
    "HMC",
    "MALA",
    "MCMC",
    "NUTS",
    "ChEES",
    "Clamped",
    "ConvergenceWarning",
    "Energy",
    "Exchange",
    "FactorGraph",
    "Estimate",
    "Flat",
    "FreeEnergy",
    "FreeEnergyEstimate",
    "GibbsBoltzmann",
    "Given",
    "LogPartition",
    "Minimum",
    "MinimumWarning",
    "Monitor",
    "Negatives",
    "SamplingError",
    "Scaled",
    "Sum",
    "Tempered",
    "TrainingError",
    "TrainingWarning",
    "UnnormalizedError",
    "UnnormalizedWarning",
    "audit",
    "energy",
    "entropy",
    "force",
    "infer",
    "kernels",
    "kl_divergence",
    "log_bayes_factor",
    "log_partition",
    "losses",
    "minimize",
    "partition",
    "to_arviz",
    "zoo",
]
