"""Bad inputs: a clear error that names argument, rule and value, or the right answer.

The ids are those of the table of bad inputs that the library was designed by: A for energies, B
for arguments, C for starting points, D for models. A warning by name counts as an answer where the
samples cannot be right; finished draws are never lost.
"""

import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_ebm as ebm
from tests.common import FAR

KERNELS = {"nuts": ebm.NUTS, "chees": ebm.ChEES, "hmc": ebm.HMC}
every_kernel = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)


def gaussian(x):
    return 0.5 * x.square().sum(-1)


def ramp(x):
    """An exponential in the first component, where that is positive, by a Gaussian."""
    return x[..., 0] + 0.5 * x[..., 1:].square().sum(-1)


def sampler(energy, make=ebm.NUTS, shape=(2,), base=None, **options):
    """An MCMC of an energy; options of the kernel and of the run together."""
    mine = ("step_size", "adapt_step_size", "target_accept_prob", "max_tree_depth", "metric")
    kernel = make(
        energy, base or ebm.Flat(shape), **{k: options.pop(k) for k in mine if k in options}
    )
    options = {"num_samples": 100, "num_chains": 4, "disable_progbar": True, **options}
    return ebm.MCMC(kernel, **options)


def run(energy, *args, **options):
    """Run quietly and return the sampler."""
    mcmc = sampler(energy, *args, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.ConvergenceWarning)
        mcmc.run()
    return mcmc


