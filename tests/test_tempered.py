"""Replica exchange of whole targets: rings, and models whose latents are summed out."""

import math

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_ebm as ebm
from pyro_ebm._ladder import Ladder
from pyro_ebm._potential import potential_of
from pyro_ebm.kernels import hmc, tempering
from pyro_ebm.kernels.tempering import tempered
from tests.common import EXACT, FALSE_ALARM, Line

pytestmark = pytest.mark.filterwarnings("ignore::pyro_ebm.ConvergenceWarning")

ANGLES = torch.arange(8) * (2 * math.pi / 8)
MODES = 5.0 * torch.stack([ANGLES.cos(), ANGLES.sin()], -1).double()


def ring(x):
    distance = (x.unsqueeze(-2) - MODES.to(x)).square().sum(-1)
    return -torch.logsumexp(-distance / (2 * 0.5**2), -1)


def run(target, *, num_samples=500, num_chains=64, **options):
    kernel = ebm.Tempered(target, **options)
    mcmc = ebm.MCMC(kernel, num_samples, 500, num_chains=num_chains, disable_progbar=True)
    mcmc.run()
    return mcmc


@pytest.mark.slow
def test_a_ring_of_eight_modes_is_visited_in_proportion():
    mcmc = run(ebm.GibbsBoltzmann(ring, ebm.Flat((2,))), num_temperatures=6)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    nearest = torch.cdist(x.flatten(0, 1), MODES).argmin(-1)
    weights = torch.bincount(nearest, minlength=8) / nearest.numel()
    assert 0.5 * (weights - 1 / 8).abs().sum() < 0.05
    assert max(float(az.rhat(x[..., i].numpy())) for i in range(2)) < 1.03
    assert (mcmc.sample_stats["round_trips"][:, -1] > 50).all()


@pytest.mark.slow
def test_without_exchange_the_ring_is_not_visited(monkeypatch):
    nothing = lambda path, ladder, state, odd: (
        torch.full_like(state.energy[1:], torch.nan),
        torch.zeros_like(state.energy[1:], dtype=torch.bool),
    )
    monkeypatch.setattr(tempering, "_crossings", nothing)
    monkeypatch.setattr(Ladder, "_respace", lambda self: None)
    mcmc = run(ebm.GibbsBoltzmann(ring, ebm.Flat((2,))), num_temperatures=6, num_samples=200)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert max(float(az.rhat(x[..., i].numpy())) for i in range(2)) > 1.03


@pytest.mark.slow
def test_the_temperatures_are_spaced_to_equal_rates_of_swaps():
    mcmc = run(ebm.GibbsBoltzmann(ring, ebm.Flat((2,))), num_temperatures=5)
    stats = mcmc.sample_stats
    rates = [float(stats[f"swap_prob_{k}"].nanmean()) for k in range(4)]
    assert max(rates) - min(rates) < 0.1
    betas = mcmc.adapted.betas
    assert betas[0] == pytest.approx(0.02)
    assert betas[-1] == 1.0


def mixed(x, beta):
    """A potential that is not linear in beta: of nine latent states, eight alike, summed out."""
    x, beta = x[..., 0], beta * torch.ones_like(x[..., 0])
    one, eight = -beta * 4.0 * (x - 1.5).square(), -beta * 2.0 * (x + 1.0).square()
    return -torch.logaddexp(one, eight + math.log(8.0))


BETAS = torch.tensor([0.2, 0.5, 1.0]).double()


def levels_after(path, num_moves=10, n=20_000):
    """Start every level in its law, move and swap, and compare every level with its law."""
    laws = [Line(lambda x, b=b: mixed(x, b)) for b in BETAS]
    step = 0.5 / BETAS.sqrt().unsqueeze(-1)
    kernel = tempered(lambda u: hmc(u, step, 2), None, BETAS, path=path)
    state = kernel.init(laws[-1].sample(n))
    position = torch.stack([law.sample(n) for law in laws])
    inner = hmc(lambda x: path(x, BETAS.unsqueeze(-1)), step, 2).init(position)
    state = state._replace(inner=inner)
    for _ in range(num_moves):
        state, info = kernel.step(state)
    assert (info.swap_prob.nan_to_num() > 0).any()
    return [law.p_value(x) for law, x in zip(laws, state.inner.position, strict=True)]


def test_a_path_that_is_not_linear_in_beta_leaves_every_level_invariant():
    assert min(levels_after(mixed)) > FALSE_ALARM


def test_swapping_with_beta_times_the_free_energy_is_seen(monkeypatch):
    """The fault of libraries whose swaps use beta F(x) where the chains have F_beta(x)."""

    def wrong(path, ladder, state, odd):
        free = path(state.position, torch.ones_like(ladder))
        return tempering._swaps(ladder, free, odd)

    monkeypatch.setattr(tempering, "_crossings", wrong)
    assert min(levels_after(mixed)) < FALSE_ALARM


DATA = torch.tensor([-2.1, -1.9, 2.0, 2.2, 2.4]).double()


