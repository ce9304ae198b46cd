"""Kernels of points in several parts: named sites in turn, and latents drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import Kernel, MoveInfo, PointState, check_count, impossible


class MixedState(NamedTuple):
    """Chains of several parts: ``position`` by name, and the ``energy`` ``(*chains,)``."""

    position: dict[str, Tensor]
    energy: Tensor


class MixedInfo(NamedTuple):
    """The record of a move of all parts, each of shape ``(*chains,)``.

    ``energy`` is that after the move; ``accept_prob`` is the mean over the parts, ``accepted``
    and ``invalid`` whether any of them was so. ``parts`` are their own records by name.
    """

    energy: Tensor
    accept_prob: Tensor
    accepted: Tensor
    invalid: Tensor
    parts: dict[str, Any]


def mixed(energy: Energy, kernels: Mapping[str, Callable[[Energy], Kernel]]) -> Kernel:
    r"""Move named parts in turn, continuous and discrete ones, each given the others.

    .. math:: x_k' \sim T_k(\cdot \mid x_k; \, U(x_1', \dots, x_{k-1}', \cdot, x_{k+1}, \dots))

    Each kernel that is right for the conditional energy of its part leaves the law of all
    invariant (Metropolis within Gibbs). A kernel is made and started afresh for every move, since
    the other parts have moved: momenta are drawn anew, and a :func:`gibbs` wants ``check=False``.
    Parts to be kept fixed are bound to the energy: ``ebm.Given(energy, x=x)``.

    Args:
        energy: The potential of the parts, called by their names, to ``(*chains,)``.
        kernels: For each part, in the order of the moves, what makes the kernel of a potential.

    Returns:
        The kernel, of positions that map names to tensors ``(*chains, *event)``, with
        :class:`~pyro_ebm.kernels.MixedState` and :class:`~pyro_ebm.kernels.MixedInfo`.

    Raises:
        ValueError: If there are no kernels; from ``init``, if a part has none.

    References:
        | Markov Chains for Exploring Posterior Distributions (Tierney, 1994)
        | https://doi.org/10.1214/aos/1176325750

    Example:
        >>> E = lambda x, z: 0.5 * (x - 4.0 * z).square().sum(-1)  # two clusters on a line
        >>> of_z = lambda u: ebm.kernels.gibbs(u, torch.tensor([0.0, 1.0]))
        >>> kernel = mixed(E, {"x": lambda u: ebm.kernels.mala(u, 0.5), "z": of_z})
        >>> state = kernel.init({"x": torch.zeros(5, 1), "z": torch.zeros(5, 1)})
        >>> state, info = kernel.step(state)
        >>> sorted(state.position), info.parts["x"].accept_prob.shape
        (['x', 'z'], torch.Size([5]))
    """
    if not kernels:
        raise ValueError("kernels must hold at least one part, got none")

    @torch.no_grad()
    def init(position: Any) -> MixedState:
        if set(position) != set(kernels):
            raise ValueError(
                f"position must have the parts {sorted(kernels)} of the kernels, got "
                f"{sorted(position)}"
            )
        return MixedState(dict(position), energy(**position))

    def step(state: MixedState) -> tuple[MixedState, MixedInfo]:
        position, records = dict(state.position), {}
        for name, make in kernels.items():
            others = {other: part for other, part in position.items() if other != name}
            kernel = make(lambda part, n=name, rest=others: energy(**{n: part}, **rest))
            moved, records[name] = kernel.step(kernel.init(position[name]))
            position[name] = moved.position
        infos = list(records.values())
        value = infos[-1].energy
        mean = torch.stack([info.accept_prob for info in infos]).mean(0)
        accepted, invalid = (
            torch.stack([getattr(info, flag) for info in infos]).any(0)
            for flag in ("accepted", "invalid")
        )
        return MixedState(position, value), MixedInfo(value, mean, accepted, invalid, records)

    return Kernel(init, step)


def augmented(
    energy: Energy,
    latent: Callable[[Tensor], Any],
    point: Callable[[Any], Tensor],
    *,
    num_sweeps: int = 1,
) -> Kernel:
    r"""Draw latents given the point, then the point given the latents: data augmentation.

    .. math:: z \sim p(z \mid x), \quad x' \sim p(x' \mid z)

    Both laws must be those of one joint law whose marginal is the target. For a restricted
    Boltzmann machine it is block Gibbs sampling, as a chain of the visible units alone.

    Args:
        energy: The potential of the points, ``(*chains, *event)`` to ``(*chains,)``; for the
            records alone.
        latent: Draws latents of points.
        point: Draws points of latents.
        num_sweeps: How many times a step draws both; it evaluates the energy once.

    Returns:
        The kernel.

    Raises:
        ValueError: If ``num_sweeps`` is no whole number from 1 on.

    References:
        | The Calculation of Posterior Distributions by Data Augmentation (Tanner and Wong, 1987)
        | https://doi.org/10.1080/01621459.1987.10478458

    Example:
        >>> rbm = ebm.zoo.RBM(6, 4)
        >>> kernel = augmented(rbm, rbm.sample_hidden, rbm.sample_visible)
        >>> state, _ = kernel.step(kernel.init(torch.zeros(5, 6)))
        >>> state.position.shape
        torch.Size([5, 6])
    """
    check_count("num_sweeps", num_sweeps, 1)

    @torch.no_grad()
    def init(position: Tensor) -> PointState:
        return PointState(position, energy(position))

    @torch.no_grad()
    def step(state: PointState) -> tuple[PointState, MoveInfo]:
        x = state.position
        for _ in range(num_sweeps):
            x = point(latent(x))
        value = energy(x)
        ones = torch.ones_like(value)
        return PointState(x, value), MoveInfo(value, ones, ones.bool(), impossible(value))

    return Kernel(init, step)