def said(mcmc):
    """Run and return what the warnings say, and the error, if there is one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mcmc.run()
        except ValueError as error:
            return str(error)
    return "\n".join(str(w.message) for w in caught)


def errors(mcmc, mean, sd):
    """How many standard errors the mean of the first component is off."""
    x = mcmc.get_samples(group_by_chain=True)["x"][..., 0]
    size = float(mcmc.diagnostics()["x"]["n_eff"][0])
    return float((x.mean() - mean).abs() / sd) * size**0.5


# A: energies -----------------------------------------------------------------------------------


@every_kernel
def test_A01_an_energy_that_is_nan_everywhere_stops_before_sampling(make):
    def nowhere(x):
        return gaussian(x) * torch.nan

    with pytest.raises(ValueError, match="'nowhere' must be finite at the initial point.* nan"):
        run(nowhere, make)


OUTSIDE = {"A02 nan": torch.nan, "A03 wall": torch.inf}


@every_kernel
@pytest.mark.parametrize("value", OUTSIDE.values(), ids=OUTSIDE)
def test_half_space_without_density_leaves_the_law_right(make, value):
    def half(x):
        return torch.where(x[..., 0] < 0, value, ramp(x))

    mcmc = run(half, make, num_samples=200, num_chains=16)
    x = mcmc.get_samples()["x"][:, 0]
    assert x.min() >= 0
    assert errors(mcmc, 1.0, 1.0) < FAR
    assert errors(mcmc, 2.0, 1.0) > FAR, "it can see a wrong mean"
    count = mcmc.sample_stats["invalid"].sum()
    assert (count > 0) == (value != value)


def test_A02_nan_is_counted_and_warned_of():
    text = said(sampler(lambda x: torch.where(x[..., 0] < 0, torch.nan, ramp(x))))
    assert "NaN energies ended" in text
    assert "<lambda>" in text


def test_A03_a_wall_is_no_fault():
    assert "NaN" not in said(sampler(lambda x: torch.where(x[..., 0] < 0, torch.inf, ramp(x))))


def test_A04_an_infinite_energy_at_the_initial_point_is_refused():
    energy = lambda x: torch.where(x[..., 0] < 0, torch.inf, ramp(x))
    at = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    with pytest.raises(ValueError, match=r"finite at the initial .* got inf for chain 1, at x = "):
        run(energy, num_chains=2, initial_params={"x": at})


@every_kernel
def test_A05_a_pit_at_the_start_is_refused(make):
    with pytest.raises(ValueError, match="bounded below at the initial point.* -inf"):
        run(lambda x: torch.where(x[..., 0] > 1, -torch.inf, gaussian(x)), make, num_chains=16)


@every_kernel
def test_A05_a_pit_in_the_middle_is_refused_and_draws_are_kept(make):
    seen = {"warm": False}

    def pit(x):
        away = torch.where(x[..., 0] > 3.5, -torch.inf, gaussian(x))
        return away if seen["warm"] else gaussian(x)

    mcmc = sampler(pit, make, num_samples=2000, warmup_steps=50, backend="eager")
    start = torch.zeros(4, 2)
    mcmc.initial_params = {"x": start}
    mcmc.num_samples = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.ConvergenceWarning)
        mcmc.run()
    seen["warm"] = True
    with pytest.raises(ValueError, match=r"must be bounded below, got -inf at draw \d+ of 2000"):
        mcmc.extend(1999)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert 1 < x.shape[1] < 2000
    assert x.isfinite().all()
    assert (x[..., 0] <= 3.5).all()


def test_A05_a_pit_in_warm_up_is_refused():
    energy = lambda x: torch.where(x[..., 0] > 2.5, -torch.inf, gaussian(x))
    with pytest.raises(
        ValueError, match=r"bounded below, got -inf at move \d+ of 1000 of warm-up"
    ):
        run(energy, warmup_steps=1000, initial_params={"x": torch.zeros(4, 2)})


WRONG = {
    "A06 a vector": (lambda x: x.square(), ValueError, r"expected \(4,\), got \(4, 2\)"),
    "A07 one too many": (
        lambda x: gaussian(x).unsqueeze(-1),
        ValueError,
        r"expected \(4,\), got \(4, 1\)",
    ),
    "A08 one for all": (lambda x: gaussian(x).sum(), ValueError, r"expected \(4,\), got \(\)"),
    "A09 a float": (lambda x: 1.0, TypeError, "return a tensor, got float"),
    "A10 an integer": (lambda x: gaussian(x).long(), TypeError, "got torch.int64"),
    "A11 complex": (lambda x: gaussian(x) * 1j, TypeError, "got torch.complex128"),
    "A12 detached": (lambda x: gaussian(x.detach()), ValueError, "depend differentiably"),
    "A12 constant": (lambda x: torch.ones(x.shape[:-1]), ValueError, "depend differentiably"),
    "A08 batch sum": (
        lambda x: gaussian(x) + gaussian(x).sum(),
        ValueError,
        "each point of a batch its own energy",
    ),
}


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(("energy", "kind", "words"), WRONG.values(), ids=WRONG)
def test_a_value_of_the_wrong_kind_is_refused(energy, kind, words, validate):
    with pyro.validation_enabled(validate):
        mcmc = sampler(energy)
        with pytest.raises(kind, match=f"energy '<lambda>' must.*{words}"):
            mcmc.run()


def test_A13_an_energy_without_gradient_is_warned_of_and_its_law_is_right():
    energy = lambda x: 3.0 * x.abs().round().sum(-1)
    mcmc = sampler(energy, ebm.ChEES, num_samples=300, num_chains=64)
    assert "Zero gradient: that of energy '<lambda>'" in said(mcmc)
    inside = (mcmc.get_samples()["x"].abs() < 0.5).double().mean()  # 1 of 1 + 2 sum e^-3k
    want = 1.0 / (1.0 + 2.0 / (torch.tensor(3.0).exp() - 1.0))
    assert (inside - want).abs() < 0.03  # correlated draws: about five standard errors


RUNAWAYS = {
    "A14 unbounded below": lambda x: -gaussian(x),
    "A15 flat": lambda x: 0.0 * x.sum(-1),
}


@every_kernel
@pytest.mark.parametrize("energy", RUNAWAYS.values(), ids=RUNAWAYS)
def test_an_energy_without_a_density_is_noticed(make, energy):
    options = {"max_tree_depth": 6} if make is ebm.NUTS else {}
    text = said(sampler(energy, make, **options))
    assert "bounded below" in text or "Runaway" in text


def test_D05_a_factor_of_the_wrong_sign_is_noticed():
    def model():
        x = pyro.sample("x", ebm.Flat())
        pyro.factor("f", 0.5 * x.square())

    mcmc = ebm.MCMC(ebm.NUTS(model, max_tree_depth=6), 50, num_chains=4, disable_progbar=True)
    text = said(mcmc)
    assert "bounded below" in text or "Runaway" in text


SCALES = {"A16 1e30": 1e30, "A18 1e11": 1e11}


@every_kernel
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_huge_scale_is_adapted_to_and_not_clamped(make, scale):
    mcmc = run(lambda x: scale * x.square().sum(-1), make, num_samples=300, num_chains=8)
    sd = (0.5 / scale) ** 0.5
    x = mcmc.get_samples()["x"][:, 0] / sd
    assert (x.square().mean() - 1.0).abs() < 0.3
    assert errors(mcmc, 0.0, sd) < FAR


@pytest.mark.parametrize("make", [ebm.NUTS, ebm.ChEES])
def test_A17_a_constant_that_swallows_the_precision_is_warned_of(make):
    torch.set_default_dtype(torch.float32)
    text = said(sampler(lambda x: gaussian(x) + 1e9, make))
    assert "Precision: energy '<lambda>' is near 1.0e+09" in text
    assert "Precision" not in said(sampler(lambda x: gaussian(x) + 1e3, make))
    torch.set_default_dtype(torch.float64)
    assert "Precision" not in said(sampler(lambda x: gaussian(x) + 1e9, make))


SUPPORTS = {"real": torch.distributions.constraints.real, "positive": dist.constraints.positive}


@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
def test_A19_an_energy_that_changes_its_points_is_refused(support):
    energy = lambda x: gaussian(x.mul_(0.5))
    with pytest.raises(ValueError, match="'<lambda>' must not change its points in place"):
        run(energy, base=ebm.Flat((2,), support))


class Net(nn.Module):
    """A Gaussian, with layers that behave differently while they are trained."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(2)

    def forward(self, x):
        return gaussian(self.drop(self.norm(x)))


