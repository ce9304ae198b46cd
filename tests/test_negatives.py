"""Negatives that last: their law, their slots, what goes with them, and how they are kept."""

import math

import arviz
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

import pyro_ebm as ebm
from pyro_ebm import checkpoint
from pyro_ebm._math import mean_weight
from pyro_ebm.kernels import (
    augmented,
    discrete_mala,
    gibbs,
    gibbs_with_gradients,
    hmc,
    mala,
    metropolis_flips,
    nuts,
    ula,
    underdamped,
)
from pyro_ebm.negatives import split_r_hat
from pyro_ebm.partition import Exact, Quadrature
from tests.common import EXACT, FAR, NUMERIC

KERNELS = {
    "mala": {"kernel": mala},
    "hmc": {"kernel": lambda u, eps: hmc(u, eps, 4)},
    "nuts": {"kernel": nuts, "num_steps": 5},
    "underdamped": {"kernel": underdamped},
    "ula": {"kernel": ula, "step_size": 0.01, "num_steps": 100},  # its bias: two per cent
    "weighted mala": {"weighted": True},
    "weighted nuts": {"kernel": nuts, "weighted": True, "num_steps": 5},
    "restarted": {"weighted": True, "restart": 0.1},
}
parametrize = pytest.mark.parametrize("options", KERNELS.values(), ids=KERNELS)


class Precision(nn.Module):
    """0.5 k x^2, of vectors."""

    def __init__(self, k=2.0, device=None):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, device=device))

    def forward(self, x):
        return 0.5 * self.k * x.square().sum(-1)


def normal(device=None, dim=1):
    return dist.Normal(torch.zeros(dim, device=device), 2.0).to_event(1)


def distance(negatives, chains, moved, precision):
    """How far the mean square is from that of a normal law, in standard errors."""
    square = moved.x.square().mean(-1)
    weight = torch.full_like(square, 1 / len(square))
    if moved.log_weight is not None:
        weight = torch.softmax(moved.log_weight, 0)
    mean = (weight * square).sum()
    return float((mean * precision - 1).abs() / (2 * weight.square().sum()).sqrt())


@parametrize
def test_chains_reach_the_law_and_follow_it(options, device):
    energy = Precision(1.0, device)
    negatives = ebm.Negatives(energy, normal(device), **{"num_steps": 30, **options})
    chains = negatives.init(2000)
    for k in (1.0, 1.5, 2.0, 4.0):
        with torch.no_grad():
            energy.k.fill_(k)
        for _ in range(3):
            chains, moved = negatives.step(chains)
        assert distance(negatives, chains, moved, k + 0.25) < FAR


@pytest.mark.parametrize("fault", ["frozen", "stale"])
def test_the_comparison_sees_a_fault(fault, device):
    energy = Precision(1.0, device)
    step = 1e-9 if fault == "frozen" else None
    negatives = ebm.Negatives(energy, normal(device), num_steps=30, step_size=step)
    chains = negatives.init(2000)
    for k in (1.0, 4.0):
        if fault == "frozen":
            with torch.no_grad():
                energy.k.fill_(k)
        for _ in range(3):
            chains, moved = negatives.step(chains)
    assert distance(negatives, chains, moved, 4.25) > FAR


def test_weights_give_log_z_while_parameters_move_and_chains_restart(device):
    energy = Precision(0.1, device)
    negatives = ebm.Negatives(energy, normal(device), num_steps=5, weighted=True, restart=0.05)
    chains = negatives.init(4000)
    for k in torch.linspace(0.1, 6.0, 20).tolist():
        with torch.no_grad():
            energy.k.fill_(k)
        chains, moved = negatives.step(chains)
        value = chains.offset + chains.log_weight.logsumexp(0) - math.log(4000)
        ess = 1 / torch.softmax(chains.log_weight, 0).square().sum()
        error = (chains.variance + 1 / ess - 1 / 4000).sqrt()
        assert abs(value + 0.5 * math.log1p(4 * k)) < FAR * error
    assert chains.variance > 0  # it has been resampled


