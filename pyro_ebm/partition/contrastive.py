"""The gradient of log Z from negatives: contrastive divergence as a log Z."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm._binding import evaluating
from pyro_ebm._free import Free
from pyro_ebm._guard import UnnormalizedWarning, is_tracing
from pyro_ebm._math import systematic
from pyro_ebm._short_run import adapt
from pyro_ebm.distribution import Flat, GibbsBoltzmann
from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import Kernel, expand_like
from pyro_ebm.kernels.langevin import mala, ula
from pyro_ebm.partition.base import LogPartition, from_weights, needs_value


class Negatives(NamedTuple):
    """Persistent chains in groups, which resample among themselves.

    The first group feeds the gradient. Where chains are weighted there is a second, which never
    does and estimates log Z: what a gradient has pushed up at the very points that it was
    computed from would otherwise be taken for a fall of log Z.
    """

    position: Tensor  # unconstrained; shape: (n, groups, *batch, *unconstrained)
    potential: Tensor  # at the parameters of the last move; shape: (n, groups, *batch)
    log_weight: Tensor  # shape: (n, groups, *batch)
    offset: Tensor  # log Z put aside by resampling; shape: (groups, *batch)
    variance: Tensor  # of the offset; shape: (groups, *batch)
    log_step: Tensor  # shape: (*batch,)
    age: int


class Contrastive:
    r"""The gradient of log Z from negatives, samples of the model by Markov chains.

    .. math:: \nabla_\theta \log Z = \mathbb{E}_{x^- \sim p_\theta}
        [\nabla_\theta (\log b(x^-) - \beta E(x^-))]

    As the ``log_partition`` of an observed site, Pyro's stock SVI learns by contrastive
    divergence (chains from data), its persistent form, or from Langevin negatives. The chains
    advance once per evaluation of the site.

    Persistent MALA chains that start from a normalised base are ``weighted`` (Jarzynski):
    the weights make up for the chains' lag behind the moving parameters, and the mean weight of
    one half of the chains, which does not feed the gradient, estimates log Z itself, so that the
    loss is a likelihood. Its error grows with the length of the training and is reported.
    Otherwise there is no value: the loss is the difference of mean energies, which says nothing
    about progress, and evaluation under ``torch.no_grad`` warns.

    Args:
        kernel: Makes a kernel of a potential and a step: :func:`~pyro_ebm.kernels.mala` or
            :func:`~pyro_ebm.kernels.ula`.
        num_chains: The number of chains; weighted ones are halved as above.
        num_steps: The number of moves per evaluation.
        persistent: Whether chains go on from evaluation to evaluation.
        start: Where chains start: ``"base"`` or ``"data"``, the site's observed points.
        restart: The fraction of persistent chains that starts anew at each evaluation.
        step_size: The step; if None it is adapted to MALA's best acceptance rate.

    Raises:
        ValueError: If a number is out of its range, the step of ULA is not given, or chains are
            to start from data where there are none.

    References:
        | Training Products of Experts by Minimizing Contrastive Divergence (Hinton, 2002)
        | https://doi.org/10.1162/089976602760128018
        | Training Restricted Boltzmann Machines using Approximations to the Likelihood Gradient
          (Tieleman, 2008)
        | https://doi.org/10.1145/1390156.1390290
        | Efficient Training of Energy-Based Models Using Jarzynski Equality (Carbone, Hua, Coste
          and Vanden-Eijnden, 2023)
        | https://arxiv.org/abs/2305.19414

    Example:
        >>> k = torch.nn.Parameter(torch.tensor(3.0))
        >>> base = dist.Normal(0.0, 1.0)
        >>> negatives = Contrastive(num_chains=4096, num_steps=50)
        >>> d = ebm.GibbsBoltzmann(lambda x: k * x**2, base, log_partition=negatives)
        >>> (-d.log_prob(torch.zeros(()))).backward()       # E[x^2] is 1 / 7, up to its sign
        >>> abs(k.grad + 1 / 7) < 0.02
        tensor(True)
    """

    gradient = "estimated"

    def __init__(
        self,
        kernel: Callable[[Energy, Any], Kernel] = mala,
        num_chains: int = 256,
        num_steps: int = 20,
        persistent: bool = True,
        *,
        start: str = "base",
        restart: float = 0.0,
        step_size: float | None = None,
    ) -> None:
        _check_options(num_chains, num_steps, start, restart)
        if kernel is ula and step_size is None:
            raise ValueError("step_size must be given for ula, which has no rate to adapt to")
        if step_size is not None and not 0.0 < step_size < math.inf:
            raise ValueError(f"step_size must be positive and finite, got {step_size}")
        self.kernel, self.num_chains, self.num_steps = kernel, num_chains, num_steps
        self.persistent, self.start, self.restart = persistent, start, restart
        self.step_size = step_size
        self.weighted = kernel is mala and persistent and start == "base"
        self.accept_rate = math.nan
        self.chains: Negatives | None = None

    @property
    def value(self) -> str:
        """Whether log Z itself is estimated."""
        return "estimated" if self.weighted else "none"

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Advance the chains and return a log Z whose gradient is that of the negatives.

        Raises:
            UnnormalizedError: If an engine asks that needs the value, the same every time.
            NotImplementedError: If the model is traced, which would freeze the chains.
            ValueError: If the support is finite, or the energy minus infinity.
        """
        needs_value(self, "gives a new estimate at every evaluation", bool(d._enumerated))
        if is_tracing():
            raise NotImplementedError(
                "Contrastive moves its chains at every evaluation, which a traced model cannot "
                "repeat: use Trace_ELBO instead of JitTrace_ELBO"
            )
        negatives = self._advance(d, x)
        assert self.chains is not None
        weight = torch.softmax(self.chains.log_weight[:, 0], 0)
        surrogate = (weight * -d.potential(negatives)).sum(0)
        if self.weighted:
            return self._estimate().value + surrogate - surrogate.detach()
        if not torch.is_grad_enabled():
            warnings.warn(
                "Contrastive has no value of log Z here (chains are not weighted): the number is "
                "a difference of mean energies, not a log-likelihood",
                UnnormalizedWarning,
                stacklevel=4,
            )
        return surrogate

    def _estimate(self) -> LogPartition:
        """Estimate log Z by the weights of the last group, with the error of all resamplings."""
        assert self.chains is not None
        value, error, ess = (part[-1] for part in from_weights(self.chains.log_weight))
        std_error = (self.chains.variance[-1] + error.square()).sqrt()
        return LogPartition(self.chains.offset[-1] + value, std_error, ess)

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Advance the chains and return the estimate by their weights."""
        value = self.log_z(d)
        return LogPartition(value, *self._estimate()[1:])

    def _advance(self, d: GibbsBoltzmann, x: Tensor | None) -> Tensor:
        """Move the chains to the present parameters; return the points of the first group."""
        free = Free(d)
        if free.finite:
            raise ValueError(
                f"Contrastive moves chains by gradients, got the finite support {d.support}; use "
                "Exact()"
            )
        potential = free.pull(d.potential)
        with torch.inference_mode(False), torch.no_grad(), evaluating(d.energy):
            chains = self._begin(free, x, potential)
            chains = self._reweight(chains, potential)
            self.chains = self._move(chains, potential)
            return free.decode(self.chains.position[:, 0]).detach()

    def _begin(self, free: Free, x: Tensor | None, potential: Energy) -> Negatives:
        """Start chains, or those that are to start anew."""
        d, old = free.d, self.chains
        if old is None or old.potential.shape[2:] != d.batch_shape:
            log_step = torch.full(d.batch_shape, math.log(self.step_size or 0.1)).to(d.floating())
            return self._fresh(free, x, log_step, 0)
        if not self.persistent:
            return self._fresh(free, x, old.log_step, old.age)
        if not self.restart:
            return old
        new = self._fresh(free, x, old.log_step, old.age)
        pick = torch.rand_like(old.potential) < self.restart
        position = torch.where(expand_like(pick, new.position), new.position, old.position)
        last = torch.where(pick, new.potential, old.potential)
        log_weight = torch.where(pick, new.log_weight - old.offset, old.log_weight)
        return old._replace(position=position, potential=last, log_weight=log_weight)

    def _fresh(self, free: Free, x: Tensor | None, step: Tensor, age: int) -> Negatives:
        """Draw starting points, with the potential of the law that they come from."""
        d = free.d
        volume = d.base.log_volume if isinstance(d.base, Flat) else 0.0
        self.weighted = self.weighted and math.isfinite(volume)  # else the base has no log Z
        groups = 2 if self.weighted else 1
        shape = torch.Size((-(-self.num_chains // groups), groups))
        points = self._from_data(d, x, shape) if self.start == "data" else d.base.sample(shape)
        z = free.encode(points)
        potential = free.pull(lambda y: -d.base.log_prob(y))(z)
        potential = potential + (volume if self.weighted else 0.0)
        zero = torch.zeros_like(potential)
        return Negatives(z, potential, zero, zero[0], zero[0], step, age)

    def _from_data(self, d: GibbsBoltzmann, x: Tensor | None, sample: torch.Size) -> Tensor:
        if x is None:
            raise ValueError("start='data' needs observed points, got none; use start='base'")
        shape = torch.broadcast_shapes(x.shape[: x.dim() - d.event_dim], d.batch_shape)
        x = x.detach().expand(*shape, *d.event_shape)
        rows = x.reshape(-1, *d.batch_shape, *d.event_shape)
        return rows[torch.randint(len(rows), sample, device=x.device)]

    def _reweight(self, chains: Negatives, potential: Energy) -> Negatives:
        """Weigh chains by the change of their potential since their last move; resample."""
        if not self.weighted:
            return chains
        now = potential(chains.position)
        log_weight = chains.log_weight + chains.potential - now
        log_weight = torch.where(log_weight.isnan(), -torch.inf, log_weight)
        value, error, ess = from_weights(log_weight)
        low = ess < len(log_weight) / 2
        rows = systematic(torch.softmax(log_weight, 0))
        wide = expand_like(rows, chains.position).expand_as(chains.position)
        resampled = chains.position.gather(0, wide)
        return chains._replace(
            position=torch.where(expand_like(low, resampled[0]), resampled, chains.position),
            offset=torch.where(low, chains.offset + value, chains.offset),
            variance=torch.where(low, chains.variance + error.square(), chains.variance),
            log_weight=torch.where(low, 0.0, log_weight),
        )

    def _move(self, chains: Negatives, potential: Energy) -> Negatives:
        """Move the chains and adapt their step."""
        # Unweighted chains have no other way to reach the model before the first gradient.
        burn_in = 10 if chains.age == 0 and self.start == "base" and not self.weighted else 1
        log_step, age, rates = chains.log_step, chains.age, []
        state = self.kernel(potential, 1.0).init(chains.position)
        for _ in range(burn_in * self.num_steps):
            step = log_step.exp().expand(chains.potential.shape)
            state, info = self.kernel(potential, step).step(state)
            rates.append(info.accept_prob.mean((0, 1)))
            if self.step_size is None:
                log_step = adapt(log_step, rates[-1], min(age, 200))
            age += 1
        if (state.energy == -torch.inf).any():
            raise ValueError("energy must not be minus infinity, which is no density")
        self.accept_rate = float(torch.stack(rates).mean())
        position, energy = state.position, state.energy
        return chains._replace(position=position, potential=energy, log_step=log_step, age=age)


def _check_options(num_chains: int, num_steps: int, start: str, restart: float) -> None:
    for name, count in (("num_chains", num_chains), ("num_steps", num_steps)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if start not in ("base", "data"):
        raise ValueError(f"start must be 'base' or 'data', got {start!r}")
    if not 0.0 <= restart < 1.0:
        raise ValueError(f"restart must be in [0, 1), got {restart}")
