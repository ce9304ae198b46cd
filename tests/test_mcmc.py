"""The contract of ``ebm.MCMC``, for each kind of sampler."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_median, init_to_sample, init_to_value
from pyro.infer.mcmc.util import initialize_model
from torch import nn

import pyro_ebm as ebm
from pyro_ebm import checkpoint
from pyro_ebm._keep import Memory, Progress
from pyro_ebm._potential import potential_of, split
from tests.common import EXACT, FAR

pytestmark = pytest.mark.filterwarnings("ignore::pyro_ebm.ConvergenceWarning")

KERNELS = {"NUTS": ebm.NUTS, "HMC": ebm.HMC, "ChEES": ebm.ChEES, "MALA": ebm.MALA}
every_kernel = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
some_kernels = pytest.mark.parametrize("make", [ebm.NUTS, ebm.ChEES], ids=["NUTS", "ChEES"])

SCALES = torch.tensor([1.0, 3.0])


def gaussian(x):
    return 0.5 * (x / SCALES.to(x)).square().sum(-1)


def run(target, *args, make=ebm.NUTS, seed=0, kernel=None, **options):
    """Run quietly from a seed and return the sampler."""
    if not isinstance(target, ebm.GibbsBoltzmann) and target is gaussian:
        target = ebm.GibbsBoltzmann(gaussian, ebm.Flat((2,)))
    options = {"num_samples": 40, "num_chains": 4, "disable_progbar": True, **options}
    mcmc = ebm.MCMC(make(target, **(kernel or {})), **options)
    pyro.set_rng_seed(seed)
    mcmc.run(*args)
    return mcmc


def draws(mcmc, name="x"):
    return mcmc.get_samples(group_by_chain=True)[name]


def errors(mcmc, name, mean, sd):
    """How many standard errors the means of a site are off: the largest component."""
    found = mcmc.diagnostics()[name]["n_eff"].clamp(max=draws(mcmc, name).shape[:2].numel())
    off = (draws(mcmc, name).flatten(0, 1).mean(0) - mean).abs()
    return float((off / sd * found.sqrt()).max())


# Draws -----------------------------------------------------------------------------------------


@every_kernel
def test_draws_come_by_chain_or_together(make):
    mcmc = run(gaussian, make=make)
    x = draws(mcmc)
    assert x.shape == (4, 40, 2)
    assert torch.equal(mcmc.get_samples()["x"], x.flatten(0, 1))
    assert mcmc.get_samples(num_samples=7)["x"].shape == (7, 2)
    assert not x.requires_grad


@every_kernel
def test_moments_of_a_gaussian_are_right(make):
    mcmc = run(gaussian, make=make, num_samples=400, num_chains=16)
    assert errors(mcmc, "x", 0.0, SCALES) < FAR
    assert errors(mcmc, "x", 0.7 * SCALES, SCALES) > FAR, "it can see a wrong mean"
    ratio = draws(mcmc).flatten(0, 1).var(0) / SCALES.square()
    assert (ratio - 1.0).abs().max() < 0.2


def constrained():
    """Three kinds of support, whose means and variances are known."""
    pyro.sample("scale", dist.Gamma(3.0, 2.0))
    pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("corr", dist.LKJCholesky(2, torch.tensor(2.0)))


@every_kernel
def test_moments_of_a_constrained_model_are_right(make):
    mcmc = run(constrained, make=make, num_samples=300, num_chains=16)
    found = mcmc.get_samples()
    assert torch.allclose(found["share"].sum(-1), torch.ones(()))
    assert errors(mcmc, "scale", 1.5, 0.75**0.5) < FAR
    assert errors(mcmc, "scale", 2.5, 0.75**0.5) > FAR, "it can see a wrong mean"
    mean = torch.tensor([1.0, 2.0, 3.0]) / 6.0
    assert errors(mcmc, "share", mean, (mean * (1.0 - mean) / 7.0).sqrt()) < FAR
    # Of an LKJ matrix of two dimensions (1 + r) / 2 is Beta(2, 2), so that var(r) is 1/5.
    r = (found["corr"] @ found["corr"].mT)[:, 0, 1]
    assert abs(float(r.square().mean()) - 0.2) < 0.05


def test_an_energy_may_have_a_base_and_a_temperature():
    d = ebm.GibbsBoltzmann(
        lambda x: 0.5 * x.square().sum(-1), dist.Normal(torch.zeros(2), 1.0).to_event(1), 3.0
    )
    mcmc = run(d, num_samples=300, num_chains=8)
    assert (draws(mcmc).flatten(0, 1).var(0) * 4.0 - 1.0).abs().max() < 0.2
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    given = ebm.MCMC(ebm.NUTS(lambda x: x.sum(-1), base), 300, num_chains=8, disable_progbar=True)
    given.run()
    assert errors(given, "x", -1.0, 1.0) < FAR


BATCHES = {
    "real": (dist.Normal(torch.zeros(3), 2.0), 0.0),
    "positive": (dist.Gamma(torch.tensor([2.0, 3.0, 4.0]), 1.0), None),
    "simplex": (dist.Dirichlet(torch.ones(3, 2)), None),
}


@pytest.mark.parametrize("num_chains", [2, 3])
@pytest.mark.parametrize(("base", "mean"), BATCHES.values(), ids=BATCHES)
def test_a_batch_of_distributions_has_its_law(base, mean, num_chains):
    energy = lambda x: 0.0 * (x.sum(-1) if base.event_dim else x)
    with pyro.validation_enabled(False):
        d = ebm.GibbsBoltzmann(energy, base)
        mcmc = run(d, num_samples=400, num_chains=num_chains)
    assert draws(mcmc).shape == (num_chains, 400, *d.shape())
    assert errors(mcmc, "x", base.mean, base.variance.sqrt()) < FAR


# Models ----------------------------------------------------------------------------------------


def enumerated(y):
    """A mixture whose labels are summed out, in a plate."""
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    means = pyro.sample("means", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("n", len(y)):
        label = pyro.sample("label", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(means[..., label.long()], 1.0), obs=y)


def hierarchical(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", 3, dim=-1):
        mean = pyro.sample("mean", dist.Normal(0.0, scale))
        with pyro.plate("n", len(y), dim=-2):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


MODELS = {
    "enumerated": (enumerated, torch.tensor([-1.3, 0.2, 1.5])),
    "plates": (hierarchical, torch.randn(4, 3, generator=torch.Generator().manual_seed(0))),
}


@pytest.mark.parametrize(("model", "data"), MODELS.values(), ids=MODELS)
def test_the_energy_of_a_model_is_pyros_potential(model, data):
    target = potential_of(model, (data,), {})
    _, potential, _, _ = initialize_model(model, (data,))
    z = torch.randn(5, target.num_dims)
    want = torch.stack([potential(split(target.sites, point)) for point in z])
    torch.testing.assert_close(target.energy(z), want, **EXACT)
    assert not torch.allclose(target.energy(z), want.roll(1))


def test_a_model_gets_its_arguments():
    def model(y, *, scale):
        mean = pyro.sample("mean", dist.Normal(0.0, 1e3))
        pyro.sample("y", dist.Normal(mean, scale), obs=y)

    mcmc = ebm.MCMC(ebm.NUTS(model), 100, num_chains=4, disable_progbar=True)
    mcmc.run(torch.tensor(5.0), scale=0.01)
    assert (mcmc.get_samples()["mean"] - 5.0).abs().max() < 0.1
    assert mcmc.model is model
    z = mcmc.transforms["mean"](torch.tensor(2.0))
    assert z == 2.0


def test_subsampling_is_refused_with_its_reason():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y), subsample_size=2) as i:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[i])

    with pytest.raises(NotImplementedError, match="a plate subsamples.*leave subsample_size out"):
        run(model, torch.zeros(5))


STRATEGIES = {
    "sample": (init_to_sample, None),
    "median": (init_to_median, None),
    "value": (init_to_value(values={"scale": torch.tensor(1.5)}), 1.5),
}


@pytest.mark.parametrize(("strategy", "want"), STRATEGIES.values(), ids=STRATEGIES)
def test_chains_start_by_pyros_strategies(strategy, want):
    model = lambda: pyro.sample("scale", dist.Uniform(1.0, 2.0))
    stay = {"step_size": 1e-9, "adapt_step_size": False, "init_strategy": strategy}
    options = {"num_samples": 1, "warmup_steps": 0, "num_chains": 3}
    x = draws(run(model, kernel=stay, **options), "scale")
    if want is None:
        assert len(x.unique()) == 3
    else:
        assert (x - want).abs().max() < 1e-6
    d = ebm.GibbsBoltzmann(gaussian, dist.Normal(torch.zeros(2), 10.0).to_event(1))
    if want is None:
        assert draws(run(d, kernel=stay, **options)).isfinite().all()


def test_an_audit_comes_first():
    def model(y):
        k = pyro.sample("k", dist.Gamma(2.0, 1.0))
        pyro.sample("y", ebm.GibbsBoltzmann(lambda x: k * x**2, ebm.Flat()), obs=y)

    with pytest.raises(ebm.UnnormalizedError, match="log Z depends on the random k"):
        run(model, torch.tensor(1.0))


@pytest.mark.parametrize("registered", [False, True])
def test_a_fixed_network_may_be_a_prior(registered):
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def model(y):
        if registered:
            pyro.module("net", net)
        x = pyro.sample("x", ebm.GibbsBoltzmann(lambda x: net(x).squeeze(-1), base))
        pyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)

    mcmc = run(model, torch.ones(2), num_samples=100)
    assert (draws(mcmc).mean((0, 1)) - 1.0).abs().max() < 0.3
    assert all(p.grad is None for p in net.parameters())


def test_a_distribution_from_outside_may_check_its_arguments():
    prior = dist.Normal(torch.zeros(2), 1.0, validate_args=True).to_event(1)
    noise = dist.Gamma(torch.tensor(2.0), 1.0, validate_args=True)

    def model(y):
        x = pyro.sample("x", prior)
        pyro.sample("noise", noise)
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "chains of this model")
        mcmc = run(model, torch.ones(2))
    assert prior.base_dist._validate_args
    assert noise._validate_args
    assert draws(mcmc).shape == (4, 40, 2)


def branching():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    scale = 1.0 if x > 0 else 0.5
    pyro.factor("f", -0.5 * (x / scale).square())


def test_a_model_with_branches_runs_one_by_one_and_says_so():
    with pytest.warns(UserWarning, match="one by one, since it cannot be traced"):
        mcmc = run(branching, num_samples=300)
    x = mcmc.get_samples()["x"]
    # exp(-x^2) where x > 0, exp(-2.5 x^2) elsewhere: masses as 1 to 1 / sqrt(2.5)
    assert abs(float((x > 0).double().mean()) - 1.0 / (1.0 + 0.4**0.5)) < 0.08


# Repetition ------------------------------------------------------------------------------------


@every_kernel
def test_a_seed_repeats_a_run_bit_for_bit(make):
    a, b, c = (run(gaussian, make=make, seed=s) for s in (1, 1, 2))
    assert torch.equal(draws(a), draws(b))
    assert not torch.equal(draws(a), draws(c))
    for name, value in a.sample_stats.items():
        assert torch.equal(value, b.sample_stats[name]), name


@every_kernel
@pytest.mark.parametrize("thin", [1, 3])
def test_two_halves_are_one_run_bit_for_bit(make, thin):
    whole = run(gaussian, make=make, num_samples=110, warmup_steps=30, thin=thin)
    parts = run(gaussian, make=make, num_samples=33, warmup_steps=30, thin=thin)
    assert not torch.equal(draws(parts)[:, -1], draws(whole)[:, -1])
    pyro.set_rng_seed(99)  # a run has its own stream of random numbers
    parts.extend(77)
    assert torch.equal(draws(parts), draws(whole))
    assert torch.equal(parts.sample_stats["lp"], whole.sample_stats["lp"])
    assert parts.num_samples == 110


@every_kernel
def test_thinning_keeps_every_third_draw(make):
    all_, some = (
        run(gaussian, make=make, num_samples=n, warmup_steps=30, thin=thin)
        for n, thin in ((99, 1), (33, 3))
    )
    assert torch.equal(draws(all_)[:, 2::3], draws(some))


@every_kernel
def test_a_block_alone_is_that_of_the_run_bit_for_bit(make):
    warm = run(gaussian, make=make).adapted
    start = {"x": torch.randn(8, 2)}
    for given in (None, start):
        options = {
            "make": make,
            "num_chains": 8,
            "block_size": 4,
            "warm": warm,
            "warmup_steps": 0,
            "initial_params": given,
        }
        whole = draws(run(gaussian, **options))
        assert whole.shape[0] == 8
        for i in (0, 1):
            alone = run(gaussian, blocks=[i], **options)
            assert torch.equal(draws(alone), whole[4 * i : 4 * i + 4])
        assert not torch.equal(whole[:4], whole[4:])


@every_kernel
def test_adaptation_is_handed_on(make):
    first = run(gaussian, make=make, num_samples=200, num_chains=16)
    then = run(gaussian, make=make, warm=first.adapted, warmup_steps=0)
    assert torch.allclose(then.adapted.step_size, first.adapted.step_size)
    assert then.adapted.num_steps == first.adapted.num_steps
    assert torch.equal(then.adapted.metric.inverse_mass, first.adapted.metric.inverse_mass)
    assert then.cost["warmup_gradients"] == 0


@every_kernel
def test_its_kernel_drives_other_chains(make):
    mcmc = run(gaussian, make=make, num_chains=16)
    kernel = mcmc.make_kernel(gaussian)
    state = kernel.init(3.0 * torch.randn(500, 2))
    for _ in range(60):
        state, _ = kernel.step(state)
    assert (state.position.var(0) / SCALES.square() - 1.0).abs().max() < 0.4


# Checkpoints -----------------------------------------------------------------------------------

SCRIPT = """
import sys, time, warnings
import pyro, torch
import pyro_ebm as ebm
warnings.simplefilter("ignore")
path, make, out, slow = sys.argv[1:5]
def energy(x):
    time.sleep(float(slow))
    return 0.5 * x.square().sum(-1)