class Coupled:
    """A double well on the line, or coupled bits, whose parameters follow a path."""

    def __init__(self, finite):
        self.t, self.finite, self.coupling = 0.0, finite, torch.randn(4, 4)
        self.base = ebm.Flat((4,), constraints.boolean) if finite else normal()

    def __call__(self, x):
        if self.finite:
            return -2 * self.t * ((x @ self.coupling) * x).sum(-1)
        return self.t * ((x.square() - 1 - self.t).square() + x).sum(-1)

    def log_z(self):
        method = Exact() if self.finite else Quadrature(-12.0, 12.0, 400)
        return ebm.log_partition(ebm.GibbsBoltzmann(self, self.base), method).value


EXACT_KERNELS = {
    "mala": {"kernel": mala, "step_size": 0.2},
    "hmc": {"kernel": lambda u, eps: hmc(u, eps, 3), "step_size": 0.3},
    "restarted": {"kernel": mala, "step_size": 0.2, "restart": 0.1},
    "gibbs": {},
    "flips": {"kernel": lambda u: metropolis_flips(u, torch.tensor([0.0, 1.0])), "restart": 0.1},
}


@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize("name", EXACT_KERNELS)
def test_the_weights_of_a_few_chains_are_z_on_average(name, fault, monkeypatch):
    """Also far from equilibrium, and after resampling: 2,000 repetitions of six chains."""
    if fault:  # resampling that puts no log Z aside

        def forgetful(log_weight):
            value, *rest = mean_weight(log_weight)
            return torch.zeros_like(value), *rest

        monkeypatch.setattr(ebm.negatives, "mean_weight", forgetful)
    energy = Coupled(name in ("gibbs", "flips"))
    options = {"num_steps": 1, "weighted": True, **EXACT_KERNELS[name]}
    many = ebm.GibbsBoltzmann(energy, energy.base).expand((2000,))
    negatives = ebm.Negatives(many, **options)
    chains, worst = negatives.init(6), 0.0
    for t in torch.linspace(0.05, 0.8, 12).tolist():
        energy.t = t
        chains, _ = negatives.step(chains)
        log_z = chains.offset + chains.log_weight.logsumexp(0) - math.log(6)
        ratio = (log_z - energy.log_z()).exp()
        worst = max(worst, float((ratio.mean() - 1).abs() / ratio.std() * math.sqrt(2000)))
    assert (chains.variance > 0).any()  # some have been resampled
    assert (worst > FAR) == fault


def test_weights_that_forget_the_offset_are_seen(device, monkeypatch):
    """The planted fault of the test above: restarted chains that weigh one."""
    energy = Precision(0.1, device)
    negatives = ebm.Negatives(energy, normal(device), num_steps=5, weighted=True, restart=0.3)
    chains, fair = negatives.init(4000), negatives.restart
    monkeypatch.setattr(
        negatives,
        "restart",
        lambda chains, *a: fair(chains._replace(offset=0 * chains.offset), *a)._replace(
            offset=chains.offset
        ),
    )
    for k in torch.linspace(0.1, 40.0, 20).tolist():
        with torch.no_grad():
            energy.k.fill_(k)
        chains, _ = negatives.step(chains)
    value = chains.offset + chains.log_weight.logsumexp(0) - math.log(4000)
    assert abs(value + 0.5 * math.log1p(4 * 40.0)) > 0.1


SUPPORTS = {
    "bits": (ebm.Flat((4,), constraints.boolean), lambda x: x),
    "integers": (ebm.Flat((3,), constraints.integer_interval(0, 2)), lambda x: x.double()),
    "one-hot": (ebm.Flat((3, 4), constraints.one_hot), lambda x: x.flatten(-2)),
}


VALUES = {"bits": [0.0, 1.0], "integers": [0, 1, 2], "one-hot": torch.eye(4).tolist()}
SWEEPS = {
    "default": None,
    "gibbs": gibbs,
    "flips": metropolis_flips,
    "gradients": gibbs_with_gradients,
    "discrete_mala": lambda u, values: discrete_mala(u, values, 0.5),
}


