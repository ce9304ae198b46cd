"""Safeguards of training: each does what it says, and is off to the bit unless asked for."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyro_ebm as ebm
from pyro_ebm import losses
from pyro_ebm.kernels import ula
from pyro_ebm.partition import Contrastive, Exact
from tests.common import EXACT, FALSE_ALARM, FAR, Line, gaussian
from tests.training_runs import normal, ring

# Spectral norm ---------------------------------------------------------------------------------

SILU_SLOPE = 1.0998  # the largest slope of SiLU


def steepest(energy, x):
    return ebm.force(energy, x).norm(dim=-1).max()


def settled(energy):
    """Let the power iterations of the layers converge."""
    for _ in range(200):
        energy(torch.zeros(1, 2))
    return energy.eval()


def grown(spectral_norm):
    """A network whose weights have grown thirtyfold."""
    energy = ebm.zoo.MLPEnergy(2, (16, 16), spectral_norm=spectral_norm)
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.mul_(30.0)
    return settled(energy)


def test_spectral_norm_bounds_the_slope_whatever_the_weights():
    x = 10.0 * torch.randn(2000, 2)
    assert steepest(grown(True), x) <= SILU_SLOPE**2
    assert steepest(grown(False), x) > 100.0  # the planted fault: no norm


def test_spectral_norm_divides_by_the_largest_singular_value():
    energy = grown(True)
    for layer in energy.layers[::2]:
        original = layer.parametrizations.weight.original
        expected = original / torch.linalg.matrix_norm(original, 2)
        # Two hundred power iterations leave the ratio of two singular values to that power.
        torch.testing.assert_close(layer.weight, expected, rtol=1e-4, atol=1e-6)


def test_without_spectral_norm_the_network_is_the_same_to_the_bit():
    torch.manual_seed(0)
    plain = ebm.zoo.MLPEnergy(2)
    torch.manual_seed(0)
    off = ebm.zoo.MLPEnergy(2, spectral_norm=False)
    for a, b in zip(plain.state_dict().items(), off.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])


def test_chains_do_not_move_the_power_iteration():
    energy = ebm.zoo.MLPEnergy(2, (8,), spectral_norm=True)
    before = {name: b.clone() for name, b in energy.named_buffers()}
    sampler = ebm.Negatives(energy, normal(), num_steps=3)
    sampler.step(sampler.init(10))
    assert energy.training
    assert all(torch.equal(b, before[name]) for name, b in energy.named_buffers())


def test_a_network_with_spectral_norm_learns_by_svi():
    energy = ebm.zoo.MLPEnergy(2, (16,), spectral_norm=True)
    negatives = Contrastive(num_chains=64, num_steps=3)
    before = {name: p.detach().clone() for name, p in energy.named_parameters()}

    def model(x):
        pyro.module("energy", energy)
        with pyro.plate("n", len(x)):
            pyro.sample("x", ebm.GibbsBoltzmann(energy, normal(), log_partition=negatives), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.ClippedAdam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(ring(64))
    moved = [name for name, p in energy.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == len(before)


# Clipped Langevin steps ------------------------------------------------------------------------


def test_a_drift_is_cut_to_its_length():
    x = torch.tensor([[0.1, 0.2], [30.0, 40.0], [0.0, 0.0]])
    ends = []
    for max_drift in (None, 0.5):
        torch.manual_seed(0)
        kernel = ula(gaussian, 0.1, max_drift=max_drift)
        state, _ = kernel.step(kernel.init(x))
        ends.append(state.position)
    free, cut = ends
    torch.testing.assert_close(cut[0], free[0], **EXACT)
    torch.testing.assert_close(cut[2], free[2], **EXACT)
    # A drift of (3, 4) becomes one of (.3, .4).
    torch.testing.assert_close(cut[1] - free[1], torch.tensor([2.7, 3.6]), **EXACT)


STEEP, STEP, MOST = 4.0, 0.005, 0.01  # U = 2 x^2, no slope above 2


def huber(x):
    """The energy 2 x^2 with no slope above 2: the law of the cut moves, as the step tends to 0."""
    x = x.squeeze(-1).abs()
    return torch.where(x < 0.5, 0.5 * STEEP * x.square(), 2.0 * x - 0.5)


@pytest.mark.parametrize(("max_drift", "right"), [(MOST, True), (None, False)])
def test_cut_moves_have_the_law_that_is_said(max_drift, right):
    law = Line(huber, -12.0, 12.0)
    kernel = ula(lambda x: 0.5 * STEEP * x.square().sum(-1), STEP, max_drift=max_drift)
    state = kernel.init(law.sample(20_000))
    for _ in range(200):
        state, _ = kernel.step(state)
    # The step leaves a bias of the variance of about 1 per cent, which 20,000 do not show.
    assert (law.p_value(state.position) > FALSE_ALARM) == right


def test_an_infinite_cut_changes_no_bit():
    kernels = [ula(gaussian, 0.1), ula(gaussian, 0.1, max_drift=1e9)]
    ends = []
    for kernel in kernels:
        torch.manual_seed(0)
        state = kernel.init(torch.randn(50, 3))
        for _ in range(5):
            state, _ = kernel.step(state)
        ends.append(state.position)
    assert torch.equal(*ends)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_wrong_cut_is_refused(value):
    with pytest.raises(ValueError, match="max_drift must be positive"):
        ula(gaussian, 0.1, max_drift=value)


# Noise on the data, penalties, averages ---------------------------------------------------------


def test_noise_on_the_data_learns_the_law_of_both():
    # N(0, 1) data with noise of sd s are N(0, 1 + s^2): the documented bias.
    noise, k = 0.5, torch.tensor(1.0, requires_grad=True)
    x = torch.randn(200_000, 1)
    noisy = x + noise * torch.randn_like(x)
    energy = lambda x: 0.5 * k * x.square().sum(-1)
    losses.score_matching(energy, noisy).backward()
    (curvature,) = noisy.square().mean(0)
    best = 1.0 / curvature  # of the loss k^2 m / 2 - k
    torch.testing.assert_close(k.grad, curvature - 1.0, **EXACT)
    error = best * (2.0 / len(x)) ** 0.5
    assert abs(best - 1.0 / (1.0 + noise**2)) < FAR * error
    assert abs(best - 1.0) > FAR * error


def test_torch_averages_an_energy_of_pyros_parameter_store():
    energy = ebm.zoo.MLPEnergy(2, (8,))
    average = AveragedModel(energy, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    negatives = Contrastive(num_chains=32, num_steps=2)

    def model(x):
        pyro.module("energy", energy)
        with pyro.plate("n", len(x)):
            pyro.sample("x", ebm.GibbsBoltzmann(energy, normal(), log_partition=negatives), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    expected = None
    for _ in range(5):
        svi.step(ring(32))
        average.update_parameters(energy)
        now = [p.detach().clone() for p in energy.parameters()]
        pairs = zip(expected or now, now, strict=True)
        expected = [0.9 * a + 0.1 * b for a, b in pairs]
    for mean, value in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(mean, value, **EXACT)
    d = ebm.GibbsBoltzmann(average.module, normal())
    assert d.log_prob(ring(3)).shape == (3,)
    assert not any(name.startswith("module") for name in pyro.get_param_store())


# The same beta for negatives and data (learnergy's row of PITFALLS) ------------------------------


@pytest.mark.slow
def test_every_beta_learns_the_same_likelihood():
    # p(x) = exp(-beta E(x)) / Z: E scaled by 1 / beta is the same law, so is the optimum. A beta
    # in the negatives alone would leave E of the wrong size: nats above by far (2.57 to 3.07).
    data = torch.bernoulli(torch.tensor([0.9, 0.2, 0.6, 0.3]).expand(400, 4))
    rows = torch.cat([data, data[:, :1]], 1)  # the last unit copies the first
    base = ebm.Flat((5,), torch.distributions.constraints.boolean)
    reached = []
    for beta in (0.5, 1.0, 2.0):
        pyro.clear_param_store()
        torch.manual_seed(0)
        energy = ebm.zoo.Ising(5)
        negatives = Contrastive(num_chains=400, num_steps=2)

        def model(energy=energy, beta=beta, negatives=negatives):
            pyro.module("energy", energy)
            with pyro.plate("n", len(rows)):
                d = ebm.GibbsBoltzmann(energy, base, beta, log_partition=negatives)
                pyro.sample("x", d, obs=rows)

        svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.05 / beta}), Trace_ELBO())
        for _ in range(150):
            svi.step()
        d = ebm.GibbsBoltzmann(energy, base, beta, log_partition=Exact())
        reached.append(d.log_prob(rows).mean().item())
    # Of the best there is, up to the noise of 400 chains in 150 steps.
    p = torch.stack([(rows == row).all(1).to(rows.dtype).mean() for row in rows])
    best = p.log().mean().item()
    assert max(reached) - min(reached) < 0.05, reached
    assert best - min(reached) < 0.15, (best, reached)
    wrong = ebm.GibbsBoltzmann(energy, base, 1.0, log_partition=Exact())
    assert best - wrong.log_prob(rows).mean() > 0.15, "the planted fault: learned at 2, read at 1"
