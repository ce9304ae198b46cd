"""Reconstruction: denoising and masked auto-encoders."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.losses import (
    denoising_autoencoder,
    denoising_score_matching,
    masked_autoencoder,
    pseudo_likelihood,
)
from tests.common import EXACT, NUMERIC


def signs(dim):
    """Return all vectors of signs: their mean is zero and their covariance one, exactly."""
    return torch.tensor([*itertools.product([-1.0, 1.0], repeat=dim)], dtype=torch.float64)


def minimum(loss, start):
    """Return where a quadratic loss of a matrix is least: one Newton step."""
    flat = start.flatten()
    of_flat = lambda f: loss(f.reshape(start.shape))
    grad = torch.autograd.functional.jacobian(of_flat, flat)
    hessian = torch.autograd.functional.hessian(of_flat, flat)
    return (flat - torch.linalg.solve(hessian, grad)).reshape(start.shape)


# Denoising --------------------------------------------------------------------------------------


def linear(scale=1.0):
    """Return the loss of a linear reconstruction: variances 4, 1 and 1/4, noise of sd 1/2."""
    x = signs(3) * torch.tensor([2.0, 1.0, 0.5])
    noisy = x + scale * 0.5 * signs(3)[:, None]
    return lambda w: denoising_autoencoder(lambda y: y @ w.T, x, noisy)


def test_the_linear_one_is_the_filter_of_wiener():
    c = torch.diag(torch.tensor([4.0, 1.0, 0.25]))
    want = c @ torch.linalg.inv(c + 0.25 * torch.eye(3))
    found = minimum(linear(), torch.zeros(3, 3))
    torch.testing.assert_close(found, want, **EXACT)
    torch.testing.assert_close(linear()(found), (c - want @ c).trace(), **EXACT)
    figures = torch.tensor([0.941176, 0.8, 0.5]), torch.tensor(0.560294)
    half = {"rtol": 0, "atol": 5e-7}  # of their last digit
    torch.testing.assert_close((found.diagonal(), linear()(found)), figures, **half)
    assert not torch.allclose(minimum(linear(1.1), torch.zeros(3, 3)), want, **NUMERIC)


@pytest.mark.parametrize("event", [(3,), (2, 2)])
def test_of_a_step_down_an_energy_it_is_denoising_score_matching(event):
    k, sigma = torch.randn(*event).square().requires_grad_(), 0.3
    x, noise = torch.randn(6, *event), torch.randn(4, 6, *event)

    def energy(x):
        return (k * x.pow(4) + x.cos()).flatten(x.dim() - len(event)).sum(-1)

    def step(y):
        y = y.detach().requires_grad_()
        return y - sigma**2 * torch.autograd.grad(energy(y).sum(), y, create_graph=True)[0]

    restored = denoising_autoencoder(step, x, x + sigma * noise)
    matched = 2 * sigma**4 * denoising_score_matching(energy, x, noise, sigma)
    torch.testing.assert_close(restored, matched, **EXACT)
    slopes = [torch.autograd.grad(loss, k)[0] for loss in (restored, matched)]
    torch.testing.assert_close(*slopes, **EXACT)


@pytest.mark.slow
def test_what_it_puts_right_is_the_score_of_the_noisy_law():
    sigma, centers = 0.4, torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.8, -1.2]])

    def mixture(variance):
        each = dist.Normal(centers, math.sqrt(variance)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.5, 0.3, 0.2])), each)

    law, noisy_law = mixture(0.25), mixture(0.25 + sigma**2)
    net = nn.Sequential(
        nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
    )
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for _ in range(2000):
        x = law.sample((1024,))
        loss = denoising_autoencoder(net, x, x + sigma * torch.randn_like(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    def error(truth):
        """Return the error of the score, against the score itself, over noisy points."""
        x = noisy_law.sample((5000,))
        score = ebm.force(lambda x: -truth.log_prob(x), x)
        found = (net(x) - x).detach() / sigma**2
        return ((found - score).square().sum() / score.square().sum()).sqrt()

    assert error(noisy_law) < 0.1
    assert error(law) > 0.3


# Masked -----------------------------------------------------------------------------------------

# Three bits in proportions of 1 to 8: a list of 36 points, whose means have no error.
BITS = signs(3).add(1).div(2)
LAW = torch.tensor([1, 5, 2, 8, 6, 3, 7, 4])


def listed():
    """Return every point under every mask."""
    x, masks = BITS.repeat_interleave(LAW, 0), BITS[1:].bool()
    return x, masks[:, None].expand(-1, len(x), -1)


class Table(nn.Module):
    """Log-odds of every unit for each mask and each pattern of the units that show."""

    def __init__(self):
        super().__init__()
        self.log_odds = nn.Parameter(torch.zeros(8, 8, 3, dtype=torch.float64))

    def forward(self, x, mask):
        place = torch.tensor([4, 2, 1])
        return self.log_odds[(mask * place).sum(-1), (x.long() * place).sum(-1)]


def conditional(mask, x):
    """Return the exact probabilities that hidden units are on, given the others."""
    same = ((x == BITS) | mask).all(-1)
    return (LAW * same).double() @ BITS / (LAW * same).sum()


def test_masked_bits_learn_their_conditional_laws():
    x, masks = listed()
    table = Table()
    want = torch.stack([torch.stack([conditional(m, p) for p in x]) for m in masks[:, 0]])
    optimizer = torch.optim.LBFGS(table.parameters(), max_iter=200, tolerance_grad=1e-9)

    def loss():
        return masked_autoencoder(lambda *a: dist.Bernoulli(logits=table(*a)), x, masks)

    def closure():
        optimizer.zero_grad()
        loss().backward()
        return loss()

    optimizer.step(closure)
    found = table(x.masked_fill(masks, 0), masks).sigmoid()
    torch.testing.assert_close(found[masks], want[masks], rtol=0, atol=0.01)  # as METHODS asks
    p = want[masks]
    entropy = -(p.xlogy(p) + (1 - p).xlogy(1 - p)).mean()
    torch.testing.assert_close(loss(), entropy, rtol=0, atol=1e-4)  # its excess is quadratic


def test_of_single_bits_it_is_the_pseudo_likelihood():
    """Of an energy's own conditional laws."""
    energy, x = ebm.zoo.Ising(3, torch.randn(3, 3).triu(1), torch.randn(3)), BITS
    masks = torch.eye(3, dtype=torch.bool)[:, None].expand(-1, 8, -1)

    def law(shown, mask):
        log_odds = energy(shown) - energy(shown + mask.to(shown))
        return dist.Bernoulli(logits=log_odds.unsqueeze(-1).expand(mask.shape))

    found = 3 * masked_autoencoder(law, x, masks)
    torch.testing.assert_close(found, pseudo_likelihood(energy, x), **EXACT)