@pytest.mark.parametrize(("name", "weighted"), [("default", False), *((n, True) for n in SWEEPS)])
@pytest.mark.parametrize("support", SUPPORTS)
def test_finite_supports_are_swept(support, name, weighted):
    base, flat = SUPPORTS[support]
    values, sweep = torch.tensor(VALUES[support]), SWEEPS[name]
    kernel = None if sweep is None else lambda u: sweep(u, values)
    base = ebm.Flat(base.event_shape, base.support)  # of the type of the test
    num = flat(base.sample((1,))).shape[-1]
    field, coupling = torch.randn(num), 0.5 * torch.randn(num, num)

    def energy(x):
        y = flat(x).to(field)
        return (y * (field + y @ coupling)).sum(-1)

    negatives = ebm.Negatives(energy, base, kernel, num_steps=20, weighted=weighted)
    chains, moved = negatives.step(negatives.init(4000))
    d = ebm.GibbsBoltzmann(energy, base)
    states = d.enumerate_support()
    truth = torch.softmax(-energy(states), 0)
    share = torch.softmax(moved.log_weight, 0) if weighted else torch.full((4000,), 1 / 4000)
    got, want = share @ flat(moved.x).to(field), truth @ flat(states).to(field)
    error = (share.square().sum() * (truth @ flat(states).to(field).square() - want**2)).sqrt()
    assert ((got - want).abs() < FAR * error).all()


def test_an_rbm_moves_by_blocks():
    rbm = ebm.zoo.RBM(4, 3)
    with torch.no_grad():
        rbm.weight.copy_(torch.randn_like(rbm.weight))

    def blocks(u):
        return augmented(u, rbm.sample_hidden, rbm.sample_visible)

    base = ebm.Flat((4,), constraints.boolean)
    negatives = ebm.Negatives(rbm, base, blocks, num_steps=20)
    _, moved = negatives.step(negatives.init(4000))
    states = ebm.GibbsBoltzmann(rbm, base).enumerate_support()
    truth = torch.softmax(-rbm(states), 0) @ states
    error = (truth * (1 - truth) / 4000).sqrt()
    assert ((moved.x.mean(0) - truth).abs() < FAR * error).all()


def test_a_batch_of_distributions_has_chains_each():
    beta = torch.tensor([1.0, 2.0, 8.0])
    d = ebm.GibbsBoltzmann(Precision(1.0), normal(), beta)
    negatives = ebm.Negatives(d, num_steps=100)
    chains, moved = negatives.step(negatives.init(2000))
    assert moved.x.shape == (2000, 3, 1)
    assert moved.info.energy.shape == chains.energy.shape == (2000, 3)
    assert chains.log_step.shape == (3,)
    assert chains.log_step[2] < chains.log_step[0]
    apart = (moved.x.square().mean((0, 2)) * (beta + 0.25) - 1).abs()
    assert (apart < FAR * math.sqrt(2 / 2000)).all()


def test_bounded_supports_are_kept():
    d = ebm.GibbsBoltzmann(lambda x: -2 * x.log().sum(-1), ebm.Flat((3,), constraints.simplex))
    negatives = ebm.Negatives(d, num_steps=100)
    _, moved = negatives.step(negatives.init(1000))
    assert d.support.check(moved.x).all()
    assert (moved.x.mean(0) - 1 / 3).abs().max() < FAR * math.sqrt(2 / 90 / 1000)


# Slots -----------------------------------------------------------------------------------------


def clone(chains):
    return chains._make(c.clone() if isinstance(c, torch.Tensor) else c for c in chains)


def same(a, b):
    return all(
        torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0))
        if isinstance(p, torch.Tensor)
        else p == q
        for p, q in zip(a, b, strict=True)
    )


OF_SLOTS = {name: KERNELS[name] for name in ("mala", "hmc", "nuts", "underdamped", "ula")}


