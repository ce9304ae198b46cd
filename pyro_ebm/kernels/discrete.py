"""Gibbs sampling on finite supports, by blocks, and Metropolis flips."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_ebm._sites import (
    Place,
    check_sites,
    check_values,
    codes_of,
    draw,
    flat_sites,
    flip,
    numbers_of,
    place_of,
    put,
    size_of,
    take,
)
from pyro_ebm.energy import Energy, describe, value_and_grad
from pyro_ebm.kernels.base import (
    Kernel,
    MoveInfo,
    PointState,
    check_count,
    impossible,
    metropolis,
)

Conditionals = str | Sequence[Callable[[Tensor], Tensor]]

MAX_NUMBERS = 1 << 22
"""Trial points of about so many numbers are evaluated at once."""

ROUNDING = 1e3
"""Energies and conditionals may differ by this many units in the last place of the energies."""


def gibbs(
    energy: Energy,
    values: Tensor,
    num_chain_dims: int | None = None,
    *,
    blocks: Sequence[Tensor] | None = None,
    conditionals: Conditionals = "energies",
    random_scan: bool = False,
    check: bool = True,
) -> Kernel:
    r"""Gibbs sampling: a sweep draws each component, or each block, from its conditional law.

    .. math:: x_i \sim p(x_i \mid x_{-i}) \propto \exp(-U(x))

    One step sweeps all blocks once, in order. The components of a block must be independent given
    all others (a colouring: see :func:`colouring`); they are drawn at once. The conditionals come

    * from ``"energies"``: K energies per component, a block in one batch;
    * where the energy is ``"affine"`` in each component alone (Ising, Potts, the joint energy of
      a Boltzmann machine), from one gradient per block;
    * from the model: a function per block that maps points to the logits of its components,
      ``(*chains, m, K)``, or for two values to the log-odds of the second, ``(*chains, m)``.

    A block of the wrong colour, an energy that is not affine and wrong logits are refused when
    chains start: a right move is a proposal that Metropolis never rejects, so that its log ratio
    must be zero.

    Args:
        energy: The potential :math:`U`, ``(*chains, *event)`` to ``(*chains,)``.
        values: The values that each component can take: ``(K,)``, or ``(K, *atom)`` where
            components are vectors, such as ``torch.eye(K)`` for one-hot points ``(n, K)``.
        num_chain_dims: The number of leading dimensions that are chains; by default those of the
            energies.
        blocks: Boolean masks over the components, or their numbers in the flattened event; by
            default one component at a time. Components in no block stay as they are.
        conditionals: Where the conditional laws come from, see above.
        random_scan: Whether a step draws as many blocks as there are at random, with
            replacement, instead of each once.
        check: Whether ``init`` compares conditionals with energies, which takes about as long as
            a sweep. Without it there is no protection against dependent blocks.

    Returns:
        The kernel.

    Raises:
        TypeError: If ``values`` is not a tensor.
        ValueError: If ``values`` are less than two, ``conditionals`` is unknown or has not one
            function per block; from ``init``, if a mask does not fit or the check fails.

    References:
        | Stochastic Relaxation, Gibbs Distributions, and the Bayesian Restoration of Images
          (Geman and Geman, 1984)
        | https://doi.org/10.1109/TPAMI.1984.4767596

    Example:
        >>> spins = torch.tensor([0.0, 1.0])
        >>> ising = ebm.zoo.Ising(4, coupling=torch.ones(4, 4).triu(1).tril(1))  # a line
        >>> even = torch.tensor([True, False, True, False])
        >>> kernel = gibbs(ising, spins, blocks=[even, ~even], conditionals="affine")
        >>> state, _ = kernel.step(kernel.init(torch.zeros(5, 4)))
        >>> state.position.shape
        torch.Size([5, 4])
    """
    check_values(values)
    places = None if blocks is None else [place_of(block) for block in blocks]
    rule = _rule(energy, values, conditionals, places)
    wide = places is not None and any(size_of(place) > 1 for place in places)

    def layout(state: PointState) -> tuple[int, list[Place]]:
        dim = state.energy.dim() if num_chain_dims is None else num_chain_dims
        if places is not None:
            return dim, places
        num = flat_sites(state.position, values, dim).shape[dim]
        return dim, [slice(i, i + 1) for i in range(num)]

    @torch.no_grad()
    def init(position: Tensor) -> PointState:
        state = PointState(position, energy(position))
        dim = layout(state)[0]
        _check_masks(blocks or (), flat_sites(position, values, dim).shape[dim])
        if check and (wide or conditionals != "energies"):
            _check(energy, values, rule, state, layout(state))
        return state

    @torch.no_grad()
    def step(state: PointState) -> tuple[PointState, MoveInfo]:
        dim, every = layout(state)
        x = state.position.clone(memory_format=torch.contiguous_format)
        flat = flat_sites(x, values, dim)  # a view
        order: Sequence[int] = range(len(every))
        if random_scan:
            order = torch.randint(len(every), (len(every),)).tolist()
        invalid = torch.zeros_like(state.energy, dtype=torch.bool)
        for b in order:
            new, bad = _drawn(rule(x, b, every[b], dim), values, dim)
            put(flat, every[b], dim, new.to(x))
            invalid |= bad
        value = energy(x)
        ones = torch.ones_like(value)
        return PointState(x, value), MoveInfo(
            value, ones, ones.bool(), invalid | impossible(value)
        )

    return Kernel(init, step)


Rule = Callable[[Tensor, int, Place, int], Tensor]
"""Logits of a block, of points, its number, its place and the number of chain dimensions."""


def _rule(
    energy: Energy, values: Tensor, conditionals: Conditionals, places: Sequence[Place] | None
) -> Rule:
    if isinstance(conditionals, str):
        if conditionals not in ("energies", "affine"):
            raise ValueError(
                "conditionals must be 'energies', 'affine' or a function per block, got "
                f"{conditionals!r}"
            )
        return (_by_energies if conditionals == "energies" else _by_gradient)(energy, values)
    own = tuple(conditionals)
    if places is None or len(own) != len(places):
        num = 0 if places is None else len(places)
        raise ValueError(f"conditionals must hold one per block ({num}), got {len(own)}")
    return lambda x, b, place, dim: own[b](x)


def _by_energies(energy: Energy, values: Tensor) -> Rule:
    k = len(values)

    def table(x: Tensor, at: Tensor, dim: int) -> Tensor:
        flat = flat_sites(x, values, dim)
        place = torch.arange(flat.shape[dim], device=x.device) == at.to(x.device).unsqueeze(-1)
        one, atom = [1] * dim, values.shape[1:]
        place = place.reshape(len(at), 1, *one, -1, *[1] * len(atom))
        trial = torch.where(place, values.reshape(k, *one, 1, *atom).to(x), flat)
        return -energy(trial.reshape(len(at), k, *x.shape)).movedim((0, 1), (-2, -1))

    def rule(x: Tensor, b: int, place: Place, dim: int) -> Tensor:
        at = numbers_of(place)
        size = max(1, MAX_NUMBERS // (k * max(1, x.numel())))
        return torch.cat([table(x, part, dim) for part in at.split(size)], dim)

    return rule


def _by_gradient(energy: Energy, values: Tensor) -> Rule:
    def rule(x: Tensor, b: int, place: Place, dim: int) -> Tensor:
        points = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        grad = take(flat_sites(value_and_grad(energy, points)[1], values, dim), place, dim)
        if values.dim() > 1:
            return -grad.flatten(dim + 1) @ values.flatten(1).to(grad).T
        if len(values) == 2:
            return grad * (values[0] - values[1])
        return -grad.unsqueeze(-1) * values

    return rule


def _drawn(logits: Tensor, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Draw components; mark the chains with an energy that was NaN or minus infinity."""
    bad = logits.isnan()
    if logits.dim() == dim + 1:
        second = torch.rand_like(logits) < logits.sigmoid()
        return values[second.long()], bad.flatten(dim).any(-1)
    logits = torch.where(bad, -torch.inf, logits)
    weight = torch.softmax(logits, -1).nan_to_num(1.0)  # nowhere finite: any value
    return values[draw(weight)], (bad | (logits == torch.inf)).flatten(dim).any(-1)


