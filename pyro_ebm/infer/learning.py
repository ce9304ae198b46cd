"""Pure losses of energies in the place of an ELBO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_ebm._guard import scored_latents, scoring
from pyro_ebm.distribution import GibbsBoltzmann


class _Scored(TorchDistribution):
    """What stands for an energy site: its log-density is minus a loss, shared by its points."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, d: GibbsBoltzmann, loss: Callable[..., Tensor]) -> None:
        self.d, self.loss = d, loss
        super().__init__(d.batch_shape, d.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.d.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Scored:
        return _Scored(self.d.expand(torch.Size(batch_shape)), self.loss)

    def log_prob(self, x: Tensor) -> Tensor:
        if scored := scored_latents(in_plates=True):
            raise NotImplementedError(
                f"{scoring()[0]}: a loss is one mean over all points, by which the score function "
                f"of the guide's {', '.join(scored)} cannot learn row by row"
            )
        # Plates repeat the distribution: noise and perturbed points come in other numbers.
        value = self.loss((self.d._origin or self.d).potential, x)
        if value.dim():
            raise ValueError(f"loss must return a scalar, got the shape {tuple(value.shape)}")
        batch = broadcast_shape(x.shape[: x.dim() - self.d.event_dim], self.batch_shape)
        return -value.expand(batch)


class _Scoring(Messenger):
    """Lets a loss stand for the log-density of energy sites that are observed."""

    def __init__(self, loss: Callable[..., Tensor], sites: Sequence[str] | None) -> None:
        super().__init__()
        self.loss, self.sites, self.seen = loss, sites, set[str]()

    def _pyro_sample(self, msg: Any) -> None:
        chosen = self.sites is None or msg["name"] in self.sites
        if chosen and msg["is_observed"] and isinstance(msg["fn"], GibbsBoltzmann):
            if isinstance(msg["mask"], Tensor) or msg["fn"]._enumerated:
                raise NotImplementedError(
                    f"site {msg['name']!r}: a loss is one mean over all points, which cannot "
                    "leave out masked ones or tell enumerated latents apart"
                )
            msg["fn"] = _Scored(msg["fn"], self.loss)
            self.seen.add(msg["name"])


class EnergyLoss:
    r"""A loss of energies for Pyro's ``SVI(model, guide, optim, loss=EnergyLoss(...))``.

    .. math:: \mathcal{L} = \sum_{s} N_s \, \ell(U_s, x_s) - \mathrm{ELBO}_{\text{rest}},
        \quad U_s(x) = \beta E(x) - \log b(x)

    At each observed :class:`~pyro_ebm.GibbsBoltzmann` site s a pure loss :math:`\ell`, as those
    of :mod:`pyro_ebm.losses`, stands for minus the mean log-density of its :math:`N_s` points;
    its potential has the parameters and latents of this trace. Such losses need no log Z, so that
    no ``log_partition`` is asked for there. The other sites, and the guide, enter by their ELBO.
    Plates that subsample scale the loss: the gradient is right on average. Masks, latents
    that are enumerated, and those of rows whose guide is not reparametrised, are refused.

    Args:
        loss: Maps a potential and the observed points ``(*batch, *event)`` to a scalar, a mean
            over points.
        sites: The names of the sites; by default all.
        elbo: Pyro's ELBO of the rest, with a ``differentiable_loss``; ``Trace_ELBO()`` if None.

    References:
        | Estimation of Non-Normalized Statistical Models by Score Matching (Hyvarinen, 2005)
        | https://jmlr.org/papers/v6/hyvarinen05a.html

    Example:
        >>> x = 2.0 * torch.randn(1000, 1)
        >>> def model():
        ...     k = pyro.param("k", torch.tensor(1.0), constraint=constraints.positive)
        ...     d = ebm.GibbsBoltzmann(lambda x: 0.5 * k * x.square().sum(-1), ebm.Flat((1,)))
        ...     with pyro.plate("n", len(x)):
        ...         pyro.sample("x", d, obs=x)
        >>> loss = EnergyLoss(ebm.losses.score_matching)
        >>> svi = pyro.infer.SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.05}), loss)
        >>> for _ in range(300):
        ...     _ = svi.step()
        >>> abs(pyro.param("k") * x.square().mean() - 1.0) < 0.01
        tensor(True)
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        sites: Sequence[str] | None = None,
        elbo: Any = None,
    ) -> None:
        if isinstance(sites, str):
            raise TypeError(f"sites must be a list of names, got {sites!r}")
        self.loss, self.sites, self.elbo = loss, sites, elbo or Trace_ELBO()

    def __call__(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a model and its guide, as SVI asks for it.

        Raises:
            ValueError: If a named site, or any, is no observed GibbsBoltzmann, or the loss
                returns no scalar.
        """
        scoring = _Scoring(self.loss, self.sites)

        def scored(*args: Any, **kwargs: Any) -> Any:
            with scoring:
                return model(*args, **kwargs)

        value = self.elbo.differentiable_loss(scored, guide, *args, **kwargs)
        missing = set(self.sites or ()) - scoring.seen
        if missing or not scoring.seen:
            names = sorted(missing) or "any name"
            raise ValueError(f"sites must be observed GibbsBoltzmann sites, got none of {names}")
        return torch.as_tensor(value)
