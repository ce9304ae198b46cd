"""Free energies: latent variables summed, integrated or minimised out of an energy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_ebm._math import Minimum, check_positive_beta, soft_minimum
from pyro_ebm._model_energy import ModelFreeEnergy
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import Energy, Given
from pyro_ebm.flat import MAX_STATES, Flat, num_states, values_of
from pyro_ebm.minimize import minimize
from pyro_ebm.partition import Exact, Method, Quadrature

__all__ = ["FreeEnergy", "FreeEnergyEstimate", "ModelFreeEnergy"]


class FreeEnergyEstimate(NamedTuple):
    """A free energy: ``value``, ``std_error`` and effective sample size ``ess``, ``(*batch,)``.

    ``bound`` is ``"upper"`` or ``"lower"`` where the value is, in the mean, a bound, else None.
    """

    value: Tensor
    std_error: Tensor
    ess: Tensor
    bound: str | None


class FreeEnergy(nn.Module):
    r"""The free energy of an energy with a latent variable, an energy again.

    .. math:: F_\beta(x) = -\frac{1}{\beta} \log \int \exp(-\beta E(x, z)) \, m(dz) ,
        \quad F_\infty(x) = \min_z E(x, z)

    It is differentiable in x, in beta and in all parameters; at :math:`\beta = \infty` by the
    envelope theorem, as the gradient of E at the minimum. With a normalised measure m it falls
    with :math:`\beta`, from the mean energy to the least; with the counting measure it rises to
    the least. Mind that tempering comes before the sum: :math:`F_\beta` is not :math:`F_1`, so
    that ``GibbsBoltzmann(F, base, beta)`` tempers a model with latents only if F has that beta.

    The minimum is that of all states where they are few enough to count; elsewhere it is the one
    that a search from a draw of ``latent`` finds, perhaps a local one: ask for more by
    ``method={"num_starts": 20}``.

    A method that draws anew at each evaluation makes a noisy energy: pass
    ``common_random_numbers=True`` where it goes into chains. :class:`~.partition.Annealed` then
    has a function for each shape of batch, and chains need one for all: take
    :class:`~.partition.Importance`.

    Args:
        energy: Maps points and a latent, ``(*batch, *event)`` each, whose batches broadcast, to
            energies ``(*batch,)``; the latent is the last argument.
        latent: The measure m: a :class:`~pyro_ebm.Flat`, or a distribution over the latent.
        beta: The inverse temperature, positive; ``math.inf`` for the minimum.
        method: A method of :mod:`pyro_ebm.partition`, at :math:`\beta = \infty` a dictionary of
            options of :func:`~pyro_ebm.minimize`. By default the exact one where there is one:
            enumeration, quadrature in up to three dimensions; ``F.method`` says which.

    Raises:
        TypeError: If the energy is not callable or the latent no distribution.
        ValueError: If beta is not positive, or infinite as a tensor, or no method is given where
            none is exact.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> means = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
        >>> components = lambda x, k: 0.5 * (x - means[k]).square().sum(-1)
        >>> latent = ebm.Flat((), constraints.integer_interval(0, 1))
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
        >>> FreeEnergy(components, latent)(x)                  # a Gaussian mixture
        tensor([0.4890, 0.2986])
        >>> FreeEnergy(components, latent, math.inf)(x)        # K-means
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        energy: Energy,
        latent: TorchDistributionMixin,
        beta: float | Tensor = 1.0,
        method: Method | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not callable(energy):
            raise TypeError(f"energy must be callable, got {type(energy).__name__}")
        if not isinstance(latent, TorchDistributionMixin):
            raise TypeError(f"latent must be a Pyro distribution, got {type(latent).__name__}")
        check_positive_beta(beta)
        self.energy, self.latent, self.beta = energy, latent, beta
        self.cold = not isinstance(beta, Tensor) and beta == math.inf
        self.method: Any = self._choose() if method is None else _checked(method, self.cold)
        with torch.random.fork_rng(devices=[]):
            point = latent.sample()
        self._point = point.reshape(-1, *latent.event_shape)[0]
        self._batches: dict[torch.Size, torch.Size] = {}

    @classmethod
    def from_model(
        cls,
        model: Callable[..., Any],
        latents: Sequence[str] | None = None,
        beta: float | Tensor = 1.0,
    ) -> ModelFreeEnergy:
        """Return the free energy of a Pyro model, its named sites enumerated away by Pyro.

        Args:
            model: The model; its arguments are those of the free energy.
            latents: The finite sites that are summed out; by default all that are not observed.
            beta: The inverse temperature of the joint energy, or ``math.inf``.
        """
        return ModelFreeEnergy(model, latents, beta)

    def _choose(self) -> Any:
        """Pick the exact method, where there is one."""
        if self.cold:
            return {}
        shape, support = self.latent.event_shape, self.latent.support
        if num_states(support, shape) <= MAX_STATES:
            return Exact()
        if values_of(support) is None and 1 <= max(1, shape.numel()) <= 3:
            return Quadrature(tolerance=1e-8)
        raise ValueError(
            f"method must be given for a latent of shape {tuple(shape)} on {support}, for which "
            "none is exact: Exact(separable=True) where the energy is a sum over finite "
            "components; Laplace, Importance, Annealed, SMC or Variational of partition"
        )

    def extra_repr(self) -> str:
        """Say what was chosen."""
        how = "minimum" if self.cold else type(self.method).__name__
        return f"beta={self.beta}, method={how}"

    @property
    def bound(self) -> str | None:
        """Whether the value is, in the mean, an ``"upper"`` or ``"lower"`` bound."""
        of_log_z = getattr(self.method, "bound", None)
        return {"lower": "upper", "upper": "lower"}.get(of_log_z or "")

    def conditional(self, *parts: Tensor) -> GibbsBoltzmann:
        """Return the law of the latent given the other parts, lean: nothing is looked at."""
        energy = Given(self.energy, *parts, ...)
        beta = 1.0 if self.cold else self.beta
        return GibbsBoltzmann._conditional(energy, self.latent, beta, self._batch(parts))

    def _batch(self, parts: tuple[Tensor, ...]) -> torch.Size:
        """Return the batch of the parts, by the energy at one latent where it is not known."""
        if len(parts) == 1 and parts[0].shape in self._batches:
            return self._batches[parts[0].shape]
        with torch.no_grad():
            value = self.energy(*parts, self._point)
        if not isinstance(value, Tensor):
            raise TypeError(f"energy must return a tensor, got {type(value).__name__}")
        if len(parts) == 1 and value.shape == parts[0].shape[: value.dim()]:
            self._batches[parts[0].shape] = value.shape
        return value.shape

    def forward(self, *parts: Tensor) -> Tensor:
        r"""Return the free energies of points.

        Args:
            *parts: Points, of shape ``(*batch, *event)``.

        Returns:
            The free energies, of shape ``(*batch,)``.
        """
        if self.cold:
            return self._energy_at_minimum(*parts)
        d = self.conditional(*parts)
        if getattr(self.method, "tabular", False):  # precise where beta is small
            points = self.method.points(d)
            measure = self._measure_of(points.log_measure)
            return soft_minimum(d._energy_at(points.x), measure, self.beta)
        return -self.method.log_z(d) / self.beta

    def _measure_of(self, log_measure: Tensor) -> Tensor:
        """Take what rounding has added to a mass of one out of it: it is divided by beta."""
        if isinstance(self.latent, Flat):
            return log_measure
        total = log_measure.detach().logsumexp(0)
        rounding = torch.finfo(total.dtype).eps ** 0.5
        return log_measure - torch.where(total.abs() < rounding, total, 0.0)

    def _energy_at_minimum(self, *parts: Tensor) -> Tensor:
        d = self.conditional(*parts)
        if not d.has_enumerate_support:
            return self.energy(*parts, self.minimum(*parts).x)
        states = d.enumerate_support(expand=False)
        return soft_minimum(d._energy_at(states), d._measure.log_prob(states), math.inf)

    def estimate(self, *parts: Tensor) -> FreeEnergyEstimate:
        """Return the free energies of points with their errors.

        Args:
            *parts: Points, of shape ``(*batch, *event)``.
        """
        if self.cold:
            value = self(*parts)
            none = torch.zeros_like(value.detach())
            return FreeEnergyEstimate(value, none, none + torch.inf, None)
        d = self.conditional(*parts)
        log_z, std_error, ess = (part.expand(d.batch_shape) for part in self.method(d))
        # As precise as a call, where a call repeats no random numbers.
        value = self(*parts) if getattr(self.method, "tabular", False) else -log_z / self.beta
        return FreeEnergyEstimate(value, std_error / self.beta, ess, self.bound)

    def posterior(self, *parts: Tensor) -> GibbsBoltzmann:
        r"""Return the law of the latent given points, :math:`\propto m \exp(-\beta E(x, z))`.

        Args:
            *parts: Points, of shape ``(*batch, *event)``, the batch of the law.

        Raises:
            ValueError: If beta is infinite: ask for :meth:`minimum`.
        """
        if self.cold:
            raise ValueError("beta must be finite for a posterior, got inf: call minimum(x)")
        energy = Given(self.energy, *parts, ...)
        return GibbsBoltzmann(energy, self.latent, self.beta, log_partition=self.method)

    def minimum(self, *parts: Tensor, **options: Any) -> Minimum:
        r"""Return the latent of least energy given points, whatever beta.

        Args:
            *parts: Points, of shape ``(*batch, *event)``.
            **options: Those of :func:`~pyro_ebm.minimize`.
        """
        settings = self.method if isinstance(self.method, dict) else {}
        return minimize(Given(self.energy, *parts, ...), self.latent, **{**settings, **options})


def _checked(method: Any, cold: bool) -> Any:
    if cold and not isinstance(method, dict):
        raise ValueError(
            "method must be a dictionary of options of minimize where beta is infinite, got "
            f"{type(method).__name__}"
        )
    if not cold and not hasattr(method, "log_z"):
        raise ValueError(f"method must be a method of pyro_ebm.partition, got {method!r}")
    return method
