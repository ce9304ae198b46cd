"""Losses on discrete points: against enumeration, in formula and in optimum."""

import itertools
import math

import pytest
import torch
from torch import nn

from benchmarks import learning_ising
from pyro_ebm import losses
from pyro_ebm.zoo import RBM, Ising, Potts
from tests.common import EXACT, FAR

PSEUDO, RATIO = losses.pseudo_likelihood, losses.ratio_matching
FLOW, SCORE = losses.minimum_probability_flow, losses.concrete_score_matching
LOSSES = {f.__name__: f for f in (PSEUDO, RATIO, FLOW, SCORE)}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

# Each loss, with all neighbours and where it can with those on a cycle.
KINDS = {name: (loss, {}) for name, loss in LOSSES.items()}
KINDS |= {f"{f.__name__}, cycle": (f, {"cycle": True}) for f in (RATIO, FLOW, SCORE)}
every_kind = pytest.mark.parametrize(("loss", "options"), KINDS.values(), ids=KINDS)

NUM, SITES = 4, 3  # values of a component, components: 64 states
STATES = torch.tensor(list(itertools.product(range(NUM), repeat=SITES)))
BITS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)

# How the same states are written, and the values that say so.
FORMS = {
    "integers": (lambda x: x, lambda: torch.arange(NUM)),
    "numbers": (lambda x: 0.5 * x - 1.0, lambda: 0.5 * torch.arange(NUM) - 1.0),
    "one-hot": (lambda x: nn.functional.one_hot(x, NUM).double(), lambda: torch.eye(NUM)),
}
every_form = pytest.mark.parametrize(("form", "values"), FORMS.values(), ids=FORMS)


class Table(nn.Module):
    """An energy with a parameter per state: every law is one of these."""

    def __init__(self, states):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(len(states), generator=generator, dtype=torch.float64)
        self.states, self.table = states, nn.Parameter(0.7 * draw)

    def forward(self, x):
        batch = x.shape[: x.dim() - self.states.dim() + 1]
        same = x.reshape(-1, 1, *self.states.shape[1:]) == self.states
        at = same.flatten(2).all(-1).long().argmax(-1)
        return self.table[at].reshape(batch)

    def log_law(self):
        return (-self.table).log_softmax(0).detach()


def neighbours(x, num, cycle):
    """Return, by the definition, the points that differ from ``x`` in one component."""
    found = []
    for i, v in itertools.product(range(len(x)), range(num)):
        if v != x[i] and (not cycle or (v - x[i]) % num in (1, num - 1)):
            found.append((*x[:i], v, *x[i + 1 :]))
    return found


def literal(loss, p, x, num, cycle=False):
    """Return the loss at one point, in the words of its paper."""
    here, near = p[x], [p[y] for y in neighbours(x, num, cycle)]
    if loss is RATIO:
        return sum((1 / (1 + here / q)) ** 2 for q in near)
    if loss is FLOW:
        return sum((q / here) ** 0.5 for q in near)
    if loss is SCORE:
        return sum((q / here - 1) ** 2 + 2 * (q / here - 1) - 2 * (here / q - 1) for q in near)
    lines = [[p[(*x[:i], v, *x[i + 1 :])] for v in range(num)] for i in range(len(x))]
    return sum(-math.log(here / sum(line)) for line in lines)


def mean_of_literals(loss, states, log_law, num, **options):
    keys = [tuple(s) for s in states.long().tolist()]
    law = dict(zip(keys, log_law.exp().tolist(), strict=True))
    return torch.tensor([literal(loss, law, x, num, **options) for x in keys]).mean()


@every_kind
@every_form
def test_it_is_the_formula_of_its_paper(loss, options, form, values):
    energy = Table(form(STATES))
    want = mean_of_literals(loss, STATES, energy.log_law(), NUM, **options)
    got = loss(energy, form(STATES), values(), **options)
    torch.testing.assert_close(got, want, **EXACT)


@every_kind
def test_zeros_and_ones_are_the_default(loss, options):
    energy = Table(BITS)
    want = mean_of_literals(loss, BITS, energy.log_law(), 2, **options)
    torch.testing.assert_close(loss(energy, BITS, **options), want, **EXACT)


def population(loss, energy, x, log_law, *args, **options):
    """Return the gradient of the expected loss in all parameters, in one row."""
    value = loss(energy, x, *args, log_weight=log_law, **options)
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, [*energy.parameters()])])


@every_kind
@every_form
def test_its_population_gradient_vanishes_at_the_truth(loss, options, form, values):
    energy = Table(form(STATES))
    grad = population(loss, energy, form(STATES), energy.log_law(), values(), **options)
    assert grad.abs().max() < 1e-14


