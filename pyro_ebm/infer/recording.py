"""Pyro's own HMC and NUTS, with a record of every kept draw."""

from typing import Any

import numpy as np
from pyro.infer import HMC, NUTS
from torch import Tensor

__all__ = ["RecordedHMC", "RecordedNUTS"]


class RecordedHMC(HMC):
    r"""Pyro's :class:`~pyro.infer.HMC`, with a record of every kept draw.

    A draw :math:`q` with its momentum :math:`p` has the Hamiltonian energy

    .. math:: H = U(q) + \tfrac{1}{2} p^\top M^{-1} p ,

    :math:`U` being the potential that the kernel sees, in unconstrained coordinates. The draws are
    those of the stock kernel, bit for bit. ``diagnostics()`` gains an entry ``sample_stats`` of
    arrays of length ``num_samples``, which :func:`pyro_ebm.to_arviz` reads:

    * ``lp`` is :math:`-U(q)`; ``energy`` is :math:`H` at the end of the move, as Stan has it, so
      that ``energy + lp`` is the kinetic energy;
    * ``acceptance_rate`` is the mean over the trajectory of :math:`\min(1, e^{H_0 - H})`;
    * ``step_size`` and ``n_steps`` are those of the leapfrog moves, ``diverging`` is Pyro's.

    Args:
        *args: The arguments of :class:`~pyro.infer.HMC`.
        **kwargs: The keyword arguments of :class:`~pyro.infer.HMC`.

    References:
        | A Conceptual Introduction to Hamiltonian Monte Carlo (Betancourt, 2017)
        | https://arxiv.org/abs/1701.02434

    Example:
        >>> kernel = RecordedHMC(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), num_steps=4)
        >>> mcmc = pyro.infer.MCMC(kernel, 20, warmup_steps=20, disable_progbar=True)
        >>> mcmc.run()
        >>> stats = mcmc.diagnostics()["sample_stats"]["chain 0"]
        >>> sorted(stats)
        ['acceptance_rate', 'diverging', 'energy', 'lp', 'n_steps', 'step_size']
        >>> bool((stats["energy"] + stats["lp"] >= 0).all())
        True
    """

    # Pyro's MCMC sends what `diagnostics` returns from workers to the parent, and calls
    # `_reset` between the chains that one process runs one after the other.
    def _reset(self) -> None:
        super()._reset()
        self._records: list[dict[str, Any]] = []
        self._kinetic: list[Tensor] = []

    def _kinetic_energy(self, r_unscaled: dict[str, Tensor]) -> Tensor:
        """Remember the kinetic energies of a move: of its start, then of each end point."""
        self._kinetic.append(super()._kinetic_energy(r_unscaled))
        return self._kinetic[-1]

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        self._kinetic = []
        before = self._accept_cnt, len(self._divergences), self._mean_accept_prob, self.step_size
        draw = super().sample(params)
        num_kept = self._t - self._warmup_steps
        if num_kept > 0 and self._kinetic:  # a model without latent sites has no energies
            self._records.append(self._record(num_kept, *before))
        return draw

    def _record(
        self,
        num_kept: int,
        num_accepted: int,
        num_divergences: int,
        mean_accept_prob: float,
        step_size: float,
    ) -> dict[str, Any]:
        """What is known of the move just made, given the kernel's counters from before it."""
        moved = self._accept_cnt > num_accepted
        kinetic = self._kinetic[self._selected() if moved else 0]
        # Pyro keeps the running mean of the acceptance probabilities; this is the last of them.
        change = self._mean_accept_prob - mean_accept_prob
        return {
            "lp": -self._potential_energy_last.item(),
            "energy": (self._potential_energy_last + kinetic).item(),
            "acceptance_rate": mean_accept_prob + num_kept * change,
            "step_size": step_size,
            "diverging": len(self._divergences) > num_divergences,
        } | self._record_trajectory()

    def _selected(self) -> int:
        """Which of the kinetic energies belongs to the accepted point."""
        return 1

    def _record_trajectory(self) -> dict[str, Any]:
        return {"n_steps": self.num_steps}

    def diagnostics(self) -> dict[str, Any]:
        found = super().diagnostics()
        if self._records:
            names = self._records[0]
            found["sample_stats"] = {n: np.array([r[n] for r in self._records]) for n in names}
        return found


class RecordedNUTS(RecordedHMC, NUTS):
    r"""Pyro's :class:`~pyro.infer.NUTS`, with a record of every kept draw.

    The record is that of :class:`RecordedHMC`, and in addition

    * ``tree_depth``: the doublings that were begun, so that
      :math:`\mathtt{n\_steps} \le 2^{\mathtt{tree\_depth}} - 1`;
    * ``reached_max_treedepth``: all ``max_tree_depth`` doublings were made, without a divergence
      or a turn inside the last, so that the trajectory may have been cut short.

    Args:
        *args: The arguments of :class:`~pyro.infer.NUTS`.
        **kwargs: The keyword arguments of :class:`~pyro.infer.NUTS`.

    References:
        | The No-U-Turn Sampler (Hoffman and Gelman, 2014)
        | https://arxiv.org/abs/1111.4246

    Example:
        >>> kernel = RecordedNUTS(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> mcmc = pyro.infer.MCMC(kernel, 20, warmup_steps=20, disable_progbar=True)
        >>> mcmc.run()
        >>> stats = mcmc.diagnostics()["sample_stats"]["chain 0"]
        >>> bool((stats["n_steps"] <= 2 ** stats["tree_depth"] - 1).all())
        True
    """

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        self._leaves: list[Tensor] = []
        return super().sample(params)

    def _build_tree(self, *args: Any) -> Any:
        """Remember the potentials of the leaves in the order in which they were made."""
        tree = super()._build_tree(*args)
        doubling = args[5]
        if doubling == 0:
            self._leaves.append(tree.z_proposal_pe)
        self._last_tree = doubling, tree  # the outermost call returns last
        return tree

    def _selected(self) -> int:
        leaf = next(i for i, u in enumerate(self._leaves) if u is self._potential_energy_last)
        return 1 + leaf

    def _record_trajectory(self) -> dict[str, Any]:
        doubling, tree = self._last_tree
        complete = not (tree.turning or tree.diverging)
        return {
            "n_steps": len(self._leaves),
            "tree_depth": doubling + 1,
            "reached_max_treedepth": complete and doubling + 1 == self._max_tree_depth,
        }
