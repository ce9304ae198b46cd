"""The exporter against ArviZ 1, in an environment without torch: see run.sh.

Not named test_*, so that the tests of the library do not collect it.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).parents[2] / "pyro_ebm" / "_arviz.py"


def load():
    """Load the module by its path, without the package, which imports torch."""
    spec = importlib.util.spec_from_file_location("_arviz", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def az():
    import arviz

    return arviz


@pytest.fixture
def exporter():
    return load()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    draws = 4, 300
    return {
        "posterior": {"mean": rng.normal(size=draws), "x": rng.normal(size=(*draws, 3))},
        "sample_stats": {
            "lp": rng.normal(size=draws),
            "energy": rng.gamma(4.0, size=draws),
            "diverging": rng.random(draws) < 0.01,
            "reached_max_treedepth": np.zeros(draws, bool),
            "tree_depth": rng.integers(1, 4, draws),
        },
        "log_likelihood": {"y": rng.normal(-1.0, 0.1, size=(*draws, 6))},
        "posterior_predictive": {"y": rng.normal(size=(*draws, 6))},
        "prior": {"mean": rng.normal(size=(1, 50))},
        "observed_data": {"y": rng.normal(size=6)},
    }


@pytest.fixture
def tree(exporter, arrays):
    return exporter.to_inference_data(arrays, dims={"y": ["day"]}, coords={"day": list("abcdef")})


def test_this_is_arviz_1_without_torch(az):
    assert int(az.__version__.split(".")[0]) >= 1
    assert importlib.util.find_spec("torch") is None


def test_it_is_a_tree_with_coordinates_on_every_dimension(tree):
    import xarray

    assert isinstance(tree, xarray.DataTree)
    for group in tree.children.values():
        assert set(group.dims) <= set(group.coords)
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "day")


def test_summary_runs(az, tree):
    assert {"mean", "x[0]", "x[2]"} <= set(az.summary(tree).index)


@pytest.mark.parametrize(
    "plot", ["plot_trace", "plot_energy", "plot_rank", "plot_forest", "plot_ess"]
)
def test_plots_run(az, tree, plot):
    from matplotlib import pyplot as plt

    getattr(az, plot)(tree, backend="matplotlib")
    assert plt.get_fignums()
    plt.close("all")


def test_the_energy_fraction_is_ours(az, tree, exporter):
    energy = np.cumsum(tree["sample_stats"]["energy"].values - 4.0, axis=1)
    tree["sample_stats"]["energy"].values[:] = energy
    truth = az.bfmi(tree)["energy"].values
    warning = next(w for w in exporter.convergence_warnings(tree) if w.startswith("E-BFMI"))
    assert f"chain 0: {truth[0].round(2)}," in warning


def test_loo_runs(az, tree):
    assert np.isfinite(az.loo(tree).elpd)


def test_diagnose_reads_our_statistics(az, tree, capsys):
    az.diagnose(tree)
    count = int(tree["sample_stats"]["diverging"].sum())
    assert f"{count} of 1200" in capsys.readouterr().out.replace(",", "")


def test_netcdf_gives_the_same_back(az, tree, tmp_path):
    tree.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    again = az.from_netcdf(tmp_path / "run.nc")
    for group in tree.children:
        for name, values in tree[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name], values)


def test_warnings_speak_of_the_faults(exporter, arrays):
    arrays["posterior"]["x"][2] = 0.0
    arrays["posterior"]["mean"][2] = 7.0
    found = exporter.convergence_warnings(exporter.to_inference_data(arrays))
    for start in ("Divergences: ", "Frozen: chain 2 hardly moves", "R-hat: mean with "):
        assert any(line.startswith(start) for line in found), found


def test_sound_chains_raise_no_warning(exporter, arrays):
    arrays["sample_stats"]["diverging"][:] = False
    arrays["sample_stats"]["energy"] = arrays["posterior"]["x"][..., 0]
    assert exporter.convergence_warnings(exporter.to_inference_data(arrays)) == []


def test_what_does_not_fit_is_refused(exporter, arrays):
    arrays["sample_stats"]["lp"] = arrays["sample_stats"]["lp"][:, 1:]
    with pytest.raises(ValueError, match="dimension 'draw' must have one size"):
        exporter.to_inference_data(arrays)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