def mixture():
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(DATA)):
        which = pyro.sample("which", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[which], 0.5), obs=DATA)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_model_is_tempered_before_its_latents_are_summed(beta):
    potential = potential_of(mixture, (), {})
    z = torch.randn(4, potential.num_dims)
    values = potential.constrain(z)
    weights, loc = values["weights"], values["loc"]
    likely = dist.Normal(loc.unsqueeze(1), 0.5).log_prob(DATA[:, None])  # shape: (4, n, 2)
    joint = torch.logsumexp(weights.log().unsqueeze(1) + beta * likely, -1).sum(-1)
    prior = dist.Normal(0.0, 3.0).log_prob(loc).sum(-1)
    prior = prior + dist.Dirichlet(torch.ones(2)).log_prob(weights)
    transform = potential.sites["weights"].transform
    jacobian = transform.log_abs_det_jacobian(z[:, :1], weights)
    expected = -(prior + joint + jacobian)
    got = potential.tempered(z, torch.full((4,), beta))
    torch.testing.assert_close(got, expected, **EXACT)
    if beta == 1.0:
        torch.testing.assert_close(potential.energy(z), expected, **EXACT)


@pytest.mark.slow
def test_the_labels_of_a_mixture_switch():
    mcmc = run(mixture, num_temperatures=6, min_beta=0.01, num_chains=32)
    assert mcmc.get_samples()["loc"][:, 0].gt(0).double().mean().sub(0.5).abs() < 0.05


def test_an_energy_site_is_tempered_above_its_base():
    d = ebm.GibbsBoltzmann(ring, dist.Normal(torch.zeros(2), 4.0).to_event(1), beta=2.0)
    z = torch.randn(3, 2)
    base = d.base.log_prob(z)
    for target in (d, lambda: pyro.sample("x", d)):
        got = potential_of(target, (), {}).tempered(z, torch.full((3,), 0.4))
        torch.testing.assert_close(got, 0.4 * 2.0 * ring(z) - base, **EXACT)


BAD = {
    "one temperature": ({"num_temperatures": 1}, "num_temperatures must be a whole number"),
    "beta of zero": ({"min_beta": 0.0}, "min_beta must be between 0 and 1, got 0.0"),
    "beta of one": ({"min_beta": 1.0}, "min_beta must be between 0 and 1"),
    "dense": ({"metric": "dense"}, "metric must be 'diagonal' or None, got 'dense'"),
    "no steps": ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ebm.Tempered(ring, ebm.Flat((2,)), **options)


def test_energy_and_path_exclude_each_other():
    with pytest.raises(ValueError, match="energy or path"):
        tempered(lambda u: hmc(u, 0.1, 1), ring, BETAS, path=mixed)


def short(num_samples, tmp_path=None, **options):
    pyro.set_rng_seed(7)
    target = ebm.GibbsBoltzmann(ring, ebm.Flat((2,)))
    checkpoint = None if tmp_path is None else tmp_path / "run.ckpt"
    mcmc = ebm.MCMC(
        ebm.Tempered(target, num_temperatures=3),
        num_samples,
        30,
        num_chains=4,
        disable_progbar=True,
        checkpoint=checkpoint,
        **options,
    )
    mcmc.run()
    return mcmc


def test_two_halves_are_one_run():
    whole, halves = short(20), short(8)
    halves.extend(12)
    assert torch.equal(whole.get_samples()["x"], halves.get_samples()["x"])


def test_a_resumed_run_has_the_same_bits(tmp_path):
    whole = short(20)
    short(8, tmp_path)
    resumed = short(20, tmp_path)
    assert torch.equal(whole.get_samples()["x"], resumed.get_samples()["x"])


def test_a_run_killed_in_warm_up_has_the_same_bits(tmp_path, monkeypatch):
    whole, update = short(20), Ladder.update_levels

    def stop(self, *args):
        update(self, *args)
        if self.count == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ladder, "update_levels", stop)
        short(20, tmp_path)
    resumed = short(20, tmp_path)
    assert torch.equal(whole.get_samples()["x"], resumed.get_samples()["x"])


def test_a_block_alone_is_the_block_of_all():
    whole = short(6, block_size=2)
    warm = whole.adapted
    pyro.set_rng_seed(3)
    points = {"x": torch.randn(4, 2)}
    target = ebm.GibbsBoltzmann(ring, ebm.Flat((2,)))

    def run_blocks(blocks):
        pyro.set_rng_seed(3)
        kernel = ebm.Tempered(target, num_temperatures=3)
        mcmc = ebm.MCMC(
            kernel,
            6,
            0,
            points,
            4,
            block_size=2,
            blocks=blocks,
            warm=warm,
            disable_progbar=True,
        )
        mcmc.run()
        return mcmc.get_samples(group_by_chain=True)["x"]

    every = run_blocks(None)
    assert torch.equal(run_blocks([1]), every[2:])
    assert not torch.equal(every[:2], every[2:])