def _check_masks(blocks: Sequence[Tensor], num: int) -> None:
    for block in blocks:
        if block.dtype == torch.bool and block.numel() != num:
            raise ValueError(
                f"blocks must be masks over the {num} components of a point, got one of shape "
                f"{tuple(block.shape)}"
            )


def _check(
    energy: Energy, values: Tensor, rule: Rule, state: PointState, layout: tuple[int, list[Place]]
) -> None:
    r"""Refuse conditionals that are not those of the energy: Metropolis would reject some moves.

    .. math:: U(x') - U(x) = \sum_{i \in B} \log \frac{p(x_i \mid x_{-B})}{p(x'_i \mid x_{-B})}

    for any change of a block B, or of a part of it, to values that are possible.

    Raises:
        ValueError: If a block breaks it; names the block and a component.
    """
    dim, places = layout
    for b, place in enumerate(places):
        at = numbers_of(place).to(state.position.device)
        logits = rule(state.position, b, place, dim)
        differs = _difference(energy, values, logits, state, at)
        if not differs(slice(None)):
            continue
        last = next((i for i in range(len(at)) if differs(slice(i + 1))), len(at) - 1)
        if differs(slice(last, last + 1)):
            raise ValueError(
                f"conditionals must be those of {describe(energy)}, but blocks[{b}] has others at "
                f"component {int(at[last])} (where they are 'affine', the energy must be so in "
                "each component)"
            )
        raise ValueError(
            f"blocks[{b}] must hold components that are independent given all others, but "
            f"component {int(at[last])} depends on an earlier one of the block"
        )


