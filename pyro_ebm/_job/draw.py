"""Draw from a learned energy by Pyro's MCMC, one chain after the other, and keep the draws."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import MCMC

from pyro_ebm._arviz import _import_arviz
from pyro_ebm._job.base import (
    JobError,
    Run,
    energy_of,
    law_of,
    need,
    progress,
    repeatable,
)
from pyro_ebm.checkpoint import write_whole
from pyro_ebm.diagnostics import to_arviz
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.infer import RecordedHMC, RecordedNUTS

KERNELS = {"nuts": RecordedNUTS, "hmc": RecordedHMC}
FEWEST = 8  # draws of a chain of which something can be said


class Draws(NamedTuple):
    """What to draw."""

    beta: float
    draws: int
    warmup: int
    chains: int
    kernel: str
    seed: int


class Chain(NamedTuple):
    """Whitened draws of a chain, and the sampler's record of each."""

    position: np.ndarray  # shape: (draws, dim)
    stats: dict[str, np.ndarray]
    finished: bool


def sample(run: Run, wanted: Draws, say: Any = print) -> Any:
    """Draw chains from a run's energy.

    Each chain has a seed of its own, so that it is the same whatever the number of chains. A
    keyboard interrupt ends sampling; finished chains are kept, or else the draws of the first.

    Args:
        run: The run.
        wanted: What to draw.
        say: Takes lines about what is going on.

    Returns:
        ArviZ's container, with the draws in the units of the table.

    Raises:
        JobError: If the first chain is interrupted before it has eight draws.
    """
    law = law_of(energy_of(run), wanted.beta)
    chains: list[Chain] = []
    total = wanted.chains * (wanted.warmup + wanted.draws)
    bar = progress(total, wanted.kernel.upper())
    with contextlib.closing(bar):
        while len(chains) < wanted.chains and all(chain.finished for chain in chains):
            with repeatable(wanted.seed * 1_000_003 + len(chains)):
                chains.append(_chain(law, wanted, bar))
    if not chains[-1].finished:
        chains = _keep(chains, wanted, say)
    return _container(run, wanted, chains)


def _chain(law: GibbsBoltzmann, wanted: Draws, bar: Any) -> Chain:
    """Run one chain, from a draw of the Gaussian."""
    kept: list[torch.Tensor] = []

    def note(kernel: Any, params: dict[str, torch.Tensor], stage: str, i: int) -> None:
        if stage.startswith("Sample"):
            kept.append(params["z"].detach().clone())
        bar.set_postfix(stage=stage.lower(), **kernel.logging(), refresh=False)
        bar.update()

    # A model of this one site would give the same draws at half the speed.
    kernel = KERNELS[wanted.kernel](potential_fn=lambda site: law.potential(site["z"]))
    mcmc = MCMC(
        kernel,
        wanted.draws,
        wanted.warmup,
        initial_params={"z": law.base.sample()},
        hook_fn=note,
        disable_progbar=True,
    )
    try:
        mcmc.run()
        stats = mcmc.diagnostics()["sample_stats"]["chain 0"]
        return Chain(mcmc.get_samples()["z"].numpy(), stats, True)
    except KeyboardInterrupt:
        stats = kernel.diagnostics()["sample_stats"] if kept else {}
        n = min([len(kept), *map(len, stats.values())])
        position = torch.stack(kept[:n]).numpy() if n else np.zeros((0, 0))
        return Chain(position, {name: values[:n] for name, values in stats.items()}, False)


def _keep(chains: list[Chain], wanted: Draws, say: Any) -> list[Chain]:
    """Say what is kept of an interrupted run: chains of one length."""
    *finished, last = chains
    if finished:
        say(
            f"Interrupted: {len(finished)} finished of {wanted.chains} chains are kept, the "
            f"{len(last.position)} draws of the next are not."
        )
        return finished
    if len(last.position) < FEWEST:
        raise JobError(
            f"interrupted after {len(last.position)} draws of the first chain: nothing is kept"
        )
    say(f"Interrupted: the first {len(last.position)} draws of the first chain are kept.")
    return [last]


def _container(run: Run, wanted: Draws, chains: list[Chain]) -> Any:
    """Put chains into ArviZ's container, in the units of the table."""
    z = torch.from_numpy(np.stack([chain.position for chain in chains]))
    rows = energy_of(run).rows(z) * run.tensors["scale"] + run.tensors["mean"]
    names = chains[0].stats
    data = to_arviz(
        {"x": rows},
        sample_stats={n: torch.from_numpy(np.stack([c.stats[n] for c in chains])) for n in names},
        dims={"x": ["column"]},
        coords={"column": run.info["data"]["columns"]},
    )
    facts = wanted._asdict() | {
        "chains": len(chains),
        "draws": z.shape[1],
        "interrupted": int(not chains[-1].finished or len(chains) < wanted.chains),
        "weights_sha256": run.info["weights"]["sha256"],
    }
    data["posterior"].attrs.update(facts)
    return data


# Files ----------------------------------------------------------------------------------------


def write_draws(path: Path, draws: Any) -> None:
    """Write draws to a netCDF file."""
    write_whole(path, lambda part: draws.to_netcdf(str(part), engine="h5netcdf"))


def read_draws(path: Path, run: Run) -> Any:
    """Read the draws of a run.

    Raises:
        JobError: If there are none, or they were drawn from other weights.
    """
    need("h5netcdf", "reading draws")
    import xarray

    if not path.exists():
        raise JobError(f"{path} is missing: draw with `pyro-ebm sample {path.parent}`")
    try:
        groups = {n: d.load() for n, d in xarray.open_groups(path, engine="h5netcdf").items()}
        facts, _ = groups["/posterior"].attrs, groups["/sample_stats"]
    except (OSError, KeyError, ValueError) as error:
        raise JobError(f"{path} cannot be read as draws: {error}") from None
    if facts.get("weights_sha256") != run.info["weights"]["sha256"]:
        raise JobError(
            f"{path} holds draws from other weights: draw anew, `pyro-ebm sample {path.parent}`"
        )
    for group in groups.values():
        group.close()
    tree, arviz = xarray.DataTree.from_dict(groups), _import_arviz()
    return arviz.from_datatree(tree) if hasattr(arviz, "from_datatree") else tree
