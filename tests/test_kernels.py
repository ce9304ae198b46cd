"""The contract of all kernels, then each kernel's own properties."""

import pytest
import torch

from pyro_ebm.kernels import (
    Kernel,
    State,
    gibbs,
    hmc,
    mala,
    nuts,
    sgld,
    tempered,
    ula,
    underdamped,
)
from pyro_ebm.kernels.base import metropolis, start
from tests.common import EXACT, FALSE_ALARM, FAR, Line, double_well, gaussian, walled

BETAS = torch.tensor([0.4, 1.0])
DATA = torch.linspace(-1.0, 1.0, 5)
EXACT_KERNELS = {
    "mala": lambda energy: mala(energy, 0.3),
    "hmc": lambda energy: hmc(energy, 0.3, 4, jitter=0.5, step_jitter=0.2),
    "nuts": lambda energy: nuts(energy, 0.5, step_jitter=0.2),
    "underdamped": lambda energy: underdamped(energy, 0.5),
}
KERNELS = {
    "ula": lambda energy: ula(energy, 0.1),
    "sgld": lambda energy: sgld(lambda x, batch: energy(x) + 0 * batch.sum(), DATA, 2, 0.1),
    # Exact, but the target alone is not all that must be started: see test_tempering.py.
    "tempered mala": lambda energy: tempered(lambda u: mala(u, 0.3), energy, BETAS),
    "tempered underdamped": lambda energy: tempered(lambda u: underdamped(u, 0.5), energy, BETAS),
    "tempered hmc": lambda energy: tempered(lambda u: hmc(u, 0.3, 4), energy, BETAS),
    **EXACT_KERNELS,
}
TARGETS = {"gaussian": gaussian, "double well": double_well, "half line": walled}
parametrize = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)


def law_after(make, energy, device):
    """Start at the target, move a while, and ask whether the target is still there."""
    law = Line(energy, device=device)
    kernel = make(energy)
    state = kernel.init(law.sample(20_000))
    for _ in range(20):
        state, _ = kernel.step(state)
    return law.p_value(state.position)


