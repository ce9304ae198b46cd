"""Methods for log Z: each declares what it gives, and engines that need more are refused."""

from pyro_ebm.partition.base import LogPartition, Method, log_partition
from pyro_ebm.partition.contrastive import Contrastive
from pyro_ebm.partition.exact import Exact
from pyro_ebm.partition.importance import Importance
from pyro_ebm.partition.laplace import Laplace
from pyro_ebm.partition.quadrature import Quadrature
from pyro_ebm.partition.variational import Variational

__all__ = [
    "Contrastive",
    "Exact",
    "Importance",
    "Laplace",
    "LogPartition",
    "Method",
    "Quadrature",
    "Variational",
    "log_partition",
]
