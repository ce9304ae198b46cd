"""What the parts of the main job share: tables, runs and their files, the learned energy."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ebm.checkpoint import write_whole
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.zoo import MLPEnergy

FORMAT = 1
CHUNK = 1 << 14  # rows of which the energy is evaluated at once


class JobError(Exception):
    """What the user can mend: one line on stderr, without a traceback."""


class Table(NamedTuple):
    """Rows of numbers with the names of their columns."""

    values: Tensor  # shape: (rows, columns), float64
    names: list[str]
    source: str


class Run(NamedTuple):
    """What ``fit`` leaves in a folder: tensors, and the facts about them that go into JSON."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]


def need(module: str, purpose: str) -> Any:
    """Import what an extra brings, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0].replace("sklearn", "scikit-learn")
        raise JobError(
            f'{purpose} needs {name}, which is not installed: pip install "pyro-ebm[demo]"'
        ) from None


@contextlib.contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Compute in float64, from a seed, with an empty parameter store; leave no trace of it.

    One thread: bits do not depend on the number of cores, and the tensors are small.
    """
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), pyro.get_param_store().scope():
        torch.set_default_dtype(torch.float64)
        try:
            torch.set_num_threads(1)
            torch.manual_seed(seed)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(before)


def progress(total: int, what: str) -> Any:
    """Return a progress bar, silent where nobody is looking."""
    from tqdm import tqdm

    silent = not sys.stderr.isatty() or "CI" in os.environ
    return tqdm(total=total, desc=what, disable=silent, dynamic_ncols=True)


# The learned law ------------------------------------------------------------------------------


class Whitened(nn.Module):
    r"""A network's energy, in the coordinates in which a Gaussian is the standard normal.

    .. math:: E(z) = E_1(\mu + L z), \quad \Sigma = L L^\top

    Chains are then well scaled however the columns are correlated, while the network sees the
    standardised columns.
    """

    def __init__(self, network: nn.Module, loc: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.network = network
        self.loc: Tensor
        self.tril: Tensor
        self.register_buffer("loc", loc)
        self.register_buffer("tril", torch.linalg.cholesky(covariance))

    def forward(self, z: Tensor) -> Tensor:
        """Return the energies of whitened points."""
        return self.network(self.rows(z))

    def rows(self, z: Tensor) -> Tensor:
        """Return the standardised rows of whitened points."""
        return self.loc + z @ self.tril.T

    def whiten(self, rows: Tensor) -> Tensor:
        """Return the whitened points of standardised rows."""
        centred = (rows - self.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.tril, centred, upper=False).squeeze(-1)


def standard_normal(dim: int) -> Any:
    """Return the base of whitened points: in the columns, the Gaussian of the training rows."""
    return dist.Normal(torch.zeros(dim, dtype=torch.float64), 1.0).to_event(1)


def build_energy(hidden: list[int], loc: Tensor, covariance: Tensor) -> Whitened:
    """Return a fresh energy of a table, near zero: the model starts at the Gaussian."""
    network = MLPEnergy(len(loc), hidden, scale=0.1)
    return Whitened(network, loc, covariance).to(loc.dtype)


def energy_of(run: Run) -> Whitened:
    """Return the learned energy of a run."""
    state = {n.removeprefix("energy."): t for n, t in run.tensors.items() if n[:7] == "energy."}
    eye = torch.eye(len(state["loc"]), dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        energy = build_energy(run.info["settings"]["hidden"], state["loc"], eye)
    energy.load_state_dict(state)
    return energy.requires_grad_(False)


def law_of(
    energy: Whitened, beta: float | Tensor = 1.0, batch: tuple[int, ...] = ()
) -> GibbsBoltzmann:
    """Return the distribution of an energy, of whitened points."""
    return GibbsBoltzmann(energy, standard_normal(len(energy.loc)).expand(batch), beta)


def gaussian(rows: Tensor, shrink: bool = True) -> tuple[Tensor, Tensor]:
    r"""Fit a full Gaussian; shrink its covariance towards a multiple of the identity.

    The intensity of the shrinkage is the one that Ledoit and Wolf derive from the rows.

    References:
        | A well-conditioned estimator for large-dimensional covariance matrices (Ledoit and
          Wolf, 2004)
        | https://doi.org/10.1016/S0047-259X(03)00096-4
    """
    n, dim = rows.shape
    loc = rows.mean(0)
    x = rows - loc
    covariance = x.T @ x / n
    if not shrink or dim == 1:
        return loc, covariance
    mean = covariance.trace() / dim
    target = mean * torch.eye(dim, dtype=rows.dtype)
    distance = (covariance - target).square().sum()
    noise = (x.square().T @ x.square() / n - covariance.square()).sum() / n
    intensity = (noise / distance).clamp(0.0, 1.0) if distance > 0 else 0.0
    return loc, covariance.lerp(target, intensity)


# Files ----------------------------------------------------------------------------------------


def save_run(folder: Path, run: Run) -> Run:
    """Write a run: the weights under the name of their hash, then the JSON that points to it."""
    buffer = io.BytesIO()
    torch.save(dict(run.tensors), buffer)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    name = f"weights-{digest[:12]}.pt"
    facts = {"format": FORMAT, **run.info, "weights": {"file": name, "sha256": digest}}
    text = json.dumps(facts, indent=1) + "\n"
    write_whole(folder / name, lambda part: part.write_bytes(data))
    write_whole(folder / "run.json", lambda part: part.write_text(text, encoding="utf-8"))
    for old in folder.glob("weights-*.pt"):
        if old.name != name:
            old.unlink()
    return run._replace(info=facts)


def load_run(folder: Path) -> Run:
    """Read a run and check that it is whole; nothing that is read is run as code."""
    path = folder / "run.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        known, name = info["format"], Path(info["weights"]["file"]).name
        digest, _ = info["weights"]["sha256"], info["settings"]["hidden"]
        data = (folder / name).read_bytes()
    except FileNotFoundError as error:
        missing = Path(str(error.filename))
        hint = ": make one with `pyro-ebm fit`" if missing == path else ""
        raise JobError(f"{folder} holds no run, {missing.name} is missing{hint}") from None
    except OSError as error:
        raise JobError(f"{folder} holds no run: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise JobError(f"{path} is damaged: it is not what `pyro-ebm fit` writes") from None
    if known != FORMAT:
        raise JobError(f"{path} has format {known}, this version of pyro-ebm reads {FORMAT}")
    if hashlib.sha256(data).hexdigest() != digest:
        raise JobError(f"{folder / name} is damaged: its SHA-256 is not the one in run.json")
    try:
        tensors = torch.load(io.BytesIO(data), weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        raise JobError(f"{folder / name} is damaged: it holds no tensors") from None
    return Run(tensors, info)
