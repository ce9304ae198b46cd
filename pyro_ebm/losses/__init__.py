"""Losses: pure functions of an energy and points, each a way to shape the energy."""

from pyro_ebm.losses.contrastive import contrastive_divergence

__all__ = ["contrastive_divergence"]
