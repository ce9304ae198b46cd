"""K-means is the cold Gaussian mixture.

One energy, E(x, k) = |x - m_k|^2 / 2, and its free energy over k. At finite beta it is a Gaussian
mixture with equal weights and the variance 1 / beta, at beta = infinity the objective of K-means.
From hot to cold the centres part, the entropies of the assignments fall from log K to zero
(deterministic annealing: Rose, 1998), and K-means comes out at the end. At beta = 1 a second
energy, with weights and variances of its own, is the mixture that scikit-learn fits by EM.

    python examples/kmeans.py --plot docs/images/kmeans.png
"""

import argparse
import math

import pyro
import torch
from pyro.distributions import constraints
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_iris
from sklearn.mixture import GaussianMixture

import pyro_ebm as ebm


class Centres(torch.nn.Module):
    """E(x, k) = |x - m_k|^2 / 2."""

    def __init__(self, means):
        super().__init__()
        self.means = means

    def forward(self, x, k):
        return 0.5 * (x - self.means[k]).square().sum(-1)


class Gaussians(torch.nn.Module):
    """E(x, k) = -log of w_k N(x; m_k, diag v_k)."""

    def __init__(self, means, variances, weights):
        super().__init__()
        self.means, self.variances, self.weights = means, variances, weights

    def forward(self, x, k):
        normal = torch.distributions.Normal(self.means[k], self.variances[k].sqrt())
        return -normal.log_prob(x).sum(-1) - self.weights[k].log()


def free_energy(energy, beta):
    one_of_k = ebm.Flat((), constraints.integer_interval(0, len(energy.means) - 1))
    return ebm.FreeEnergy(energy, one_of_k, beta)


def shares(F, x):
    """Return the posterior of the component, (n, K): at beta = infinity all on the nearest."""
    if F.cold:
        return torch.nn.functional.one_hot(F.minimum(x).x, len(F.energy.means)).to(x)
    return F.posterior(x).log_prob(torch.arange(len(F.energy.means))[:, None]).exp().T


def learn_centres(x, means, beta, num_steps):
    """Minimise the sum of free energies over the centres, by EM: Lloyd's steps when it is cold."""
    for _ in range(num_steps):
        share = shares(free_energy(Centres(means), beta), x)
        mass = share.sum(0)
        new = (share.T @ x) / mass.clamp(min=1e-30)[:, None]  # no 0 / 0
        new = torch.where(mass[:, None] > 0, new, means)  # a centre that nothing chose stays
        if torch.equal(new, means):
            break
        means = new
    return means


def learn_mixture(x, energy, num_steps, floor=1e-6):
    """EM for a mixture of diagonal Gaussians; ``floor``, added to variances, is scikit-learn's."""
    for _ in range(num_steps):
        share = shares(free_energy(energy, 1.0), x)
        mass = share.sum(0)
        means = (share.T @ x) / mass[:, None]
        variances = (share.T @ x.square()) / mass[:, None] - means.square() + floor
        moved = (means - energy.means).abs().max()
        energy = Gaussians(means, variances, mass / len(x))
        if moved < 1e-12:
            break
    return energy


def anneal(x, num_components, args):
    """Follow the centres from hot to cold; return them, the betas and the mean entropies."""
    scale = x.var(0).sum()
    betas = torch.logspace(-0.5, 3.0, args.temperatures) / scale * 2
    means = x.mean(0) + 1e-3 * torch.randn(num_components, x.shape[1])
    entropies = []
    for beta in [*betas.tolist(), math.inf]:
        means = learn_centres(x, means + 1e-4 * scale.sqrt() * torch.randn_like(means), beta, 50)
        share = shares(free_energy(Centres(means), beta), x)
        entropies.append(torch.special.entr(share).sum(-1).mean())
    return means, [*betas.tolist(), math.inf], torch.stack(entropies)


