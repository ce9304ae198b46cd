"""The 17 reference posteriors as Pyro models.

Their definitions and data, and draws to compare with, are those of posteriordb
(https://github.com/stan-dev/posteriordb). ``POSTERIORS`` makes a model from data; a parameter
without a prior is a site with the flat measure. The sites are the parameters of the reference but
where ``PARAMETERS`` says how they follow from the sites, and ``SITES`` how to come back.

Data take torch's default type when a model is made. A model makes its distributions anew in each
call, so that they obey ``pyro.validation_enabled`` at that time.
"""

import json
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

import pyro_ebm as ebm

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "posteriordb"


def tensors(data, *keys):
    """The data under these names, in the default type."""
    dtype = torch.get_default_dtype()
    return [torch.tensor(data[key], dtype=dtype) for key in keys]


def positive():
    return ebm.Flat((), constraints.positive)


def design(*columns):
    """A column of ones and these, side by side."""
    return torch.stack((torch.ones_like(columns[0]), *columns), -1)


def half_cauchy():
    return dist.HalfCauchy(2.5)


def regression(y, x, *, sigma=positive):
    """``y ~ Normal(x @ beta, sigma)`` with a flat prior of beta; ``sigma()`` is sigma's prior."""

    def model():
        b, s = pyro.sample("beta", ebm.Flat(x.shape[-1:])), pyro.sample("sigma", sigma())
        pyro.sample("y", dist.Normal(x @ b, s).to_event(1), obs=y)

    return model


# Regressions -----------------------------------------------------------------------------------


def earn_height(data):
    earn, height = tensors(data, "earn", "height")
    return regression(earn, design(height))


def logearn_interaction(data):
    earn, height, male = tensors(data, "earn", "height", "male")
    return regression(earn.log(), design(height, male, height * male))


def kidscore_interaction(data):
    score, hs, iq = tensors(data, "kid_score", "mom_hs", "mom_iq")
    return regression(score, design(hs, iq, hs * iq), sigma=half_cauchy)


def kidscore_momiq(data):
    score, iq = tensors(data, "kid_score", "mom_iq")
    return regression(score, design(iq), sigma=half_cauchy)


def kidscore_mom_work(data):
    score, work = tensors(data, "kid_score", "mom_work")
    return regression(score, design(*((work == k).to(score) for k in (2, 3, 4))))


def mesquite(data):
    keys = "weight", "diam1", "diam2", "canopy_height", "total_height", "density", "group"
    weight, *x = tensors(data, *keys)
    return regression(weight, design(*x))


def logmesquite_logvas(data):
    keys = "weight", "diam1", "diam2", "canopy_height", "total_height", "density"
    weight, diam1, diam2, canopy, total, density = (x.log() for x in tensors(data, *keys))
    (group,) = tensors(data, "group")
    area = diam1 + diam2
    return regression(weight, design(area + canopy, area, diam1 - diam2, total, density, group))


def nes(data):
    keys = "partyid7", "real_ideo", "race_adj", "age_discrete", "educ1", "gender", "income"
    party, ideology, race, age, *rest = tensors(data, *keys)
    ages = ((age == k).to(party) for k in (2, 3, 4))
    return regression(party, design(ideology, race, *ages, *rest))


def blr(data):
    x, y = tensors(data, "X", "y")

    def model():
        beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand(x.shape[-1:]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
        pyro.sample("y", dist.Normal(x @ beta, sigma).to_event(1), obs=y)

    return model


def kilpisjarvi(data):
    x, y, *prior = tensors(data, "x", "y", "pmualpha", "psalpha", "pmubeta", "psbeta")

    def model():
        alpha = pyro.sample("alpha", dist.Normal(*prior[:2]))
        beta = pyro.sample("beta", dist.Normal(*prior[2:]))
        sigma = pyro.sample("sigma", positive())
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma).to_event(1), obs=y)

    return model


# Time series -----------------------------------------------------------------------------------