@every_kernel
def test_A20_A21_layers_are_evaluated_and_restored(make):
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    mcmc = run(net, make, num_samples=300, num_chains=8)
    assert net.training
    assert net.drop.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert (mcmc.get_samples()["x"].var(0) - 1.0).abs().max() < 0.3


def test_A20_layers_are_restored_after_an_error():
    net = Net()
    with pytest.raises(ValueError, match="initial"):
        run(net, initial_params={"x": torch.full((4, 2), torch.inf)})
    with pytest.raises(ebm.SamplingError):
        run(lambda x: net(x) + torch.ones(7))
    assert net.training


@pytest.mark.parametrize("num_chains", [1, 4])
def test_A20_a_random_energy_is_refused(num_chains):
    with pytest.raises(ValueError, match="'<lambda>' must give .*random"):
        run(lambda x: gaussian(x) + torch.rand(len(x)), num_chains=num_chains)


def test_A20_a_random_model_is_refused():
    def model():
        pyro.sample("x", dist.Normal(torch.rand(()), 1.0))

    with pytest.raises(ValueError, match="model 'model' must give .*random"):
        ebm.MCMC(ebm.NUTS(model), 10, disable_progbar=True).run()


def test_A21_chains_that_are_coupled_are_refused():
    energy = lambda x: gaussian(x - x.mean(0))
    with pytest.raises(ValueError, match="each point of a batch its own energy"):
        run(energy)


def test_A22_an_error_at_the_first_call_is_shown_chained():
    def broken(x):
        raise LookupError("no such thing")

    words = "energy 'broken' raised LookupError at its first call: no such thing"
    with pytest.raises(ebm.SamplingError, match=words) as caught:
        run(broken)
    assert isinstance(caught.value.__cause__, LookupError)


@every_kernel
def test_A23_an_error_in_the_middle_names_the_draw_and_loses_none(make):
    calls = {"count": 0, "last": 10**9}

    def fails(x):
        calls["count"] += 1
        if calls["count"] == calls["last"]:
            raise LookupError("the disk is full")
        return gaussian(x)

    mcmc = sampler(fails, make, num_samples=10**6, warmup_steps=20)
    whole = run(gaussian, make, num_samples=200, warmup_steps=20)
    calls["last"] = 500
    pyro.set_rng_seed(0)
    words = (
        r"'fails' raised LookupError at draw (\d+) of 1000000; the (\d+) finished.*disk is full"
    )
    with pytest.raises(ebm.SamplingError, match=words) as caught:
        mcmc.run()
    assert isinstance(caught.value.__cause__, LookupError)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert x.shape[:1] + x.shape[2:] == (4, 2)
    assert f"at draw {x.shape[1] + 1} of" in str(caught.value)
    assert f"the {x.shape[1]} finished draws" in str(caught.value)
    assert x.shape[1] > 10
    assert whole.get_samples()["x"].shape == (800, 2)
    assert mcmc.sample_stats["lp"].shape == x.shape[:2]


def test_A23_an_error_in_warm_up_names_the_move():
    calls = {"count": 0}

    def fails(x):
        calls["count"] += 1
        if calls["count"] == 50:
            raise LookupError
        return gaussian(x)

    mcmc = sampler(fails)
    with pytest.raises(ebm.SamplingError, match=r"at move \d+ of 100 of warm-up; the 0 finished"):
        mcmc.run()
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (4, 0, 2)


