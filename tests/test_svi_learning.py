"""Learning through Pyro's SVI: negatives as a log Z, and losses in the place of an ELBO."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam, ClippedAdam
from torch import nn

import pyro_ebm as ebm
from pyro_ebm import checkpoint
from pyro_ebm.infer import EnergyLoss
from pyro_ebm.kernels import gibbs, hmc, mala, nuts, ula
from pyro_ebm.losses import noise_contrastive, score_matching
from pyro_ebm.partition import Contrastive, Exact, Quadrature
from tests.common import EXACT, FALSE_ALARM, FAR

ELBOS = {
    "Trace": Trace_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceEnum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
}


def gradients(value, module):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))])


def p_value(estimates, truth):
    """Test by Student that independent estimates have the true mean: the worst component."""
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(len(estimates))
    t = ((estimates.mean(0) - truth) / error).abs()
    return float(2 * scipy.stats.t.sf(t.numpy(), len(estimates) - 1).min())


# The gradient of negatives -----------------------------------------------------------------------


class Well(nn.Module):
    """A skewed double well on the line."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.5, 0.2, 0.1]))

    def forward(self, x):
        return (self.w * x[..., None] ** torch.arange(1.0, 5.0)).sum(-1)


class Spins(nn.Module):
    """Three bits with all couplings."""

    def __init__(self):
        super().__init__()
        self.field = nn.Parameter(torch.tensor([0.3, -0.5, 0.2]))
        self.coupling = nn.Parameter(torch.tensor([1.0, -0.5, 0.7]))

    def forward(self, x):
        pairs = x * x.roll(1, -1)
        return -(x * self.field + pairs * self.coupling).sum(-1)


BASES = {
    Well: lambda: dist.Normal(torch.tensor(0.0), 1.5),
    Spins: lambda: ebm.Flat((3,), constraints.boolean),
}
# Unweighted chains from the base make ten times the moves at first.
NEGATIVES = {
    "mala": (Well, {"weighted": False}),
    "ula": (Well, {"kernel": ula, "step_size": 0.02, "num_steps": 40}),
    "hmc": (Well, {"kernel": lambda u, e: hmc(u, e, 4), "weighted": False, "num_steps": 5}),
    "nuts": (Well, {"kernel": nuts, "weighted": False, "num_steps": 1, "step_size": 0.6}),
    "gibbs": (Spins, {"kernel": lambda u: gibbs(u, torch.tensor([0.0, 1.0])), "weighted": False}),
    "weighted mala": (Well, {}),
    "weighted hmc": (Well, {"kernel": lambda u, e: hmc(u, e, 4), "num_steps": 5}),
    "weighted nuts": (Well, {"kernel": nuts, "num_steps": 1, "step_size": 0.6}),
    "weighted gibbs": (Spins, {}),
    "restarted": (Well, {"restart": 0.2}),
    "from data": (Spins, {"start": "data", "persistent": False, "num_steps": 10}),
}


def estimates_of(make, options, num=16):
    energy, base = make(), BASES[make]()
    d = ebm.GibbsBoltzmann(energy, base)
    method = Exact() if d.has_enumerate_support else Quadrature(-9.0, 9.0, 400)
    truth = gradients(method.log_z(d), energy)
    found = []
    for _ in range(num):
        negatives = Contrastive(**{"num_chains": 200, "num_steps": 10, **options})
        for _ in range(1 + 2 * negatives.weighted):
            value = negatives.log_z(d, base.sample((64,)))
        found.append(gradients(value, energy))
    return found, truth


LONG = ("ula", "nuts", "hmc", "weighted nuts")


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in LONG else [])
        for name, case in NEGATIVES.items()
    ],
)
def test_the_gradient_of_negatives_is_that_of_the_exact_log_z(make, options):
    assert p_value(*estimates_of(make, options)) > FALSE_ALARM


SHORT = {"num_steps": 1, "persistent": False, "start": "data"}
FROZEN = {"step_size": 1e-6, "weighted": False}


