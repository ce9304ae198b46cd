"""The Pyro side: chains, audits, reparametrisations, kernels that keep their records."""

from pyro_ebm._audit import Finding, audit
from pyro_ebm.infer.base import HMC, MALA, NUTS, ChEES, Tempered
from pyro_ebm.infer.exchange import Exchange
from pyro_ebm.infer.learning import EnergyLoss
from pyro_ebm.infer.mcmc import MCMC, SamplingError
from pyro_ebm.infer.recording import RecordedHMC, RecordedNUTS
from pyro_ebm.infer.reparam import IndexReparam

__all__ = [
    "HMC",
    "MALA",
    "MCMC",
    "NUTS",
    "ChEES",
    "EnergyLoss",
    "Exchange",
    "Finding",
    "IndexReparam",
    "RecordedHMC",
    "RecordedNUTS",
    "SamplingError",
    "Tempered",
    "audit",
]