@pytest.mark.parametrize("options", OF_SLOTS.values(), ids=OF_SLOTS)
def test_some_chains_move_and_return_to_their_slots(options, device):
    negatives = ebm.Negatives(Precision(2.0, device), normal(device), **options)
    chains = negatives.init(50)
    slots = torch.tensor([3, 40, 7], device=device)
    for _ in range(2):
        before = clone(chains)
        new, moved = negatives.step(chains, slots)
        assert same(chains, before)  # its argument is left alone
        rest = torch.ones(50, dtype=torch.bool, device=device).index_fill(0, slots, False)
        assert torch.equal(new.position[rest], before.position[rest])
        assert torch.equal(new.age[rest], before.age[rest])
        assert torch.equal(new.position[slots], moved.x)
        assert torch.equal(moved.slots, slots)
        assert (moved.x != before.position[slots]).any(-1).all()
        chains = new
    assert (chains.age[slots] == 2 * negatives.num_steps).all()
    assert chains.age.sum() == chains.age[slots].sum()


def test_a_buffer_of_ten_thousand_moves_some_at_random(device):
    negatives = ebm.Negatives(Precision(2.0, device), normal(device), num_steps=2)
    chains = negatives.init(10_000)
    for _ in range(3):
        chains, moved = negatives.step(chains, 128)
        assert moved.x.shape == (128, 1)
        assert len(moved.slots.unique()) == 128
    assert chains.age.sum() == 3 * 128 * 2
    assert chains.position.shape == (10_000, 1)


def around(x, label):
    return 2.0 * (x - label).square().sum(-1)


def test_labels_go_with_their_chains(device):
    label = torch.arange(4.0, device=device).repeat(250).unsqueeze(-1)
    negatives = ebm.Negatives(around, ebm.Flat((1,), device=device), num_steps=50)
    chains, moved = negatives.step(negatives.init(1000, label))
    assert torch.equal(moved.label, label)

    def apart(x, label):
        off = torch.stack([(x - label)[label == i].mean() for i in range(4)])
        return off.abs().max() / (0.5 / math.sqrt(len(x) / 4))

    assert apart(moved.x, moved.label) < FAR
    slots = torch.randperm(1000, device=device)[:400]
    chains, moved = negatives.step(chains, slots)
    assert torch.equal(moved.label, label[slots])
    assert apart(moved.x, moved.label) < FAR
    assert apart(moved.x, moved.label.flip(0)) > FAR  # what a wrong order gives


@pytest.mark.parametrize("from_data", [False, True])
def test_a_share_of_chains_restarts(from_data, device):
    label = torch.zeros(2000, 1, device=device)
    negatives = ebm.Negatives(
        around, normal(device), num_steps=1, restart=0.25, step_size=1e-9, num_recent=2
    )
    chains, _ = negatives.step(negatives.init(torch.full_like(label, 30.0), label))
    data = torch.tensor([[8.0], [9.0]], device=device)
    options = {"x": data, "label": data} if from_data else {}
    chains, moved = negatives.step(chains, **options)
    young = chains.age == 1
    assert abs(young.double().mean() - 0.25) < FAR * math.sqrt(0.25 * 0.75 / 2000)
    assert chains.recent[young].isnan().any(-1).all()
    assert not chains.recent[(chains.age == 2) & (moved.x[:, 0] > 20)].isnan().any()
    assert (moved.x[young] < 20).all()
    if from_data:
        assert torch.equal(moved.x[young].round(), moved.label[young])
        assert set(moved.label[young].flatten().tolist()) == {8.0, 9.0}
    else:
        assert (moved.label == 0).all()


def test_restarts_from_a_few_rows_use_each_about_equally():
    data = torch.arange(10.0).unsqueeze(-1)
    negatives = ebm.Negatives(Precision(), normal(), step_size=1e-12)
    chains = negatives.init(100)
    chains = negatives.restart(chains, torch.ones(100, dtype=torch.bool), data)
    assert (torch.bincount(chains.position.flatten().long()) == 10).all()


# What chains leave alone, and what goes with them ------------------------------------------------