@pytest.mark.parametrize("options", [SHORT, FROZEN], ids=["short", "frozen"])
def test_the_comparison_sees_chains_that_lag(options):
    assert p_value(*estimates_of(Well, options)) < FALSE_ALARM


def test_negatives_from_data_at_the_truth_have_no_gradient_against_data():
    """One step from exact draws of the model stays there; from other data it does not."""
    energy = Spins()
    d = ebm.GibbsBoltzmann(energy, ebm.Flat((3,), constraints.boolean))

    def contrast(shift):
        x = d.sample((200,))
        x = torch.where(torch.rand_like(x) < shift, 1.0, x)
        method = Contrastive(num_chains=200, num_steps=1, persistent=False, start="data")
        return gradients(energy(x).mean() + method.log_z(d, x), energy)

    zero = torch.zeros(6)
    assert p_value([contrast(0.0) for _ in range(25)], zero) > FALSE_ALARM
    assert p_value([contrast(0.3) for _ in range(25)], zero) < FALSE_ALARM


def test_groups_of_chains_are_one_batch_to_the_energy():
    """Convolutions and batch norm take one dimension of points."""
    base, shapes = dist.Normal(torch.zeros(3), 1.0).to_event(1), set()

    def energy(x):
        shapes.add(x.dim())
        return x.square().sum(-1)

    Contrastive(num_chains=10, num_steps=2).log_z(ebm.GibbsBoltzmann(energy, base))
    assert shapes == {2}


def test_chains_at_walls_weigh_nothing():
    """Chains that never leave their wall, of infinite energy, take no part in the gradient."""
    k = nn.Parameter(torch.tensor(0.1))

    def energy(x):
        return torch.where(x > -1.5, k * x, torch.inf)

    d = ebm.GibbsBoltzmann(energy, dist.Normal(0.0, 1.0), validate_args=False)
    method = Contrastive(num_chains=4000, step_size=1e-12, num_steps=1)
    value = method.log_z(d)
    assert method.chains.log_weight.isinf().any()
    exact = Quadrature(-1.5 + 1e-12, 9.0, 200).log_z(d)
    assert abs(value - exact) < 0.05  # 2,000 weights that are nought or about one: .006
    slopes = [torch.autograd.grad(v, k)[0] for v in (value, exact)]
    assert abs(slopes[0] - slopes[1]) < 0.1  # sd 0.9 over the root of 2,000 is .02


def test_chains_from_data_start_at_each_row_of_the_step():
    x = torch.linspace(-1.0, 1.0, 30)
    d = ebm.GibbsBoltzmann(Well(), dist.Normal(0.0, 1.5))
    method = Contrastive(
        num_chains=60, num_steps=1, persistent=False, start="data", step_size=1e-14
    )
    for data in (x, x + 7.0):
        method.log_z(d, data)
        ends = method.moved.x.sort().values
        torch.testing.assert_close(ends, data.repeat_interleave(2), atol=1e-5, rtol=0)


# log Z along training ----------------------------------------------------------------------------


@pytest.mark.slow
def test_weighted_sweeps_track_the_log_z_of_an_rbm_that_learns():
    torch.manual_seed(0)
    energy, base = ebm.zoo.RBM(8, 4), ebm.Flat((8,), constraints.boolean)
    method = Contrastive(num_chains=1000, num_steps=2)
    data = (torch.rand(100, 1) < 0.5).double().expand(-1, 8).clone()  # all alike: two modes
    data = torch.where(torch.rand_like(data) < 0.1, 1 - data, data)

    def model():
        pyro.module("energy", energy)
        with pyro.plate("n", 100):
            pyro.sample("x", ebm.GibbsBoltzmann(energy, base, log_partition=method), obs=data)

    svi = SVI(model, lambda: None, Adam({"lr": 0.04}), Trace_ELBO())
    law = ebm.GibbsBoltzmann(energy, base, log_partition=Exact())
    first = -law.log_prob(data).mean()
    for step in range(150):
        svi.step()
        if step % 30 == 29:
            value, error, _ = ebm.log_partition(law, method)
            truth = ebm.log_partition(law, Exact()).value
            assert abs(value - truth) < FAR * error
    last = -law.log_prob(data).mean()
    assert last < first - 1.5  # of 5.5 nats, 3.3 are in the data