def ar(data):
    """``y[t] ~ Normal(alpha + sum_k beta[k] y[t - k], sigma)`` from the (K + 1)-th on."""
    (y,), K = tensors(data, "y"), data["K"]
    past = y.unfold(0, K, 1)[:-1].flip(-1)  # shape: (T - K, K), the latest value first

    def model():
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand((K,)).to_event(1))
        sigma = pyro.sample("sigma", half_cauchy())
        pyro.sample("y", dist.Normal(alpha + past @ beta, sigma).to_event(1), obs=y[K:])

    return model


def linear_recurrence(b, u):
    """``h[t] = u[t] + b h[t - 1]`` over the last dimension, in log2(T) steps.

    After a step with a power ``c = b^k``, ``h[t]`` is the sum of the last ``2 k`` terms.
    """
    h, k = u, 1
    while k < u.shape[-1]:
        h = torch.cat((h[..., :k], h[..., k:] + b * h[..., :-k]), -1)
        b, k = b * b, 2 * k
    return h


def garch(data):
    """The variance is ``alpha0 + alpha1 (y[t - 1] - mu)^2 + beta1`` times the one before.

    Alpha1 and beta1 are flat on a triangle: two corners of the simplex, whose third is left.
    """
    y, sigma1 = tensors(data, "y", "sigma1")

    def model():
        mu, alpha0 = pyro.sample("mu", ebm.Flat()), pyro.sample("alpha0", positive())
        weights = pyro.sample("weights", ebm.Flat((3,), constraints.simplex))
        alpha1, beta1, _ = weights.unbind(-1)
        news = alpha0 + alpha1 * (y[:-1] - mu).square()
        variance = linear_recurrence(beta1, torch.cat((sigma1.square()[None], news)))
        pyro.sample("y", dist.Normal(mu, variance.sqrt()).to_event(1), obs=y)

    return model


def log_matmul(a, b):
    """The product of matrices of two rows and columns, ``(2, 2, *batch)``, given by their logs."""
    return torch.logaddexp(a[:, :1] + b[:1], a[:, 1:] + b[1:])


def hmm(data):
    """Two states with unit noise about their means, both equally probable at first.

    The likelihood is a product of matrices, in pairs, pairs of pairs and so on.
    """
    (y,) = tensors(data, "y")
    middle = y.new_tensor([3.0, 10.0])

    def model():
        row = ebm.Flat((2,), constraints.simplex)
        rows = torch.stack((pyro.sample("theta1", row), pyro.sample("theta2", row)))
        mu = pyro.sample("steps", ebm.Flat((2,), constraints.positive)).cumsum(-1)
        pyro.factor("prior", dist.Normal(middle, 1.0).log_prob(mu).sum(-1))
        emission = dist.Normal(mu[:, None], 1.0).log_prob(y)  # shape: (2, T)
        product = rows.log()[:, :, None] + emission[:, 1:]
        while (n := product.shape[-1]) > 1:
            half = n // 2
            pairs = log_matmul(product[..., : 2 * half : 2], product[..., 1 : 2 * half : 2])
            product = torch.cat((pairs, product[..., 2 * half :]), -1)
        pyro.factor("y", torch.logsumexp(emission[:, :1] + product[..., 0], (0, 1)))

    return model


# Others ----------------------------------------------------------------------------------------


def eight_schools_noncentered(data):
    y, sigma = tensors(data, "y", "sigma")

    def model():
        z = pyro.sample("theta_trans", dist.Normal(0.0, 1.0).expand(y.shape).to_event(1))
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma).to_event(1), obs=y)

    return model


def gp_regr(data):
    """A Gaussian process; sigma is the variance of the noise, not its standard deviation."""
    x, y = tensors(data, "x", "y")
    distance2, eye = (x[:, None] - x).square(), torch.eye(len(x)).to(x)

    def model():
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        cov = alpha.square() * torch.exp(-0.5 * distance2 / rho.square()) + sigma * eye
        factor, info = torch.linalg.cholesky_ex(cov)
        factor = torch.where(info == 0, factor, torch.nan)  # one chain fails alone
        pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), scale_tril=factor), obs=y)

    return model