@every_kernel
def test_A24_a_matrix_without_a_factor_is_a_rejection(make):
    def half(x):  # the Cholesky factor exists where the first component is positive
        matrix = x[..., :1, None] * torch.eye(2)
        return ramp(x) + 0.0 * torch.linalg.cholesky(matrix).sum((-1, -2))

    mcmc = sampler(half, make, num_samples=100, num_chains=8)
    assert "NaN energies ended" in said(mcmc)
    assert mcmc.sample_stats["invalid"].any()
    assert mcmc.get_samples()["x"][:, 0].min() > 0
    assert errors(mcmc, 1.0, 1.0) < FAR


# B: arguments ----------------------------------------------------------------------------------

BAD = {
    "B01 zero": 0.0,
    "B02 negative": -0.1,
    "B03 nan": float("nan"),
    "B04 infinite": float("inf"),
}


@every_kernel
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_step_size_is_positive_and_finite(make, value):
    with pytest.raises(ValueError, match=f"step_size must be positive and finite, got {value}"):
        make(gaussian, ebm.Flat((2,)), step_size=value)


FUNCTIONS = {
    "hmc": lambda step: ebm.kernels.hmc(gaussian, step, 3),
    "nuts": lambda step: ebm.kernels.nuts(gaussian, step),
    "mala": lambda step: ebm.kernels.mala(gaussian, step),
    "ula": lambda step: ebm.kernels.ula(gaussian, step),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_so_is_that_of_a_kernel(make, value, tensor):
    step = torch.tensor([1.0, value]) if tensor else value
    with pytest.raises(ValueError, match="step_size must be positive and finite, got"):
        make(step)


BOUNDS = {
    "B05 no leapfrog steps": (lambda: ebm.HMC(gaussian, ebm.Flat(), num_steps=0), "num_steps"),
    "B05 none of a kernel": (lambda: ebm.kernels.hmc(gaussian, 0.1, 0), "num_steps"),
    "B06 no samples": (lambda: sampler(gaussian, num_samples=0), "num_samples must be at least 1"),
    "B07 negative": (lambda: sampler(gaussian, num_samples=-5), "num_samples must .* got -5"),
    "B08 no chains": (lambda: sampler(gaussian, num_chains=0), "num_chains must be at least 1"),
    "B09 warmup": (lambda: sampler(gaussian, warmup_steps=-1), "warmup_steps must .* got -1"),
    "thin": (lambda: sampler(gaussian, thin=0), "thin must be at least 1, got 0"),
    "block_size": (lambda: sampler(gaussian, block_size=0), "block_size must be at least 1"),
    "blocks": (lambda: sampler(gaussian, blocks=[1]), r"blocks must be among \[0\], got \[1\]"),
    "no blocks": (lambda: sampler(gaussian, blocks=[]), r"blocks must be among \[0\], got \[\]"),
    "backend": (lambda: sampler(gaussian, backend="jax"), "backend must be one of"),
    "metric": (lambda: sampler(gaussian, metric="full"), "metric must be one of"),
    "depth": (lambda: sampler(gaussian, max_tree_depth=0), "max_tree_depth must be .*from 1"),
    "B10 1.5": (lambda: sampler(gaussian, target_accept_prob=1.5), "between 0 and 1, got 1.5"),
    "B11 nan": (lambda: sampler(gaussian, target_accept_prob=float("nan")), "got nan"),
    "B12 beta": (lambda: ebm.GibbsBoltzmann(gaussian, ebm.Flat(), -1.0), "beta must be positive"),
    "B13 beta": (lambda: ebm.GibbsBoltzmann(gaussian, ebm.Flat(), torch.nan), "beta must be"),
    "B14 beta": (lambda: ebm.GibbsBoltzmann(gaussian, ebm.Flat(), 0.0), "beta = 0 is the base"),
}


@pytest.mark.parametrize(("make", "words"), BOUNDS.values(), ids=BOUNDS)
def test_an_argument_has_its_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


KINDS = {
    "kernel": (lambda: ebm.MCMC(pyro.infer.NUTS(gaussian), 10), "kernel must be ebm.NUTS"),
    "num_samples": (lambda: sampler(gaussian, num_samples=2.5), "whole number, got 2.5"),
    "num_chains": (lambda: sampler(gaussian, num_chains=True), "whole number, got True"),
    "target": (lambda: ebm.NUTS(3.0), "target must be a Pyro model.* got float"),
    "step_size": (lambda: ebm.NUTS(gaussian, step_size="small"), "step_size must be a number"),
}


@pytest.mark.parametrize(("make", "words"), KINDS.values(), ids=KINDS)
def test_an_argument_has_its_kind(make, words):
    with pytest.raises(TypeError, match=words):
        make()


STEPS = {"B15 too large": 1e3, "B16 overflow": 1e200}


@every_kernel
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_step_that_is_too_large_is_counted_and_warned_of(make, step):
    mcmc = sampler(gaussian, make, step_size=step, adapt_step_size=False, metric=None)
    text = said(mcmc)
    assert "Divergences: 400 of 400" in text
    assert "Frozen" in text
    assert mcmc.sample_stats["diverging"].all()
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert torch.equal(x[:, 0], x[:, -1])


# C: starting points ----------------------------------------------------------------------------

STARTS = {
    "C01 nan": (torch.tensor([[1.0, 0.0], [0.0, torch.nan]]), ValueError, "finite, got .*chain 1"),
    "C02 integer": (torch.ones(2, 2, dtype=torch.long), TypeError, "got torch.int64"),
    "C03 complex": (torch.ones(2, 2, dtype=torch.cfloat), TypeError, "got torch.complex64"),
    "C08 no chains": (torch.ones(0, 2), ValueError, r"the shape \(2, 2\), got \(0, 2\)"),
    "C10 meta": (torch.ones(2, 2, device="meta"), ValueError, "the device cpu, got meta"),
    "shape": (torch.ones(2, 3), ValueError, r"the shape \(2, 2\), got \(2, 3\)"),
    "a list": ([[1.0, 2.0]], TypeError, "be a tensor, got list"),
}


@pytest.mark.parametrize(("start", "kind", "words"), STARTS.values(), ids=STARTS)
def test_a_wrong_starting_point_is_refused(start, kind, words):
    with pytest.raises(kind, match=rf"initial_params\['x'\] must.*{words}"):
        run(gaussian, num_chains=2, initial_params={"x": start})


HALVES = {"C04 float16": torch.float16, "C05 bfloat16": torch.bfloat16}


@pytest.mark.parametrize("make", [ebm.NUTS, ebm.ChEES])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_half_precision_runs_in_single(make, dtype):
    torch.set_default_dtype(torch.float32)
    mcmc = run(gaussian, make, initial_params={"x": torch.ones(4, 2, dtype=dtype)})
    assert mcmc.get_samples()["x"].dtype == torch.float32


@pytest.mark.parametrize("make", [ebm.NUTS, ebm.ChEES])
def test_C06_double_precision_stays(make):
    torch.set_default_dtype(torch.float32)
    start = torch.ones(4, 2, dtype=torch.float64)
    mcmc = run(gaussian, make, initial_params={"x": start})
    assert mcmc.get_samples()["x"].dtype == torch.float64
    assert not torch.equal(mcmc.get_samples()["x"], mcmc.get_samples()["x"].float().double())
    assert run(gaussian, make).get_samples()["x"].dtype == torch.float32


def test_C06_so_it_does_for_a_model():
    torch.set_default_dtype(torch.float32)
    mcmc = ebm.MCMC(
        ebm.NUTS(lambda: pyro.sample("x", dist.Gamma(2.0, 1.0))),
        20,
        initial_params={"x": torch.zeros(2, dtype=torch.float64)},
        num_chains=2,
        disable_progbar=True,
    )
    with pytest.warns(ebm.ConvergenceWarning):
        mcmc.run()
    assert mcmc.get_samples()["x"].dtype == torch.float64


def test_C07_an_empty_event_is_refused():
    with pytest.raises(ValueError, match=r"must not be empty, got \(0,\)"):
        run(gaussian, shape=(0,))


def test_C09_strides_do_not_matter():
    start = torch.randn(2, 4).T
    assert not start.is_contiguous()
    pyro.set_rng_seed(1)
    a = run(gaussian, initial_params={"x": start}).get_samples()["x"]
    pyro.set_rng_seed(1)
    b = run(gaussian, initial_params={"x": start.contiguous()}).get_samples()["x"]
    assert torch.equal(a, b)


SHAPES = {"C11 scalar": (), "C12 image": (3, 4, 4)}


@every_kernel
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_events_of_any_shape_have_their_law(make, shape):
    energy = lambda x: 0.5 * x.square().sum(tuple(range(x.dim() - len(shape), x.dim())))
    if not shape:
        energy = lambda x: 0.5 * x.square()
    mcmc = run(energy, make, shape=shape, num_samples=200, num_chains=8)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert x.shape == (8, 200, *shape)
    assert (x.reshape(1600, -1).var(0).mean() - 1.0).abs() < 0.2


@every_kernel
def test_C13_C14_the_callers_tensor_is_left_alone(make):
    plain = torch.ones(4, 2)
    tracked = torch.ones(4, 2, requires_grad=True)
    for start in (plain, tracked):
        x = run(gaussian, make, initial_params={"x": start}).get_samples()["x"]
        assert not x.requires_grad
        assert torch.equal(start.detach(), torch.ones(4, 2))
        assert start.grad is None
    assert not plain.requires_grad
    assert tracked.requires_grad


@every_kernel
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_C15_parameters_get_no_gradient(make, backend):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    run(lambda x: net(x).squeeze(-1) + gaussian(x), make, backend=backend, num_samples=20)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


MODES = {"C16 no_grad": torch.no_grad, "C17 inference_mode": torch.inference_mode}


@every_kernel
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_it_runs_where_gradients_are_off(make, mode):
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with mode():
        mcmc = run(gaussian, make)
        chains = ebm.MCMC(make(model), 20, num_chains=2, disable_progbar=True)
        with pytest.warns(ebm.ConvergenceWarning):
            chains.run(torch.tensor(1.0))
    assert mcmc.get_samples()["x"].std() > 0.5
    assert chains.get_samples()["mean"].std() > 0.1


@pytest.mark.parametrize("make", [ebm.NUTS, ebm.ChEES])
def test_C18_a_million_dimensions_take_seconds(make):
    torch.set_default_dtype(torch.float32)
    clock = time.perf_counter()
    mcmc = run(
        gaussian,
        make,
        shape=(10**6,),
        num_samples=5,
        num_chains=1,
        step_size=0.05,
        warmup_steps=2,
        **({"max_tree_depth": 3} if make is ebm.NUTS else {}),
    )
    assert mcmc.get_samples()["x"].shape == (5, 10**6)
    assert time.perf_counter() - clock < 60.0
    assert len(mcmc.adapted.metric.inverse_mass) in (1, 10**6), "no matrix"


def test_C19_a_wrong_name_is_refused_with_the_known_ones():
    with pytest.raises(KeyError, match=r"must have the sites \['x'\], got \['y'\]"):
        run(gaussian, initial_params={"y": torch.zeros(4, 2)})


# D: models -------------------------------------------------------------------------------------


def regression(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Gamma(scale, 1.0), obs=y)


DATA = {"D01 outside the support": [-1.0, 1.0], "D02 nan": [torch.nan, 1.0]}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_data_that_are_impossible_are_refused_with_their_site(data):
    mcmc = ebm.MCMC(ebm.NUTS(regression), 10, disable_progbar=True)
    with pytest.raises(ValueError, match="site 'y' must have data that are possible"):
        mcmc.run(torch.tensor(data))


def test_D02_masked_data_may_be_anything():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y)), pyro.poutine.mask(mask=y > 0):
            pyro.sample("y", dist.Exponential(mean.exp()), obs=y)

    mcmc = ebm.MCMC(ebm.NUTS(model), 4, disable_progbar=True)
    with pytest.warns(ebm.ConvergenceWarning):
        mcmc.run(torch.tensor([-1.0, 1.0]))


def test_D01_a_density_that_is_nowhere_is_named():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", x - torch.inf)

    with pytest.raises(ValueError, match="finite at the initial point.*not finite at 'wall'"):
        ebm.MCMC(ebm.NUTS(model), 10, disable_progbar=True).run()


def test_D04_a_name_that_is_used_twice_is_refused():
    def model():
        pyro.sample("s", dist.Normal(0.0, 1.0))
        pyro.sample("s", dist.Normal(0.0, 1.0))

    with pytest.raises(RuntimeError, match="Multiple sample sites named 's'"):
        ebm.MCMC(ebm.NUTS(model), 10, disable_progbar=True).run()


def test_a_model_without_continuous_sites_is_refused():
    with pytest.raises(ValueError, match="at least one continuous latent site"):
        ebm.MCMC(ebm.NUTS(lambda: pyro.sample("k", dist.Bernoulli(0.5))), 10).run()
