"""The Ising model on an open square lattice of bits: exact log Z and draws, row by row."""

import arviz as az
import torch
from pyro.distributions import constraints

import pyro_ebm as ebm
from pyro_ebm.flat import states_of

N = 7


def ising(coupling):
    def energy(x):
        s = 2.0 * x - 1.0
        down = (s[..., 1:, :] * s[..., :-1, :]).sum((-1, -2))
        right = (s[..., :, 1:] * s[..., :, :-1]).sum((-1, -2))
        return -coupling * (down + right)

    return energy


def bits(n=N):
    return ebm.Flat((n, n), constraints.boolean)


def rows(n):
    """All rows, their inner sums of neighbours, and the sums between any two."""
    states = states_of(constraints.boolean, (n,))
    s = 2.0 * states - 1.0
    return states, (s[:, 1:] * s[:, :-1]).sum(-1), s @ s.T


def messages(coupling, n):
    """Logs of the sums over all rows above, by row: ``(n, 2^n)``."""
    _, inner, between = rows(n)
    found = [coupling * inner]
    for _ in range(n - 1):
        top = found[-1].amax()
        total = (found[-1] - top).exp() @ (coupling * between).exp()
        found.append(total.log() + top + coupling * inner)
    return torch.stack(found)


def log_z(coupling, n=N):
    return messages(torch.as_tensor(coupling), n)[-1].logsumexp(0)


def draw(coupling, n=N):
    """Draw a lattice exactly, from the last row up."""
    states, _, between = rows(n)
    above = messages(torch.as_tensor(coupling), n)
    row = torch.multinomial(torch.softmax(above[-1], 0), 1)
    drawn = [states[row]]
    for k in range(n - 2, -1, -1):
        logits = above[k] + coupling * between.index_select(1, row)[:, 0]
        row = torch.multinomial(torch.softmax(logits, 0), 1)
        drawn.append(states[row])
    return torch.cat(drawn)


def sampler(coupling):
    """An exact ``sampler`` of a single lattice, as ``GibbsBoltzmann`` takes it."""
    return lambda d, shape: draw(coupling).expand(d.shape(shape))


def posterior(log_prior, log_likelihood, grid):
    """Mean and standard deviation by quadrature on an even grid."""
    share = torch.softmax(log_prior + log_likelihood, 0)
    mean = (share * grid).sum()
    return mean, (share * (grid - mean).square()).sum().sqrt()


def far(draws, mean, sd):
    """How far draws ``(chains, n)`` are from a law, in standard errors: mean, and spread."""
    scores = []
    for x, center in ((draws, mean), ((draws - mean).square(), sd.square())):
        a = x.detach().cpu().numpy()
        error = x.std() / az.ess(a) ** 0.5
        scores.append(abs((x.mean() - center) / error).item())
    return max(scores)
