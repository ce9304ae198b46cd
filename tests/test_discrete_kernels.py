"""Kernels on finite supports, against the sum over all states."""

from functools import partial

import pytest
import torch
from pyro.distributions import constraints

import pyro_ebm as ebm
from pyro_ebm._sites import draw, flip
from pyro_ebm.kernels import (
    augmented,
    colouring,
    discrete,
    discrete_mala,
    gibbs,
    gibbs_with_gradients,
    informed,
    mala,
    metropolis_flips,
    mixed,
    tempered,
)
from pyro_ebm.kernels.base import metropolis
from pyro_ebm.zoo import RBM, Ising
from tests.common import EXACT, FALSE_ALARM, FAR, Line

BITS = torch.tensor([0.0, 1.0], dtype=torch.float64)


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Supports and energies ---------------------------------------------------------------------------


def glass(x):
    """A ring of twelve spins with couplings of both signs and fields: affine in each."""
    s, j, h = 2 * x - 1, numbers(12, seed=1).to(x), numbers(12, seed=2).to(x)
    return -(0.8 * j * s * s.roll(-1, -1) + 0.4 * h * s).sum(-1)


def steep(x):
    """Fields of very different sizes."""
    return -(torch.linspace(-3, 3, 12).to(x) * x).sum(-1)


def curved(x):
    """The same with a term of all spins: not affine, and no two are independent."""
    return glass(x) + 0.15 * (2 * x - 1).sum(-1).square() * (0.5 + x[..., 0])


def rungs(x):
    """Whole numbers from 0 to 2 on a ring: no more affine than a spring is."""
    x = x.to(torch.get_default_dtype())
    return 0.4 * (x - x.roll(1, -1)).square().sum(-1) - 0.3 * x[..., :2].sum(-1)


def potts(x):
    coupling = 0.9 * (torch.eye(6).roll(1, 0) + torch.eye(6).roll(-1, 0))
    field = 0.5 * numbers(6, 3, seed=3)
    return ebm.zoo.Potts(6, 3, coupling, field).to(x)(x)


EVEN = torch.arange(12) % 2 == 0
SIX = torch.arange(6) % 2 == 0


class Case:
    """An energy with its values, all its states, their probabilities and a colouring."""

    def __init__(self, energy, values, states, blocks=None):
        self.energy, self.values, self.states, self.blocks = energy, values, states, blocks
        with torch.no_grad():
            self.p = torch.softmax(-energy(states), 0)

    def sample(self, n):
        return self.states[torch.multinomial(self.p, n, replacement=True)]

    def rows(self, x):
        """Return the numbers of states."""
        one_hot = self.values.dim() > 1
        code = x.argmax(-1) if one_hot else (x.unsqueeze(-1) == self.values).long().argmax(-1)
        places = torch.arange(code.shape[-1] - 1, -1, -1)
        return (code * len(self.values) ** places).sum(-1)

    def p_value(self, x, num=40):
        """Chi-squared of independent draws; states of like probability share a bin, in threes."""
        order = self.p.argsort()
        place = torch.empty_like(order)
        place[order] = (self.p[order].cumsum(0) * num).long().clamp(max=num - 1)
        group = 3 * place + torch.arange(len(place)) % 3
        expected = torch.zeros(3 * num).index_add(0, group, self.p) * len(x)
        counts = torch.bincount(group[self.rows(x)], minlength=3 * num)
        chi2 = ((counts - expected).square() / expected)[expected > 0].sum()
        return torch.special.gammaincc(((expected > 0).sum() - 1) / 2, chi2 / 2).item()


def spins(energy, blocks=None):
    return Case(energy, BITS, torch.cartesian_prod(*[BITS] * 12), blocks)


CASES = {
    "ring": lambda: spins(glass, [EVEN, ~EVEN]),
    "curved": lambda: spins(curved),
    "whole numbers": lambda: Case(
        rungs, torch.arange(3), torch.cartesian_prod(*[torch.arange(3)] * 6), [SIX, ~SIX]
    ),
    "potts": lambda: Case(
        potts,
        torch.eye(3),
        ebm.Flat((6, 3), constraints.one_hot).enumerate_support(),
        [SIX, ~SIX],
    ),
}
INFORMED = {
    "gradients": gibbs_with_gradients,
    "gradients, barker": partial(gibbs_with_gradients, balance="barker"),
    "paths": partial(gibbs_with_gradients, num_flips=3),
    "discrete mala": lambda energy, values: discrete_mala(energy, values, 0.5),
    "discrete mala, barker": lambda energy, values: discrete_mala(
        energy, values, 0.5, balance="barker"
    ),
}
KERNELS = {
    "gibbs": gibbs,
    "random scan": partial(gibbs, random_scan=True),
    "flips": metropolis_flips,
    "three flips": partial(metropolis_flips, num_flips=3),
    **INFORMED,
}
parametrize = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)


