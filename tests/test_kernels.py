"""The contract of all kernels, then each kernel's own properties."""

import pytest
import torch

from pyro_ebm.kernels import Kernel, State, gibbs, hmc, mala, nuts, ula
from pyro_ebm.kernels.base import metropolis, start
from tests.common import EXACT, FALSE_ALARM, Line


def gaussian(x):
    return 0.5 * x.square().sum(-1)


def double_well(x):
    return (x.square() - 1.0).square().sum(-1)


def walled(x):
    return torch.where(x[..., 0] > 0, x[..., 0], torch.inf)


EXACT_KERNELS = {
    "mala": lambda energy: mala(energy, 0.3),
    "hmc": lambda energy: hmc(energy, 0.3, 4, jitter=0.5, step_jitter=0.2),
    "nuts": lambda energy: nuts(energy, 0.5, step_jitter=0.2),
}
KERNELS = {"ula": lambda energy: ula(energy, 0.1), **EXACT_KERNELS}
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


@parametrize
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_a_step_keeps_shapes_and_its_argument(make, batch, device):
    kernel = make(gaussian)
    state = kernel.init(torch.randn(*batch, 2, device=device))
    before = [part.clone() for part in state]
    new, info = kernel.step(state)
    assert new.position.shape == (*batch, 2)
    assert info.accept_prob.shape == info.invalid.shape == new.energy.shape == batch
    for part, old in zip(state, before, strict=True):
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
@pytest.mark.parametrize("kernel", [ula, mala])
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
