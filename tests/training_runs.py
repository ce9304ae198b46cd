"""Training runs of at most 200 steps under a monitor: sound ones, and ones that fail by script."""

import math

import pyro.distributions as dist
import torch
from torch import nn

import pyro_ebm as ebm
from pyro_ebm import kernels, losses
from pyro_ebm.partition import Exact, Quadrature


def normal(dim=2, scale=2.0):
    return dist.Normal(torch.zeros(dim), scale).to_event(1)


def ring(n):
    """Draw points at a radius of N(2, 0.3^2) in all directions."""
    radius, angle = 2.0 + 0.3 * torch.randn(n), 2 * math.pi * torch.rand(n)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def potential(energy, base):
    return lambda x: energy(x) - base.log_prob(x)


def langevin(energy, start, num_steps, step_size=0.05, noise_scale=None, make=kernels.ula):
    """Move chains; return where they end, and the records of all moves."""
    options = {} if noise_scale is None else {"noise_scale": noise_scale}
    kernel = make(energy, step_size, **options)
    state, infos = kernel.init(start), []
    for _ in range(num_steps):
        state, info = kernel.step(state)
        infos.append(info)
    return state.position, infos


def learn(monitor, energy, batch, negatives, steps, optimizer, loss=None):
    """Learn by contrast; ``negatives(x)`` returns chains and the records of their moves."""
    for _ in range(steps):
        x = batch()
        chains, info = negatives(x)
        value = (
            losses.contrastive_divergence(energy, x, chains) if loss is None else loss(x, chains)
        )
        optimizer.zero_grad()
        value.backward()
        if monitor.update(x, chains, loss=value, info=info):
            optimizer.step()
    return monitor


def adam(energy, lr=3e-3):
    return torch.optim.Adam(energy.parameters(), lr)


class Persistent:
    """Chains that go on from step to step, as a function of the batch."""

    def __init__(self, energy, start, num_steps, **options):
        self.energy, self.chains = energy, start
        self.num_steps, self.options = num_steps, options

    def __call__(self, x):
        self.chains, info = langevin(self.energy, self.chains, self.num_steps, **self.options)
        return self.chains, info


class Quadratic(nn.Module):
    """E = k |x|^2 / 2, of whatever sign k takes."""

    def __init__(self, k=1.0):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k))

    def forward(self, x):
        return 0.5 * self.k * x.square().sum(-1)


def stripes(side=3):
    """Return all bars and stripes: images whose rows, or columns, are each of one colour."""
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * side)
    rows = bits.unsqueeze(-1).expand(-1, side, side)
    return torch.cat([rows, rows.transpose(1, 2)]).reshape(-1, side * side).unique(dim=0)


def gibbs(rbm, v, num_steps):
    for _ in range(num_steps):
        h = torch.bernoulli(torch.sigmoid(rbm.hidden_logits(v)))
        v = torch.bernoulli(torch.sigmoid(rbm.visible_logits(h)))
    return v.detach()


# Sound runs ------------------------------------------------------------------------------------


def gaussian_exact():
    """A precision, with exact negatives and the exact log Z."""
    energy = Quadratic(0.5)
    d = ebm.GibbsBoltzmann(energy, normal(scale=2.0))
    method, held_out = Quadrature(-12.0, 12.0, 200), torch.randn(500, 2)
    monitor = ebm.Monitor(d, held_out=held_out, log_partition=method)

    def negatives(x):
        return torch.randn(256, 2) / (energy.k.detach() + 0.25).sqrt(), None

    return learn(monitor, energy, lambda: torch.randn(256, 2), negatives, 100, adam(energy, 0.02))


def ring_persistent():
    """An MLP by persistent MALA chains of ebm.Negatives."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    sampler = ebm.Negatives(energy, base, num_steps=10)
    chains, optimizer = sampler.init(256), adam(energy)
    monitor = ebm.Monitor(energy, base)
    for _ in range(100):
        x = ring(256)
        chains, moved = sampler.step(chains)
        loss = losses.contrastive_divergence(energy, x, moved.x)
        optimizer.zero_grad()
        loss.backward()
        monitor.update(x, moved, loss=loss)
        optimizer.step()
    return monitor


def ring_from_data():
    """An MLP by short ULA chains from the data."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    u = potential(energy, base)
    monitor = ebm.Monitor(energy, base)
    return learn(
        monitor, energy, lambda: ring(256), lambda x: langevin(u, x, 10), 100, adam(energy)
    )