def sigmoid_not_squared(rise):
    return torch.sigmoid(-rise)


def flow_without_the_half(rise):
    return (-rise).exp()


def one_way_score(rise):
    return (-2 * rise).exp() - 2 * (-rise).exp()


def independent_neighbours(rise):
    return torch.logsumexp(-rise, 1)


FAULTS = [sigmoid_not_squared, flow_without_the_half, one_way_score, independent_neighbours]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_loss_has_a_gradient_at_the_truth(fault):
    energy = Table(BITS)

    def loss(energy, x, log_weight):
        flipped = (x + torch.eye(4).unsqueeze(1)) % 2
        rise = (energy(flipped) - energy(x)).unsqueeze(1)
        return (log_weight.exp() * fault(rise).sum((0, 1) if fault(rise).dim() > 2 else 0)).sum()

    assert population(loss, energy, BITS, energy.log_law()).abs().max() > 1e-2


@every_loss
def test_its_population_gradient_vanishes_at_sixteen_spins(loss):
    num = 16
    coupling = 0.25 * torch.randn(num, num)
    energy = Ising(num, coupling + coupling.T, 0.3 * torch.randn(num))
    x = (torch.arange(2**num).unsqueeze(-1) >> torch.arange(num) & 1).double()
    log_law = (-energy(x)).log_softmax(0).detach()
    grad = population(loss, energy, x, log_law, affine=True)
    assert grad.abs().max() < 1e-8
    off = population(loss, Ising(num, energy.coupling, 0 * energy.field), x, log_law, affine=True)
    assert off.abs().max() > 1e-2


def learned(loss, states, log_law, *args, **options):
    """Return the law of least expected loss, by Newton's steps from a flat table."""
    energy = Table(states)
    nn.init.zeros_(energy.table)
    for _ in range(40):
        value = loss(energy, states, *args, log_weight=log_law, **options)
        (grad,) = torch.autograd.grad(value, energy.table, create_graph=True)
        rows = [torch.autograd.grad(g, energy.table, retain_graph=True)[0] for g in grad]
        # A constant in the energy stays free, whence the pseudo-inverse.
        step = torch.linalg.pinv(torch.stack(rows), rtol=1e-10, hermitian=True) @ grad.detach()
        with torch.no_grad():
            energy.table -= step / step.abs().amax().clamp(min=1.0)
    return energy.log_law()


@every_kind
@pytest.mark.parametrize("p", [(0.7, 0.2, 0.1), (0.4, 0.3, 0.15, 0.1, 0.05)], ids=len)
def test_the_law_of_a_categorical_is_found(loss, options, p):
    log_law, x = torch.tensor(p).log(), torch.arange(len(p)).unsqueeze(-1)
    found = learned(loss, x, log_law, torch.arange(len(p)), **options)
    torch.testing.assert_close(found, log_law, **EXACT)


@every_loss
def test_the_law_of_several_components_is_found(loss):
    log_law = Table(BITS).log_law()
    torch.testing.assert_close(learned(loss, BITS, log_law), log_law, **EXACT)


def joint_rbm():
    rbm = RBM(3, 1, scale=1.0)
    return lambda x: rbm(x[..., :3], x[..., 3:])


def one_hot_states():
    return nn.functional.one_hot(STATES, NUM).double()


AFFINE = {
    "Ising": (lambda: Ising(4, torch.randn(4, 4), torch.randn(4)), lambda: (BITS,)),
    "an RBM with its hidden unit": (joint_rbm, lambda: (BITS,)),
    "Potts": (
        lambda: Potts(SITES, NUM, torch.randn(SITES, SITES), torch.randn(SITES, NUM)),
        lambda: (one_hot_states(), torch.eye(NUM)),
    ),
}


@every_kind
@pytest.mark.parametrize(("make", "points"), AFFINE.values(), ids=AFFINE)
def test_one_gradient_does_where_the_energy_is_affine(loss, options, make, points):
    energy = make()
    parameters = [*energy.parameters()] if isinstance(energy, nn.Module) else []
    slow, fast = (loss(energy, *points(), affine=affine, **options) for affine in (False, True))
    torch.testing.assert_close(fast, slow, **EXACT)
    if parameters:
        want, got = torch.autograd.grad(slow, parameters), torch.autograd.grad(fast, parameters)
        torch.testing.assert_close(got, want, **EXACT)