def polish(x, num_components, args):
    """The best of several annealings, each ended by cold steps until nothing moves."""
    best = None
    for _ in range(args.restarts):
        means, betas, entropies = anneal(x, num_components, args)
        means = learn_centres(x, means, math.inf, 300)
        inertia = 2 * free_energy(Centres(means), math.inf)(x).sum()
        if best is None or inertia < best[0]:
            best = inertia, means, betas, entropies
    return best


def cold_end(name, x, num_components, args):
    inertia, means, betas, entropies = polish(x, num_components, args)
    theirs = KMeans(num_components, n_init=10, random_state=0).fit(x.numpy())
    centres = torch.as_tensor(theirs.cluster_centers_).to(x)
    at_theirs = 2 * free_energy(Centres(centres), math.inf)(x).sum()
    print(
        f"{name:8}beta = inf  inertia of ours {inertia:.4f}, of KMeans {theirs.inertia_:.4f}; "
        f"F at KMeans' centres {at_theirs:.4f}"
    )
    return means, betas, entropies


def warm_end(x):
    theirs = GaussianMixture(3, covariance_type="diag", tol=1e-10, max_iter=2000, random_state=0)
    theirs.fit(x.numpy())
    start = KMeans(3, n_init=1, random_state=0).fit(x.numpy()).labels_
    share = torch.nn.functional.one_hot(torch.as_tensor(start).long(), 3).to(x)
    mass = share.sum(0)
    means = (share.T @ x) / mass[:, None]
    variances = (share.T @ x.square()) / mass[:, None] - means.square() + 1e-6
    ours = learn_mixture(x, Gaussians(means, variances, mass / len(x)), 2000)
    at_theirs = Gaussians(
        *(torch.as_tensor(a).to(x) for a in (theirs.means_, theirs.covariances_, theirs.weights_))
    )
    print(
        f"iris    beta = 1    -F a flower: ours {-free_energy(ours, 1.0)(x).mean():.5f}, "
        f"GaussianMixture {theirs.score(x.numpy()):.5f}; -F of its parameters "
        f"{-free_energy(at_theirs, 1.0)(x).mean():.5f}"
    )


def plot(path, x, curves):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    means, betas, entropies = curves["iris"]
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), width_ratios=[1, 1, 1, 1.3])
    palette = torch.tensor([[0.0, 0.45, 0.7], [0.9, 0.6, 0.0], [0.85, 0.15, 0.35]])
    for axis, beta in zip(axes, (0.5, 2.0, math.inf), strict=False):
        centres = learn_centres(x, means, beta, 500)
        share = shares(free_energy(Centres(centres), beta), x)
        axis.scatter(x[:, 2], x[:, 0], c=(share @ palette).clamp(0, 1).numpy(), s=14)
        axis.plot(centres[:, 2], centres[:, 0], "kx", ms=9, mew=2)
        axis.set_title(r"$\beta = \infty$" if beta == math.inf else rf"$\beta = {beta:.2g}$")
        axis.set_xlabel("petal length (cm)")
    axes[0].set_ylabel("sepal length (cm)")
    for (name, (_, b, h)), k in zip(curves.items(), (3, 10), strict=True):
        axes[3].semilogx(b[:-1], h[:-1] / math.log(k), label=f"{name}, K = {k}")
    axes[3].set(
        xlabel=r"$\beta$",
        ylabel="entropy of assignments / log K",
        ylim=(-0.02, 1.05),
        xlim=(0.1, 200),
    )
    axes[3].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--temperatures", type=int, default=30)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(args.seed)

    iris = torch.as_tensor(load_iris().data)
    digits = torch.as_tensor(load_digits().data / 16)
    warm_end(iris)
    curves = {
        "iris": cold_end("iris", iris, 3, args),
        "digits": cold_end("digits", digits, 10, args),
    }
    if args.plot:
        plot(args.plot, iris, curves)


if __name__ == "__main__":
    main()