def rbm_persistent():
    """An RBM of bars and stripes by persistent block Gibbs chains, its likelihood enumerated."""
    rbm, data = ebm.zoo.RBM(9, 8), stripes()
    base = ebm.Flat((9,), dist.constraints.boolean)
    monitor = ebm.Monitor(rbm, base, log_partition=Exact())
    chains = [torch.bernoulli(torch.full((100, 9), 0.5))]

    def negatives(x):
        chains[0] = gibbs(rbm, chains[0], 5)
        return chains[0], None

    optimizer = torch.optim.SGD(rbm.parameters(), 0.1)
    return learn(monitor, rbm, lambda: data.repeat(4, 1), negatives, 200, optimizer)


def score():
    """An MLP by sliced score matching, without negatives."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    u, monitor, optimizer = potential(energy, base), ebm.Monitor(energy, base), adam(energy)
    for _ in range(100):
        x = ring(256)
        loss = losses.sliced_score_matching(u, x, torch.randn(256, 2))
        optimizer.zero_grad()
        loss.backward()
        monitor.update(x, loss=loss)
        optimizer.step()
    return monitor


class Precision(nn.Module):
    """E = |A (x - m)|^2 / 2, a Gaussian of many dimensions."""

    def __init__(self, dim=20):
        super().__init__()
        self.root, self.mean = nn.Parameter(torch.eye(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return 0.5 * ((x - self.mean) @ self.root).square().sum(-1)


def wide(n):
    """Draw points of 20 components, of different widths."""
    return 1.0 + torch.randn(n, 20) * torch.linspace(0.5, 2.0, 20)


def persistent(energy, base, start, num_steps, kernel=None, **options):
    """Negatives of ebm.Negatives, with their record of moves."""
    sampler = ebm.Negatives(energy, base, kernel, num_steps, **options)
    chains = [sampler.init(start)]

    def negatives(x):
        chains[0], moved = sampler.step(chains[0])
        return moved.x, moved

    return negatives


def gaussian_persistent():
    """A Gaussian of 20 dimensions on a flat base, which leaves the normaliser to the energy."""
    energy, base = Precision(), ebm.Flat((20,))
    chains = persistent(energy, base, torch.randn(256, 20), 5)
    monitor = ebm.Monitor(energy, base)
    return learn(monitor, energy, lambda: wide(128), chains, 100, adam(energy, 1e-2))


def gaussian_from_data():
    """The same by contrastive divergence of five moves from the data."""
    energy, base = Precision(), ebm.Flat((20,))
    sampler = ebm.Negatives(energy, base, kernels.mala, 5, step_size=0.05)

    def negatives(x):
        moved = sampler.step(sampler.init(x))[1]
        return moved.x, moved

    monitor = ebm.Monitor(energy, base)
    return learn(monitor, energy, lambda: wide(128), negatives, 100, adam(energy, 5e-3))


def noise_contrast():
    """An MLP against noise."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    u = potential(energy, base)
    loss = lambda x, noise: losses.noise_contrastive(u, x, noise, base)
    noise = lambda x: (base.sample((256,)), None)
    monitor = ebm.Monitor(energy, base)
    return learn(monitor, energy, lambda: ring(256), noise, 100, adam(energy), loss)


def chain_of_spins(n, num_spins=10):
    """Draw spins that agree with their left neighbour with a probability of .8."""
    turns = (torch.rand(n, num_spins) < 0.2).cumsum(-1)
    first = torch.rand(n, 1) < 0.5
    return ((turns + first) % 2).to(torch.get_default_dtype())


def spins():
    """An Ising model by its pseudo-likelihood, with the exact likelihood of held-out rows."""
    energy, base = ebm.zoo.Ising(10), ebm.Flat((10,), dist.constraints.boolean)
    held_out = chain_of_spins(300)
    monitor = ebm.Monitor(energy, base, held_out=held_out, log_partition=Exact())
    loss = lambda x, _: losses.pseudo_likelihood(energy, x)
    batch, none = lambda: chain_of_spins(128), lambda x: (None, None)
    return learn(monitor, energy, batch, none, 100, adam(energy, 2e-2), loss)


