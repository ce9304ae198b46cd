"""Reparametrisations of energy sites."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.distributions import Categorical, Delta
from pyro.infer.reparam.reparam import Reparam
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_ebm.distribution import GibbsBoltzmann


class IndexReparam(Reparam):
    r"""Turn a site with a finite support into a site of indices and a lookup.

    .. math:: i \sim \mathrm{Categorical}(p(s_1), \ldots, p(s_K)), \quad x = s_i

    Pyro's ``infer_discrete`` and ``compute_marginals`` need scalar discrete sites; this gives
    them one for spins, patterns and one-hot vectors. The new site is called ``<name>_index`` and
    is normalised, so that log Z is exact. Mark sites for enumeration by ``config_enumerate``
    (an ``infer=`` of the site itself does not reach the new one). Chains and guides over the
    other sites enumerate the site as it is, and do not start with a reparametrised one.

    Raises:
        ValueError: When applied to a site whose support is not finite, or observed outside it.

    Example:
        >>> def model():
        ...     spins = ebm.Flat((2,), constraints.boolean)
        ...     return pyro.sample("x", ebm.GibbsBoltzmann(lambda x: -x.prod(-1), spins))
        >>> model = pyro.poutine.reparam(model, config={"x": IndexReparam()})
        >>> sorted(n for n in pyro.poutine.trace(model).get_trace().nodes if n[0] == "x")
        ['x', 'x_index']
    """

    def apply(self, msg: Any) -> Any:
        """Sample the index and look the state up."""
        fn, event_dim = self._unwrap(msg["fn"])
        if not fn.has_enumerate_support:
            raise ValueError(
                f"site {msg['name']!r} must have a finite support of moderate size for "
                f"IndexReparam, got {fn.support}"
            )
        states = fn.enumerate_support(expand=False)
        # A potential has no log Z, which Categorical supplies.
        scores = -fn.potential(states) if isinstance(fn, GibbsBoltzmann) else fn.log_prob(states)
        logits = scores.expand(len(states), *fn.batch_shape).movedim(0, -1)
        table = states.reshape(len(states), *fn.event_shape)
        # Pyro's way to say that a value is where to start, not data.
        start = None if msg["value"] is None else _index_of(msg["value"], table, msg["name"])
        index = pyro.sample(
            f"{msg['name']}_index",
            Categorical(logits=logits).to_event(event_dim - fn.event_dim),
            obs=start,
            infer={"is_observed": msg["is_observed"]},
        )
        value = msg["value"] if msg["is_observed"] else Vindex(table)[index]
        return {
            "fn": Delta(value, event_dim=event_dim).mask(False),
            "value": value,
            "is_observed": True,
        }


def _index_of(x: Tensor, table: Tensor, name: str) -> Tensor:
    """Return the rows at which points stand in a table ``(K, *event)``."""
    same = x.unsqueeze(-table.dim()) == table  # shape: (*batch, K, *event)
    same = same.flatten(x.dim() - table.dim() + 1).unflatten(-1, (len(table), -1)).all(-1)
    if not same.any(-1).all():
        raise ValueError(f"site {name!r} must have values in its support, got {x}")
    return same.long().argmax(-1)
