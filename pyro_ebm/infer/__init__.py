"""The Pyro side: audits, reparametrisations, kernels that keep their records."""

from pyro_ebm.infer.audit import Finding, audit
from pyro_ebm.infer.recording import RecordedHMC, RecordedNUTS
from pyro_ebm.infer.reparam import IndexReparam

__all__ = ["Finding", "IndexReparam", "RecordedHMC", "RecordedNUTS", "audit"]