def small_batches():
    """Eight data and eight chains at a time."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    chains = persistent(energy, base, 8, 10)
    return learn(
        ebm.Monitor(energy, base), energy, lambda: ring(8), chains, 100, adam(energy, 5e-4)
    )


SOUND = {
    "gaussian, exact negatives": gaussian_exact,
    "ring, persistent chains": ring_persistent,
    "ring, chains from data": ring_from_data,
    "RBM, persistent Gibbs": rbm_persistent,
    "ring, score matching": score,
    "20 dimensions, persistent chains": gaussian_persistent,
    "20 dimensions, chains from data": gaussian_from_data,
    "ring, noise contrast": noise_contrast,
    "spins, pseudo-likelihood": spins,
    "ring, batches of eight": small_batches,
}


# Runs that fail --------------------------------------------------------------------------------


def fresh(energy, num_steps, step_size, spread=2.0):
    """Negatives by short chains from noise, anew at each step."""
    return lambda x: langevin(energy, spread * torch.randn(256, 2), num_steps, step_size)


def blow_up():
    """A penalty on the last layer has the wrong sign."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    last = energy.layers[-1].weight
    monitor, optimizer = ebm.Monitor(energy, base), torch.optim.SGD([last], 0.1)

    def loss(x, negatives):
        return losses.contrastive_divergence(energy, x, negatives) - 0.7 * last.square().sum()

    noisy = lambda x: (x + 0.3 * torch.randn_like(x), None)
    return learn(monitor, energy, lambda: ring(256), noisy, 75, optimizer, loss)


def frozen():
    """All proposals are refused from step 30 on, since the step is too large."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    chains = Persistent(potential(energy, base), ring(256), 5, make=kernels.mala)
    monitor, optimizer = ebm.Monitor(energy, base), adam(energy)
    learn(monitor, energy, lambda: ring(256), chains, 30, optimizer)
    chains.options["step_size"] = 1e4
    return learn(monitor, energy, lambda: ring(256), chains, 50, optimizer)


def saturated():
    """Chains are clamped to a box whose corner a steep slope pushes them into."""
    slope = nn.Linear(2, 1)
    energy = lambda x: slope(x).squeeze(-1)
    monitor = ebm.Monitor(energy)

    def negatives(x):
        chains, info = langevin(energy, torch.rand(256, 2), 10)
        return chains.clamp(0.0, 1.0), info

    def batch():
        return 0.4 + 0.2 * torch.rand(256, 2)

    with torch.no_grad():
        slope.weight.fill_(30.0)
    return learn(monitor, energy, batch, negatives, 50, adam(slope, 1e-4))


def stuck():
    """Visible biases of an RBM are so large that all units are on in all chains."""
    rbm = ebm.zoo.RBM(9, 8)
    with torch.no_grad():
        rbm.visible_bias.fill_(50.0)
    chains = lambda x: (gibbs(rbm, x, 1), None)
    return learn(ebm.Monitor(rbm), rbm, lambda: stripes().repeat(4, 1), chains, 50, adam(rbm))


def runaway():
    """The energy falls in all directions, without a base."""
    energy = Quadratic(-0.5)
    chains = Persistent(energy, torch.randn(256, 2), 10)
    batch = lambda: torch.randn(256, 2)
    return learn(ebm.Monitor(energy), energy, batch, chains, 50, adam(energy, 1e-4))


def flat():
    """A penalty shrinks the weights to nothing."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    optimizer = torch.optim.SGD(energy.parameters(), 1e-2, weight_decay=20.0)
    chains = Persistent(potential(energy, base), ring(256), 5)
    return learn(ebm.Monitor(energy, base), energy, lambda: ring(256), chains, 70, optimizer)


def far():
    """Persistent chains start far out, and crawl."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal(scale=50.0)
    start = 60.0 + torch.randn(256, 2)
    chains = Persistent(potential(energy, base), start, 5, step_size=0.01)
    return learn(ebm.Monitor(energy, base), energy, lambda: ring(256), chains, 50, adam(energy))


def gap():
    """Negatives are noise that hardly moves, so that the energy tells them from a thin ring."""
    energy = ebm.zoo.MLPEnergy(2, (32, 32))
    batch = lambda: 2.0 * nn.functional.normalize(torch.randn(256, 2)) + 0.05 * torch.randn(256, 2)
    chains = fresh(energy, 2, 1e-4, 0.2)
    return learn(ebm.Monitor(energy), energy, batch, chains, 75, adam(energy, 4e-3))


def short_run():
    """Short chains from noise are on their way when they end."""
    energy, base = Quadratic(1.0), normal()
    u = potential(energy, base)
    batch = lambda: torch.randn(256, 2)
    monitor = ebm.Monitor(energy, base)
    return learn(monitor, energy, batch, fresh(u, 10, 0.04, 3.0), 50, adam(energy, 1e-3))


def crawling():
    """Persistent chains make one tiny move a step."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    chains = Persistent(potential(energy, base), ring(256), 1, step_size=1e-4)
    return learn(ebm.Monitor(energy, base), energy, lambda: ring(256), chains, 50, adam(energy))