@pytest.mark.parametrize("energy", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("make", EXACT_KERNELS.values(), ids=EXACT_KERNELS)
def test_exact_kernel_leaves_its_target_invariant(make, energy, device):
    assert law_after(make, energy, device) > FALSE_ALARM


def faulty(energy, fault):
    """MALA with a planted fault."""
    right = mala(energy, 0.3)

    def step(state):
        noise = 0.6**0.5 * torch.randn_like(state.position)
        drift = 0.3 * state.grad
        new = start(energy, state.position - drift + fault.get("noise", 1.0) * noise)

        def log_forward(a, b):
            return -(b.position - a.position + 0.3 * a.grad).square().sum(-1) / 1.2

        ratio = log_forward(new, state) - log_forward(state, new)
        return metropolis(state, new, fault.get("ratio", 1.0) * ratio)

    return Kernel(right.init, step)


FAULTS = {"no proposal ratio": {"ratio": 0.0}, "ratio upside down": {"ratio": -1.0}}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_invariance_test_sees_a_fault(fault, device):
    assert law_after(lambda e: faulty(e, fault), double_well, device) < FALSE_ALARM


def test_the_invariance_test_sees_a_biased_kernel(device):
    assert law_after(lambda energy: ula(energy, 0.3), gaussian, device) < FALSE_ALARM


def test_the_copy_without_a_fault_is_right(device):
    assert law_after(lambda e: faulty(e, {}), double_well, device) > FALSE_ALARM


def test_ula_has_its_closed_form_variance(device):
    step, n = 0.4, 200_000
    kernel = ula(gaussian, step)
    state = kernel.init(torch.zeros(n, 1, device=device))
    for _ in range(40):
        state, _ = kernel.step(state)
    truth = 1 / (1 - step / 2)
    error = truth * (2 / n) ** 0.5
    assert abs(state.position.var().item() - truth) < 5 * error


@pytest.mark.parametrize("noise_scale", [None, 0.3, 1.5])
def test_ula_reports_the_temperature_that_it_has(noise_scale, device):
    step, n = 0.1, 50_000
    kernel = ula(gaussian, step, noise_scale)
    state = kernel.init(torch.zeros(n, 1, device=device))
    for _ in range(150):
        state, info = kernel.step(state)
    expected = 1.0 if noise_scale is None else noise_scale**2 / (2 * step)
    assert info.temperature.shape == (n,)
    torch.testing.assert_close(info.temperature[0].item(), expected, **EXACT)
    truth = expected / (1 - step / 2)
    assert abs(state.position.var().item() - truth) < FAR * truth * (2 / n) ** 0.5


def test_the_temperature_is_that_of_each_chain(device):
    steps = torch.tensor([0.1, 0.2], device=device)
    kernel = ula(gaussian, steps, 0.2)
    _, info = kernel.step(kernel.init(torch.zeros(2, 1, device=device)))
    torch.testing.assert_close(info.temperature, 0.02 / steps, **EXACT)


N, SMALL = 20, 5  # a datum's energy is (x - y)^2 / 2, and so is the prior's with y = 0


def of_a_mean(x, batch, scale=None):
    """The energy of a mean, of shape ``(*chains, 1)``, by a batch of observations."""
    scale = N / len(batch) if scale is None else scale
    return gaussian(x) + scale * 0.5 * (x - batch).square().sum(-1)


def stationary(energy, batch_size, device, num_steps=4000):
    r"""Run one chain of a step that makes its draws independent; return what is left over.

    With :math:`\epsilon (N + 1) = 1` a draw is the batch's own mean with Langevin noise.
    """
    data = torch.linspace(0.0, 3.0, N, device=device).square()
    step = 1 / (N + 1)
    kernel, draws = sgld(energy, data, batch_size, step), []
    state = kernel.init(torch.zeros(1, device=device))
    for _ in range(num_steps):
        state, _ = kernel.step(state)
        draws.append(state.position)
    draws = torch.stack(draws[2:])
    batch = (N / batch_size) ** 2 * batch_size * data.var() * (1 - batch_size / N)
    variance = 2 * step + step**2 * batch
    mean = data.sum() / (N + 1)
    sd = (variance / len(draws)) ** 0.5
    spread = (2 / len(draws)) ** 0.5 * variance
    return abs(draws.mean() - mean) / sd, abs(draws.var() - variance) / spread


@pytest.mark.parametrize("batch_size", [SMALL, N], ids=["small", "full"])
def test_sgld_has_its_closed_form_mean_and_variance(batch_size, device):
    assert max(stationary(of_a_mean, batch_size, device)) < FAR


def test_the_closed_form_sees_a_batch_that_is_not_scaled_up(device):
    unscaled = lambda x, batch: of_a_mean(x, batch, scale=1.0)
    assert max(stationary(unscaled, SMALL, device)) > FAR


def test_the_closed_form_sees_batches_drawn_with_replacement(device, monkeypatch):
    replaced = lambda n, device=None: torch.randint(n, (n,), device=device)
    monkeypatch.setattr(torch, "randperm", replaced)
    assert max(stationary(of_a_mean, N, device)) > FAR


def test_sgld_with_all_data_is_ula(device):
    data, ends = torch.randn(N, device=device), []
    kernels = sgld(of_a_mean, data, N, 0.01), ula(lambda x: of_a_mean(x, data), 0.01)
    for kernel in kernels:
        torch.manual_seed(3)
        state = kernel.init(torch.zeros(1_000, 1, device=device))
        for _ in range(100):
            state, _ = kernel.step(state)
        ends.append(state.position)
    truth = 1 / ((N + 1) * (1 - 0.01 * (N + 1) / 2))  # the variance of each
    a, b = ends
    assert abs(a.mean() - b.mean()) < FAR * (2 * truth / 1_000) ** 0.5
    assert abs(a.var() - b.var()) < FAR * (4 / 1_000) ** 0.5 * truth


def test_sgld_draws_a_fresh_batch_without_repeats(device):
    data, seen = torch.arange(20.0, device=device), []

    def energy(x, batch):
        seen.append(batch.tolist())
        return gaussian(x)

    kernel = sgld(energy, data, 8, 0.1)
    state = kernel.init(torch.zeros(3, 1, device=device))
    for _ in range(5):
        state, _ = kernel.step(state)
    assert len(seen) == 6
    assert all(len(set(batch)) == 8 for batch in seen)
    assert len({tuple(sorted(batch)) for batch in seen}) == 6


@pytest.mark.parametrize("batch_size", [0, -1, 6, 2.5, True, float("nan")])
def test_a_batch_size_out_of_range_is_refused(batch_size):
    with pytest.raises(ValueError, match=r"batch_size must be a whole .* the 5 rows .*, got"):
        sgld(of_a_mean, DATA, batch_size, 0.1)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_noise_and_friction_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match=f"noise_scale must be positive and finite, got {value}"):
        ula(gaussian, 0.1, value)
    with pytest.raises(ValueError, match=f"noise_scale must be positive and finite, got {value}"):
        sgld(of_a_mean, DATA, 2, 0.1, value)
    with pytest.raises(ValueError, match=f"friction must be positive and finite, got {value}"):
        underdamped(gaussian, 0.1, value)


