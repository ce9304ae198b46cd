"""Sound training gives no alarm, each scripted failure its name; and what a look measures."""

import copy
import math
import warnings

import pyro
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_ebm as ebm
from pyro_ebm import kernels, losses
from pyro_ebm.partition import Annealed, Contrastive, Exact, Quadrature
from tests.common import EXACT, NUMERIC, gaussian
from tests.training_runs import FAILING, SOUND, Quadratic, adam, langevin, normal, ring, stripes

RUNS = {f"{name}, seed {seed}": (make, seed) for name, make in SOUND.items() for seed in range(2)}
WITHIN = 50  # steps from the onset of a failure to its name


def watched(run):
    """Make a run with its warnings kept by the monitor alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.TrainingWarning)
        return run()


@pytest.mark.slow
def test_twenty_sound_runs_give_at_most_one_alarm():
    assert len(RUNS) == 20
    alarms = []
    for name, (make, seed) in RUNS.items():
        torch.manual_seed(seed)
        alarms += [(name, str(w)) for w in watched(make).warnings]
    assert len(alarms) <= 1, alarms


@pytest.mark.slow
@pytest.mark.parametrize(("run", "kind", "onset"), FAILING.values(), ids=FAILING)
def test_a_failure_is_named_and_no_other(run, kind, onset):
    monitor = watched(run)
    assert {w.kind for w in monitor.warnings} == {kind}, str(monitor)
    assert onset < monitor.warnings[0].step <= onset + WITHIN
    assert len(monitor.warnings) == 1, "once, while it lasts"


def test_at_least_twelve_kinds_are_scripted():
    kinds = {kind for _, kind, _ in FAILING.values()} | {"not finite"}
    assert len(kinds) >= 12


def step(monitor, x=None, negatives=None, **seen):
    """Show the monitor one step, by default of standard normal points."""
    x = torch.randn(64, 2) if x is None else x
    return monitor.update(x, torch.randn(64, 2) if negatives is None else negatives, **seen)


# What is not finite ----------------------------------------------------------------------------


def overflow(x):
    return torch.where(x[..., 0] > 50, torch.inf, gaussian(x))


NOT_FINITE = {
    "NaN in the data": (lambda x: x.index_fill(0, torch.tensor([3, 17]), math.nan), r"\[3, 17\]"),
    "an infinite energy": (lambda x: x.index_fill(0, torch.tensor([5]), 99.0), r"\[5\]"),
}


@pytest.mark.parametrize(("spoil", "rows"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_it_stops_and_names_the_rows_and_the_step(spoil, rows):
    monitor = ebm.Monitor(overflow)
    for _ in range(3):
        x = torch.randn(32, 2)
        assert step(monitor, x, loss=overflow(x).mean())
    x = spoil(torch.randn(32, 2))
    with pytest.raises(ebm.TrainingError, match=rf"step 4, not finite: the loss is .*x .*{rows}"):
        step(monitor, x, loss=overflow(x).mean())


def test_it_names_negatives_that_are_not_finite():
    negatives = torch.randn(64, 2).index_fill(0, torch.tensor([7]), math.nan)
    with pytest.raises(ebm.TrainingError, match=r"negatives is not finite in 1 rows: \[7\]"):
        step(ebm.Monitor(gaussian), negatives=negatives, loss=math.nan)


def test_it_sees_what_is_not_finite_without_a_loss():
    monitor = ebm.Monitor(gaussian, every=5)
    step(monitor)
    x = torch.full((8, 2), math.nan)
    seen = [step(monitor, x) for _ in range(3)]
    with pytest.raises(ebm.TrainingError, match="step 5"):
        step(monitor, x)
    assert all(seen), "between looks it takes no time"


def test_it_names_a_gradient_that_is_not_finite():
    energy = Quadratic(0.0)
    loss = energy.k.sqrt()  # 0, of infinite slope
    loss.backward()
    with pytest.raises(ebm.TrainingError, match="gradient of 'k' is not finite"):
        step(ebm.Monitor(energy), loss=loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_is_left_out_and_counted(bad):
    energy = Quadratic(1.0)
    monitor, optimizer = ebm.Monitor(energy, on_nan="skip"), torch.optim.SGD([energy.k], 0.1)

    def run():
        for i in range(6):
            x = torch.randn(64, 2)
            loss = energy(x).mean() * (bad if i in (2, 4) else 1.0)
            optimizer.zero_grad()
            loss.backward()
            if step(monitor, x, loss=loss):
                optimizer.step()

    with pytest.warns(ebm.TrainingWarning, match="not finite") as seen:
        run()
    assert monitor.skipped == 2
    assert len(seen) == 1
    assert energy.k.isfinite()
    assert all(math.isfinite(v) for v in monitor.history["loss"])


def test_what_is_left_out_is_also_a_gradient_of_a_finite_loss():
    energy = Quadratic(0.0)
    loss = energy.k.sqrt()
    loss.backward()
    with pytest.warns(ebm.TrainingWarning, match="gradient of 'k'"):
        assert not step(ebm.Monitor(energy, on_nan="skip"), loss=loss)


# It changes nothing ----------------------------------------------------------------------------


def train(monitored):
    """Learn a ring for 60 steps, and return the weights and the next random number."""
    torch.manual_seed(0)
    energy, base = ebm.zoo.MLPEnergy(2, (16,)), normal()
    method = Annealed(num_particles=16, num_steps=8)
    monitor = ebm.Monitor(energy, base, held_out=ring(50), log_partition=method)
    optimizer, sampler = adam(energy), ebm.Negatives(energy, base, num_steps=2)
    chains = sampler.init(64)
    for _ in range(60):
        x = ring(64)
        chains, moved = sampler.step(chains)
        optimizer.zero_grad()
        loss = losses.contrastive_divergence(energy, x, moved.x)
        loss.backward()
        if monitored:
            monitor.update(x, moved, loss=loss)
        optimizer.step()
    return [*energy.parameters(), torch.rand(1)], monitor


@pytest.mark.filterwarnings("ignore::pyro_ebm.UnnormalizedWarning")  # 16 particles are few
def test_training_is_the_same_to_the_bit_without_it():
    with_it, monitor = train(True)
    without, _ = train(False)
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert monitor.history["step"] == [1.0, 25.0, 50.0]
    known = [math.isfinite(v) for v in monitor.history["held_out"]]
    assert known == [True, False, True]


def test_it_leaves_modes_and_points_alone():
    energy = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1), nn.Flatten(0))
    x, negatives = torch.randn(20, 2), torch.randn(20, 2)
    before = copy.deepcopy((x, negatives, energy.state_dict()))
    ebm.Monitor(energy).update(x, negatives)
    assert energy.training
    assert torch.equal(x, before[0])
    assert torch.equal(negatives, before[1])
    assert all(p.grad is None for p in energy.parameters())


def test_between_looks_it_evaluates_nothing():
    calls = []

    def energy(x):
        calls.append(len(x))
        return gaussian(x)

    monitor = ebm.Monitor(energy)
    for _ in range(24):
        step(monitor, loss=torch.tensor(1.0))
    assert calls == [128, 8], "at the first step: of data and negatives, and curvature of data"
    step(monitor, loss=torch.tensor(1.0))
    assert calls == [128, 8, 128]


# What a look measures, against closed forms ----------------------------------------------------


def test_energies_and_their_gap():
    x, negatives = torch.randn(60, 3), 2.0 * torch.randn(50, 3)
    base = normal(3, 3.0)
    monitor = ebm.Monitor(ebm.GibbsBoltzmann(gaussian, base, beta=0.5))
    monitor.update(x, negatives, loss=2.5)
    at, of = (0.5 * gaussian(p) - base.log_prob(p) for p in (x, negatives))
    sd = ((at.var(correction=0) + of.var(correction=0)) / 2).sqrt()
    seen = {name: torch.tensor(values[0]) for name, values in monitor.history.items()}
    torch.testing.assert_close(seen["energy_data"], at.mean(), **EXACT)
    torch.testing.assert_close(seen["energy_negatives"], of.mean(), **EXACT)
    torch.testing.assert_close(seen["gap"], (of.mean() - at.mean()) / sd, **EXACT)
    assert seen["loss"] == 2.5


def test_the_loss_is_the_mean_since_the_last_look():
    monitor = ebm.Monitor(gaussian, every=4)
    for i in range(9):
        step(monitor, loss=torch.tensor(float(i)))
    assert monitor.history["loss"] == [0.0, 2.0, 5.5]


@pytest.mark.parametrize("of_a_base", [False, True])
def test_curvature_of_a_gaussian(of_a_base):
    # Sign vectors are eigenvectors' sums: of a diagonal Hessian the trace is exact.
    precision = torch.tensor([4.0, 1.0, 0.25])
    energy = lambda x: 0.5 * (precision * x.square()).sum(-1)
    x = torch.randn(60, 3)
    base = normal(3, 0.5) if of_a_base else None
    monitor = ebm.Monitor(energy, base)
    monitor.update(x)
    scale = x.var(0, correction=0).mean()
    total = precision + (4.0 if of_a_base else 0.0)
    expected = scale * total.sum()
    torch.testing.assert_close(torch.tensor(monitor.history["trace"][0]), expected, **EXACT)
    (largest,) = monitor.history["curvature"]
    # Two steps of the power method, from a vector of equal parts.
    power = (total**4).sum().sqrt() / (total**2).sum().sqrt()
    torch.testing.assert_close(torch.tensor(largest), scale * power, **EXACT)
    force = scale.sqrt() * (total * x[:8]).norm(dim=1).mean()
    torch.testing.assert_close(torch.tensor(monitor.history["force"][0]), force, **EXACT)


def test_movement_of_chains():
    monitor, x = ebm.Monitor(gaussian, every=3), torch.randn(64, 2)
    chains = torch.randn(64, 2)
    for _ in range(3):
        chains = chains + torch.tensor([0.3, 0.4])
        monitor.update(x, chains)
    expected = 0.5 / x.var(0, correction=0).sum().sqrt()
    torch.testing.assert_close(torch.tensor(monitor.history["movement"][-1]), expected, **NUMERIC)
    assert monitor.history["still"][-1] == 0.0


def test_movement_follows_the_state_where_negatives_are_some_of_the_chains():
    sampler = ebm.Negatives(gaussian, normal(), num_steps=2)
    chains, monitor = sampler.init(500), ebm.Monitor(gaussian, every=3)
    for _ in range(3):
        old, (chains, moved) = chains, sampler.step(chains, 20)
        monitor.update(torch.randn(64, 2), moved, state=chains)
    stayed = (old.position[:64] == chains.position[:64]).all(1)
    assert monitor.history["still"][-1] == stayed.to(old.position.dtype).mean()
    assert stayed.sum() > 50, "20 of 500 chains move at a time"


def test_acceptance_and_temperature_are_those_of_the_moves():
    _, infos = langevin(gaussian, torch.randn(50, 2), 4, 0.5, make=kernels.mala)
    monitor = ebm.Monitor(gaussian)
    step(monitor, info=infos)
    rate = torch.stack([i.accept_prob for i in infos]).mean()
    torch.testing.assert_close(torch.tensor(monitor.history["acceptance"][0]), rate, **EXACT)
    _, infos = langevin(gaussian, torch.randn(50, 2), 4, 0.1, 0.4)
    monitor = ebm.Monitor(gaussian)
    step(monitor, info=infos[-1])
    temperature = torch.tensor(monitor.history["temperature"][0])
    torch.testing.assert_close(temperature, torch.tensor(0.4**2 / 0.2), **EXACT)


def test_records_of_moves_stacked_and_in_a_list_say_the_same():
    _, infos = langevin(gaussian, 5.0 + torch.randn(50, 2), 8, 0.1)
    stacked = type(infos[0])(*map(torch.stack, zip(*infos, strict=True)))
    seen = []
    for info in (infos, stacked):
        torch.manual_seed(0)
        monitor = ebm.Monitor(gaussian)
        step(monitor, info=info)
        seen.append([v for v in monitor.history.values() if not math.isnan(v[0])])
    assert seen[0] == seen[1]
    assert not math.isnan(monitor.history["drift"][0])


@pytest.mark.parametrize("num_steps", [1, 2, 5, 8])
@pytest.mark.parametrize("step_size", [0.1, None])
def test_negatives_record_the_energies_halfway(num_steps, step_size):
    # A chain that only counts: its energy is the number of its moves.
    info = lambda e: kernels.MoveInfo(e, torch.ones_like(e), e > 0, e < 0)
    count = kernels.Kernel(
        lambda x: kernels.PointState(x, torch.zeros(len(x))),
        lambda state: (state._replace(energy=state.energy + 1), info(state.energy + 1)),
    )
    sampler = ebm.Negatives(
        gaussian, normal(), lambda u, eps: count, num_steps, step_size=step_size
    )
    chains = sampler.init(7)
    for _ in range(70):  # past the moves in which the step is adapted
        chains, moved = sampler.step(chains)
    assert moved.halfway.tolist() == [(num_steps + 1) // 2] * 7
    assert moved.info.energy.tolist() == [num_steps] * 7


def test_the_drift_of_ebm_negatives_is_that_of_its_moves():
    x = 0.5 * torch.randn(64, 2)
    sampler = ebm.Negatives(gaussian, normal(), kernels.ula, 10, step_size=0.02)
    _, moved = sampler.step(sampler.init(5.0 + torch.randn(64, 2)))
    monitor = ebm.Monitor(gaussian)
    monitor.update(x, moved)
    change = (moved.info.energy - moved.halfway).mean()
    sd = gaussian(x).std(correction=0)  # the smaller of both
    torch.testing.assert_close(torch.tensor(monitor.history["drift"][0]), change / sd, **EXACT)


@pytest.mark.parametrize(
    ("energy", "share"),
    [
        (gaussian, 0.0),
        (lambda x: 1.1 * x.square().sum(-1).log1p(), 0.0),
        (lambda x: 0.9 * x.square().sum(-1).log1p(), 1.0),
        (lambda x: x[..., 0], 0.5),
    ],
    ids=["Gaussian", "heavy tails", "too heavy", "a slope"],
)
def test_tails_without_an_integral_are_seen_in_two_dimensions(energy, share):
    x = torch.randn(32, 2)
    monitor = ebm.Monitor(energy, ebm.Flat((2,)))
    assert watched(lambda: monitor.update(torch.cat([x, -x])))
    assert monitor.history["tails"] == [share]
    assert [w.kind for w in monitor.warnings] == ["runaway"] * (share > 0)


def test_a_proper_base_or_walls_need_no_tails():
    for base in (normal(), ebm.Flat((2,), constraints.unit_interval), None):
        monitor = ebm.Monitor(lambda x: x[..., 0], base)
        monitor.update(torch.rand(64, 2))
        assert math.isnan(monitor.history["tails"][0])


def test_what_is_hidden_hides_nothing():
    from pyro_ebm._signs import RULES, SYMPTOMS

    order = list(RULES)
    for cause, symptoms in SYMPTOMS.items():
        assert all(order.index(cause) < order.index(symptom) for symptom in symptoms)


def test_the_temperature_of_the_tutorials_is_reported():
    # JEM's and the UvA tutorial's numbers: a step of 1 with noise of .01, and of 10 with .005.
    for step_size, noise, value in ((1.0, 0.01, "5e-05"), (10.0, 0.005, "1.25e-06")):
        _, infos = langevin(gaussian, torch.randn(64, 2), 1, step_size, noise)
        with pytest.warns(ebm.TrainingWarning, match=f"temperature {value}, not 1"):
            step(ebm.Monitor(gaussian), info=infos)


# Likelihoods -----------------------------------------------------------------------------------


def test_a_likelihood_is_that_of_the_distribution():
    d = ebm.GibbsBoltzmann(gaussian, normal(), log_partition=Quadrature(-12.0, 12.0, 120))
    x, held_out = torch.randn(60, 2), torch.randn(30, 2)
    monitor = ebm.Monitor(d, held_out=held_out, log_partition=d.log_partition)
    monitor.update(x)
    for name, points in (("likelihood", x), ("held_out", held_out)):
        expected = d.log_prob(points).mean()
        torch.testing.assert_close(torch.tensor(monitor.history[name][0]), expected, **EXACT)


def test_annealing_brackets_log_z():
    d = ebm.GibbsBoltzmann(gaussian, normal())
    exact = torch.randn(512, 2) / 1.25**0.5
    method = Annealed(num_particles=256, num_steps=32, start=exact)
    monitor = ebm.Monitor(d, held_out=torch.randn(30, 2), log_partition=method)
    step(monitor)
    error = abs(monitor.history["log_z"][0] + math.log(5.0))
    assert error < 3 * monitor.history["log_z_error"][0] < 0.3


def test_a_sound_likelihood_that_wavers_is_no_fall():
    # The same numbers with and without the error of log Z: within three errors there is no sign.
    from pyro_ebm._signs import find

    def history(error):
        looks = {name: [math.nan] * 3 for name in ("dim", *ebm.Monitor(gaussian).history)}
        rows = {"step": [1.0, 10.0, 20.0], "likelihood": [-4.0, -3.0, -3.3]}
        return looks | rows | {"log_z_error": [error] * 3}

    assert find(history(0.0))["falling"]
    assert "falling" not in find(history(0.1))


# Pyro's SVI, discrete points, what is refused ---------------------------------------------------


def test_discrete_points_of_whole_numbers():
    energy = lambda x: x.sum(-1).to(torch.get_default_dtype())
    monitor = ebm.Monitor(energy)
    for _ in range(10):
        monitor.update(torch.randint(3, (50, 4)), torch.randint(3, (50, 4)))
    assert not monitor.warnings
    assert math.isnan(monitor.history["curvature"][0])
    assert monitor.history["stuck"][-1] == 0.0


def test_energies_of_several_parts():
    energy = lambda x, y: 0.5 * (x - y).square().sum(-1)
    parts = [torch.randn(30, 2) for _ in range(4)]
    monitor = ebm.Monitor(energy)
    monitor.update(tuple(parts[:2]), tuple(parts[2:]))
    expected = [energy(*parts[:2]).mean().item(), energy(*parts[2:]).mean().item()]
    seen = [monitor.history[name][0] for name in ("energy_data", "energy_negatives")]
    assert seen == pytest.approx(expected)


def test_a_kind_is_said_again_when_it_comes_again():
    monitor = ebm.Monitor(gaussian, every=1)
    hot = langevin(gaussian, torch.randn(64, 2), 1, 0.1, 2.0)[1]
    sound = langevin(gaussian, torch.randn(64, 2), 1, 0.1)[1]
    infos = [hot] * 3 + [sound] * 6 + [hot] * 3
    with pytest.warns(ebm.TrainingWarning) as seen:
        assert all(step(monitor, info=info) for info in infos)
    assert [w.message.step for w in seen] == [1, 10]
    assert [w.kind for w in monitor.warnings] == ["temperature"] * 2


def test_the_table_and_the_picture(capsys, tmp_path):
    monitor = watched(FAILING["crawling"][0])
    monitor.summary()
    said = capsys.readouterr().out
    assert said.strip() == str(monitor)
    assert "acceptance" in said
    assert "energy negatives" in said
    pytest.importorskip("matplotlib")
    monitor.plot().savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


REFUSED = {
    "every": {"every": 0},
    "slow": {"slow": 0},
    "on_nan": {"on_nan": "ignore"},
    "held_out needs": {"held_out": torch.zeros(3, 2)},
    "log_partition must": {"log_partition": Exact()},
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_wrong_options(name):
    with pytest.raises(ValueError, match=name):
        ebm.Monitor(gaussian, **REFUSED[name])


def test_it_runs_where_the_points_are(device):
    energy = ebm.zoo.MLPEnergy(2, (8,)).to(device)
    x = torch.randn(40, 2, device=device)
    monitor = ebm.Monitor(energy)
    for _ in range(10):
        loss = losses.contrastive_divergence(energy, x, torch.randn_like(x))
        loss.backward()
        assert monitor.update(x, torch.randn_like(x), loss=loss)
    with pytest.raises(ebm.TrainingError, match="step"):
        all(monitor.update(x, x, loss=loss * math.nan) for _ in range(25))


CONTRASTIVE = {
    "weighted": {},
    "from data": {"start": "data", "persistent": False},
    "unweighted": {"weighted": False},
}


@pytest.mark.parametrize("options", CONTRASTIVE.values(), ids=CONTRASTIVE)
def test_it_watches_contrastive_under_svi(options):
    energy, base = ebm.zoo.MLPEnergy(2, (16,)), normal()
    negatives = Contrastive(num_chains=128, num_steps=3, **options)
    monitor = ebm.Monitor(energy, base, every=3)

    def model(x):
        pyro.module("energy", energy)
        with pyro.plate("n", len(x)):
            pyro.sample("x", ebm.GibbsBoltzmann(energy, base, log_partition=negatives), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(6):
        x = ring(64)
        loss = svi.step(x)
        assert monitor.update(x, negatives, loss=loss)
    moved = negatives.moved.x[:64].reshape(64, -1, 2)[:, 0]
    with torch.no_grad():
        values = energy(moved) - base.log_prob(moved)
    weight = torch.full((64,), 1.0 / 64)
    if negatives.weighted:
        weight = negatives.moved.log_weight[:64, 0].softmax(0)
    sd, expected = values.std(correction=0), (weight * values).sum()
    if negatives.weighted:
        assert abs(expected - values.mean()) > 1e-3, "or the weights would not be seen"
        sd = (weight * (values - expected).square()).sum().sqrt()
    seen = {name: torch.tensor(values[-1]) for name, values in monitor.history.items()}
    torch.testing.assert_close(seen["energy_negatives"], expected, **EXACT)
    torch.testing.assert_close(seen["sd_negatives"], sd, **EXACT)
    torch.testing.assert_close(seen["acceptance"], negatives.moved.accept_prob.mean(), **EXACT)
    assert seen["movement"] > 0.01


def test_it_watches_an_rbm_under_svi():
    rbm, base = ebm.zoo.RBM(9, 4), ebm.Flat((9,), constraints.boolean)
    negatives = Contrastive(num_chains=64, num_steps=1)
    monitor = ebm.Monitor(rbm, base, every=2, log_partition=Exact())
    x = stripes()

    def model():
        pyro.module("rbm", rbm)
        with pyro.plate("n", len(x)):
            pyro.sample("x", ebm.GibbsBoltzmann(rbm, base, log_partition=negatives), obs=x)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(4):
        assert monitor.update(x, negatives, loss=svi.step())
    assert not monitor.warnings
    assert math.isfinite(monitor.history["likelihood"][0])