def overfitting():
    """A large network sees ten points again and again."""
    energy, base, x = ebm.zoo.MLPEnergy(2, (64, 64)), normal(), ring(10)
    method = Quadrature(-6.0, 6.0, 60)
    d = ebm.GibbsBoltzmann(energy, base, log_partition=method)
    monitor = ebm.Monitor(d, held_out=ring(200), log_partition=method, slow=10)
    loss = lambda x, negatives: -d.log_prob(x).mean()
    return learn(monitor, energy, lambda: x, lambda x: (None, None), 100, adam(energy), loss)


def falling():
    """After 150 steps by the exact gradient, CD-1 of bars and stripes, which forgets the rest."""
    rbm, data = ebm.zoo.RBM(9, 16), stripes()
    base = ebm.Flat((9,), dist.constraints.boolean)
    monitor = ebm.Monitor(rbm, base, log_partition=Exact(), slow=10)
    d = ebm.GibbsBoltzmann(rbm, base, log_partition=Exact())
    exact = lambda x, _: -d.log_prob(x).mean()
    batch, optimizer = lambda: data.repeat(4, 1), adam(rbm, 0.1)
    learn(monitor, rbm, batch, lambda x: (None, None), 150, optimizer, exact)
    assert not monitor.warnings
    return learn(monitor, rbm, batch, lambda x: (gibbs(rbm, x, 1), None), 60, optimizer)


def cold():
    """The noise of Langevin moves is far below sqrt(2 epsilon), as in JEM."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    u = potential(energy, base)
    chains = lambda x: langevin(u, 2 * torch.randn(256, 2), 20, 1.0, 0.01)
    return learn(ebm.Monitor(energy, base), energy, lambda: ring(256), chains, 50, adam(energy))


def canyon():
    """Data lie on a line, and the energy follows them."""
    width = nn.Parameter(torch.zeros(()))
    energy = lambda x: 0.5 * (x[..., 0].square() + width.exp() * x[..., 1].square())
    x = torch.randn(256, 2) * torch.tensor([1.0, 1e-4])
    monitor, optimizer = ebm.Monitor(energy), torch.optim.Adam([width], 0.3)
    score = lambda x, _: losses.score_matching(energy, x)
    return learn(monitor, energy, lambda: x, lambda x: (None, None), 100, optimizer, score)


def piecewise_linear():
    """Score matching of an energy without second derivatives."""
    net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
    energy = lambda x: net(x).squeeze(-1)
    monitor, optimizer = ebm.Monitor(energy), adam(net)
    noise = lambda x, _: losses.sliced_score_matching(energy, x, torch.randn_like(x))
    return learn(monitor, energy, lambda: ring(256), lambda x: (None, None), 60, optimizer, noise)


def driven():
    """A field far beyond the data's holds all spins up from step 30 on."""
    energy, base = ebm.zoo.Ising(10), ebm.Flat((10,), dist.constraints.boolean)
    chains, monitor = persistent(energy, base, 64, 1), ebm.Monitor(energy, base)
    batch, optimizer = lambda: chain_of_spins(64), torch.optim.SGD(energy.parameters(), 1e-3)
    learn(monitor, energy, batch, chains, 30, optimizer)
    with torch.no_grad():
        energy.field.fill_(30.0)
    return learn(monitor, energy, batch, chains, 50, optimizer)