def faulty_underdamped(energy, fault):
    """Underdamped Langevin with a planted fault, at little friction."""
    right, c = underdamped(energy, 1.0, 0.5), 0.8

    def refresh(p):
        return c * p + fault.get("noise", (1 - c**2) ** 0.5) * torch.randn_like(p)

    def step(state):
        before = refresh(state.momentum)
        half = before - 0.5 * state.grad
        new = start(energy, state.position + half)
        after = half - fault.get("last kick", 0.5) * new.grad
        kinetic = 0.5 * (before.square() - after.square()).sum(-1)
        turned = state._replace(momentum=fault.get("turn", -1.0) * before)
        new = state._make([*new, after])
        kept, info = metropolis(turned, new, fault.get("kinetic", 1.0) * kinetic)
        return kept._replace(momentum=refresh(kept.momentum)), info

    return Kernel(right.init, step)


MOMENTUM_FAULTS = {
    "no turn": {"turn": 1.0},
    "momentum lost": {"turn": 0.0},
    "no kinetic energy": {"kinetic": 0.0},
    "noise of the wrong size": {"noise": 0.9},
    "half a kick": {"last kick": 0.25},
}


@pytest.mark.parametrize("fault", MOMENTUM_FAULTS.values(), ids=MOMENTUM_FAULTS)
def test_the_invariance_test_sees_a_fault_of_the_momentum(fault, device):
    assert law_after(lambda e: faulty_underdamped(e, fault), double_well, device) < FALSE_ALARM


def test_the_underdamped_copy_without_a_fault_is_right(device):
    assert law_after(lambda e: faulty_underdamped(e, {}), double_well, device) > FALSE_ALARM


def test_the_momentum_keeps_its_law_and_stays_independent(device):
    law = Line(double_well, device=device)
    kernel = underdamped(double_well, 0.5, 0.3)
    state = kernel.init(law.sample(20_000))
    for _ in range(20):
        state, _ = kernel.step(state)
    assert Line(gaussian, device=device).p_value(state.momentum) > FALSE_ALARM
    product = (state.position * state.momentum).flatten()
    assert abs(product.mean()) < FAR * product.std() / len(product) ** 0.5


def test_great_friction_makes_it_mala(device):
    ends = []
    for kernel in (underdamped(double_well, 0.6, 1e6), mala(double_well, 0.18)):
        state = kernel.init(torch.full((100_000, 1), 0.5, device=device))
        state, info = kernel.step(state)
        ends.append(torch.stack([info.accept_prob, state.position.squeeze(-1)]))
    a, b = ends
    error = (2 / a.shape[1]) ** 0.5 * a.std(1)
    assert ((a.mean(1) - b.mean(1)).abs() < FAR * error).all()


def leaves(record):
    """Return the tensors of a record, and of the records in it."""
    if isinstance(record, torch.Tensor):
        return [record]
    return [leaf for part in record for leaf in leaves(part)]


@parametrize
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_a_step_keeps_shapes_and_its_argument(make, batch, device):
    kernel = make(gaussian)
    state = kernel.init(torch.randn(*batch, 2, device=device))
    before = [part.clone() for part in leaves(state)]
    new, info = kernel.step(state)
    assert new.position.shape == (*batch, 2)
    assert info.accept_prob.shape == info.invalid.shape == new.energy.shape == batch
    for part, old in zip(leaves(state), before, strict=True):
        torch.testing.assert_close(part, old, **EXACT)


@parametrize
def test_the_same_seed_gives_the_same_chain(make):
    kernel, ends = make(double_well), []
    for _ in range(2):
        torch.manual_seed(3)
        state = kernel.init(torch.randn(4, 2))
        for _ in range(5):
            state, _ = kernel.step(state)
        ends.append(state.position)
    assert torch.equal(*ends)


@parametrize
def test_nan_is_a_rejection_that_is_marked(make, device):
    def energy(x):
        return torch.where(x[..., 0] > 0, torch.nan, gaussian(x))

    kernel = make(energy)
    state = kernel.init(-torch.rand(500, 1, device=device))
    marked = 0
    for _ in range(20):
        state, info = kernel.step(state)
        marked += int(info.invalid.sum())
        if make is not KERNELS["nuts"]:  # a tree that NaN ends still has points to draw
            assert not (info.invalid & info.accepted).any()
    assert marked > 0
    assert (state.position < 0).all()