def run(kernel, start, num):
    state = kernel.init(start)
    for _ in range(num):
        state, info = kernel.step(state)
        assert not info.invalid.any()
    return state


def law_after(kernel, case, num=5):
    """Start in the law, move, and ask whether it is still there."""
    return case.p_value(run(kernel, case.sample(20_000), num).position)


# Invariance --------------------------------------------------------------------------------------


@parametrize
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_kernel_leaves_its_law_invariant(make, case):
    case = case()
    sweeps = make is gibbs or getattr(make, "func", None) is gibbs
    assert law_after(make(case.energy, case.values), case, 1 if sweeps else 6) > FALSE_ALARM


@pytest.mark.parametrize(
    ("name", "conditionals"),
    [
        ("ring", "energies"),
        ("ring", "affine"),
        ("whole numbers", "energies"),
        ("potts", "energies"),
        ("potts", "affine"),
    ],
)
def test_gibbs_in_blocks_leaves_the_law_invariant(name, conditionals):
    case = CASES[name]()
    kernel = gibbs(case.energy, case.values, blocks=case.blocks, conditionals=conditionals)
    assert law_after(kernel, case, 3) > FALSE_ALARM


def test_the_comparison_sees_blocks_of_neighbours():
    case = CASES["ring"]()
    both = [torch.ones(12, dtype=torch.bool)]
    for conditionals in ("energies", "affine"):
        kernel = gibbs(case.energy, BITS, blocks=both, conditionals=conditionals, check=False)
        assert law_after(kernel, case, 2) < FALSE_ALARM


def stale(old, new, ratio):
    """Keep the gradients of the points that chains have left."""
    kept, info = metropolis(old, new, ratio)
    return kept._replace(grad=old.grad), info