kernel = getattr(ebm, make)(energy, ebm.Flat((2,)))
pyro.set_rng_seed(5)
mcmc = ebm.MCMC(kernel, 60, 40, num_chains=3, thin=2, checkpoint=path or None,
                disable_progbar=True, backend="eager")
print("begins", flush=True)
mcmc.run()
torch.save((mcmc.get_samples()["x"], mcmc.sample_stats["lp"]), out)
print("draws", mcmc.get_samples(group_by_chain=True)["x"].shape[1], flush=True)
"""


def start(path, make, out, slow=0.0):
    command = [sys.executable, "-c", SCRIPT, str(path), make, str(out), str(slow)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_is_resumed_bit_for_bit(tmp_path):
    path, out = tmp_path / "run.ckpt", tmp_path / "out.pt"
    whole = start("", "NUTS", tmp_path / "whole.pt")
    for wait in np.random.default_rng(0).uniform(0.0, 1.5, size=2):  # seconds
        process = start(path, "NUTS", out, slow=0.004)
        assert process.stdout.readline() == "begins\n"
        before = path.stat().st_mtime_ns if path.exists() else 0
        while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        process.communicate()
        checkpoint.load(path)  # it is whole
        assert process.returncode == -signal.SIGKILL
    done = start(path, "NUTS", out)
    for process in (done, whole):
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 0, error
    for a, b in zip(torch.load(out), torch.load(tmp_path / "whole.pt"), strict=True):
        assert torch.equal(a, b)


@every_kernel
@pytest.mark.parametrize("last", [20, 60, 100])
def test_a_run_that_stops_anywhere_is_resumed_bit_for_bit(make, last, tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_ebm._run.SAVING", 1e9)  # save whenever it may
    options = {"make": make, "num_samples": 150, "warmup_steps": 30, "backend": "eager"}
    whole = run(gaussian, **options)
    path = tmp_path / "run.ckpt"

    class Killed(BaseException):
        """Nothing in the library catches it, as nothing catches a kill."""

    saved = {"count": 0}
    save = checkpoint.save

    def counted(path, state):
        save(path, state)
        saved["count"] += 1
        if saved["count"] == last // 20:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", counted)
    with pytest.raises(Killed):
        run(gaussian, checkpoint=path, **options)
    monkeypatch.setattr(checkpoint, "save", save)
    resumed = run(gaussian, checkpoint=path, seed=123, **options)
    assert torch.equal(draws(resumed), draws(whole))
    assert resumed.cost["sampling_gradients"] == whole.cost["sampling_gradients"]
    longer = run(gaussian, checkpoint=path, **{**options, "num_samples": 170})
    whole.extend(20)
    assert torch.equal(draws(longer), draws(whole))
    fewer = run(gaussian, checkpoint=path, **{**options, "num_samples": 10})
    assert draws(fewer).shape[1] == 170, "draws that are there are not thrown away"


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run.ckpt"
    run(gaussian, checkpoint=path)
    return path


def test_a_checkpoint_with_a_wrong_bit_is_refused(saved):
    data = saved.read_bytes()
    for place in np.random.default_rng(0).integers(len(data), size=30):
        broken = bytearray(data)
        broken[place] ^= 1 << int(place) % 8
        saved.write_bytes(broken)
        with pytest.raises(checkpoint.CheckpointError, match="damaged|another file"):
            run(gaussian, checkpoint=saved)


def test_a_checkpoint_that_is_cut_short_is_refused(saved):
    data = saved.read_bytes()
    for length in (0, 10, 50, 200, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:length])
        with pytest.raises(checkpoint.CheckpointError, match="damaged|another file"):
            run(gaussian, checkpoint=saved)


def test_code_in_a_checkpoint_is_not_run(saved, tmp_path, monkeypatch):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    saved.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(checkpoint.CheckpointError, match="another file"):
        run(gaussian, checkpoint=saved)
    checkpoint.save(saved, {"settings": Evil()})  # with a right SHA-256
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        run(gaussian, checkpoint=saved)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Evil()))  # noqa: S301 - it would have been seen
    assert ran.exists()


OTHERS = {
    "warmup_steps": {"warmup_steps": 7},
    "thin": {"thin": 2},
    "blocks": {"num_chains": 5},
    "kernel": {"make": ebm.ChEES},
    "target_accept_prob": {"kernel": {"target_accept_prob": 0.9}},
    "draws": {"reduce": print},
}


@pytest.mark.parametrize(("name", "options"), OTHERS.items(), ids=OTHERS)
def test_a_checkpoint_of_other_settings_is_refused_by_name(saved, name, options):
    with pytest.raises(checkpoint.CheckpointError, match=f"its {name} is .* this run's is"):
        run(gaussian, checkpoint=saved, **options)


def test_a_checkpoint_of_another_target_is_refused(saved):
    d = ebm.GibbsBoltzmann(lambda x: x.square().sum(-1), ebm.Flat((2,)))
    with pytest.raises(checkpoint.CheckpointError, match="must be of the same target"):
        run(d, checkpoint=saved)
    checkpoint.save(saved, {"x": 1})
    with pytest.raises(checkpoint.CheckpointError, match="must be of a run"):
        run(gaussian, checkpoint=saved)


# Interruptions ---------------------------------------------------------------------------------


@every_kernel
def test_an_interrupt_keeps_the_draws_and_the_run_goes_on(make):
    calls = {"count": 0, "stop": 400}

    def energy(x):
        calls["count"] += 1
        if calls["count"] == calls["stop"]:
            raise KeyboardInterrupt
        return gaussian(x)

    d = ebm.GibbsBoltzmann(energy, ebm.Flat((2,)))
    with pytest.warns(
        ebm.ConvergenceWarning, match=r"interrupted at draw (\d+) of 1000; "
    ) as said:
        mcmc = run(d, make=make, num_samples=1000, warmup_steps=20)
    count = draws(mcmc).shape[1]
    assert 1 < count < 1000
    assert f"interrupted at draw {count + 1} of 1000; the {count} finished" in str(said[0].message)
    assert said[0].filename == __file__
    before = draws(mcmc).clone()
    mcmc.extend(30)
    assert draws(mcmc).shape[1] == count + 30
    assert torch.equal(draws(mcmc)[:, :count], before)


def test_an_interrupt_in_warm_up_is_gone_on_from():
    calls = {"count": 0}

    def energy(x):
        calls["count"] += 1
        if calls["count"] == 60:
            raise KeyboardInterrupt
        return gaussian(x)

    d = ebm.GibbsBoltzmann(energy, ebm.Flat((2,)))
    with pytest.warns(ebm.ConvergenceWarning, match=r"at move \d+ of 100 of warm-up; the 0 fini"):
        mcmc = run(d, warmup_steps=100)
    mcmc.extend(300)
    assert (draws(mcmc).flatten(0, 1).var(0) / SCALES.square() - 1.0).abs().max() < 0.5


def test_control_c_keeps_the_draws(tmp_path):
    process = start(tmp_path / "run.ckpt", "NUTS", tmp_path / "out.pt", slow=0.003)
    assert process.stdout.readline() == "begins\n"
    while not (tmp_path / "run.ckpt").exists():
        time.sleep(0.01)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    text, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert re.fullmatch(r"draws \d+\n", text)
    checkpoint.load(tmp_path / "run.ckpt")


# Where draws go --------------------------------------------------------------------------------


@some_kernels
def test_draws_may_be_reduced_as_they_come(make):
    chunks = []
    mcmc = run(gaussian, make=make, num_samples=150, reduce=chunks.append)
    whole = run(gaussian, make=make, num_samples=150)
    assert torch.equal(torch.cat([c["x"] for c in chunks], 1), draws(whole))
    assert all(set(c) == {"x"} and c["x"].shape[1] <= 64 for c in chunks)
    assert mcmc.get_samples() == {}
    assert torch.equal(mcmc.sample_stats["lp"], whole.sample_stats["lp"])


def test_a_reduction_that_fails_is_named():
    def full(found):
        raise OSError("no space left")

    with pytest.raises(ebm.SamplingError, match=r"\(stream or reduce\) raised OSError.*no space"):
        run(gaussian, reduce=full)


def test_draws_may_be_streamed_to_a_file(tmp_path):
    xr = pytest.importorskip("xarray")
    pytest.importorskip("zarr")
    options = {"num_samples": 100, "warmup_steps": 20, "stream": tmp_path / "draws.zarr"}
    mcmc = run(gaussian, **options)
    mcmc.extend(50)
    whole = run(gaussian, num_samples=150, warmup_steps=20)
    found = xr.open_zarr(tmp_path / "draws.zarr", consolidated=False)
    assert found["x"].dims == ("chain", "draw", "x_dim_0")
    assert torch.equal(torch.from_numpy(found["x"].values), draws(whole))
    assert found["draw"].values.tolist() == list(range(150))
    with pytest.raises(FileExistsError, match="stream must be a new store"):
        run(gaussian, **options)


def test_a_stream_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    xr = pytest.importorskip("xarray")
    pytest.importorskip("zarr")
    monkeypatch.setattr("pyro_ebm._run.SAVING", 1e9)
    options = {
        "num_samples": 150,
        "warmup_steps": 20,
        "stream": tmp_path / "draws.zarr",
        "checkpoint": tmp_path / "run.ckpt",
    }

    class Killed(BaseException):
        pass

    save, kept = checkpoint.save, []

    def stops(path, state):  # after the second chunk was written, and before that was noted
        if state["draws"]["lp"].shape[1] == 128:
            raise Killed
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", stops)
    with pytest.raises(Killed):
        run(gaussian, **options)
    assert xr.open_zarr(options["stream"], consolidated=False).sizes["draw"] == 128
    monkeypatch.setattr(checkpoint, "save", save)
    run(gaussian, **options)
    whole = run(gaussian, num_samples=150, warmup_steps=20)
    found = xr.open_zarr(options["stream"], consolidated=False)
    assert torch.equal(torch.from_numpy(found["x"].values), draws(whole))
    assert not kept


def test_memory_is_laid_out_once():
    sink = Memory(10, {"x": torch.empty(3, 0, 2)})
    room = sink.parts["x"]
    assert room.shape == (3, 10, 2)
    for i in range(5):
        sink.add({"x": torch.full((3, 2, 2), float(i))})
    assert sink.parts["x"] is room
    assert torch.equal(sink.draws()["x"][0, :, 0], torch.arange(5.0).repeat_interleave(2))


def test_running_r_hat_is_that_of_all_draws():
    x = torch.randn(4, 50, 3) + 0.3 * torch.randn(4, 1, 3)
    progress = Progress()
    assert np.isnan(progress.r_hat())
    for chunk in x.split([7, 30, 13], 1):
        progress.add(chunk)
    want = max(az.rhat(x[..., i].numpy(), method="identity") for i in range(3))
    assert progress.r_hat() == pytest.approx(want, rel=1e-6)


# Reports ---------------------------------------------------------------------------------------


def test_the_bar_says_how_it_goes(capsys):
    run(gaussian, disable_progbar=False)
    text = capsys.readouterr().err
    for part in (
        r"warm-up, acceptance 0\.\d\d, step \d",
        r", acceptance [01]\.\d\d, step [\d.e-]+, divergences 0, R-hat so far [12]\.\d{3}",
        "80/80",
    ):
        assert re.search(part, text), part
    run(gaussian)
    assert capsys.readouterr().err == ""


def test_what_is_wrong_is_warned_of_by_name():
    mcmc = ebm.MCMC(ebm.NUTS(gaussian, ebm.Flat((2,))), 10, num_chains=4, disable_progbar=True)
    with pytest.warns(ebm.ConvergenceWarning, match="per chain is below 100") as said:
        mcmc.run()
    assert {w.filename for w in said} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(gaussian, num_samples=1000, num_chains=8)


@every_kernel
def test_diagnostics_are_by_site_and_chain(make):
    mcmc = run(gaussian, make=make)
    found = mcmc.diagnostics()
    assert found["x"]["n_eff"].shape == (2,)
    assert found["x"]["r_hat"].shape == (2,)
    assert list(found["divergences"]) == [f"chain {i}" for i in range(4)]
    assert found["divergences"]["chain 0"] == []
    assert 0.3 < found["acceptance rate"]["chain 3"] <= 1.0
    x = draws(mcmc)[..., 1].numpy()
    assert float(found["x"]["n_eff"][1]) == pytest.approx(az.ess(x))
    assert float(found["x"]["r_hat"][1]) == pytest.approx(az.rhat(x))


def test_a_single_chain_has_an_r_hat():
    found = run(gaussian, num_chains=1, num_samples=100).diagnostics()
    assert (found["x"]["r_hat"] < 1.5).all()


STATS = {"lp", "energy", "acceptance_rate", "step_size", "n_steps", "diverging", "invalid"}


@every_kernel
def test_the_sampler_keeps_records(make):
    mcmc = run(gaussian, make=make)
    stats = mcmc.sample_stats
    more = {"tree_depth", "reached_max_treedepth"} if make is ebm.NUTS else set()
    assert set(stats) == STATS | more
    assert all(value.shape == (4, 40) for value in stats.values())
    torch.testing.assert_close(stats["lp"], -gaussian(draws(mcmc)), rtol=1e-6, atol=1e-6)
    assert (stats["energy"] >= -stats["lp"]).all()
    assert stats["diverging"].dtype == torch.bool
    assert stats["n_steps"].dtype == torch.long
    assert mcmc.cost["sampling_gradients"] == int(stats["n_steps"].sum())
    assert mcmc.cost["executed_gradients"] >= mcmc.cost["sampling_gradients"]


def test_divergences_are_recorded_where_they_are():
    wild = {"step_size": 5.0, "adapt_step_size": False, "metric": None}
    mcmc = run(gaussian, kernel=wild)
    where = mcmc.sample_stats["diverging"]
    assert where.any()
    listed = mcmc.diagnostics()["divergences"]
    assert listed["chain 2"] == where[2].nonzero()[:, 0].tolist()


def test_arviz_takes_a_run(capsys):
    y = torch.tensor([1.0, 2.0])

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    mcmc = run(model, y, num_samples=50)
    data = mcmc.to_arviz()
    assert data["posterior"]["mean"].shape == (4, 50)
    assert data["log_likelihood"]["y"].shape == (4, 50, 2)
    assert data["observed_data"]["y"].values.tolist() == [1.0, 2.0]
    assert {"lp", "energy", "diverging", "tree_depth"} <= set(data["sample_stats"].data_vars)
    assert az.summary(data).loc["mean", "mean"] == pytest.approx(1.0, abs=0.5)
    table = mcmc.summary()
    assert "mean" in table.index
    assert "Number of divergences: 0" in capsys.readouterr().out


def test_results_need_a_run():
    mcmc = ebm.MCMC(ebm.NUTS(gaussian, ebm.Flat((2,))), 10)
    for use in (mcmc.get_samples, mcmc.diagnostics, lambda: mcmc.extend(5), lambda: mcmc.adapted):
        with pytest.raises(ValueError, match="must have run: call mcmc.run"):
            use()