def low_dim_gauss_mix(data):
    (y,) = tensors(data, "y")

    def model():
        mu = pyro.sample("mu", ebm.Flat((2,), constraints.ordered_vector))
        pyro.factor("prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand((2,)).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
        each = dist.Normal(mu[:, None], sigma[:, None]).log_prob(y)  # shape: (2, N)
        first, second = theta.log() + each[0], torch.log1p(-theta) + each[1]
        pyro.factor("y", torch.logaddexp(first, second).sum(-1))

    return model


POSTERIORS = {
    "arK-arK": ar,
    "earnings-earn_height": earn_height,
    "earnings-logearn_interaction": logearn_interaction,
    "eight_schools-eight_schools_noncentered": eight_schools_noncentered,
    "garch-garch11": garch,
    "gp_pois_regr-gp_regr": gp_regr,
    "hmm_example-hmm_example": hmm,
    "kidiq-kidscore_interaction": kidscore_interaction,
    "kidiq-kidscore_momiq": kidscore_momiq,
    "kidiq_with_mom_work-kidscore_mom_work": kidscore_mom_work,
    "kilpisjarvi_mod-kilpisjarvi": kilpisjarvi,
    "low_dim_gauss_mix-low_dim_gauss_mix": low_dim_gauss_mix,
    "mesquite-logmesquite_logvas": logmesquite_logvas,
    "mesquite-mesquite": mesquite,
    "nes1980-nes": nes,
    "nes2000-nes": nes,
    "sblrc-blr": blr,
}

# From the values of sites to the parameters of the reference, and back ---------------------------


def eight_schools_parameters(theta_trans, mu, tau):
    return {"theta": mu[..., None] + tau[..., None] * theta_trans, "mu": mu, "tau": tau}


def eight_schools_sites(theta, mu, tau):
    return {"theta_trans": (theta - mu[..., None]) / tau[..., None], "mu": mu, "tau": tau}


def garch_parameters(mu, alpha0, weights):
    alpha1, beta1, _ = weights.unbind(-1)
    return {"mu": mu, "alpha0": alpha0, "alpha1": alpha1, "beta1": beta1}


def garch_sites(mu, alpha0, alpha1, beta1):
    weights = torch.stack((alpha1, beta1, 1 - alpha1 - beta1), -1)
    return {"mu": mu, "alpha0": alpha0, "weights": weights}


def hmm_parameters(theta1, theta2, steps):
    return {"theta1": theta1, "theta2": theta2, "mu": steps.cumsum(-1)}


def hmm_sites(theta1, theta2, mu):
    steps = torch.diff(mu, dim=-1, prepend=torch.zeros_like(mu[..., :1]))
    return {"theta1": theta1, "theta2": theta2, "steps": steps}


PARAMETERS = {
    "eight_schools-eight_schools_noncentered": eight_schools_parameters,
    "garch-garch11": garch_parameters,
    "hmm_example-hmm_example": hmm_parameters,
}
SITES = {
    "eight_schools-eight_schools_noncentered": eight_schools_sites,
    "garch-garch11": garch_sites,
    "hmm_example-hmm_example": hmm_sites,
}


def columns(name, samples):
    """From values ``(*batch, *event)`` of the sites to columns ``(*batch,)`` of the reference."""
    _, names, *_ = load(name)
    parameters = PARAMETERS.get(name, dict)(**samples)
    out = {}
    for column in names:
        parameter, _, index = column.rstrip("]").partition("[")
        value = parameters[parameter]
        out[column] = value[..., int(index) - 1] if index else value
    return out


def sites(name, draws):
    """From draws ``(*batch, n)``, columns in the reference's order, to values of the sites."""
    _, names, *_ = load(name)
    grouped = {}
    for column, draw in zip(names, draws.unbind(-1), strict=True):
        grouped.setdefault(column.partition("[")[0], []).append((column, draw))
    parameters = {
        parameter: torch.stack([d for _, d in group], -1) if "[" in group[0][0] else group[0][1]
        for parameter, group in grouped.items()
    }
    return SITES.get(name, dict)(**parameters)


def load(name):
    """The data, the columns' names, the draws ``(chains, draws, n)`` and a summary by column."""
    entry = json.loads((REFERENCE / f"{name}.json").read_text())
    with np.load(REFERENCE / f"{name}.draws.npz") as file:
        names, draws = file["names"].tolist(), torch.tensor(file["draws"])
    return entry["data"], names, draws.to(torch.get_default_dtype()), entry["reference"]
