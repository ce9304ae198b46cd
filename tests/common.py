"""Exact laws, small energies and tolerances: the only place with numbers."""

import arviz as az
import torch

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # one number by two formulas, float64
NUMERIC = {"rtol": 1e-6, "atol": 1e-8}  # against finite differences or quadrature
FALSE_ALARM = 1e-6  # least p-value of a statistical test of independent draws
FAR = 5.0  # standard errors between a mean and the truth


def gaussian(x):
    return 0.5 * x.square().sum(-1)


def double_well(x):
    return (x.square() - 1.0).square().sum(-1)


def walled(x):
    return torch.where(x[..., 0] > 0, x[..., 0], torch.inf)


class Line:
    """The exact law of a one-dimensional energy, by summing over a fine grid.

    The energy takes points ``(*batch, 1)``; so do ``sample`` and ``p_value``.
    """

    def __init__(self, energy, low=-6.0, high=6.0, n=20_001, device=None):
        self.x = torch.linspace(low, high, n, device=device)
        self.mass = torch.softmax(-energy(self.x.unsqueeze(-1)), 0).detach()

    def sample(self, n):
        """Independent draws, uniform within their cell of the grid."""
        cell = (self.x[1] - self.x[0]) * (torch.rand(n, device=self.x.device) - 0.5)
        return (self.x[torch.multinomial(self.mass, n, replacement=True)] + cell).unsqueeze(-1)

    def mean(self, f):
        """The exact mean of ``f``, which takes points ``(n,)``."""
        return (self.mass * f(self.x)).sum()

    def p_value(self, samples, bins=40):
        """Chi-squared test of independent samples, in bins of equal mass under the law."""
        samples = samples.detach().flatten().to(self.x)
        edges = self.mass.cumsum(0) - 0.5 * self.mass
        right = torch.searchsorted(self.x, samples).clamp(1, len(self.x) - 1)
        step = (samples - self.x[right - 1]) / (self.x[right] - self.x[right - 1])
        u = torch.lerp(edges[right - 1], edges[right], step.clamp(0, 1))
        counts = torch.bincount((u * bins).long().clamp(0, bins - 1), minlength=bins)
        expected = samples.numel() / bins
        chi2 = ((counts - expected).square() / expected).sum()
        return torch.special.gammaincc(chi2.new_tensor((bins - 1) / 2), chi2 / 2).item()


def standard_errors(draws, mean, sd):
    """How far one chain's mean is from the truth, in standard errors: the largest component.

    The standard error is ``sd / sqrt(ESS)``, with the true ``sd`` and the chain's own effective
    sample size, at most the number of draws. A chain that does not move gives NaN.
    """
    x = draws.detach().cpu().flatten(1) if draws.dim() > 1 else draws.detach().cpu()[:, None]
    ess = torch.tensor([az.ess(c.numpy()[None]) for c in x.T]).clamp(max=len(x))
    mean, sd = (torch.as_tensor(v).detach().cpu().flatten() for v in (mean, sd))
    return ((x.mean(0) - mean).abs() * ess.sqrt() / sd).max().item()