# Stock ELBOs -------------------------------------------------------------------------------------


LEARNERS = {name: (elbo, {}) for name, elbo in ELBOS.items()}
LEARNERS["from data"] = Trace_ELBO, {"start": "data", "persistent": False}


@pytest.mark.parametrize(("elbo", "options"), LEARNERS.values(), ids=LEARNERS)
def test_stock_elbos_learn_the_coupling_of_spins(elbo, options):
    """An open chain of spins: at the maximum of the likelihood tanh J is the mean of s s'."""
    torch.manual_seed(0)
    base = ebm.Flat((4,), constraints.boolean)

    def energy_of(coupling):
        return lambda x: -coupling * ((2 * x[..., 1:] - 1) * (2 * x[..., :-1] - 1)).sum(-1)

    x = ebm.GibbsBoltzmann(energy_of(torch.tensor(0.6)), base).sample((200,))
    mle = ((2 * x[:, 1:] - 1) * (2 * x[:, :-1] - 1)).mean().atanh()
    method = Contrastive(num_chains=200, num_steps=2, **options)

    def model():
        coupling = pyro.param("coupling", torch.tensor(0.0))
        with pyro.plate("n", 200, subsample_size=100) as i:
            d = ebm.GibbsBoltzmann(energy_of(coupling), base, log_partition=method)
            pyro.sample("x", d, obs=x[i])

    svi = SVI(model, lambda: None, Adam({"lr": 0.03}), elbo())
    values = []
    for _ in range(150):
        svi.step()
        values.append(pyro.param("coupling").item())
    # Mini-batches of 100 and 200 chains, averaged over 100 steps: some two per cent.
    assert abs(sum(values[-100:]) / 100 - mle) < 0.05


# Conditional energies ----------------------------------------------------------------------------


def regression(num=120):
    x = torch.linspace(-1.0, 1.0, num)
    return x, 1.5 * x + 0.3 * torch.randn(num)


def conditional(method, x, y, subsample_size=None, by_hand=None):
    """p(y | x) of the energy k (y - w x)^2 / 2, with a slope and a precision to learn."""
    w, log_k = pyro.param("w", torch.tensor(0.0)), pyro.param("log_k", torch.tensor(0.0))

    def energy(y, x):
        return 0.5 * log_k.exp() * (y - w * x).square()

    if by_hand is not None:
        x, y = x[by_hand], y[by_hand]
    with pyro.plate("n", len(x), subsample_size=subsample_size) as i:
        base = dist.Normal(torch.tensor(0.0), 3.0)
        law = ebm.GibbsBoltzmann(ebm.Given(energy, x[i]), base, log_partition=method)
        pyro.sample("y", law, obs=y[i])