class Noisy(nn.Module):
    """A network that would be random, and would learn from its chains, in training mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 1)
        )
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x):
        return self.layers(x).squeeze(-1) + x.square().sum(-1)


@parametrize
def test_the_energy_is_left_alone(options):
    energy = Noisy()
    energy(torch.randn(5, 2)).sum().backward()
    before = {n: p.clone() for n, p in energy.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in energy.parameters()]
    needs = [p.requires_grad for p in energy.parameters()]
    negatives = ebm.Negatives(energy, normal(dim=2), **{**options, "num_steps": 2})
    chains, moved = negatives.step(negatives.init(20))
    assert all(torch.equal(p, before[n]) for n, p in energy.state_dict().items())
    for p, grad in zip(energy.parameters(), grads, strict=True):
        assert p.grad is None if grad is None else torch.equal(p.grad, grad)
    assert [p.requires_grad for p in energy.parameters()] == needs
    assert all(m.training for m in energy.modules())
    assert not moved.x.requires_grad
    energy.eval()
    potential = energy(moved.x) - normal(dim=2).log_prob(moved.x)
    torch.testing.assert_close(chains.energy, potential, **EXACT)


def test_parameters_are_as_they_were_after_an_error():
    energy = Precision()

    def broken(x):
        raise RuntimeError(f"of {energy.k}")

    negatives = ebm.Negatives(broken, normal())
    with pytest.raises(RuntimeError):
        negatives.step(negatives.init(3))
    assert energy.k.requires_grad


def test_chains_take_no_part_in_a_graph_that_is_there():
    energy = Precision()
    loss = energy(torch.ones(3, 1)).sum()
    negatives = ebm.Negatives(energy, normal())
    negatives.step(negatives.init(3))
    loss.backward()
    assert energy.k.grad == 1.5


def test_momentum_goes_on():
    frictionless = {"kernel": lambda u, eps: underdamped(u, eps, 1e-20), "step_size": 0.1}
    negatives = ebm.Negatives(lambda x: 0 * x.sum(-1), ebm.Flat((2,)), num_steps=1, **frictionless)
    first, _ = negatives.step(negatives.init(5))
    chains, _ = negatives.step(first)
    torch.testing.assert_close(chains.momentum, first.momentum, **NUMERIC)
    torch.testing.assert_close(chains.position - first.position, 0.1 * first.momentum, **NUMERIC)


def test_a_step_is_adapted_and_kept():
    energy = Precision(400.0)
    negatives = ebm.Negatives(energy, normal(), num_steps=10)
    chains = negatives.init(500)
    for _ in range(40):
        chains, moved = negatives.step(chains)
    assert abs(moved.accept_prob.mean() - 0.574) < 0.05  # 5,000 moves know it to two per cent
    before = chains.log_step
    with torch.no_grad():
        energy.k.mul_(100.0)
    for _ in range(20):
        chains, moved = negatives.step(chains)
    assert abs(before - chains.log_step - math.log(100)) < 0.3
    fixed = ebm.Negatives(energy, normal(), num_steps=10, step_size=0.25)
    assert fixed.step(fixed.init(5))[0].log_step == math.log(0.25)


@parametrize
def test_a_resumed_run_gives_the_same_bits(options, tmp_path, device):
    energy = Precision(2.0, device)

    def make():
        return ebm.Negatives(energy, normal(device), num_recent=3, **{**options, "num_steps": 3})

    negatives = make()
    some = None if negatives.weighted else 10
    chains, _ = negatives.step(negatives.init(20), some)
    checkpoint.save(tmp_path / "chains.ckpt", {"chains": negatives.state_dict(chains)})
    runs = []
    for _ in range(2):
        torch.manual_seed(17)
        fresh = make()
        chains = fresh.load_state_dict(checkpoint.load(tmp_path / "chains.ckpt")["chains"])
        for _ in range(4):
            chains, _ = fresh.step(chains, some)
        runs.append(chains)
        torch.rand(3)
    assert same(*runs)
    again = fresh.load_state_dict(checkpoint.load(tmp_path / "chains.ckpt")["chains"])
    torch.rand(1)  # another random state, another run
    assert not same(fresh.step(again, some)[0], runs[0])


def test_labels_are_kept(tmp_path):
    negatives = ebm.Negatives(around, normal())
    chains = negatives.init(4, torch.arange(4.0).unsqueeze(-1))
    checkpoint.save(tmp_path / "chains.ckpt", negatives.state_dict(chains))
    kept = negatives.load_state_dict(checkpoint.load(tmp_path / "chains.ckpt"))
    assert torch.equal(kept.label, chains.label)
    assert kept.momentum is None


def test_it_waits_for_no_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    negatives = ebm.Negatives(Precision(2.0, "cuda"), normal("cuda"), step_size=0.1, restart=0.1)
    chains, _ = negatives.step(negatives.init(100), 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        negatives.step(chains, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# R-hat -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [10, 11, 200])
def test_r_hat_is_that_of_arviz(num):
    draws = torch.randn(num, 6).cumsum(0) + torch.arange(6.0)
    expected = torch.tensor(arviz.rhat(draws.T.numpy(), method="split"))
    torch.testing.assert_close(split_r_hat(draws), expected, **EXACT)
    holes = torch.cat([draws, draws[:, :1]], 1)
    holes[3, 6] = math.nan
    torch.testing.assert_close(split_r_hat(holes), expected, **EXACT)


def test_r_hat_tells_chains_that_are_stuck():
    energy = Precision(1.0)
    for step, stuck in ((None, False), (1e-6, True)):
        negatives = ebm.Negatives(energy, normal(), num_recent=50, step_size=step)
        chains = negatives.init(40)
        for _ in range(60):
            chains, _ = negatives.step(chains)
        assert (negatives.r_hat(chains) > 1.1) == stuck


# Refusals ----------------------------------------------------------------------------------------


def steps(n, *args, **kwargs):
    return n.step(n.init(4), *args, **kwargs)


LINE, BITS = normal(), ebm.Flat((2,), constraints.boolean)
accepts_all = {"kernel": lambda u, eps: ula(u, eps)}
WRONG = {
    "no base": (lambda: ebm.Negatives(gibbs), TypeError, "target must be a GibbsBoltzmann"),
    "no move": (lambda: ebm.Negatives(around, LINE, num_steps=0), ValueError, "num_steps must"),
    "restart": (lambda: ebm.Negatives(around, LINE, restart=2.0), ValueError, "restart must"),
    "step": (lambda: ebm.Negatives(around, LINE, step_size=-1.0), ValueError, "step_size must"),
    "ula": (lambda: ebm.Negatives(around, LINE, ula), ValueError, "step_size must be given"),
    "like ula": (
        lambda: steps(ebm.Negatives(Precision(), LINE, **accepts_all)),
        ValueError,
        "step_size must be given for a kernel that accepts all",
    ),
    "weights of ula": (
        lambda: steps(
            ebm.Negatives(Precision(), LINE, **accepts_all, step_size=0.1, weighted=True)
        ),
        ValueError,
        "weighted must be False for a kernel that accepts all",
    ),
    "improper base": (
        lambda: ebm.Negatives(around, ebm.Flat((1,)), weighted=True),
        ValueError,
        "need a base of finite volume",
    ),
    "weights from data": (
        lambda: ebm.Negatives(around, LINE, weighted=True).init(torch.zeros(3, 1)),
        ValueError,
        "must start at the base",
    ),
    "weights of some": (
        lambda: steps(ebm.Negatives(Precision(), LINE, weighted=True), 2),
        ValueError,
        "must all move",
    ),
    "no chains": (lambda: ebm.Negatives(around, LINE).init(0), ValueError, "start must be a whol"),
    "no points": (
        lambda: ebm.Negatives(around, LINE).init(torch.zeros(0, 1)),
        ValueError,
        r"points must be some of shape \(1,\), got \(0, 1\)",
    ),
    "points of another shape": (
        lambda: ebm.Negatives(around, LINE).init(torch.zeros(3, 2)),
        ValueError,
        r"points must be some of shape \(1,\), got \(3, 2\)",
    ),
    "points outside": (
        lambda: ebm.Negatives(around, BITS).init(torch.full((3, 2), 0.5)),
        ValueError,
        "must lie in the support",
    ),
    "more slots than chains": (
        lambda: steps(ebm.Negatives(Precision(), LINE), 5),
        ValueError,
        "slots must be a whole number from 1 to 4, got 5",
    ),
    "mala of bits": (lambda: ebm.Negatives(around, BITS, mala), ValueError, "finite support"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()
