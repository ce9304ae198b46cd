"""Training that tells the truth: what a loop shows while it learns, and warnings by name."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from pyro_ebm._binding import evaluating
from pyro_ebm._chart import COLUMNS, draw, table
from pyro_ebm._measure import (
    Data,
    Numbers,
    Seen,
    curvature,
    energies,
    movement,
    moves,
    places,
    tails,
    to_host,
)
from pyro_ebm._signs import find
from pyro_ebm.distribution import Flat, GibbsBoltzmann, unvalidated
from pyro_ebm.energy import Energy, describe
from pyro_ebm.flat import atom
from pyro_ebm.kernels.base import check_count
from pyro_ebm.partition import log_partition as estimate

__all__ = ["Monitor", "TrainingError", "TrainingWarning"]

NUM_POINTS = 64  # data and chains that a look takes
NUM_CURVED = 8  # data whose curvature is measured
PACE = 2  # curvature at every other look
QUIET = 3  # looks from a sign to one that is new

MUST_BE_FINITE = ("loss", "energy_data", "energy_negatives", "gradient")


class TrainingWarning(UserWarning):
    """A sign that training fails.

    Args:
        message: What was seen and what to do.
        kind: The kind of failure, as :class:`Monitor` lists them.
        step: The step at which it was seen.
    """

    def __init__(self, message: str, kind: str, step: int) -> None:
        super().__init__(message)
        self.kind, self.step = kind, step


class TrainingError(RuntimeError):
    """Training that cannot go on: a loss, an energy or a gradient that is not finite."""


class Monitor:
    r"""Watch a training loop, and warn by name when it fails.

    Call :meth:`update` once a step, after ``backward`` and before the optimiser's step; with SVI,
    after ``svi.step``, which leaves no gradients to see. It draws none of your random numbers and
    changes nothing, so that training is the same to the bit without it. At the first step and at
    every ``every``-th it looks at 64 data and chains; in between it only adds up the loss and, on
    a GPU, waits for nothing. The kinds:

    * ``"not finite"``: stops with a :class:`TrainingError` that names rows, or skips;
    * ``"blow-up"``: the energies of data are far beyond those of any sound run;
    * ``"frozen"``, ``"saturated"``: chains do not move, or stick at walls or at one value;
    * ``"runaway"``: no normaliser; negatives run away to lower energies than the data's, or,
      on a flat base, the energy grows too little far out;
    * ``"far"``, ``"gap"``: negatives three times farther out than the data reach, or their mean
      energy, under weights where they have any, more than 3 sd from that of the data;
    * ``"flat"``: the energy is the same everywhere;
    * ``"short"``: too few moves for the mixing time: the energy still drifts in the second half
      of the moves, or persistent chains hardly move;
    * ``"temperature"``: :math:`\sigma^2 / 2 \epsilon` of Langevin moves is not near 1;
    * ``"curvature"``: data in canyons, or nothing for score matching to learn from;
    * ``"overfitting"``, ``"falling"``: the held-out log-likelihood falls, while that of the
      first batch does not, or does; by more than 3 errors, .05 nats and a twentieth of the gain.

    Each is warned of once, as a :class:`TrainingWarning`, and again where it has been away for
    two looks; all are in ``warnings``. Symptoms of a cause that is found are left out.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``; or a
            :class:`~pyro_ebm.GibbsBoltzmann`, with its base and beta. The parameters whose
            gradients are watched are those of its module.
        base: The base :math:`b` of the model, if it has one. Walls are those of its support.
        held_out: Rows that are not learned from, ``(n, *event)``; needs ``log_partition``.
        log_partition: A method of :mod:`pyro_ebm.partition` with a value; then the likelihoods of
            these rows and of the first batch are watched too. One with a ``bracket``, as
            :class:`~pyro_ebm.partition.Annealed`, gives log Z from both sides. That from above
            needs exact samples, or ends of long runs for it to ``start`` from: where these miss
            a mode it is too low.
        every: The steps from look to look. On one core a look takes .4 (an RBM) to 1 ms (a
            network, with its curvature), a step between looks a microsecond: in all 2 per cent
            of steps of 2 ms. Where steps are faster, take more of them.
        slow: The steps from one log Z to the next.
        on_nan: ``"raise"`` stops at what is not finite. ``"skip"`` warns, counts in
            ``skipped``, and :meth:`update` returns False; it looks at loss and gradients at
            every step, for which a GPU waits.

    Raises:
        ValueError: If an option is out of its range, or a likelihood lacks its parts.

    References:
        | A Practical Guide to Training Restricted Boltzmann Machines (Hinton, 2010)
        | https://www.cs.toronto.edu/~hinton/absps/guideTR.pdf
        | On the Anatomy of MCMC-Based Maximum Likelihood Learning of Energy-Based Models
          (Nijkamp, Hill, Han, Zhu and Wu, 2019)
        | https://arxiv.org/abs/1903.12370

    Example:
        >>> energy = ebm.zoo.MLPEnergy(2)
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> monitor, x = ebm.Monitor(energy, base), torch.randn(64, 2)
        >>> optimizer = torch.optim.Adam(energy.parameters(), 1e-3)
        >>> for _ in range(50):
        ...     negatives = torch.randn(64, 2)
        ...     loss = ebm.losses.contrastive_divergence(energy, x, negatives)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     if monitor.update(x, negatives, loss=loss):
        ...         optimizer.step()
        >>> monitor.history["step"], monitor.warnings
        ([1.0, 25.0, 50.0], [])
    """

    def __init__(
        self,
        energy: Energy | GibbsBoltzmann,
        base: Any = None,
        *,
        held_out: Tensor | None = None,
        log_partition: Any = None,
        every: int = 25,
        slow: int = 50,
        on_nan: str = "raise",
    ) -> None:
        check_count("every", every, 1)
        check_count("slow", slow, 1)
        if on_nan not in ("raise", "skip"):
            raise ValueError(f"on_nan must be 'raise' or 'skip', got {on_nan!r}")
        if held_out is not None and log_partition is None:
            raise ValueError("held_out needs a log_partition, got None")
        beta: Any = 1.0
        if isinstance(energy, GibbsBoltzmann):
            beta, base = energy.beta, energy.base
            energy = energy.energy
        if log_partition is not None and (base is None or log_partition.value == "none"):
            raise ValueError("log_partition must give a value of log Z, and needs a base")
        self.energy, self.base, self.beta = energy, base, beta
        self.log_partition = log_partition
        self._rows = {} if held_out is None else {"held_out": held_out}
        self.every, self.slow, self.on_nan = every, slow, on_nan
        self._measure = None if base is None or isinstance(base, Flat) else unvalidated(base)
        self._walls = _walls(base)
        # A flat base without walls leaves the normaliser to the energy.
        self._open = isinstance(base, Flat) and self._walls == (None, None)
        self._parameters = dict(energy.named_parameters() if isinstance(energy, nn.Module) else ())
        self.step, self.skipped = 0, 0
        self.history: dict[str, list[float]] = {n: [] for n in ("step", "dim", *COLUMNS)}
        self.warnings: list[TrainingWarning] = []
        self._seen: dict[str, int] = {}  # kind -> the look at which it was last found
        self._losses: Any = 0.0
        self._slow_look = -1
        self._before: Tensor | None = None
        self._probe: Tensor | None = None
        self._is_discrete: bool | None = None

    def update(
        self,
        x: Any,
        negatives: Any = None,
        *,
        loss: Tensor | float | None = None,
        info: Any = None,
        state: Any = None,
    ) -> bool:
        """Count a step, and look at it if it is time to.

        Args:
            x: The batch of data, ``(n, *event)``; a tuple of the parts of an energy of several.
            negatives: The negatives of the step, ``(m, *event)``; or what
                :meth:`ebm.Negatives.step` returns, or a
                :class:`~pyro_ebm.partition.Contrastive` that is learned with.
            loss: The loss of the step.
            info: The kernel's record of the last move; a list of those of all moves of the step,
                or records stacked in their first dimension, show whether the moves are enough.
            state: The state of all chains, followed from step to step where ``negatives`` are
                not the same chains every time.

        Returns:
            Whether the step is sound; if not, do without it.

        Raises:
            TrainingError: If something is not finite, unless ``on_nan="skip"``.
        """
        self.step += 1
        value = loss.detach() if isinstance(loss, Tensor) else loss
        if isinstance(value, Tensor) and value.device.type == "cpu":
            value = value.item()
        if not self._sound(value):
            return self._unsound(x, negatives, loss)
        self._losses = self._losses + (0.0 if value is None else value)
        due = self.step % self.every == 0 or self.step == 1
        if not due and (self.step + 1) % self.every:
            return True
        seen = Seen.of(x, negatives, info, state)
        if due and not self._look(seen, value is not None):
            return self._unsound(x, negatives, loss)
        self._before = None if seen.chains is None else seen.chains[:NUM_POINTS].clone()
        return True

    def _sound(self, value: Tensor | float | None) -> bool:
        """Whether the loss is finite, and the gradients where one may go on without the step."""
        if self.on_nan == "skip":
            return _finite(value) and all(_finite(g) for g in self._gradients())
        # That of another device is seen in the sum, at the next look.
        return isinstance(value, Tensor) or _finite(value)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]

    def _look(self, seen: Seen, has_loss: bool) -> bool:
        """Measure, keep the numbers and warn; return whether all is finite."""
        numbers = self._numbers(seen.some(NUM_POINTS))
        if has_loss:
            steps = self.step - (self.history["step"] or [0.0])[-1]
            numbers["loss"] = torch.as_tensor(self._losses / steps)
        self._losses = 0.0
        known = to_host(numbers)
        if not all(math.isfinite(known.get(name, 0.0)) for name in MUST_BE_FINITE):
            return False
        if self.log_partition is not None and self.step // self.slow != self._slow_look:
            self._slow_look = self.step // self.slow
            known |= self._likelihoods(seen.x[0])
        known |= {"step": float(self.step), "dim": float(seen.x[0][0].numel())}
        for name, values in self.history.items():
            values.append(known.get(name, math.nan))
        self._warn(find(self.history))
        return True

    @torch.no_grad()
    def _numbers(self, seen: Seen) -> Numbers:
        """Measure the points, the chains and their moves."""
        x, negatives, now, info, log_weight = seen
        if self._is_discrete is None:
            self._is_discrete = not x[0].is_floating_point() or bool((x[0] == x[0].round()).all())
        data = Data.of(x[0])
        found = data.numbers()
        with evaluating(self.energy):
            found |= energies(*self._energies(x, negatives), len(x[0]), log_weight)
            if not self._is_discrete and len(self.history["step"]) % PACE == 0:
                scale = (found["variance"] / data.rows.shape[1]).sqrt()
                found |= self._curvature(x, scale)
                if self._open:
                    u = lambda first: self._energies((first, *x[1:]))[0]
                    found["tails"] = tails(u, x[0], data)
        if negatives is not None:
            found |= places(data, negatives[0], None if self._is_discrete else self._walls)
        if now is not None and self._before is not None and now.shape == self._before.shape:
            found |= movement(data, self._before, now)
        if info is not None:
            found |= moves(info, found["sd_data"])
        if gradients := self._gradients():
            found["gradient"] = vector_norm(torch.stack([vector_norm(g) for g in gradients]))
        return found

    def _energies(
        self, x: tuple[Tensor, ...], negatives: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return beta E - log b of data and then of negatives, and beta E alone."""
        parts = x
        if negatives is not None:
            parts = tuple(torch.cat(pair) for pair in zip(x, negatives, strict=True))
        plain = self.energy(*parts)
        plain = plain if self.beta == 1.0 else self.beta * plain
        whole = plain if self._measure is None else plain - self._measure.log_prob(parts[0])
        return whole, plain

    def _curvature(self, x: tuple[Tensor, ...], scale: Tensor) -> Numbers:
        """Measure the curvature of the energy at a few of the data."""
        few = tuple(part[:NUM_CURVED] for part in x)
        if self._probe is None or self._probe.shape != few[0].shape:
            generator = torch.Generator().manual_seed(0)  # the user's numbers stay the same
            signs = torch.randint(2, few[0].shape, generator=generator)
            self._probe = (2 * signs - 1).to(few[0])
        potential = lambda first: self._energies((first, *few[1:]))[0]
        return curvature(potential, few[0], scale, self._probe)

    def _likelihoods(self, x: Tensor) -> dict[str, float]:
        """Estimate log Z, and log-likelihoods: the same rows every time, so that they compare."""
        self._rows.setdefault("likelihood", x)
        d = GibbsBoltzmann(self.energy, self.base, self.beta)
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad(), evaluating(self.energy):
            if hasattr(self.log_partition, "bracket"):
                sides = self.log_partition.bracket(d)
            else:
                sides = (estimate(d, self.log_partition),)
            means = {name: -float(d.potential(rows).mean()) for name, rows in self._rows.items()}
        ends = [float(side.value) for side in sides]
        log_z, half = sum(ends) / len(ends), (max(ends) - min(ends)) / 2
        error = half + max(float(side.std_error) for side in sides)
        found = {name: mean - log_z for name, mean in means.items()}
        return found | {"log_z": log_z, "log_z_error": error}

    def _warn(self, found: dict[str, str]) -> None:
        """Warn of what is new; what cannot be judged at this look, "", stays as it was."""
        look = len(self.history["step"])
        for kind, text in found.items():
            age = look - self._seen.get(kind, -QUIET)
            if text or age == 1:
                self._seen[kind] = look
            if text and age >= QUIET:
                self._say(kind, text)

    def _say(self, kind: str, text: str) -> None:
        warning = TrainingWarning(f"step {self.step}, {kind}: {text}", kind, self.step)
        self.warnings.append(warning)
        warnings.warn(warning, stacklevel=5)

    def _unsound(self, x: Any, negatives: Any, loss: Any) -> bool:
        """Name what is not finite, and stop or count."""
        seen, what = Seen.of(x, negatives, None, None), []
        if not _finite(loss):
            what.append(f"the loss is {float(torch.as_tensor(loss).detach())}")
        for name, parts in (("x", seen.x), ("negatives", seen.negatives)):
            what += self._bad_rows(name, parts or ())
        for name, parameter in self._parameters.items():
            if not _finite(parameter):
                what.append(f"the parameter {name!r} is not finite")
            elif not _finite(parameter.grad):
                what.append(f"the gradient of {name!r} is not finite")
        text = f"{'; '.join(what) or 'the mean loss is not finite'}, in {describe(self.energy)}"
        if self.on_nan == "raise":
            raise TrainingError(
                f"step {self.step}, not finite: {text}. Take these rows out, lower the learning "
                'rate, or leave out such steps by on_nan="skip"'
            )
        self.skipped += 1
        if self.skipped == 1:
            self._say("not finite", f"{text}. The step is left out, as are all such; see skipped")
        return False

    @torch.no_grad()
    def _bad_rows(self, name: str, parts: tuple[Tensor, ...]) -> list[str]:
        """Name rows that are not finite themselves, or else those of such energies."""
        if not parts:
            return []
        bad = ~parts[0].reshape(len(parts[0]), -1).isfinite().all(1)
        if bad.any():
            return [f"{name} is not finite in {_rows(bad)}"]
        with evaluating(self.energy):
            bad = ~self._energies(parts)[0].isfinite()
        return [f"the energies of {name} are not finite in {_rows(bad)}"] if bad.any() else []

    def __str__(self) -> str:
        """Return the table that :meth:`summary` prints."""
        head = f"{self.step} steps, {len(self.history['step'])} looks, {self.skipped} left out"
        said = [f"- {warning}" for warning in self.warnings] or ["no warnings"]
        return "\n".join([head, *table(self.history), *said])

    def summary(self) -> None:
        """Print what was seen, in a table with what is sound, and the warnings."""
        print(self)

    def plot(self) -> Any:
        """Draw the numbers over the steps, with a line where a warning was given.

        Returns:
            A matplotlib ``Figure``; save it by its ``savefig``.

        Raises:
            ModuleNotFoundError: Without matplotlib, the extra ``plot``.
        """
        return draw(self.history, {w.step: w.kind for w in self.warnings})


def _finite(value: Tensor | float | None) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return value is None or math.isfinite(value)


def _walls(base: Any) -> tuple[Any, Any]:
    """Return the ends of a base's support where it is a box, else None."""
    support = None if base is None else atom(base.support)
    return getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)


def _rows(bad: Tensor) -> str:
    rows = bad.nonzero().flatten().tolist()
    return f"{len(rows)} rows: {rows[:8]}" + (" ..." if len(rows) > 8 else "")