def test_one_gradient_takes_two_evaluations():
    sizes, energy = [], Ising(4)

    def counted(x):
        sizes.append(x.shape[:-1].numel())
        return energy(x)

    PSEUDO(counted, BITS)
    assert sizes == [16, 16 * 4]
    sizes.clear()
    PSEUDO(counted, BITS, affine=True)
    assert sizes == [16, 16]  # the second is the check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_energy_that_is_not_affine_is_refused(dtype):
    rbm = RBM(4, 3, scale=0.1).to(dtype)
    with pytest.raises(ValueError, match="affine must be False for energy 'RBM'"):
        PSEUDO(rbm, BITS.to(dtype), affine=True)
    # Rounding, beside a large constant, is not taken for a bend.
    energy = Ising(4, torch.randn(4, 4), torch.randn(4)).to(dtype)
    PSEUDO(lambda x: energy(x) + 1e6, BITS.to(dtype), affine=True)


def test_affine_needs_points_that_can_be_differentiated():
    with pytest.raises(ValueError, match="x must be of floating point"):
        PSEUDO(Table(STATES), STATES, torch.arange(NUM), affine=True)
    with pytest.raises(ValueError, match="must depend differentiably on its points"):
        PSEUDO(lambda x: torch.zeros(x.shape[:-1]), BITS, affine=True)


@pytest.mark.parametrize("num", [2, 3])
def test_values_of_another_precision_leave_that_of_the_points(num):
    x, values = BITS.float(), torch.arange(num, dtype=torch.float64)
    b = torch.randn(4, dtype=torch.float32)
    straight, jumps = (PSEUDO(lambda x: x @ b, x, values, affine=a) for a in (True, False))
    assert straight.dtype == jumps.dtype == torch.float32
    torch.testing.assert_close(straight, jumps)


@every_kind
@every_form
@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_chunks_give_the_same(loss, options, form, values, chunk_size):
    energy = Table(form(STATES))
    whole, parts = (
        loss(energy, form(STATES), values(), chunk_size=size, **options)
        for size in (None, chunk_size)
    )
    torch.testing.assert_close(parts, whole, **EXACT)
    want, got = (torch.autograd.grad(v, energy.table) for v in (whole, parts))
    torch.testing.assert_close(got, want, **EXACT)


def test_chunks_bound_the_points_that_are_there_at_once():
    sizes, energy = [], RBM(20, 3)

    def counted(x):
        sizes.append(x.shape[:-1].numel())
        return energy(x)

    x = torch.bernoulli(torch.full((7, 20), 0.5))
    PSEUDO(counted, x, chunk_size=6).backward()
    forward = [7, 42, 42, 42, 14]
    assert sizes == [*forward, *reversed(forward[1:])]  # the backward pass does each once more


@every_loss
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_it_takes_any_batch_and_event(loss, batch):
    x = torch.bernoulli(torch.full((*batch, 2, 2), 0.5))
    energy = Table(BITS)
    value = loss(lambda x: energy(x.flatten(-2)), x)
    each = [loss(energy, row) for row in x.reshape(-1, 4)]
    torch.testing.assert_close(value, torch.stack(each).mean(), **EXACT)


@every_loss
def test_a_conditional_energy_keeps_its_rows(loss):
    energy = Ising(4, torch.randn(4, 4))
    x, y = torch.bernoulli(torch.full((5, 4), 0.5)), torch.randn(5, 4)

    def given(x, y):
        return energy(x) + (x * y).sum(-1)

    value = loss(lambda x: given(x, y), x)
    each = [loss(lambda a, y=y: given(a, y), x) for x, y in zip(x, y, strict=True)]
    torch.testing.assert_close(value, torch.stack(each).mean(), **EXACT)


@every_loss
def test_a_value_that_is_none_of_the_values_gives_nan(loss):
    energy = Ising(4)
    assert loss(energy, BITS).isfinite()
    assert loss(energy, 2 * BITS - 1).isnan()  # spins where bits are expected
    assert loss(energy, 2 * BITS - 1, torch.tensor([-1.0, 1.0])).isfinite()
    assert loss(energy, 2 * BITS - 1, affine=True).isnan()


@pytest.mark.parametrize("loss", [PSEUDO, RATIO, FLOW])
def test_a_neighbour_behind_a_wall_does_no_harm(loss):
    b = torch.zeros(3, requires_grad=True)

    def energy(x):  # one unit at most
        return torch.where(x.sum(-1) > 1, torch.inf, -x @ b)

    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    value = loss(energy, x)
    (grad,) = torch.autograd.grad(value, b)
    assert value.isfinite()
    assert grad.isfinite().all()
    impossible = torch.tensor([[1.0, 1.0, 0.0]])
    assert not loss(energy, impossible).isfinite()


def test_huge_rises_are_exact():
    b = torch.tensor([800.0, -800.0])
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(PSEUDO(lambda x: -x @ b, x), torch.tensor(800.0), **EXACT)
    torch.testing.assert_close(RATIO(lambda x: -x @ b, x), torch.tensor(1.0), **EXACT)


