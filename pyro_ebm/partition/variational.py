"""log Z bounded from below by a guide."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_ebm._binding import modules_of, referenced
from pyro_ebm._guide import Proposal, given
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.partition.base import (
    LogPartition,
    Method,
    Points,
    Weighted,
    from_weights,
    learns,
    needs_value,
    points_of,
    warn_low_ess,
    weigh,
)


class Variational:
    r"""A lower bound of log Z by a guide :math:`q`: the ELBO, or tighter for more particles.

    .. math:: \log Z \ge \mathbb{E}_{x_1 \dots x_K \sim q} \Big[ \log \frac1K \sum_k
        \frac{b(x_k) \exp(-\beta E(x_k))}{q(x_k)} \Big]

    It is a bound in the mean; ``std_error`` is that of the average over ``num_draws`` draws of
    the bracket. It rises with :math:`K` to log Z; :meth:`gap` says what is left. The gradient is
    in the parameters of the energy and, to fit it, of the guide: through the draws where the
    guide is reparametrised, else by its score.

    A guide that is a function draws the site ``site``; where the energy has given parts it is
    called with them, and so may be amortised. All of its sites must be ``site`` and what that is
    made of (``is_auxiliary``, as an autoguide's). It is trained by :meth:`fit`, or by any loop on
    ``-log_z(d)``, as below; as the ``log_partition`` of a site it only serves.

    Args:
        guide: A normalised distribution, or a Pyro guide: a function or an autoguide.
        num_particles: The number :math:`K`; one is the ELBO.
        num_draws: The number of draws that are averaged, each of :math:`K` particles.
        site: The name of the guide's site.
        common_random_numbers: Whether every evaluation draws the same numbers, so that the bound
            is a smooth function of the parameters, as HMC and NUTS need. A guide that draws for
            each batch element apart, by reparametrised draws, has a function for each shape of
            batch.

    Raises:
        ValueError: If ``num_particles`` is less than one or ``num_draws`` less than two; when
            used, if the guide has no such site, no density, or sites besides.

    References:
        | Auto-Encoding Variational Bayes (Kingma and Welling, 2013)
        | https://arxiv.org/abs/1312.6114
        | Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2015)
        | https://arxiv.org/abs/1509.00519

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: 2.0 * (x - 1.0) ** 2, ebm.Flat())
        >>> def guide():
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        ...     pyro.sample("x", dist.Normal(loc, scale))
        >>> bound = Variational(guide)
        >>> losses = bound.fit(d, 500, pyro.optim.Adam({"lr": 0.02}))
        >>> abs(bound(d).value - 0.2258) < 0.1             # q can be exact, and nearly is
        tensor(True)

        The same by hand, for a guide of torch:

        >>> loc = torch.tensor(0.0, requires_grad=True)
        >>> optim = torch.optim.Adam([loc], lr=0.1)
        >>> for _ in range(100):
        ...     loss = -Variational(dist.Normal(loc, 0.5)).log_z(d)
        ...     optim.zero_grad(); loss.backward(); optim.step()
        >>> abs(loc - 1.0) < 0.1
        tensor(True)
    """

    value = "bound"
    bound = "lower"
    gradient = "estimated"

    def __init__(
        self,
        guide: Any,
        num_particles: int = 1,
        *,
        num_draws: int = 64,
        site: str = "x",
        common_random_numbers: bool = False,
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {num_particles}")
        if num_draws < 2:
            raise ValueError(f"num_draws must be at least 2, got {num_draws}")
        self.guide, self.num_particles, self.num_draws = guide, num_particles, num_draws
        self.site, self.common_random_numbers = site, common_random_numbers
        self._proposal = Proposal(guide, site, common_random_numbers)

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return the bound of log Z, differentiable in the energy and, unless scoring, the guide.

        A guide learns nothing from the points ``x`` that are scored, which would push it away.

        Raises:
            UnnormalizedError: If MCMC asks and the particles are not common.
        """
        if not self.common_random_numbers:
            needs_value(self, "draws fresh particles, so that it is never the same twice")
        return self._estimate(d, learns(x)).value

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return the bound with its standard error and the particles' effective sample size."""
        return self._estimate(d, True)

    def _estimate(self, d: GibbsBoltzmann, through: bool) -> LogPartition:
        with torch.set_grad_enabled(through and torch.is_grad_enabled()):
            draws = self._proposal.draw(d, self.num_draws * self.num_particles)
        log_weight = weigh(d, points_of(d, draws)).log_weight
        each = log_weight.unflatten(0, (self.num_draws, -1)).logsumexp(1)
        each = each + math.log(self.num_draws)  # shape: (num_draws, *batch)
        value = each.mean(0)
        if not draws.reparametrized and draws.log_q.requires_grad:
            value = value + self._score(each.detach(), draws.log_q)
        with torch.no_grad():
            std_error = each.std(0) / math.sqrt(self.num_draws)
            ess = from_weights(log_weight).ess
        return LogPartition(value, std_error, ess)

    def points(self, d: GibbsBoltzmann) -> Points:
        """Return particles of the guide, weighed by the base over the guide."""
        with torch.no_grad():
            draws = self._proposal.draw(d, self.num_draws * self.num_particles)
        return points_of(d, draws)

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return particles of the guide with their weights."""
        return weigh(d, self.points(d))

    def gap(
        self, d: GibbsBoltzmann, method: Method | None = None, num_particles: int = 1024
    ) -> LogPartition:
        """Return how far the bound is below log Z, with its standard error.

        Args:
            d: The distribution.
            method: The method that gives the true log Z; if None, the average weight of many
                particles of the guide, itself a bound that is tight where ``ess`` is large.
            num_particles: Their number.

        Returns:
            The gap, its error, and the effective sample size of what it is measured with.
        """
        with torch.no_grad():
            bound = self(d)
            if method is None:
                points = points_of(d, self._proposal.draw(d, num_particles))
                truth = from_weights(weigh(d, points).log_weight + math.log(num_particles))
                warn_low_ess(truth.ess, "particles of the guide")
            else:
                truth = method(d)
            error = torch.hypot(bound.std_error, truth.std_error)
            return LogPartition(truth.value - bound.value, error, truth.ess)

    def fit(self, d: GibbsBoltzmann, num_steps: int, optim: Any = None) -> Tensor:
        """Train the guide by Pyro's SVI on the unnormalised energy, whose ELBO lacks log Z.

        The loss of ``Trace_ELBO`` is minus the bound, summed over the batch. Nothing is written
        to the energy's parameters.

        Args:
            d: The distribution.
            num_steps: The number of steps.
            optim: An optimiser of :mod:`pyro.optim`; Adam with a rate of 0.01 if None.

        Returns:
            The losses, of shape ``(num_steps,)``.

        Raises:
            TypeError: If the guide is a distribution, whose parameters Pyro does not know.
        """
        if self._proposal.is_distribution:
            raise TypeError(
                "guide must be a function or an autoguide for fit, got the distribution "
                f"{type(self.guide).__name__}: minimise -log_z(d) in its parameters"
            )
        scored = copy.copy(d)
        scored.log_partition = "constant"
        parts, named = given(d)
        frames = self._proposal.trace(d).nodes[self.site]["cond_indep_stack"]

        def model(*_: Any, **__: Any) -> None:
            with contextlib.ExitStack() as stack:
                for frame in frames:  # the same plates as around the guide's site
                    stack.enter_context(pyro.plate(frame.name, frame.size, dim=frame.dim))
                pyro.sample(self.site, scored)

        optim = optim or pyro.optim.Adam({"lr": 0.01})
        svi = SVI(model, self.guide, optim, Trace_ELBO())
        with _frozen(d.energy):
            return torch.tensor([svi.step(*parts, **named) for _ in range(num_steps)])

    def _score(self, each: Tensor, log_q: Tensor) -> Tensor:
        """Return zero with the part of the gradient that the draws do not carry."""
        n = self.num_draws
        total = log_q.unflatten(0, (n, -1)).sum(1)
        others = (each.sum(0) - each) / (n - 1)  # a baseline that is independent of the draw
        return ((each - others) * (total - total.detach())).mean(0)


@contextlib.contextmanager
def _frozen(energy: Any) -> Iterator[None]:
    """Keep gradients away from what an energy is made of."""
    tensors = [thing for _, thing in referenced(energy) if isinstance(thing, Tensor)]
    tensors += [p for module in modules_of(energy).values() for p in module.parameters()]
    learned = [t for t in tensors if t.is_leaf and t.requires_grad]
    for tensor in learned:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in learned:
            tensor.requires_grad_()
