"""Free coordinates of a support: those in which points move, and the kernels that move them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_ebm._short_run import unconstrained
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import Energy
from pyro_ebm.flat import sites_of, values_of
from pyro_ebm.kernels.base import Kernel, Metric
from pyro_ebm.kernels.discrete import gibbs
from pyro_ebm.kernels.hmc import hmc

QUARTER, MAX_STEPS = 1.4, 8  # leapfrog steps run ahead of time, so less than pi / 2

MakeKernel = Callable[..., Kernel]


class Free:
    """Unconstrained coordinates; on finite supports the components, or the places of the ones.

    A kernel that is given moves one-hot points themselves.

    Args:
        d: The distribution on whose support points are.
        kernel: Makes a kernel of a potential, on continuous supports also of a step; by default
            sweeps of Gibbs sampling, and trajectories of about a quarter of a period.
    """

    def __init__(self, d: GibbsBoltzmann, kernel: MakeKernel | None = None) -> None:
        self.d, self.own = d, kernel
        self.finite = sites_of(d.support, d.event_shape) is not None
        if not self.finite:
            self.transform = _transform(d)
            self.shape = torch.Size(self.transform.inverse_shape(d.event_shape))
            return
        values = values_of(d.support)
        self.one_hot = values is None and kernel is None
        values = torch.arange(d.event_shape[-1]) if values is None else values
        like = d.floating()
        self.values = values.to(like) if values.is_floating_point() else values.to(like.device)
        self.shape = d.event_shape[:-1] if self.one_hot else d.event_shape

    def encode(self, x: Tensor) -> Tensor:
        """Return the coordinates of points."""
        if self.finite:
            return x.argmax(-1) if self.one_hot else x
        return self.transform.inv(x)

    def decode(self, z: Tensor) -> Tensor:
        """Return the points of coordinates."""
        if not self.finite:
            return self.transform(z)
        if self.one_hot:
            return torch.nn.functional.one_hot(z, len(self.values)).to(self.d.floating())
        return z

    def pull(self, potential: Energy) -> Energy:
        """Return a potential of points as one of coordinates."""
        if self.finite:
            return lambda z: potential(self.decode(z))
        return unconstrained(potential, self.transform, self.d.event_dim)

    def kernel(self, potential: Energy, step: Tensor, metric: Metric | None = None) -> Kernel:
        """Make the kernel of chains with the dimensions of the steps ``(*chains,)``.

        Scaled points have a period of about 2 pi; after half of one they are back at the energy
        that they came from.
        """
        if self.own is not None:
            return self.own(potential) if self.finite else self.own(potential, step)
        if self.finite:
            return gibbs(potential, self.values, step.dim())
        num = round(QUARTER / float(step.log().mean().exp()))
        return hmc(potential, step, min(max(num, 1), MAX_STEPS), metric=metric, step_jitter=0.3)


def _transform(d: GibbsBoltzmann) -> Transform:
    try:
        return biject_to(d.support)
    except NotImplementedError:
        raise ValueError(
            f"the support must be finite or map to the reals, got {d.support}"
        ) from None


def inside(law: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return points, with one of a law's for those outside its support; and which are inside.

    Densities and energies are not asked for outside, where they may be anything.
    """
    fine = law.support.check(x)
    if bool(fine.all()):
        return x, fine
    with torch.no_grad():
        like = law.sample()
    return torch.where(fine.reshape(fine.shape + (1,) * len(law.event_shape)), x, like), fine