right_path = informed._log_path
FAULTS = {
    "no proposal ratio": ("metropolis", lambda old, new, ratio: metropolis(old, new, 0 * ratio)),
    "ratio upside down": ("metropolis", lambda old, new, ratio: metropolis(old, new, -ratio)),
    "stale gradients": ("metropolis", stale),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("make", INFORMED.values(), ids=INFORMED)
def test_the_comparison_sees_a_fault_of_the_proposal(make, fault, monkeypatch):
    monkeypatch.setattr(informed, *fault)
    case = CASES["curved"]()
    assert law_after(make(case.energy, case.values), case, 15) < FALSE_ALARM


def with_replacement(scores, at, code, used):
    """The probability of a path as if a component could be drawn again."""
    return torch.where(
        used, scores[..., 0].gather(-1, at) - scores.logsumexp((-2, -1))[:, None], 0
    ).sum(-1)


def test_the_comparison_sees_paths_as_if_drawn_with_replacement(monkeypatch):
    monkeypatch.setattr(informed, "_log_path", with_replacement)
    assert law_after(INFORMED["paths"](steep, BITS), spins(steep), 30) < FALSE_ALARM


def test_the_comparison_sees_a_way_back_that_leads_elsewhere(monkeypatch):
    """With three values the way back is by two places where the way forth is by one."""
    monkeypatch.setattr(
        informed, "_log_path", lambda s, at, code, used: right_path(s, at, 0 * code, used)
    )
    case = CASES["whole numbers"]()
    assert law_after(gibbs_with_gradients(case.energy, case.values), case, 20) < FALSE_ALARM


def test_the_comparison_sees_flips_that_are_always_accepted(monkeypatch):
    always = lambda old, new, ratio: metropolis(old, new, ratio + torch.inf)
    monkeypatch.setattr(discrete, "metropolis", always)
    case = CASES["ring"]()
    assert law_after(metropolis_flips(case.energy, BITS), case) < FALSE_ALARM


# Reversibility -----------------------------------------------------------------------------------


def couple(x):
    """Two whole numbers from 0 to 2 that repel each other: nine states."""
    x = x.to(torch.get_default_dtype())
    return 0.7 * x[..., 0] * x[..., 1].square() - 0.5 * x[..., 0] - 0.3 * x[..., 1]


def small():
    values = torch.arange(3)
    return Case(couple, values, torch.cartesian_prod(values, values))


def balance_of(make, n=200_000):
    """The p-value that each move between two states is made as often as its reverse."""
    case = small()
    x = case.sample(n)
    y = run(make(case.energy, case.values), x, 1).position
    flow = torch.bincount(9 * case.rows(x) + case.rows(y), minlength=81).reshape(9, 9)
    some = (flow + flow.T).triu(1) > 10
    chi2 = ((flow - flow.T).square() / (flow + flow.T))[some].sum()
    return torch.special.gammaincc(some.sum() / 2, chi2 / 2).item()


REVERSIBLE = {
    "flips": metropolis_flips,
    "two flips": partial(metropolis_flips, num_flips=2),
    **INFORMED,
}


@pytest.mark.parametrize("make", REVERSIBLE.values(), ids=REVERSIBLE)
def test_a_move_is_as_frequent_as_its_reverse(make):
    assert balance_of(make) > FALSE_ALARM


def test_the_comparison_sees_that_a_sweep_is_not_reversible():
    assert balance_of(gibbs) < FALSE_ALARM


@pytest.mark.parametrize("make", INFORMED.values(), ids=INFORMED)
def test_it_sees_a_proposal_without_its_ratio(make, monkeypatch):
    monkeypatch.setattr(informed, *FAULTS["no proposal ratio"])
    assert balance_of(make) < FALSE_ALARM


def test_gibbs_with_gradients_accepts_as_its_formula_says():
    """On an affine energy the first order is exact: weights are those of energy differences."""
    case = CASES["ring"]()
    x = case.sample(50)
    kernel = gibbs_with_gradients(glass, BITS)
    state = kernel.init(x)
    new, info = kernel.step(state)
    moved = (new.position != x).sum(-1) == 1
    assert torch.equal(moved, info.accepted)

    def proposal(a, b):
        flipped = (a.unsqueeze(1) - torch.eye(12)).abs()  # shape: (n, 12, 12)
        weight = torch.softmax(0.5 * (glass(a).unsqueeze(1) - glass(flipped)), 1)
        return weight[a != b]

    a, b = x[moved], new.position[moved]
    ratio = (glass(a) - glass(b)).exp() * proposal(b, a) / proposal(a, b)
    torch.testing.assert_close(info.accept_prob[moved], ratio.clamp(max=1.0), **EXACT)


def test_discrete_mala_accepts_as_its_formula_says():
    case = CASES["potts"]()
    x = case.sample(50)
    kernel = discrete_mala(potts, case.values, 0.8)
    new, info = kernel.step(kernel.init(x))
    slope = lambda a: ebm.force(potts, a)

    def log_proposal(a, b):
        gain = 0.5 * (slope(a) - (slope(a) * a).sum(-1, keepdim=True))
        logits = gain - (1 - a) * 2 / (2 * 0.8)  # one-hot vectors are the root of two apart
        return (logits.log_softmax(-1) * b).sum((-2, -1))

    a, b = x[info.accepted], new.position[info.accepted]
    ratio = (potts(a) - potts(b) + log_proposal(b, a) - log_proposal(a, b)).exp()
    torch.testing.assert_close(info.accept_prob[info.accepted], ratio.clamp(max=1.0), **EXACT)


# The contract ------------------------------------------------------------------------------------

CONTRACT = {
    **KERNELS,
    "blocks": lambda energy, values: gibbs(energy, values, blocks=[SIX, ~SIX], check=False),
    "affine": lambda energy, values: gibbs(energy, values, conditionals="affine", check=False),
}
every = pytest.mark.parametrize("make", CONTRACT.values(), ids=CONTRACT)


def field(x):
    """The energy of six components on their own: also affine where they are one-hot."""
    x = x.to(torch.get_default_dtype())
    return -(x[..., 1:].flatten(-2).sum(-1) if x.shape[-1] == 3 else x.sum(-1))


@every
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("support", ["bits", "whole numbers", "one-hot"])
def test_a_step_keeps_shapes_and_its_argument(make, batch, support, device):
    values = {"bits": BITS, "whole numbers": torch.arange(3), "one-hot": torch.eye(3)}[support]
    values = values.to(device)
    kernel = make(field, values)
    start = values[torch.randint(len(values), (*batch, 6), device=device)]
    state = kernel.init(start)
    before = [part.clone() for part in state]
    new, info = kernel.step(state)
    assert new.position.shape == start.shape
    assert new.position.dtype == start.dtype
    assert info.accept_prob.shape == info.invalid.shape == new.energy.shape == batch
    torch.testing.assert_close(new.energy, field(new.position), **EXACT)
    for part, old in zip(state, before, strict=True):
        assert torch.equal(part, old)


@every
def test_the_same_seed_gives_the_same_chain(make):
    kernel, ends = make(glass6, BITS), []
    for _ in range(2):
        torch.manual_seed(3)
        ends.append(run(kernel, torch.zeros(40, 6), 5).position)
    assert torch.equal(*ends)


def glass6(x):
    return glass(torch.cat([x, x], -1))


@every
def test_it_runs_in_single_precision_and_under_no_grad(make):
    kernel = make(glass6, BITS.float())
    with torch.no_grad():
        state = run(kernel, torch.zeros(4, 6, dtype=torch.float32), 3)
    assert state.position.dtype == torch.float32


@parametrize
def test_a_wall_is_exact_and_not_marked(make):
    def walled(x):
        return torch.where(x.sum(-1) > 3, torch.inf, glass6(x))

    state = run(make(walled, BITS), torch.zeros(300, 6), 10)
    assert (state.position.sum(-1) <= 3).all()
    assert (state.position.sum(-1) > 0).any()


@parametrize
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_an_impossible_energy_is_a_rejection_that_is_marked(make, bad):
    def broken(x):
        return torch.where(x.sum(-1) > 3, bad, -x.sum(-1))

    kernel, marked = make(broken, BITS), 0
    state = kernel.init(torch.zeros(300, 6))
    for _ in range(10):
        state, info = kernel.step(state)
        marked += int(info.invalid.sum())
    assert marked > 0
    if bad != bad or make not in (gibbs, KERNELS["random scan"]):
        assert (state.position.sum(-1) <= 3).all()


@parametrize
def test_parameters_get_no_gradient(make):
    energy = Ising(6, coupling=torch.ones(6, 6))
    state = run(make(energy, BITS), torch.zeros(5, 6), 2)
    assert not state.energy.requires_grad
    assert all(p.grad is None for p in energy.parameters())


@pytest.mark.parametrize("make", [gibbs_with_gradients, INFORMED["discrete mala"]])
def test_an_informed_kernel_is_tempered_too(make):
    case, betas = CASES["ring"](), torch.tensor([0.4, 1.0])
    kernel = tempered(lambda u: make(u, BITS), glass, betas)
    state = kernel.init(case.sample(10_000))
    cold = Case(lambda x: 0.4 * glass(x), BITS, case.states)
    inner = state.inner
    hot = cold.sample(10_000)
    fresh = make(lambda x: betas.unsqueeze(-1) * glass(x), BITS).init(
        torch.stack([hot, inner.position[1]])
    )
    state = state._replace(inner=fresh)
    for _ in range(6):
        state, _ = kernel.step(state)
    assert case.p_value(state.position) > FALSE_ALARM
    assert cold.p_value(state.inner.position[0]) > FALSE_ALARM


def test_a_distribution_over_whole_numbers_has_gradients_too():
    base = ebm.Flat((6,), constraints.integer_interval(0, 2))
    d = ebm.GibbsBoltzmann(rungs, base)
    case = CASES["whole numbers"]()
    assert law_after(gibbs_with_gradients(d.potential, torch.arange(3)), case) > FALSE_ALARM


# Blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ring", "potts"])
def test_a_gradient_gives_the_conditionals_of_the_energies(name):
    case = CASES[name]()
    x, tables = case.sample(7), []
    for kind in ("energies", "affine"):
        logits = discrete._rule(case.energy, case.values, kind, None)(x, 0, slice(1, 5), 1)
        if logits.dim() == 2:
            logits = torch.stack([torch.zeros_like(logits), logits], -1)
        tables.append(logits.log_softmax(-1))
    torch.testing.assert_close(*tables, **EXACT)


def test_energies_in_chunks_are_those_at_once(monkeypatch):
    case, rules = CASES["potts"](), []
    x = case.sample(7)
    for size in (1 << 22, 300):
        monkeypatch.setattr(discrete, "MAX_NUMBERS", size)
        rules.append(discrete._by_energies(potts, case.values)(x, 0, torch.tensor([0, 2, 5]), 1))
    torch.testing.assert_close(*rules, **EXACT)


def test_an_energy_that_is_not_affine_is_refused():
    case = CASES["curved"]()
    kernel = gibbs(curved, BITS, conditionals="affine")
    with pytest.raises(
        ValueError, match=r"those of energy 'curved', but blocks\[0\] .* component 0"
    ):
        kernel.init(case.sample(3))


def test_the_component_that_is_not_affine_is_named():
    energy = lambda x: -x.sum(-1) + x[..., 4].square() - x[..., 4]
    kernel = gibbs(energy, BITS, blocks=[SIX, ~SIX], conditionals="affine")
    with pytest.raises(ValueError, match=r"but blocks\[0\] has others at component 4 "):
        kernel.init(torch.zeros(3, 6))


@pytest.mark.parametrize("conditionals", ["energies", "affine"])
def test_blocks_of_neighbours_are_refused(conditionals):
    blocks = [torch.tensor([0, 2, 3]), torch.tensor([1, 4])]
    kernel = gibbs(glass, BITS, blocks=blocks, conditionals=conditionals)
    with pytest.raises(ValueError, match=r"blocks\[0\] must .* component 3 depends on an earlier"):
        kernel.init(spins(glass).sample(20))


def test_wrong_logits_are_refused():
    wrong = lambda x: x.new_zeros(len(x), 6)
    kernel = gibbs(glass, BITS, blocks=[EVEN, ~EVEN], conditionals=[wrong, wrong])
    with pytest.raises(ValueError, match=r"but blocks\[0\] has others at component 0"):
        kernel.init(spins(glass).sample(20))


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_right_lattice_in_single_precision_is_not_refused(offset):
    black = (torch.arange(10)[:, None] + torch.arange(10)) % 2 == 0

    def torus(x):
        s = 2 * x - 1
        return offset - 0.44 * (s * (s.roll(1, -1) + s.roll(1, -2))).sum((-2, -1))

    for conditionals in ("energies", "affine"):
        kernel = gibbs(torus, BITS.float(), blocks=[black, ~black], conditionals=conditionals)
        run(kernel, torch.randint(2, (20, 10, 10)).float(), 2)


def test_walls_are_no_fault_of_blocks():
    """No two neighbours are one: of even ones alone each is free."""
    hard = lambda x: torch.where((x * x.roll(1, -1)).sum(-1) > 0, torch.inf, -x.sum(-1))
    state = run(gibbs(hard, BITS, blocks=[EVEN, ~EVEN]), torch.zeros(50, 12), 5)
    assert state.energy.isfinite().all()
    with pytest.raises(ValueError, match="depends on an earlier one of the block"):
        gibbs(hard, BITS, blocks=[EVEN | ~EVEN]).init(torch.zeros(50, 12))


def layers(rbm):
    """The blocks of the units of a Boltzmann machine, and their log-odds."""
    num = len(rbm.visible_bias)
    visible = torch.arange(num + len(rbm.hidden_bias)) < num
    odds = [lambda x: rbm.visible_logits(x[..., num:]), lambda x: rbm.hidden_logits(x[..., :num])]
    return [visible, ~visible], odds, lambda x: rbm(x[..., :num], x[..., num:])


def machine():
    rbm = RBM(7, 5, scale=1.0)
    torch.nn.init.normal_(rbm.visible_bias)
    return rbm


def test_the_layers_of_a_boltzmann_machine_are_drawn_from_their_own_logits():
    blocks, odds, joint = layers(machine())
    case = spins(joint)
    kernel = gibbs(joint, BITS, blocks=blocks, conditionals=odds)
    assert law_after(kernel, case) > FALSE_ALARM


def visible(rbm):
    return Case(rbm, BITS, torch.cartesian_prod(*[BITS] * 7))


def test_latents_drawn_anew_leave_the_law_of_the_points():
    rbm = machine()
    kernel = augmented(rbm, rbm.sample_hidden, rbm.sample_visible, num_sweeps=2)
    assert law_after(kernel, visible(rbm)) > FALSE_ALARM
    other = machine()
    kernel = augmented(rbm, other.sample_hidden, rbm.sample_visible)
    assert law_after(kernel, visible(rbm)) < FALSE_ALARM


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_latents_drawn_anew_keep_shapes_and_their_argument(batch):
    rbm = machine()
    energy = lambda v: torch.where(v[..., 0] > 0, torch.nan, rbm(v))
    kernel = augmented(energy, rbm.sample_hidden, rbm.sample_visible)
    state = kernel.init(torch.zeros(*batch, 7))
    for _ in range(20):
        before = state.position.clone()
        new, info = kernel.step(state)
        assert new.position.shape == (*batch, 7)
        assert info.accept_prob.shape == info.accepted.shape == new.energy.shape == batch
        assert not new.energy.requires_grad
        assert torch.equal(info.invalid, new.position[..., 0] > 0)
        assert torch.equal(before, state.position)
        state = new


def test_colouring_never_joins_what_is_coupled():
    coupling = numbers(30, 30, seed=4).where(numbers(30, 30, seed=5) > 1.2, 0.0)
    blocks = colouring(coupling)
    assert torch.stack(blocks).sum(0).eq(1).all()
    pairs = (coupling != 0).fill_diagonal_(False)
    assert not any(pairs[b][:, b].any() for b in blocks)


@pytest.mark.parametrize(("num", "expected"), [(8, 2), (9, 3)])
def test_a_ring_has_two_colours_or_three(num, expected):
    assert len(colouring(torch.eye(num).roll(1, 0))) == expected


# Parts -------------------------------------------------------------------------------------------


def clusters(x, z, k):
    """A number on the line, a bit and a number from 0 to 2: all three depend on each other."""
    centre = 2.0 * z[..., 0] - 1.5 * k[..., 0] + z[..., 0] * k[..., 0]
    return 0.5 * (x[..., 0] - centre).square() * (1 + z[..., 0]) - 0.4 * k[..., 0]


def exact_clusters(n):
    """Draw from the joint law: the line integrates in closed form."""
    z, k = (v.flatten() for v in torch.meshgrid(BITS, torch.arange(3.0), indexing="ij"))
    weight = torch.softmax(0.4 * k - 0.5 * torch.log1p(z), 0)
    row = torch.multinomial(weight, n, replacement=True)
    z, k = z[row], k[row]
    x = 2 * z - 1.5 * k + z * k + torch.randn(n) / (1 + z).sqrt()
    return {"x": x[:, None], "z": z[:, None], "k": k[:, None]}, weight


PARTS = {
    "x": lambda u: mala(u, 0.3),
    "z": lambda u: gibbs_with_gradients(u, BITS),
    "k": lambda u: gibbs(u, torch.arange(3.0)),
}


def in_parallel(energy, kernels):
    """Move each part given where the others were before: a fault."""
    kernel = mixed(energy, kernels)

    def step(state):
        moved = {}
        for name in kernels:
            only = {name: kernels[name]}
            rest = {n: part for n, part in state.position.items() if n != name}
            one = mixed(partial(energy, **rest), only)
            moved |= one.step(one.init({name: state.position[name]}))[0].position
        return kernel.init(moved), None

    return kernel._replace(step=step)


def law_of_clusters(make):
    position, weight = exact_clusters(20_000)
    kernel = make(clusters, PARTS)
    state = kernel.init(position)
    for _ in range(10):
        state, _ = kernel.step(state)
    x, z, k = (state.position[name][:, 0] for name in "xzk")
    expected = weight * len(x)
    counts = torch.bincount((3 * z + k).long(), minlength=6)
    chi2 = ((counts - expected).square() / expected).sum()
    discrete_p = torch.special.gammaincc(torch.tensor(2.5), chi2 / 2).item()
    r = (x - (2 * z - 1.5 * k + z * k)) * (1 + z).sqrt()  # standard normal
    line = Line(lambda y: 0.5 * y.square().sum(-1))
    return min(discrete_p, line.p_value(r[:, None]))


def test_parts_in_turn_leave_the_joint_law_invariant():
    assert law_of_clusters(mixed) > FALSE_ALARM


def test_the_comparison_sees_parts_that_move_given_the_past():
    assert law_of_clusters(in_parallel) < FALSE_ALARM


def test_a_part_that_is_given_stays_and_the_others_have_its_conditional_means():
    """The conditional means of the bit and the number, by summing over their six values."""
    x = torch.tensor([[-1.5], [0.3], [2.0]])
    kernel = mixed(ebm.Given(clusters, x=x), {name: PARTS[name] for name in "zk"})
    position = {"z": torch.zeros(4_000, 3, 1), "k": torch.zeros(4_000, 3, 1)}
    state = run_parts(kernel, position, 60)
    z, k = (v.reshape(-1, 1, 1) for v in torch.meshgrid(BITS, torch.arange(3.0), indexing="ij"))
    weight = torch.softmax(-clusters(x, z, k), 0)
    for name, values in (("z", z), ("k", k)):
        mean = (weight * values[..., 0]).sum(0)
        sd = ((weight * values[..., 0].square()).sum(0) - mean.square()).sqrt()
        error = (state.position[name][..., 0].mean(0) - mean).abs()
        assert (error < FAR * sd / 4_000**0.5).all()


def run_parts(kernel, position, num):
    state = kernel.init(position)
    for _ in range(num):
        state, info = kernel.step(state)
        assert not info.invalid.any()
    return state


def test_parts_keep_their_argument_and_report_each():
    position, _ = exact_clusters(6)
    kernel = mixed(clusters, PARTS)
    state = kernel.init(position)
    before = {name: part.clone() for name, part in state.position.items()}
    new, info = kernel.step(state)
    assert all(torch.equal(before[name], state.position[name]) for name in before)
    torch.testing.assert_close(new.energy, clusters(**new.position), **EXACT)
    assert sorted(info.parts) == ["k", "x", "z"]
    mean = torch.stack([part.accept_prob for part in info.parts.values()]).mean(0)
    torch.testing.assert_close(info.accept_prob, mean, **EXACT)


def test_parts_without_a_kernel_are_refused():
    kernel = mixed(clusters, PARTS)
    with pytest.raises(ValueError, match=r"must have the parts \['k', 'x', 'z'\] .* got \['x'\]"):
        kernel.init({"x": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="kernels must hold at least one part, got none"):
        mixed(clusters, {})


# Clamping ----------------------------------------------------------------------------------------

SEEN = torch.arange(12) % 3 == 0


@pytest.mark.parametrize("make", [gibbs, gibbs_with_gradients, INFORMED["discrete mala"]])
@pytest.mark.parametrize("name", ["glass", "machine"])
def test_completions_have_their_conditional_law(name, make):
    energy = glass if name == "glass" else layers(machine())[2]
    x = spins(energy).sample(1)[0]
    clamped = ebm.Clamped(energy, x, SEEN)
    free = Case(clamped, BITS, torch.cartesian_prod(*[BITS] * 8))
    assert law_after(make(clamped, BITS), free) > FALSE_ALARM
    whole = clamped.complete(free.states)
    assert (whole[:, SEEN] == x[SEEN]).all()
    torch.testing.assert_close(clamped.free(whole), free.states, **EXACT)
    # The law is that of all states, restricted to those that agree with what is seen.
    case = spins(energy)
    agree = (case.states[:, SEEN] == x[SEEN]).all(-1)
    mean = (case.p[agree, None] * case.states[agree]).sum(0) / case.p[agree].sum()
    torch.testing.assert_close(mean[~SEEN], (free.p[:, None] * free.states).sum(0), **EXACT)


def test_each_chain_may_have_seen_something_else():
    x = spins(glass).sample(3)
    d = ebm.GibbsBoltzmann(
        ebm.Clamped(glass, x, SEEN), ebm.Flat((8,), constraints.boolean).expand((3,))
    )
    states = d.enumerate_support()
    means = (torch.softmax(-d.potential(states), 0).unsqueeze(-1) * states).sum(0)
    for one, mean in zip(x, means, strict=True):
        own = Case(ebm.Clamped(glass, one, SEEN), BITS, torch.cartesian_prod(*[BITS] * 8))
        torch.testing.assert_close(mean, own.p @ own.states, **EXACT)


def test_one_hot_rows_are_observed_as_a_whole():
    case, seen = CASES["potts"](), torch.tensor([True, False, False, True, False, True])
    x = case.sample(1)[0]
    clamped = ebm.Clamped(potts, x, seen[:, None])
    free = Case(clamped, case.values, ebm.Flat((3, 3), constraints.one_hot).enumerate_support())
    assert law_after(gibbs_with_gradients(clamped, case.values), free) > FALSE_ALARM
    assert (clamped.complete(free.states)[:, seen] == x[seen]).all()


def test_a_conditional_normal_law_is_that_of_the_textbook():
    a = numbers(4, 4, seed=7)
    precision, seen = a @ a.T + torch.eye(4), torch.tensor([False, True, False, True])
    energy = lambda x: 0.5 * ((x @ precision) * x).sum(-1)
    x = numbers(4, seed=8)
    clamped = ebm.Clamped(energy, x, seen)
    own, cross = precision[~seen][:, ~seen], precision[~seen][:, seen]
    mean = -torch.linalg.solve(own, cross @ x[seen])
    torch.testing.assert_close(ebm.force(clamped, mean), torch.zeros(2), **EXACT)
    z = (
        mean
        + torch.linalg.solve_triangular(
            torch.linalg.cholesky(own).T, torch.randn(2, 20_000), upper=True
        ).T
    )
    state = run(mala(clamped, 0.2), z, 10)
    whitened = (state.position - mean) @ torch.linalg.cholesky(own)
    line = Line(lambda y: 0.5 * y.square().sum(-1))
    assert line.p_value(whitened.reshape(-1, 1)) > FALSE_ALARM


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="observed must be boolean, got torch.int64"):
        ebm.Clamped(glass, torch.zeros(12), torch.ones(12).long())
    with pytest.raises(
        ValueError, match=r"shape of the event, .* got \(5,\) for points .*\(12,\)"
    ):
        ebm.Clamped(glass, torch.zeros(12), torch.ones(5).bool())


def test_two_phases_have_the_gradient_of_the_free_energy():
    """Hidden units drawn given the data: their mean gradient is that of the free energy."""
    rbm, n = machine(), 20_000
    v = visible(rbm).sample(3)
    kernel = gibbs(ebm.Given(rbm, v, ...), BITS)
    h = run(kernel, torch.zeros(n, 3, 5), 1).position  # a sweep is exact: they are independent
    exact = torch.autograd.grad(rbm(v).sum(), rbm.weight)[0]
    joint = torch.autograd.grad(rbm(v, h).sum() / n, rbm.weight)[0]
    p = rbm.hidden_logits(v).sigmoid()
    error = ((v.square().T @ (p * (1 - p))) / n).sqrt()
    assert ((joint - exact).abs() <= FAR * error).all()


# Errors ------------------------------------------------------------------------------------------


def test_values_and_options_out_of_range_are_refused():
    for make in (gibbs, metropolis_flips, gibbs_with_gradients):
        with pytest.raises(TypeError, match="values must be a tensor, got list"):
            make(glass, [0.0, 1.0])
        with pytest.raises(ValueError, match="values must hold two or more"):
            make(glass, torch.ones(1))
    with pytest.raises(ValueError, match="num_flips must be a whole number of at least 1, got 0"):
        gibbs_with_gradients(glass, BITS, num_flips=0)
    with pytest.raises(ValueError, match="balance must be one of sqrt, barker, got 'min'"):
        gibbs_with_gradients(glass, BITS, balance="min")
    with pytest.raises(ValueError, match="step_size must be positive and finite, got 0.0"):
        discrete_mala(glass, BITS, 0.0)
    with pytest.raises(ValueError, match="conditionals must be 'energies', .* got 'exact'"):
        gibbs(glass, BITS, conditionals="exact")
    with pytest.raises(ValueError, match=r"conditionals must hold one per block \(2\), got 1"):
        gibbs(glass, BITS, blocks=[EVEN, ~EVEN], conditionals=[torch.sin])
    with pytest.raises(ValueError, match=r"coupling must be a square matrix, got shape \(2, 3\)"):
        colouring(torch.zeros(2, 3))


def test_more_flips_than_components_and_masks_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="num_flips must be a whole number from 1 to 12, got 13"):
        metropolis_flips(glass, BITS, num_flips=13).init(torch.zeros(2, 12))
    with pytest.raises(ValueError, match=r"over the 12 components of a point, .* shape \(6,\)"):
        gibbs(glass, BITS, blocks=[SIX]).init(torch.zeros(2, 12))