@every_loss
def test_what_is_wrong_is_named(loss):
    energy = Ising(4)
    with pytest.raises(ValueError, match=r"must not be empty, got the shape \(0, 4\)"):
        loss(energy, BITS[:0])
    with pytest.raises(ValueError, match="chunk_size must be positive, got 0"):
        loss(energy, BITS, chunk_size=0)
    with pytest.raises(ValueError, match="values must hold two or more values"):
        loss(energy, BITS, torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"x must end in the shape .* \(3,\), got \(16, 4\)"):
        loss(energy, BITS, torch.eye(3))
    with pytest.raises(ValueError, match=r"log_weight must have .*\(16,\), got \(3,\)"):
        loss(energy, BITS, log_weight=torch.zeros(3))
    with pytest.raises(ValueError, match="must return one energy per point"):
        loss(lambda x: energy(x).sum(), BITS)


@every_loss
def test_it_works_without_gradients(loss):
    energy = Ising(4, torch.randn(4, 4))
    want = loss(energy, BITS).detach()
    for context in (torch.no_grad, torch.inference_mode):
        for options in ({}, {"affine": True}, {"chunk_size": 1}):
            with context():
                value = loss(energy, BITS, **options)
            assert not value.requires_grad
            torch.testing.assert_close(value.clone(), want, **EXACT)


# Errors of learned couplings, against exact asymptotics ----------------------------------------


def features(x):
    """Return the products of pairs of spins, then the spins."""
    s = 2 * x - 1
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], 1)
    return torch.cat([s[..., i] * s[..., j], s], -1)


def of_parameters(loss, x, log_weight=None):
    """Return the loss as a function of couplings and fields in one row."""
    return lambda theta: loss(lambda x: -(features(x) @ theta), x, log_weight=log_weight)


def spins(num, strength):
    coupling, field = learning_ising.spin_glass(num, strength, 0.2)
    theta = torch.cat([learning_ising.pairs(coupling), field])
    x = learning_ising.states(num)
    law = (features(x) @ theta).softmax(0)
    return theta, x, law, learning_ising.asymptotics(coupling, field)


BY_NAME = learning_ising.LOSSES


@pytest.mark.parametrize("name", BY_NAME)
def test_the_oracle_of_asymptotics_is_the_sandwich(name):
    theta, x, law, known = spins(4, 1.5)
    slopes, curvatures = [], []
    for state in x:
        point = of_parameters(BY_NAME[name], state.unsqueeze(0))
        slopes.append(torch.autograd.functional.jacobian(point, theta))
        curvatures.append(torch.autograd.functional.hessian(point, theta))
    slope, curvature = torch.stack(slopes), torch.stack(curvatures)
    bread = torch.linalg.inv((law.reshape(-1, 1, 1) * curvature).sum(0))
    want = bread @ (slope.T @ (law.unsqueeze(1) * slope)) @ bread
    torch.testing.assert_close(known[name], want, **EXACT)
    bound = known["maximum likelihood"]
    fisher = torch.cov(features(x).T, aweights=law, correction=0)
    torch.testing.assert_close(torch.linalg.inv(bound), fisher, **EXACT)
    assert torch.linalg.eigvalsh(want - bound).min() > -1e-10  # zero but for rounding, if least


def learned_many(loss, theta, x, law, log_weights):
    """Return the parameters of least loss for each row of weights, near the true ones."""
    hessian = torch.autograd.functional.hessian(of_parameters(loss, x, law.log()), theta)

    def step(found, log_weight):
        grad = torch.func.grad(of_parameters(loss, x, log_weight))(found)
        return found - torch.linalg.solve(hessian, grad)

    found = theta.expand(len(log_weights), -1)
    for _ in range(12):  # with the true Hessian in place of each one's own
        before, found = found, torch.func.vmap(step, chunk_size=50)(found, log_weights)
    assert (found - before).abs().max() < 1e-4  # the errors are of 1e-2
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_errors_are_as_large_as_theory_says(name):
    size, repeats = 20_000, 200
    theta, x, law, known = spins(8, 1.5)
    counts = torch.multinomial(law, size * repeats, replacement=True).reshape(repeats, size)
    counts = torch.stack([c.bincount(minlength=len(x)) for c in counts])
    found = learned_many(BY_NAME[name], theta, x, law, counts.double().log())

    def excess(covariance):
        """Return by how many standard errors the squared errors exceed those of a covariance."""
        total = (found - theta).square().sum() * size / repeats
        return (total - covariance.trace()) / (2 * covariance.square().sum() / repeats).sqrt()

    assert abs(excess(known[name])) < FAR
    if name != "pseudo-likelihood":  # which is nearly as good as maximum likelihood
        assert excess(known["maximum likelihood"]) > FAR