@parametrize
def test_a_wall_is_exact_and_not_marked(make, device):
    kernel = make(walled)
    state = kernel.init(torch.rand(500, 1, device=device))
    for _ in range(20):
        state, info = kernel.step(state)
        assert not info.invalid.any()
    assert (state.position > 0).all()


def test_a_chain_behind_a_wall_finds_out(device):
    kernel = mala(walled, 0.5)
    state = kernel.init(torch.full((500, 1), -0.5, device=device))
    for _ in range(50):
        state, _ = kernel.step(state)
    assert (state.position > 0).all()


@parametrize
def test_minus_infinity_is_never_entered(make, device):
    def energy(x):
        return torch.where(x[..., 0] > 1.0, -torch.inf, gaussian(x))

    kernel = make(energy)
    state = kernel.init(torch.zeros(500, 1, device=device))
    for _ in range(50):
        state, _ = kernel.step(state)
    assert (state.position <= 1.0).all()


@parametrize
def test_parameters_get_no_gradient(make):
    layer = torch.nn.Linear(2, 1)
    kernel = make(lambda x: gaussian(x) + layer(x).squeeze(-1))
    state, _ = kernel.step(kernel.init(torch.randn(3, 2)))
    assert layer.weight.grad is None
    assert not state.position.requires_grad
    assert not state.energy.requires_grad


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", [ula, mala, underdamped])
def test_a_step_size_out_of_range_is_refused(kernel, step):
    with pytest.raises(ValueError, match="step_size must be positive and finite"):
        kernel(gaussian, step)


def test_an_image_is_an_event(device):
    kernel = mala(lambda x: 0.5 * x.square().sum((-3, -2, -1)), 0.1)
    state, info = kernel.step(kernel.init(torch.randn(5, 3, 4, 4, device=device)))
    assert state.position.shape == (5, 3, 4, 4)
    assert info.accept_prob.shape == (5,)


def couplings(x):
    """The energy of a ring of four spins with values -1, 0 and 2, in a field."""
    return -0.4 * (x * x.roll(1, -1)).sum(-1) + 0.3 * x.sum(-1)


VALUES = torch.tensor([-1.0, 0.0, 2.0])


def sweeps(energy, n, device):
    values = VALUES.to(device, torch.get_default_dtype())
    kernel = gibbs(energy, values)
    state = kernel.init(values[torch.randint(3, (n, 4), device=device)])
    for _ in range(30):
        state, info = kernel.step(state)
    assert not info.invalid.any()
    return state.position, values


def p_value(positions, values, energy):
    states = torch.cartesian_prod(*[values] * 4)
    expected = len(positions) * torch.softmax(-energy(states), 0)
    same = (positions.unsqueeze(1) == states).all(-1)
    chi2 = ((same.sum(0) - expected).square() / expected).sum()
    return torch.special.gammaincc(chi2.new_tensor((len(states) - 1) / 2), chi2 / 2).item()


def test_gibbs_sampling_equals_the_enumeration(device):
    positions, values = sweeps(couplings, 20_000, device)
    assert p_value(positions, values, couplings) > FALSE_ALARM


def test_the_comparison_with_the_enumeration_sees_a_wrong_temperature(device):
    positions, values = sweeps(lambda x: 0.8 * couplings(x), 20_000, device)
    assert p_value(positions, values, couplings) < FALSE_ALARM


def test_gibbs_sampling_stays_off_walls_and_marks_nan(device):
    values = torch.tensor([0.0, 1.0], device=device)

    def walled_spins(x):
        return torch.where(x.sum(-1) > 1, torch.inf, -x.sum(-1))

    kernel = gibbs(walled_spins, values)
    state, _ = kernel.step(kernel.init(torch.zeros(200, 3, device=device)))
    assert (state.position.sum(-1) <= 1).all()
    kernel = gibbs(lambda x: torch.where(x.sum(-1) > 1, torch.nan, -x.sum(-1)), values)
    state, info = kernel.step(kernel.init(torch.zeros(200, 3, device=device)))
    assert (state.position.sum(-1) <= 1).all()
    assert info.invalid.any()


def test_state_is_immutable():
    with pytest.raises(AttributeError):
        State(torch.zeros(1), torch.zeros(1), torch.zeros(1)).position = torch.ones(1)