def test_components_in_no_block_stay():
    x = spins(glass).sample(50)
    moved = run(gibbs(glass, BITS, blocks=[EVEN]), x, 3).position
    assert torch.equal(moved[:, ~EVEN], x[:, ~EVEN])
    assert not torch.equal(moved, x)


@pytest.mark.parametrize("make", [metropolis_flips, *INFORMED.values()])
def test_a_position_off_the_values_is_refused(make):
    x = torch.zeros(2, 12)
    x[1, 4] = 0.5
    with pytest.raises(ValueError, match=r"got 0.5 at component 4 of chain \(1,\)"):
        make(glass, BITS).init(x)


def test_a_draw_is_never_of_zero_weight():
    weight = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0], dtype=torch.float32)
    code = draw(weight.expand(200_000, 5))
    share = torch.bincount(code, minlength=5) / 200_000
    assert (share[weight == 0] == 0).all()
    assert (share[3] - 0.75).abs() < FAR * (0.1875 / 200_000) ** 0.5


def test_a_flip_goes_round_the_values():
    values = torch.tensor([-1.0, 0.0, 2.0])
    x = values[torch.tensor([[0, 1, 2], [2, 1, 0]])]
    at, shift = torch.tensor([[0, 2], [1, 2]]), torch.tensor([[1, 1], [2, 0]])
    expected = values[torch.tensor([[1, 1, 0], [2, 0, 0]])]
    assert torch.equal(flip(x, values, at, shift), expected)