def slopes():
    """An MLP on a flat base: downhill without end in some directions."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), ebm.Flat((2,))
    monitor, chains = ebm.Monitor(energy, base), persistent(energy, base, ring(64), 5)
    return learn(monitor, energy, lambda: ring(64), chains, 25, adam(energy, 1e-4))


def unstable():
    """A concave energy of 20 dimensions, whose chains run away."""
    energy = lambda x: -0.025 * x.square().sum(-1) * scale.exp()
    scale = nn.Parameter(torch.zeros(()))
    chains = Persistent(energy, torch.randn(64, 20), 10, step_size=0.1)
    optimizer = torch.optim.SGD([scale], 1e-12)
    return learn(ebm.Monitor(energy), energy, lambda: wide(64), chains, 75, optimizer)


def wide_noise():
    """Noise to contrast with that is far wider than the data."""
    energy, noise = Precision(), normal(20, 60.0)
    loss = lambda x, negatives: losses.noise_contrastive(energy, x, negatives, noise)
    negatives = lambda x: (noise.sample((64,)), None)
    batch, optimizer = lambda: wide(64), adam(energy, 1e-3)
    return learn(ebm.Monitor(energy), energy, batch, negatives, 50, optimizer, loss)


def coin_flips():
    """An RBM is to tell two patterns from coin flips, which are no negatives of its own."""
    rbm, base = ebm.zoo.RBM(64, 16), ebm.Flat((64,), dist.constraints.boolean)
    coins = lambda: torch.bernoulli(torch.full((64, 64), 0.5))
    patterns = coins()[:2].repeat(32, 1)
    batch = lambda: (patterns - torch.bernoulli(torch.full((64, 64), 0.05))).abs()
    optimizer = torch.optim.SGD(rbm.parameters(), 0.05)
    return learn(ebm.Monitor(rbm, base), rbm, batch, lambda x: (coins(), None), 75, optimizer)


def restarted():
    """Chains of ebm.Negatives start anew from a wide base, and are on their way when they end."""
    energy, base = Precision(), normal(20, 5.0)
    chains = persistent(energy, base, 128, 8, kernels.mala, step_size=0.01, restart=1.0)
    monitor = ebm.Monitor(energy, base)
    return learn(monitor, energy, lambda: wide(64), chains, 50, adam(energy, 1e-3))


def cold_spins():
    """Neighbours are tied so strongly that no flip is accepted."""
    tie = torch.diag(torch.full((9,), 60.0), 1)
    energy, base = ebm.zoo.Ising(10, tie + tie.T), ebm.Flat((10,), dist.constraints.boolean)
    flips = lambda u: kernels.metropolis_flips(u, torch.tensor([0.0, 1.0]))
    chains = persistent(energy, base, chain_of_spins(64, 1).expand(64, 10), 5, flips)
    batch, optimizer = lambda: chain_of_spins(64), torch.optim.SGD(energy.parameters(), 1e-3)
    return learn(ebm.Monitor(energy, base), energy, batch, chains, 50, optimizer)


def few_rows():
    """An Ising model by the exact likelihood of fifteen rows."""
    energy, base = ebm.zoo.Ising(10), ebm.Flat((10,), dist.constraints.boolean)
    rows, d = chain_of_spins(15), ebm.GibbsBoltzmann(energy, base, log_partition=Exact())
    monitor = ebm.Monitor(d, held_out=chain_of_spins(500), log_partition=Exact(), slow=25)
    loss = lambda x, _: -d.log_prob(x).mean()
    none = lambda x: (None, None)
    return learn(monitor, energy, lambda: rows, none, 100, adam(energy, 0.03), loss)


# The run, its kind, and the step after which it fails.
FAILING = {
    "blow-up": (blow_up, "blow-up", 25),
    "frozen": (frozen, "frozen", 30),
    "saturated": (saturated, "saturated", 0),
    "stuck": (stuck, "saturated", 0),
    "runaway": (runaway, "runaway", 0),
    "flat": (flat, "flat", 0),
    "far": (far, "far", 0),
    "gap": (gap, "gap", 25),
    "short run": (short_run, "short", 0),
    "crawling": (crawling, "short", 0),
    "overfitting": (overfitting, "overfitting", 0),
    "falling": (falling, "falling", 150),
    "cold": (cold, "temperature", 0),
    "canyon": (canyon, "curvature", 0),
    "piecewise linear": (piecewise_linear, "curvature", 0),
    "spins driven up": (driven, "saturated", 30),
    "slopes on a flat base": (slopes, "runaway", 0),
    "unstable in 20 dimensions": (unstable, "runaway", 0),
    "noise too wide": (wide_noise, "far", 0),
    "coin flips": (coin_flips, "gap", 0),
    "restarted chains": (restarted, "short", 0),
    "cold spins": (cold_spins, "frozen", 0),
    "few rows": (few_rows, "overfitting", 0),
}