def _difference(
    energy: Energy, values: Tensor, logits: Tensor, state: PointState, at: Tensor
) -> Callable[[slice], bool]:
    """Draw a change of a block; say of its parts whether the energy changes as logits do."""
    before, dim = state.energy, state.energy.dim()
    flat = flat_sites(state.position, values, dim)
    if logits.dim() == dim + 1:
        logits = torch.stack([torch.zeros_like(logits), logits], -1)
    log_prob = logits.log_softmax(-1)
    possible = log_prob > -torch.inf
    new = draw(torch.where(possible.any(-1, keepdim=True), possible, True).to(log_prob))
    old = codes_of(flat.index_select(dim, at), values)
    log_old, log_new = log_prob.gather(-1, torch.stack([old, new], -1)).unbind(-1)

    def differs(part: slice) -> bool:
        changed = flat.index_copy(dim, at[part], values[new[..., part]].to(flat))
        change = energy(changed.reshape(state.position.shape)) - before
        gain = (log_old - log_new)[..., part].sum(-1)
        error = ROUNDING * torch.finfo(gain.dtype).eps * (1.0 + before.abs() + gain.abs())
        known = before.isfinite() & gain.isfinite()
        return bool((known & ~((change - gain).abs() <= error)).any())

    return differs


def colouring(coupling: Tensor) -> list[Tensor]:
    r"""Split components into blocks of which no two components are coupled, greedily.

    Args:
        coupling: A matrix ``(n, n)``; components i and j are coupled where it is not zero, either
            way round. The diagonal does not count.

    Returns:
        Boolean masks over the components, for the ``blocks`` of :func:`gibbs`.

    Raises:
        ValueError: If ``coupling`` is not a square matrix.

    Example:
        >>> ring = torch.eye(4).roll(1, 0)
        >>> colouring(ring)
        [tensor([ True, False,  True, False]), tensor([False,  True, False,  True])]
    """
    if coupling.dim() != 2 or coupling.shape[0] != coupling.shape[1]:
        raise ValueError(f"coupling must be a square matrix, got shape {tuple(coupling.shape)}")
    near = (coupling != 0) | (coupling.T != 0)
    colours: list[int] = []
    for i, row in enumerate(near.tolist()):
        taken = {colour for j, colour in enumerate(colours) if row[j]}
        colours.append(next(c for c in range(i + 1) if c not in taken))
    all_colours = torch.tensor(colours, device=coupling.device)
    return [all_colours == c for c in range(max(colours, default=-1) + 1)]


def metropolis_flips(energy: Energy, values: Tensor, *, num_flips: int = 1) -> Kernel:
    r"""Propose other values of components chosen at random; Metropolis accepts or rejects.

    .. math:: q(x' \mid x) = \binom{n}{r}^{-1} (K - 1)^{-r}

    for points :math:`x'` that differ from :math:`x` in r of the n components: the proposal is
    symmetric. A step costs one energy.

    Args:
        energy: The potential :math:`U`, ``(*chains, *event)`` to ``(*chains,)``.
        values: The values that each component can take, as in :func:`gibbs`.
        num_flips: How many components r are changed at once. An even number on two values never
            changes the parity of a point.

    Returns:
        The kernel.

    Raises:
        TypeError: If ``values`` is not a tensor.
        ValueError: If there are less than two values or flips are no whole number from 1 on;
            from ``init``, if there are less components, or one has none of the values.

    References:
        | Equation of State Calculations by Fast Computing Machines (Metropolis et al., 1953)
        | https://doi.org/10.1063/1.1699114

    Example:
        >>> kernel = metropolis_flips(lambda x: -x.sum(-1), torch.tensor([0.0, 1.0]))
        >>> state, info = kernel.step(kernel.init(torch.zeros(5, 3)))
        >>> info.accept_prob
        tensor([1., 1., 1., 1., 1.])
    """
    check_values(values)
    check_count("num_flips", num_flips, 1)

    @torch.no_grad()
    def init(position: Tensor) -> PointState:
        state = PointState(position, energy(position))
        flat = flat_sites(position, values, state.energy.dim())
        check_count("num_flips", num_flips, 1, flat.shape[state.energy.dim()])
        check_sites(flat, values)
        return state

    @torch.no_grad()
    def step(state: PointState) -> tuple[PointState, MoveInfo]:
        dim = state.energy.dim()
        flat = flat_sites(state.position, values, dim)
        u = torch.rand(flat.shape[: dim + 1], device=flat.device)
        at = u.topk(num_flips, -1).indices  # shape: (*chains, num_flips)
        new = flip(flat, values, at, torch.randint_like(at, 1, len(values)))
        position = new.reshape(state.position.shape)
        proposal = PointState(position, energy(position))
        return metropolis(state, proposal, torch.zeros_like(state.energy))

    return Kernel(init, step)
