"""The gradient of log Z from negatives: contrastive divergence as a log Z."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm._free import MakeKernel
from pyro_ebm._guard import (
    UnnormalizedError,
    UnnormalizedWarning,
    is_tracing,
    needs_all_values,
    scoring,
)
from pyro_ebm._math import weighted_mean
from pyro_ebm.distribution import Flat, GibbsBoltzmann
from pyro_ebm.kernels.base import check_count, check_positive, check_share
from pyro_ebm.kernels.langevin import ula
from pyro_ebm.negatives import Chains, Moved, Negatives, put, spread, take
from pyro_ebm.partition.base import LogPartition, from_weights, needs_value


class Contrastive:
    r"""The gradient of log Z from negatives, samples of the model by Markov chains.

    .. math:: \nabla_\theta \log Z = \mathbb{E}_{x^- \sim p_\theta}
        [\nabla_\theta (\log b(x^-) - \beta E(x^-))]

    As the ``log_partition`` of an observed site, Pyro's stock SVI learns by contrastive
    divergence (chains from data), its persistent form, or from negatives of any kernel. The
    chains, :class:`~pyro_ebm.Negatives`, advance once per evaluation of the site; each site needs
    a method of its own.

    Persistent chains of an exact kernel that start from a normalised base are ``weighted``
    (Jarzynski): the weights make up for the chains' lag behind the moving parameters, and the
    mean weight of one half of the chains, which does not feed the gradient, estimates log Z
    itself, so that the loss is a likelihood. Its error grows with the length of the training and
    is reported; where chains do not cross from mode to mode it is too small, since it does not
    count that resampled chains have ancestors in common. Otherwise there is no value: the loss is
    the difference of mean energies, which says nothing about progress, and evaluation under
    ``torch.no_grad`` warns.

    A conditional energy has chains for each row of its batch. Under a plate that subsamples they
    belong to the rows of the data, and each goes on when its row is drawn; where rows change and
    no plate says which they are, chains start anew, with a warning. Chains of :math:`E(x \mid z)`
    follow a latent z; where z moves far from evaluation to evaluation take
    ``persistent=False, start="data"``.

    Args:
        kernel: Makes a kernel of a potential and a step, as ``lambda u, eps: hmc(u, eps, 5)``;
            for a finite support, of the potential alone. By default
            :func:`~pyro_ebm.kernels.mala`, or sweeps of :func:`~pyro_ebm.kernels.gibbs`.
        num_chains: The number of chains; weighted ones are halved as above.
        num_steps: The number of moves per evaluation; ten times as many where unweighted
            persistent chains start at the base.
        persistent: Whether chains go on from evaluation to evaluation.
        start: Where chains start: ``"base"`` or ``"data"``, the points observed at this
            evaluation, each used about equally often.
        restart: The fraction of persistent chains that starts anew at each evaluation.
        step_size: The step; if None it is adapted to an acceptance of .574 of MALA, .8 of others.
        weighted: Whether chains are weighted; by default where they can be. A kernel that is not
            exact needs False, but ``ula`` itself.

    Raises:
        ValueError: If a number is out of its range, the step of ULA is not given, or chains are
            to be weighted that cannot.

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

    def __init__(  # noqa: PLR0913 - what chains are, and how they move
        self,
        kernel: MakeKernel | None = None,
        num_chains: int = 256,
        num_steps: int = 20,
        persistent: bool = True,
        *,
        start: str = "base",
        restart: float = 0.0,
        step_size: float | None = None,
        weighted: bool | None = None,
    ) -> None:
        check_count("num_chains", num_chains, 1)
        check_count("num_steps", num_steps, 1)
        check_share("restart", restart)
        if start not in ("base", "data"):
            raise ValueError(f"start must be 'base' or 'data', got {start!r}")
        if step_size is not None:
            check_positive("step_size", step_size)
        elif kernel is ula:
            raise ValueError("step_size must be given for ula, which has no rate to adapt to")
        can = kernel is not ula and persistent and start == "base"
        if weighted and not can:
            raise ValueError(
                "weighted chains must persist, start at the base and have an exact kernel, got "
                f"persistent={persistent}, start={start!r}, {kernel}"
            )
        self.kernel, self.num_chains, self.num_steps = kernel, num_chains, num_steps
        self.persistent, self.start, self.restart = persistent, start, restart
        self.step_size, self.weighted = step_size, can if weighted is None else weighted
        self.chains: Chains | None = None  # of all rows of the data, where they belong to rows
        self.moved: Moved | None = None
        self._site: str | None = None
        self._x: Tensor | None = None  # what was observed at the last evaluation

    @property
    def value(self) -> str:
        """Whether log Z itself is estimated."""
        return "estimated" if self.weighted else "none"

    @property
    def accept_rate(self) -> float:
        """The mean probability of acceptance at the last evaluation."""
        return math.nan if self.moved is None else float(self.moved.accept_prob.mean())

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Advance the chains and return a log Z whose gradient is that of the negatives.

        Raises:
            UnnormalizedError: If an engine asks that needs the value, the same every time.
            NotImplementedError: If the model is traced, which would freeze the chains.
            ValueError: If the energy is minus infinity, or the method serves two sites.
        """
        return self._log_z(d, x).value

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Advance the chains and return the estimate by their weights."""
        return self._log_z(d, None)

    def _log_z(self, d: GibbsBoltzmann, x: Tensor | None) -> LogPartition:
        needs_value(self, "gives a new estimate at every evaluation", bool(d._enumerated))
        if is_tracing():
            raise NotImplementedError(
                "Contrastive moves its chains at every evaluation, which a traced model cannot "
                "repeat: use Trace_ELBO instead of JitTrace_ELBO"
            )
        self._check_site()
        chains, moved = self._advance(d, x)
        if chains.log_weight is not None:  # the first group feeds the gradient
            surrogate = -weighted_mean(d.potential(moved.x[:, 0]), chains.log_weight[:, 0])
            parts = _estimate(chains)
            return parts._replace(value=parts.value + surrogate - surrogate.detach())
        if because := needs_all_values():
            raise UnnormalizedError(
                f"{scoring()[0]}: {because} needs the value of log Z, and these chains of "
                "Contrastive are not weighted: take persistent chains of an exact kernel from a "
                "normalised base, another method, or a reparametrised guide"
            )
        if not torch.is_grad_enabled():
            warnings.warn(
                "Contrastive has no value of log Z here (chains are not weighted): the number is "
                "a difference of mean energies, not a log-likelihood",
                UnnormalizedWarning,
                stacklevel=5,
            )
        surrogate = -d.potential(moved.x).mean(0)
        return LogPartition(surrogate, *[torch.full_like(surrogate.detach(), math.nan)] * 2)

    def _check_site(self) -> None:
        """Refuse a second site: its energy would move the chains of the first."""
        site = scoring()[0]
        if not site.startswith("site "):
            return
        if self._site not in (None, site):
            raise ValueError(
                f"Contrastive must serve one site, got {self._site} and {site}: make one for each"
            )
        self._site = site

    def _advance(self, d: GibbsBoltzmann, x: Tensor | None) -> tuple[Chains, Moved]:
        """Move the chains of this evaluation to the present parameters."""
        data = _rows_of(d, x) if self.start == "data" else None
        negatives = self._negatives(d)
        rows = self._rows(d) if self.persistent else None
        if rows is None:
            begin = self._go_on(negatives, x, data)
        else:
            store = self._store(negatives, rows, data)
            begin = take(store, rows.places, rows.axis)
            begin = negatives.restart(begin, begin.age < 0, data)
        if self._is_far(begin):
            negatives.num_steps *= 10
        chains, moved = negatives.step(begin, x=data)
        if (chains.energy == -torch.inf).any():
            raise ValueError("energy must not be minus infinity, which is no density")
        self.chains = chains if rows is None else _put_back(store, chains, rows)
        self.moved = moved
        if rows is None and x is not None:
            self._x = x.detach()
        return chains, moved

    def _negatives(self, d: GibbsBoltzmann) -> Negatives:
        """Say how chains move."""
        volume = d.base.log_volume if isinstance(d.base, Flat) else 0.0
        self.weighted = self.weighted and math.isfinite(volume)  # else the base has no log Z
        return Negatives(
            d.expand((2, *d.batch_shape)) if self.weighted else d,
            kernel=self.kernel,
            num_steps=self.num_steps,
            step_size=self.step_size,
            restart=self.restart if self.persistent else 0.0,
            weighted=self.weighted,
        )

    def _is_far(self, chains: Chains) -> bool:
        """Whether some chains have no weights and start at the base: then all move longer.

        They have no other way to reach the model before their first gradient.
        """
        if self.weighted or self.start == "data":
            return False
        return self.chains is None or (self.persistent and bool((chains.age == 0).any()))

    def _fresh(self, negatives: Negatives, data: Tensor | None) -> Chains:
        """Start all chains, with the step that was adapted before."""
        num = -(-self.num_chains // (2 if self.weighted else 1))
        at = num if data is None else data[spread(len(data), num, data.device)]
        new, old = negatives.init(at), self.chains
        if old is None or old.log_step.shape != new.log_step.shape:
            return new
        return new._replace(log_step=old.log_step, num_moves=old.num_moves)

    def _go_on(self, negatives: Negatives, x: Tensor | None, data: Tensor | None) -> Chains:
        """Return the chains of the last evaluation, unless they are to start anew."""
        old, d = self.chains, negatives.d
        if not self.persistent or old is None:
            return self._fresh(negatives, data)
        batch = d.batch_shape[1:] if self.weighted else d.batch_shape
        # One observed point for each element of the batch, as of a conditional energy.
        own = x is not None and batch.numel() != 1 and x.shape == batch + d.event_shape
        same = x is None or not own or self._x is None or torch.equal(self._x, x)
        if same and old.age.shape[1:] == d.batch_shape:
            unseen = old.age < 0  # rows that no plate has drawn yet
            return negatives.restart(old, unseen, data) if unseen.any() else old
        if own:
            warnings.warn(
                "Contrastive cannot tell to which rows of the data its chains belong, and starts "
                "them anew: take mini-batches for a conditional energy by one pyro.plate(..., "
                "subsample_size=...), and make the distribution inside it",
                UserWarning,
                stacklevel=6,
            )
        return self._fresh(negatives, data)

    def _rows(self, d: GibbsBoltzmann) -> _Rows | None:
        """Find the rows of the data that the batch is of, if one plate has drawn them."""
        batch = len(d.batch_shape)
        drawn = [(dim, *rows) for dim, rows in d._rows.items() if -dim <= batch]
        own = [(dim, places, n) for dim, places, n in drawn if d.batch_shape[dim] == len(places)]
        if len(own) != 1:
            return None
        dim, places, size = own[0]
        return _Rows(places, 1 + self.weighted + batch + dim, size)

    def _store(self, negatives: Negatives, rows: _Rows, data: Tensor | None) -> Chains:
        """Return the chains of all rows, those of rows not seen yet with a negative age."""
        shape = list(negatives.d.batch_shape)
        shape[rows.axis - 1] = rows.size
        if self.chains is not None and list(self.chains.age.shape[1:]) == shape:
            return self.chains
        everywhere = torch.zeros(rows.size, dtype=torch.long, device=rows.places.device)
        new = take(self._fresh(negatives, data), everywhere, rows.axis)
        return new._replace(age=torch.full_like(new.age, -1))

    def state_dict(self) -> dict[str, Any]:
        """Return the chains and the random state, for :func:`pyro_ebm.checkpoint.save`.

        Raises:
            ValueError: If there are no chains yet.
        """
        if self.chains is None:
            raise ValueError("Contrastive must have been evaluated, got no chains to keep")
        kept = {"site": self._site, "x": self._x, "weighted": self.weighted}
        return {**Negatives.state_dict(self.chains), **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from chains that were kept, and from their random state."""
        self.chains = Negatives.load_state_dict(state)
        self._site, self._x, self.weighted = state["site"], state["x"], state["weighted"]


class _Rows(NamedTuple):
    """Rows of the data: places along an axis of the chains, which has a number in all."""

    places: Tensor
    axis: int
    size: int


def _estimate(chains: Chains) -> LogPartition:
    """Estimate log Z by the weights of the last group, with the error of all resamplings."""
    assert chains.log_weight is not None
    value, error, ess = (part[-1] for part in from_weights(chains.log_weight))
    std_error = (chains.variance[-1] + error.square()).sqrt()
    return LogPartition(chains.offset[-1] + value, std_error, ess)


def _put_back(store: Chains, chains: Chains, rows: _Rows) -> Chains:
    """Put the chains of some rows into the store; the others' steps follow the mean change."""
    at = rows.axis - 1
    change = chains.log_step - store.log_step.index_select(at, rows.places)
    store = store._replace(log_step=store.log_step + change.mean(at, keepdim=True))
    return put(store, chains, rows.places, rows.axis)


def _rows_of(d: GibbsBoltzmann, x: Tensor | None) -> Tensor:
    """Return observed points as rows ``(m, *batch, *event)``."""
    if x is None:
        raise ValueError("start='data' needs observed points, got none; use start='base'")
    shape = torch.broadcast_shapes(x.shape[: x.dim() - d.event_dim], d.batch_shape)
    x = x.detach().expand(*shape, *d.event_shape)
    return x.reshape(-1, *d.batch_shape, *d.event_shape)