REGRESSIONS = {
    "all rows": (None, {}),
    "weighted": (40, {}),
    "persistent": (40, {"weighted": False}),
    "from data": (40, {"start": "data", "persistent": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "options"), REGRESSIONS.values(), ids=REGRESSIONS)
def test_a_conditional_energy_learns_a_regression(size, options):
    torch.manual_seed(0)
    x, y = regression()
    # The base N(0, 9) weighs little beside a precision of eleven.
    w = (x * y).sum() / (x * x).sum()
    log_k = -(y - w * x).square().mean().log()
    method = Contrastive(num_chains=20, num_steps=3, **options)
    svi = SVI(conditional, lambda *_: None, ClippedAdam({"lr": 0.05}), Trace_ELBO())
    tail = []
    for step in range(200):
        svi.step(method, x, y, size)
        if step >= 100:
            tail.append([pyro.param("w").item(), pyro.param("log_k").item()])
    found = torch.tensor(tail).mean(0)
    # Of 120 rows the slope has an error of .05, and 100 mini-batches average to below that.
    assert abs(found[0] - w) < 0.1
    assert abs(found[1] - log_k) < 0.2


def test_chains_belong_to_the_rows_that_a_plate_draws():
    x, y = regression(30)
    method = Contrastive(num_chains=8, num_steps=3)
    svi = SVI(conditional, lambda *_: None, Adam({"lr": 1e-9}), Trace_ELBO())
    for _ in range(5):
        before = method.chains
        with pyro.poutine.trace() as trace:
            svi.step(method, x, y, 10)
        rows = trace.trace.nodes["n"]["value"]
        assert method.chains.age.shape == (4, 2, 30)
        rest = torch.ones(30, dtype=torch.bool).index_fill(0, rows, False)
        if before is None:
            assert (method.chains.age[..., rest] == -1).all()
        else:
            assert torch.equal(method.chains.position[..., rest], before.position[..., rest])
            age = before.age[..., rows].clamp(min=0) + 3
            assert torch.equal(method.chains.age[..., rows], age)


def test_rows_drawn_later_move_as_long_at_first_as_the_first():
    x, y = regression(30)
    method = Contrastive(num_chains=8, num_steps=3, weighted=False)
    svi = SVI(conditional, lambda *_: None, Adam({"lr": 1e-9}), Trace_ELBO())
    for _ in range(20):
        svi.step(method, x, y, 10)
    assert (method.chains.age >= 30).all()


def test_rows_not_drawn_yet_start_when_all_are_asked_for():
    x, y = regression(30)
    method = Contrastive(num_chains=8, num_steps=3)
    svi = SVI(conditional, lambda *_: None, Adam({"lr": 1e-9}), Trace_ELBO())
    svi.step(method, x, y, 10)
    drawn = method.chains.age[0, 0] == 3
    svi.evaluate_loss(method, x, y)
    assert torch.equal(method.chains.age[0, 0], torch.where(drawn, 6, 3))
    assert len(method.chains.position[0, 0].unique()) == 30


@pytest.mark.slow
def test_the_chains_of_a_row_have_its_law():
    torch.manual_seed(0)
    x, y = 20 * torch.linspace(-1.0, 1.0, 12), torch.zeros(12)
    pyro.param("w", torch.tensor(1.0))
    pyro.param("log_k", torch.tensor(1.0))
    method = Contrastive(num_chains=2000, num_steps=5, weighted=False)
    svi = SVI(conditional, lambda *_: None, Adam({"lr": 1e-12}), Trace_ELBO())
    for _ in range(60):
        svi.step(method, x, y, 4)
    precision = math.e + 1 / 9
    mean = method.chains.position.mean(0)
    error = 1 / math.sqrt(2000 * precision)
    assert (mean - math.e * x / precision).abs().max() < FAR * error
    # The planted fault: chains that belong to places in the batch would be all mixed up.
    assert (mean.flip(0) - math.e * x / precision).abs().max() > FAR * error


def test_each_row_has_a_step_of_its_own():
    """With one step for all, the mean acceptance would be right where the narrowest row stands."""
    precision, values = torch.tensor([0.1, 1.0, 300.0]), torch.zeros(3)
    method = Contrastive(num_chains=200, num_steps=5, weighted=False)

    def model():
        with pyro.plate("n", 3, subsample_size=2) as i:
            energy = ebm.Given(lambda y, k: 0.5 * k * y.square(), precision[i])
            base = dist.Normal(torch.tensor(0.0), 3.0)
            pyro.sample("y", ebm.GibbsBoltzmann(energy, base, log_partition=method), obs=values[i])

    svi = SVI(model, lambda: None, Adam({}), Trace_ELBO())
    for _ in range(80):
        svi.step()
    step, moved = method.chains.log_step.exp() * precision, method.chains
    assert (step < 4.0).all()  # where MALA accepts no more
    square = moved.position.square().mean(0) * (precision + 1 / 9)
    assert ((square - 1).abs() < FAR * math.sqrt(2 / 200)).all()


def test_rows_that_change_in_number_start_anew_and_that_is_said():
    x, y = regression(30)
    method = Contrastive(num_chains=8, num_steps=3)
    svi = SVI(conditional, lambda *_: None, Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step(method, x, y, None, torch.arange(10))
    with pytest.warns(UserWarning, match="cannot tell to which rows"):
        svi.step(method, x, y, None, torch.arange(4))


def test_an_evaluation_that_fails_leaves_chains_and_their_rows():
    x, y = regression(30)
    method = Contrastive(num_chains=8, num_steps=3)

    def evaluate(rows, broken=False):
        def energy(y, x):
            if broken and y.dim() == 3:  # of the chains, in two groups
                raise RuntimeError("broken")
            return 0.5 * (y - x).square()

        base = dist.Normal(torch.tensor(0.0), 3.0)
        return method.log_z(ebm.GibbsBoltzmann(ebm.Given(energy, x[rows]), base), y[rows])

    first, second = torch.arange(10), torch.arange(10, 20)
    evaluate(first)
    before, moved = method.chains, method.moved
    with (
        pytest.raises(RuntimeError, match="broken"),
        pytest.warns(UserWarning, match="cannot tell"),
    ):
        evaluate(second, broken=True)
    assert method.chains is before
    assert method.moved is moved
    evaluate(first)
    assert (method.chains.age == 6).all()
    with pytest.warns(UserWarning, match="cannot tell"):  # chains of the first rows
        evaluate(second)


def test_rows_that_change_without_a_plate_start_anew_and_that_is_said():
    x, y = regression(30)
    method = Contrastive(num_chains=8, num_steps=3)
    svi = SVI(conditional, lambda *_: None, Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step(method, x, y, None, torch.arange(10))
    svi.step(method, x, y, None, torch.arange(10))
    assert (method.chains.age == 6).all()
    with pytest.warns(UserWarning, match="cannot tell to which rows"):
        svi.step(method, x, y, None, torch.arange(10, 20))
    assert (method.chains.age == 3).all()


# Several energies, latents, files ----------------------------------------------------------------


def two(first, second, data):
    for name, method, x in (("a", first, data[0]), ("b", second, data[1])):
        k = pyro.param(f"k_{name}", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate(f"n_{name}", len(x)):
            law = ebm.GibbsBoltzmann(
                lambda x, k=k: 0.5 * k * x**2,
                dist.Normal(torch.tensor(0.0), 100.0),
                log_partition=method,
            )
            pyro.sample(name, law, obs=x)


@pytest.mark.slow
def test_two_energies_of_a_model_learn_each_by_its_method():
    torch.manual_seed(0)
    data = 0.5 * torch.randn(200), 2.0 * torch.randn(100)
    methods = [Contrastive(num_chains=500, num_steps=5) for _ in data]
    svi = SVI(two, lambda *_: None, Adam({"lr": 0.03}), Trace_ELBO())
    tail = []
    for step in range(180):
        svi.step(*methods, data)
        if step >= 80:
            tail.append([pyro.param("k_a").item(), pyro.param("k_b").item()])
    mle = torch.stack([1 / x.square().mean() for x in data])
    # 500 persistent chains over 100 steps: a few per cent.
    assert (torch.tensor(tail).mean(0) / mle - 1).abs().max() < 0.1


def test_one_method_at_two_sites_is_refused():
    method, data = Contrastive(num_chains=4, num_steps=1), (torch.zeros(2), torch.zeros(2))
    svi = SVI(two, lambda *_: None, Adam({"lr": 0.03}), Trace_ELBO())
    with pytest.raises(ValueError, match="must serve one site, got site 'a' and site 'b'"):
        svi.step(method, method, data)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_chains_follow_the_latents_of_a_guide(persistent):
    """x = z + noise with z ~ N(0, 1): the energy k x^2 / 2 - k z x has a log Z that z moves."""
    torch.manual_seed(0)
    x = math.sqrt(1.5) * torch.randn(300)
    variance = x.square().mean() - 1.0  # the maximum of the likelihood, in closed form
    start = {"persistent": persistent, "start": "base" if persistent else "data"}
    method = Contrastive(num_chains=10, num_steps=10, **start)

    def model():
        k = pyro.param("k", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("n", 300):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            energy = ebm.Given(lambda x, z: 0.5 * k * x.square() - k * z * x, z)
            base = dist.Normal(torch.tensor(0.0), 30.0)
            pyro.sample("x", ebm.GibbsBoltzmann(energy, base, log_partition=method), obs=x)

    def guide():
        slope = pyro.param("slope", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("n", 300):
            pyro.sample("z", dist.Normal(slope * x, scale))

    svi = SVI(model, guide, Adam({"lr": 0.03}), Trace_ELBO())
    tail = []
    for step in range(250):
        svi.step()
        if step >= 130:
            tail.append([pyro.param(n).item() for n in ("k", "slope", "scale")])
    k, slope, scale = torch.tensor(tail).mean(0)
    assert abs(1 / k - variance) < 0.12  # the likelihood is flat there: three nats of 450
    assert abs(slope - k / (1 + k)) < 0.05
    assert abs(scale - (1 + k) ** -0.5) < 0.05


def two_precisions(method):
    """A latent chooses one of two energies, whose log Z decide on it."""
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    base = dist.Normal(torch.tensor(0.0), 3.0)
    law = ebm.GibbsBoltzmann(lambda x: (0.05 + 0.5 * z) * x**2, base, log_partition=method)
    pyro.sample("x", law, obs=torch.tensor(1.0))


def chosen(*_):
    q = pyro.param("q", torch.tensor(0.5), constraint=constraints.unit_interval)
    pyro.sample("z", dist.Bernoulli(q))


@pytest.mark.parametrize("elbo", [ELBOS["Trace"], ELBOS["TraceGraph"], ELBOS["TraceEnum"]])
def test_a_score_function_is_refused_what_has_no_value(elbo):
    """Its gradient is the value times a score: without log Z it learned .63 for a true .59."""
    unweighted = Contrastive(num_chains=4, num_steps=1, weighted=False)
    with pytest.raises(ebm.UnnormalizedError, match="score function of the guide's 'z' needs"):
        SVI(two_precisions, chosen, Adam({}), elbo()).step(unweighted)
    weighted = Contrastive(num_chains=4, num_steps=1)
    SVI(two_precisions, chosen, Adam({}), elbo()).step(weighted)


def test_weights_of_draws_are_refused_what_has_no_value():
    method = Contrastive(num_chains=4, num_steps=1, weighted=False)
    renyi = RenyiELBO(num_particles=2)
    with pytest.raises(ebm.UnnormalizedError, match="renyi_elbo, which weighs draws, needs"):
        SVI(two_precisions, chosen, Adam({}), renyi).step(method)


def test_a_resumed_method_gives_the_same_bits(tmp_path):
    x, y = regression(30)
    methods = [Contrastive(num_chains=8, num_steps=3) for _ in range(2)]
    d = ebm.GibbsBoltzmann(Well(), dist.Normal(0.0, 1.5))
    methods[0].log_z(d)
    checkpoint.save(tmp_path / "method.ckpt", methods[0].state_dict())
    values = [methods[0].log_z(d).detach()]
    methods[1].load_state_dict(checkpoint.load(tmp_path / "method.ckpt"))
    values.append(methods[1].log_z(d).detach())
    assert torch.equal(*values)
    with pytest.raises(ValueError, match="got no chains to keep"):
        Contrastive().state_dict()


# Losses in the place of an ELBO ------------------------------------------------------------------


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x):
        return 0.5 * (self.k * x.square()).sum(-1)


def plain(energy, x, subsample_size=None, rows=None):
    pyro.module("energy", energy)
    with pyro.plate("n", len(x), subsample_size=subsample_size, subsample=rows) as i:
        pyro.sample("x", ebm.GibbsBoltzmann(energy, ebm.Flat((2,)), 2.0), obs=x[i])


def test_a_loss_sees_the_potential_and_all_rows():
    energy, x = Quadratic(), torch.randn(12, 2)
    value = EnergyLoss(score_matching)(plain, lambda *_: None, energy, x)
    truth = 12 * score_matching(lambda x: 2.0 * energy(x), x)
    torch.testing.assert_close(value, truth, **EXACT)
    torch.testing.assert_close(gradients(value, energy), gradients(truth, energy), **EXACT)


def test_mini_batches_are_unbiased():
    energy, x = Quadratic(), torch.randn(12, 2)
    loss = EnergyLoss(score_matching)
    whole = gradients(loss(plain, lambda *_: None, energy, x), energy)
    batches = torch.randperm(12).reshape(4, 3)
    parts = [
        gradients(loss(plain, lambda *_: None, energy, x, None, rows), energy) for rows in batches
    ]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, **EXACT)
    assert (parts[0] - whole).abs().max() > 0.01


def test_no_log_z_is_asked_for_there_and_only_there():
    energy, x = Quadratic(), torch.randn(12, 2)
    adam = Adam({"lr": 0.1})
    SVI(plain, lambda *_: None, adam, EnergyLoss(score_matching)).step(energy, x)
    with pytest.raises(ebm.UnnormalizedError, match="learned 'energy"):
        SVI(plain, lambda *_: None, adam, Trace_ELBO()).step(energy, x)

    def two(energy, x):
        plain(energy, x)
        with pyro.plate("m", len(x)):
            pyro.sample("y", ebm.GibbsBoltzmann(energy, ebm.Flat((2,))), obs=x)

    SVI(two, lambda *_: None, adam, EnergyLoss(score_matching)).step(energy, x)
    with pytest.raises(ebm.UnnormalizedError, match="site 'y'"):
        SVI(two, lambda *_: None, adam, EnergyLoss(score_matching, ["x"])).step(energy, x)


def test_the_other_sites_enter_by_their_elbo():
    """A prior on a precision that is learned by score matching: the mode, in closed form."""
    torch.manual_seed(0)
    x = 0.7 * torch.randn(50, 1)

    def model():
        k = pyro.sample("k", dist.Gamma(torch.tensor(3.0), 2.0))
        with pyro.plate("n", 50):
            law = ebm.GibbsBoltzmann(lambda x: 0.5 * k * x.square().sum(-1), ebm.Flat((1,)))
            pyro.sample("x", law, obs=x)

    guide = AutoDelta(model)
    svi = SVI(model, guide, Adam({"lr": 0.02}), EnergyLoss(score_matching))
    for _ in range(400):
        svi.step()
    # The score matching loss is n (k^2 m / 2 - k); minus the log prior, 2 k - 2 log k.
    m = x.square().sum()
    mode = (50 - 2 + ((50 - 2) ** 2 + 8 * m).sqrt()) / (2 * m)
    torch.testing.assert_close(guide.median()["k"], mode, rtol=1e-3, atol=0)


def test_a_mean_over_all_points_refuses_masks_and_enumeration():
    x = torch.randn(12, 2)

    def masked():
        with pyro.poutine.mask(mask=torch.arange(12) < 6):
            plain(Quadratic(), x)

    def enumerated():
        with pyro.plate("n", 12):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            law = ebm.GibbsBoltzmann(lambda x: (1 + z) * x.square().sum(-1), ebm.Flat((2,)))
            pyro.sample("x", law, obs=x)

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    for model in (masked, enumerated):
        with pytest.raises(NotImplementedError, match="site 'x': a loss is one mean"):
            EnergyLoss(score_matching, elbo=elbo)(model, lambda: None)


@pytest.mark.parametrize("of_rows", [False, True])
def test_a_score_function_has_the_loss_of_all_rows_only(of_rows):
    """A latent of each row would learn from the mean over all: an nth of its own loss."""
    x, q = torch.randn(12, 1), torch.tensor(0.3, requires_grad=True)

    def z():
        return pyro.sample("z", dist.Bernoulli(0.5))

    def model():
        outside = None if of_rows else z()
        with pyro.plate("n", 12):
            scale = 1 + (z() if of_rows else outside)
            energy = ebm.Given(lambda x, k: k * x.square().sum(-1), scale)
            pyro.sample("x", ebm.GibbsBoltzmann(energy, ebm.Flat((1,))), obs=x)

    def guide():
        with pyro.plate("n", 12) if of_rows else contextlib.nullcontext():
            pyro.sample("z", dist.Bernoulli(q))

    def loss(u, x):
        return u(x).mean()

    def step():
        return torch.autograd.grad(EnergyLoss(loss)(model, guide), q)[0]

    if of_rows:
        with pytest.raises(NotImplementedError, match="score function of the guide's z cannot"):
            step()
        return
    slopes = torch.stack([step() for _ in range(400)])
    prior = q.detach().log() - (1 - q.detach()).log()  # the slope of the divergence of Bernoullis
    truth = x.square().sum() + prior
    assert abs(slopes.mean() - truth) < FAR * slopes.std() / 20


@pytest.mark.parametrize("elbo", [Trace_ELBO, ELBOS["TraceEnum"], TraceMeanField_ELBO])
def test_a_loss_may_draw_noise_of_another_number(elbo):
    energy, x = Quadratic(), torch.randn(12, 2)
    noise = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    draws = noise.sample((30,))

    def loss(potential, x):
        return noise_contrastive(potential, x, draws, noise)

    value = EnergyLoss(loss, elbo=elbo())(plain, lambda *_: None, energy, x)
    torch.testing.assert_close(value, 12 * loss(lambda x: 2.0 * energy(x), x), **EXACT)


def test_a_plain_function_is_a_loss_as_well():
    """With its parameters registered where SVI looks for them."""
    torch.manual_seed(0)
    x = torch.randn(500, 2) / torch.tensor([2.0, 1.0]).sqrt()
    energy = Quadratic()

    def loss(model, guide, x):
        return score_matching(pyro.module("energy", energy), x)

    svi = SVI(lambda x: None, lambda x: None, Adam({"lr": 0.05}), loss)
    for _ in range(300):
        svi.step(x)
    torch.testing.assert_close(energy.k.data, 1 / x.square().mean(0), rtol=1e-3, atol=0)


def test_evaluation_gives_the_value_only():
    energy, x = Quadratic(), torch.randn(12, 2)
    svi = SVI(plain, lambda *_: None, Adam({"lr": 0.1}), EnergyLoss(score_matching))
    value = 12 * score_matching(lambda x: 2.0 * energy(x), x).item()
    assert math.isclose(svi.evaluate_loss(energy, x), value, rel_tol=1e-10)
    assert energy.k.grad is None


WRONG = {
    "no such site": (EnergyLoss(score_matching, ["x", "y"]), r"got none of \['y'\]"),
    "no scalar": (EnergyLoss(lambda u, x: u(x)), r"must return a scalar, got the shape \(12,\)"),
}


@pytest.mark.parametrize(("loss", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_loss_is_named(loss, message):
    with pytest.raises(ValueError, match=message):
        loss(plain, lambda *_: None, Quadratic(), torch.randn(12, 2))
    with pytest.raises(ValueError, match="got none of any name"):
        EnergyLoss(score_matching)(lambda: None, lambda: None)
    with pytest.raises(TypeError, match="must be a list of names"):
        EnergyLoss(score_matching, "x")


def test_mala_of_bits_is_refused():
    d = ebm.GibbsBoltzmann(Spins(), ebm.Flat((3,), constraints.boolean))
    with pytest.raises(ValueError, match="finite support"):
        Contrastive(mala).log_z(d)
