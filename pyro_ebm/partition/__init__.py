"""Methods for log Z: each declares what it gives, and engines that need more are refused."""

from pyro_ebm.partition.annealed import Annealed, Bracket
from pyro_ebm.partition.base import LogPartition, Method, log_partition
from pyro_ebm.partition.bridge import MBAR, Bridge
from pyro_ebm.partition.contrastive import Contrastive
from pyro_ebm.partition.exact import Exact
from pyro_ebm.partition.importance import Importance
from pyro_ebm.partition.information import (
    Estimate,
    entropy,
    kl_divergence,
    log_bayes_factor,
)
from pyro_ebm.partition.laplace import Laplace
from pyro_ebm.partition.quadrature import Quadrature
from pyro_ebm.partition.smc import SMC
from pyro_ebm.partition.table import Table
from pyro_ebm.partition.variational import Variational

__all__ = [
    "MBAR",
    "SMC",
    "Annealed",
    "Bracket",
    "Bridge",
    "Contrastive",
    "Estimate",
    "Exact",
    "Importance",
    "Laplace",
    "LogPartition",
    "Method",
    "Quadrature",
    "Table",
    "Variational",
    "entropy",
    "kl_divergence",
    "log_bayes_factor",
    "log_partition",
]
