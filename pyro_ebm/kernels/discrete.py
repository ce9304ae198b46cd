"""Kernels on finite supports."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import Kernel, MoveInfo


class SpinState(NamedTuple):
    """Chains: their ``position`` and ``energy`` ``(*chains,)``."""

    position: Tensor
    energy: Tensor


def gibbs(energy: Energy, values: Tensor, num_chain_dims: int = 1) -> Kernel:
    r"""Gibbs sampling: a sweep draws each component from its conditional law.

    .. math:: x_i \sim p(x_i \mid x_{-i}) \propto \exp(-U(x))

    One step sweeps all components once, in order, at the cost of as many energies per component
    as it has values.

    Args:
        energy: The potential :math:`U`, ``(*chains, *event)`` to ``(*chains,)``.
        values: The values that each component can take, of shape ``(K,)``.
        num_chain_dims: The number of leading dimensions that are chains.

    Returns:
        The kernel.

    References:
        | Stochastic Relaxation, Gibbs Distributions, and the Bayesian Restoration of Images
          (Geman and Geman, 1984)
        | https://doi.org/10.1109/TPAMI.1984.4767596

    Example:
        >>> spins = torch.tensor([0.0, 1.0])
        >>> kernel = gibbs(lambda x: -x.sum(-1), spins)
        >>> state, _ = kernel.step(kernel.init(torch.zeros(5, 3)))
        >>> state.position.shape
        torch.Size([5, 3])
    """

    def init(position: Tensor) -> SpinState:
        with torch.no_grad():
            return SpinState(position, energy(position))

    @torch.no_grad()
    def step(state: SpinState) -> tuple[SpinState, MoveInfo]:
        shape = state.position.shape
        flat = state.position.reshape(*shape[:num_chain_dims], -1).clone()
        invalid = torch.zeros_like(state.energy, dtype=torch.bool)
        for i in range(flat.shape[-1]):
            trial = flat.expand(len(values), *flat.shape).clone()
            trial[..., i] = values.reshape(-1, *[1] * num_chain_dims)
            energies = energy(trial.reshape(len(values), *shape))  # shape: (K, *chains)
            invalid |= (energies.isnan() | (energies == -torch.inf)).any(0)
            probs = torch.softmax(-torch.where(energies.isnan(), torch.inf, energies), 0)
            table = probs.reshape(len(values), -1).T.nan_to_num(1.0)  # nowhere finite: any value
            draw = torch.multinomial(table, 1)
            flat[..., i] = values[draw].reshape(shape[:num_chain_dims])
        new = init(flat.reshape(shape))
        ones = torch.ones_like(new.energy)
        return new, MoveInfo(new.energy, ones, ones.bool(), invalid)

    return Kernel(init, step)