def test_numbers_learn_their_conditional_means():
    x, masks = listed()
    means = lambda shown, mask: torch.stack(
        [
            torch.stack([conditional(m, p) for m, p in zip(*rows, strict=True)])
            for rows in zip(mask, shown, strict=True)
        ]
    )
    shift = torch.zeros(3, requires_grad=True)
    loss = masked_autoencoder(lambda *a: means(*a) + shift, x, masks)
    p = means(x.masked_fill(masks, 0), masks)[masks]
    torch.testing.assert_close(loss, (p * (1 - p)).mean(), **EXACT)
    (slope,) = torch.autograd.grad(loss, shift)
    torch.testing.assert_close(slope, torch.zeros(3), **EXACT)


@pytest.mark.parametrize("unit", range(3))
def test_of_a_gaussian_the_error_of_a_unit_is_one_over_its_precision(unit):
    precision = torch.tensor([[2.0, 0.6, -0.3], [0.6, 1.5, 0.4], [-0.3, 0.4, 1.0]])
    x = signs(3) @ torch.linalg.cholesky(torch.linalg.inv(precision)).T
    mask = (torch.arange(3) == unit).expand(8, 3)

    def loss(weight):  # of the other units
        line = lambda y, mask: (y[:, ~mask[0]] @ weight).unsqueeze(-1).expand(8, 3)
        return masked_autoencoder(line, x, mask)

    weight = minimum(loss, torch.zeros(2))
    own, others = precision[unit, unit], precision[unit][~mask[0]]
    torch.testing.assert_close(weight, -others / own, **EXACT)
    torch.testing.assert_close(loss(weight), 1 / own, **EXACT)


def test_categories_are_masked_too():
    x, mask = torch.tensor([[0, 2], [1, 1]]), torch.tensor([[True, False], [True, True]])
    logits = torch.randn(2, 2, 3)
    loss = masked_autoencoder(lambda x, mask: dist.Categorical(logits=logits), x, mask)
    log_p = logits.log_softmax(-1)
    want = -(log_p[0, 0, 0] + log_p[1, 0, 1] + log_p[1, 1, 1]) / 3
    torch.testing.assert_close(loss, want, **EXACT)


def test_what_is_hidden_is_not_seen():
    x = torch.randn(4, 3)
    mask = torch.rand(2, 4, 3) < 0.5
    seen = []

    def spy(y, mask):
        seen.append(y)
        return torch.zeros_like(y)

    masked_autoencoder(spy, x, mask)
    assert torch.equal(seen[0], torch.where(mask, 0.0, x))


def test_units_that_show_do_not_count():
    x, mask = torch.tensor([[1.0, math.nan], [3.0, 0.0]]), torch.tensor([[True, False]] * 2)
    loss = masked_autoencoder(lambda y, mask: torch.where(mask, 0.0, y), x, mask)
    torch.testing.assert_close(loss, torch.tensor(5.0), **EXACT)
    assert masked_autoencoder(lambda y, mask: y, x, ~mask | mask).isnan()
    assert masked_autoencoder(lambda y, mask: y, x, mask & ~mask).isnan()


# What is refused --------------------------------------------------------------------------------

X = torch.ones(4, 2)
HIDDEN = torch.ones(4, 2, dtype=torch.bool)
REFUSED = {
    "noisy": lambda: denoising_autoencoder(lambda y: y, X, X[:3]),
    "empty": lambda: denoising_autoencoder(lambda y: y, X[:0], X[:0]),
    "keep the shape": lambda: denoising_autoencoder(lambda y: y[:, 0], X, X),
    "mask": lambda: masked_autoencoder(lambda y, m: y, X, HIDDEN[:, :1]),
    "per unit": lambda: masked_autoencoder(lambda y, m: y[:, 0], X, HIDDEN),
    "per unit,": lambda: masked_autoencoder(
        lambda y, m: dist.Normal(y, 1.0).to_event(1), X, HIDDEN
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_it_refuses(words):
    with pytest.raises(ValueError, match=words):
        REFUSED[words]()


def test_it_refuses_masks_of_numbers():
    with pytest.raises(TypeError, match="mask"):
        masked_autoencoder(lambda y, m: y, X, X)
