"""The main job through its command line, at small sizes."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI

import pyro_ebm as ebm
from pyro_ebm._job import base, draw, fit, plots, report, score, table, text
from pyro_ebm.cli import PICTURES, main
from pyro_ebm.infer import RecordedNUTS

from .common import EXACT

SMALL = ["--steps", "24", "--hidden", "8", "--chains", "32", "--moves", "2", "--batch", "16"]
FEW = ["--draws", "40", "--warmup", "30", "--chains", "2"]
ROOT = Path(__file__).parents[1]


def rows(n=60, dim=2, seed=0):
    """Two clouds, apart in the first column."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim))
    x[:, 0] += np.where(rng.random(n) < 0.5, -3.0, 3.0)
    return x


def write_csv(path, x, header="length,width"):
    lines = [",".join(map(repr, row)) for row in x.tolist()]
    path.write_text("\n".join([header, *lines][0 if header else 1 :]) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def quick_score():
    """Judge with fewer particles: the tests of the score say which error that leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "PARTICLES", 1 << 13)
        patch.setattr(score, "RUNGS", 8)
        yield


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with a small run, its draws and its table."""
    folder = tmp_path_factory.mktemp("learned")
    data = write_csv(folder / "clouds.csv", rows())
    assert main(["fit", str(data), "--out", str(folder / "run"), *SMALL]) == 0
    assert main(["sample", str(folder / "run"), *FEW]) == 0
    return folder


@pytest.fixture
def run(learned, tmp_path):
    """A copy of that run, to be spoilt."""
    return Path(shutil.copytree(learned / "run", tmp_path / "run"))


def error_of(capsys):
    """Return the error, which is one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("pyro-ebm: error: ")
    return lines[0]


def weights_of(folder):
    return json.loads((folder / "run.json").read_text())["weights"]["sha256"]


# Tables ---------------------------------------------------------------------------------------

GOOD = "\n".join(f"{i},{i * i}" for i in range(12))


def array(**arrays):
    return lambda path: np.savez(path, **arrays)


def spoilt(value):
    x = rows()
    x[6, 1] = value
    return x


BAD = {
    "missing": ("a.csv", None, ["a.csv", "cannot be read"]),
    "a folder": ("a.csv", lambda path: path.mkdir(), ["a.csv", "cannot be read"]),
    "empty": ("a.csv", "", ["a.csv is empty"]),
    "blank": ("a.csv", "\n , \n\n", ["a.csv is empty"]),
    "names only": ("a.csv", "x,y\n", ["has 0 rows"]),
    "one row": ("a.csv", "x,y\n1,2\n", ["has 1 row,", "10"]),
    "text": ("a.csv", "x,y\n1,2\n\n3,four\n", ["row 4, column 'y'", "'four' is not a number"]),
    "text without names": ("a.csv", "1,2\n3,four\n", ["row 2, column 2:", "'four'"]),
    "text in the first row": ("a.csv", "1,2,x\n3,4,5\n", ["row 1, column 3", "'x'"]),
    "no cell": ("a.csv", "x,y\n1,\n", ["row 2, column 'y'", "empty"]),
    "NaN": ("a.csv", "x,y\n1,2\nnan,3\n", ["row 3, column 'x'", "nan is not a finite number"]),
    "infinite": ("a.csv", "x,y\n1,-inf\n", ["row 2, column 'y'", "-inf"]),
    "too large": ("a.csv", "x,y\n1,1e999\n", ["row 2, column 'y'", "1e999"]),
    "1_000": ("a.csv", "x,y\n1,1_000\n", ["row 2, column 'y'", "'1_000'"]),
    "ragged": ("a.csv", "x,y\n1,2\n3\n", ["row 3", "1 cell", "the first has 2"]),
    "ragged without names": ("a.csv", "1,2\n3,4,5\n", ["row 2", "3 cells", "the first has 2"]),
    "two of a name": ("a.csv", "x,x\n1,2\n", ["row 1", "two columns are called 'x'"]),
    "constant": ("a.csv", "x,y\n" + "2.5,1\n2.5,3\n" * 6, ["column 'x' is constant, 2.5"]),
    "huge": ("a.csv", GOOD.replace("11,", "1e200,"), ["column 1 reaches 1e+200"]),
    "not text": ("a.csv", b"x,y\n\xff\xfe,1\n", ["no text in UTF-8"]),
    "a null": ("a.csv", "x,y\n1,2\x00\n", ["row 2"]),
    "unknown suffix": ("a.xlsx", "1", ["must end in one of .csv, .npy, .npz", "'.xlsx'"]),
    "no suffix": ("a", "1", ["must end in one of", "'no suffix'"]),
    "several arrays": ("a.npz", array(p=rows(), q=rows()), ["2 arrays (p, q)", "--array"]),
    "no array": ("a.npz", array(), ["no array"]),
    "NPZ cut off": ("a.npz", b"PK\x03\x04nothing", ["no array of numbers"]),
    "one dimension": ("a.npy", lambda p: np.save(p, np.ones(20)), ["rows and columns", "(20,)"]),
    "no columns": ("a.npy", lambda p: np.save(p, np.ones((20, 0))), ["(20, 0)"]),
    "no rows": ("a.npy", lambda p: np.save(p, np.ones((0, 2))), ["has 0 rows"]),
    "strings": ("a.npy", lambda p: np.save(p, np.array([["a"]])), ["real numbers", "<U1"]),
    "complex": ("a.npy", lambda p: np.save(p, 1j * rows()), ["real numbers", "complex128"]),
    "objects": (
        "a.npy",
        lambda p: np.save(p, np.array([[1, "a"]], dtype=object), allow_pickle=True),
        ["Python objects"],
    ),
    "NPY cut off": ("a.npy", b"\x93NUMPY\x01\x00", ["no array of numbers"]),
    "NaN in NPY": ("a.npy", lambda p: np.save(p, spoilt(np.nan)), ["row 7, column 2: nan"]),
    "inf in NPZ": ("a.npz", array(x=spoilt(np.inf)), ["row 7, column 2: inf"]),
}


@pytest.mark.parametrize(("name", "content", "said"), BAD.values(), ids=BAD)
def test_a_bad_file_is_one_clear_line(name, content, said, tmp_path, capsys):
    path = tmp_path / name
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["fit", str(path), "--out", str(tmp_path / "run")]) == 2
    error = error_of(capsys)
    assert str(path) in error
    assert not [part for part in said if part not in error], error
    assert not (tmp_path / "run").exists()


X = np.arange(24.0).reshape(12, 2) ** 2
FORMS = {
    "names": ("a.csv", "a b,c\n" + "\n".join(f"{p},{q}" for p, q in X), ["a b", "c"]),
    "no names": ("a.csv", "\n".join(f"{p},{q}" for p, q in X), ["column 1", "column 2"]),
    "a mark and semicolons": (
        "a.CSV",
        "\ufeffa;b,c\r\n" + "\r\n".join(f"{p};{q}" for p, q in X),
        ["a", "b,c"],
    ),
    "tabs and quotes": (
        "a.csv",
        '"a"\t"b"\n' + "\n".join(f'"{p}"\t{q}' for p, q in X),
        ["a", "b"],
    ),
    "blank lines": ("a.csv", "\na,b\n\n" + "\n\n".join(f" {p} , {q}" for p, q in X), ["a", "b"]),
    "a comment sign": ("a.csv", "# a,b\n" + "\n".join(f"{p},{q}" for p, q in X), ["a", "b"]),
    "a name missing": ("a.csv", ",b\n" + "\n".join(f"{p},{q}" for p, q in X), ["column 1", "b"]),
    "NPY": ("a.npy", lambda path: np.save(path, X.astype(int)), ["column 1", "column 2"]),
    "NPZ": ("a.npz", array(x=X.astype("f4")), ["column 1", "column 2"]),
}


@pytest.mark.parametrize(("name", "content", "names"), FORMS.values(), ids=FORMS)
def test_a_table_is_read(name, content, names, tmp_path):
    path = tmp_path / name
    content(path) if callable(content) else path.write_bytes(content.encode())
    read = table.read_table(str(path))
    assert read.names == names
    assert read.values.dtype == torch.float64
    torch.testing.assert_close(read.values, torch.from_numpy(X), **EXACT)


def test_columns_are_taken_by_name_or_number(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("kind,a,b\n" + "\n".join(f"red,{p},{q}" for p, q in X))
    read = table.read_table(str(path), ["3", "a"])
    assert read.names == ["b", "a"]
    torch.testing.assert_close(read.values, torch.from_numpy(X[:, ::-1].copy()), **EXACT)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("a,z", "no column 'z'; it has kind, a"),
        ("0", "no column '0'"),
        ("a,2", "each column once"),
    ],
)
def test_wrong_columns_are_refused(columns, said, tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("kind,a\n" + "\n".join(f"red,{p}" for p, _ in X))
    assert main(["fit", str(path), "--columns", columns]) == 2
    assert said in error_of(capsys)


def test_an_array_is_chosen(tmp_path, capsys):
    path = tmp_path / "a.npz"
    np.savez(path, p=X, q=-X)
    read = table.read_table(str(path), array="q")
    torch.testing.assert_close(read.values, torch.from_numpy(-X), **EXACT)
    assert main(["fit", str(path), "--array", "r"]) == 2
    assert "no array 'r'; it has p, q" in error_of(capsys)
    np.save(tmp_path / "a.npy", X)
    assert main(["fit", str(tmp_path / "a.npy"), "--array", "p"]) == 2
    assert "--array is for NPZ" in error_of(capsys)


def test_a_column_that_is_constant_in_the_training_rows_is_refused(tmp_path, capsys):
    x = rows(20)
    x[:, 1] = 0.0
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    x[order[0], 1] = 1.0  # the first of those that are held out
    path = write_csv(tmp_path / "a.csv", x)
    assert main(["fit", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "column 'width' is constant, 0, in the 16 training rows" in error_of(capsys)


def test_the_default_is_the_wine_data():
    wine = table.read_table(None)
    assert wine.values.shape == (178, 13)
    assert wine.names[0] == "alcohol"
    assert table.read_table(None, ["hue"]).names == ["hue"]


# Learning -------------------------------------------------------------------------------------


def test_the_gaussian_is_that_of_ledoit_and_wolf():
    from sklearn.covariance import ledoit_wolf

    x = np.random.default_rng(0).normal(size=(40, 6)) @ np.diag(range(1, 7))
    loc, covariance = base.gaussian(torch.from_numpy(x))
    want = torch.from_numpy(ledoit_wolf(x)[0])
    torch.testing.assert_close(loc, torch.from_numpy(x.mean(0)), **EXACT)
    torch.testing.assert_close(covariance, want, **EXACT)


def test_dependent_columns_have_a_base_and_no_unshrunk_gaussian(tmp_path, capsys):
    x = rows(40, 3)
    x[:, 2] = x[:, 0] - x[:, 1]
    path = write_csv(tmp_path / "a.csv", x, "a,b,c")
    assert main(["fit", str(path), "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert "unshrunk   does not exist" in capsys.readouterr().out


def test_whitened_points_are_standard():
    x = torch.from_numpy(rows(50, 3))
    loc, covariance = base.gaussian(x, shrink=False)
    energy = base.build_energy([4], loc, covariance)
    z = energy.whiten(x)
    torch.testing.assert_close(z.T @ z / 50, torch.eye(3), **EXACT)
    torch.testing.assert_close(energy.rows(z), x, **EXACT)


def test_a_run_holds_all_that_is_needed(learned):
    found = base.load_run(learned / "run")
    assert found.info["data"]["columns"] == ["length", "width"]
    assert found.info["settings"]["hidden"] == [8]
    data = torch.from_numpy(rows())
    kept = report.table_rows(found)
    torch.testing.assert_close(kept.sort(0).values, data.sort(0).values, **EXACT)
    train = found.tensors["train"]
    torch.testing.assert_close(train.mean(0), torch.zeros(2), **EXACT)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(2), **EXACT)
    names = sorted(path.name for path in (learned / "run").iterdir())
    assert names == ["draws.nc", "run.json", found.info["weights"]["file"]]


@pytest.mark.parametrize("dim", [1, 2])
def test_the_held_out_likelihood_is_that_of_quadrature(dim, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score, "PARTICLES", 1 << 15)
    monkeypatch.setattr(score, "RUNGS", 32)
    np.save(tmp_path / "a.npy", rows(200, dim))
    arguments = ["--out", str(tmp_path / "run"), *SMALL, "--validation", "0"]
    # Far from the Gaussian in a few steps.
    arguments += ["--hidden", "16", "--lr", "0.1", "--steps", "60", "--weight-decay", "0"]
    assert main(["fit", str(tmp_path / "a.npy"), *arguments]) == 0
    found = base.load_run(tmp_path / "run")
    energy, held_out = base.energy_of(found), found.tensors["held_out"]
    truth = ebm.log_partition(base.law_of(energy), ebm.partition.Quadrature(-9.0, 9.0, 200)).value
    assert abs(truth) > 0.1  # there is something to be estimated
    for name in ("log_z", "log_z_second"):
        got = found.info["held_out"][name]
        assert abs(got["value"] - truth.item()) < 5 * got["std_error"]
    # The density of the rows themselves, summed over a grid, is one.
    line = torch.linspace(-9.0, 9.0, 2001 if dim == 1 else 401)
    grid = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)

    def density(x):
        b = torch.distributions.MultivariateNormal(energy.loc, scale_tril=energy.tril)
        return b.log_prob(x) - energy(energy.whiten(x)) - truth

    total = density(grid).exp().sum() * (line[1] - line[0]) ** dim
    assert abs(total - 1.0) < 1e-3  # of the grid
    printed = f"{found.info['held_out']['energy']:9.3f} +/-"
    assert printed in capsys.readouterr().out
    error = found.info["held_out"]["log_z"]["std_error"]
    assert abs(found.info["held_out"]["energy"] - density(held_out).mean().item()) < 5 * error


def test_the_gaussians_are_judged_on_the_same_rows(learned):
    found = base.load_run(learned / "run")
    train, held_out = found.tensors["train"], found.tensors["held_out"]
    covariance = train.T @ train / len(train)
    plain = torch.distributions.MultivariateNormal(torch.zeros(2), covariance)
    got = torch.tensor(found.info["held_out"]["gaussian_unshrunk"])
    torch.testing.assert_close(got, plain.log_prob(held_out).mean(), **EXACT)


@pytest.mark.slow
def test_an_energy_beats_the_gaussian_on_two_clouds(tmp_path, capsys):
    np.save(tmp_path / "a.npy", rows(400))
    small = ["--hidden", "32,32", "--chains", "128", "--steps", "300", "--lr", "0.01"]
    small += ["--weight-decay", "10"]
    assert main(["fit", str(tmp_path / "a.npy"), "--out", str(tmp_path / "run"), *small]) == 0
    assert "The energy is BETTER than the Gaussian" in capsys.readouterr().out
    gain = json.loads((tmp_path / "run" / "run.json").read_text())["held_out"]["gain"]
    x = torch.from_numpy(rows(100_000, seed=1))
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(2)),
        torch.distributions.Independent(
            torch.distributions.Normal(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 1.0), 1
        ),
    )
    most = mixture.log_prob(x).mean()
    most -= torch.distributions.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean()
    assert gain > 0.5 * most  # of what there is to be had; measured: 1.05, with 80 rows held out


@pytest.mark.slow
def test_on_gaussian_rows_no_energy_claims_to_be_better(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(150, 4)))
    small = ["--hidden", "32,32", "--lr", "0.01", "--chains", "128", "--steps", "200"]
    assert main(["fit", str(tmp_path / "a.npy"), "--out", str(tmp_path / "run"), *small]) == 0
    out = capsys.readouterr().out
    assert "NOT clearly better" in out or "The energy is zero" in out


def test_an_energy_that_gains_nothing_stays_zero(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit._Watch, "look", lambda self, average: -1.0)
    path = write_csv(tmp_path / "a.csv", rows())
    assert main(["fit", str(path), "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert "the model is the Gaussian, and no better than it" in capsys.readouterr().out
    energy = base.energy_of(base.load_run(tmp_path / "run"))
    assert not energy(torch.randn(5, 2)).any()


def test_learning_that_breaks_down_says_so(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", rows())
    out = ["--out", str(tmp_path / "run"), *SMALL]
    assert main(["fit", str(path), *out, "--lr", "1e30"]) == 2
    error = error_of(capsys)
    assert "learning broke down at step" in error
    assert "lower --lr" in error
    assert not (tmp_path / "run" / "run.json").exists()


def made_up(**changes):
    log_z = {"value": 1.0, "std_error": 0.01, "ess": 900.0, "particles": 1000}
    found = {
        "energy": -3.0,
        "gaussian": -3.5,
        "gaussian_unshrunk": -3.6,
        "gain": 0.5,
        "gain_row_error": 0.1,
        "log_z": log_z | changes.pop("log_z", {}),
        "log_z_second": log_z | changes.pop("second", {}),
    }
    steps = changes.pop("steps", 5)
    data = {"held_out_rows": 9, "training_rows": 30, "columns": ["a"], "source": "a.csv"}
    learning = {"steps": steps, "interrupted": False}
    return {"data": data, "learning": learning, "held_out": found | changes}


VERDICTS = {
    "better": ({}, "is BETTER than the Gaussian"),
    "worse": ({"gain": -0.5}, "is WORSE than the Gaussian"),
    "neither": ({"gain": 0.15}, "is NOT clearly better"),
    "blurred by log Z": ({"log_z": {"std_error": 0.4}}, "is NOT clearly better"),
    "disagreement": ({"second": {"value": 2.0}}, "THE TWO DISAGREE"),
    "blurred by disagreement": ({"second": {"value": 2.0}}, "is NOT clearly better"),
    "few particles": ({"log_z": {"ess": 20.0}}, "Few particles"),
    "zero": ({"steps": 0}, "The energy is zero"),
    "one row": ({"gain_row_error": None}, "cannot tell"),
    "no unshrunk Gaussian": ({"gaussian_unshrunk": None}, "does not exist"),
}


@pytest.mark.parametrize(("changes", "said"), VERDICTS.values(), ids=VERDICTS)
def test_the_verdict_is_plain(changes, said):
    assert said in "\n".join(text.held_out(made_up(**changes)))


def test_agreement_is_said():
    assert "the two agree" in "\n".join(text.held_out(made_up()))


# Repeating ------------------------------------------------------------------------------------


def test_a_seed_repeats_a_run_whatever_the_default_dtype(learned, tmp_path):
    torch.set_default_dtype(torch.float32)
    data, first, second = learned / "clouds.csv", learned / "run", tmp_path / "run"
    torch.rand(3)  # the state of the generator plays no part
    assert main(["fit", str(data), "--out", str(second), *SMALL]) == 0
    assert main(["sample", str(second), *FEW]) == 0
    assert weights_of(second) == weights_of(first)
    assert (first / "run.json").read_text() == (second / "run.json").read_text()
    draws = [draw.read_draws(f / "draws.nc", base.load_run(f)) for f in (first, second)]
    for group in ("posterior", "sample_stats"):
        assert draws[0][group].equals(draws[1][group])


def test_another_seed_is_another_run(learned, tmp_path):
    arguments = [str(learned / "clouds.csv"), "--out", str(tmp_path / "run"), *SMALL]
    assert main(["fit", *arguments, "--seed", "1"]) == 0
    assert weights_of(tmp_path / "run") != weights_of(learned / "run")


def test_a_chain_is_the_same_whatever_the_number_of_chains(run):
    loaded = base.load_run(run)
    both = draw.read_draws(run / "draws.nc", loaded)["posterior"]["x"].values
    wanted = draw.Draws(1.0, 40, 30, 1, "nuts", 0)
    one = draw.sample(loaded, wanted)["posterior"]["x"].values
    assert (one[0] == both[0]).all()
    assert (both[0] != both[1]).any()


def test_no_global_state_changes(learned, tmp_path):
    pyro.param("mine", torch.tensor(1.0))

    def state():
        return {
            "random": torch.get_rng_state().tolist(),
            "numpy": str(np.random.get_state()),  # noqa: NPY002 - that is the global one
            "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
            "parameters": dict(pyro.get_param_store().items()),
            "figures": plots_open(),
        }

    before = state()
    arguments = [str(learned / "clouds.csv"), "--out", str(tmp_path / "run"), *SMALL]
    assert main(["fit", *arguments]) == 0
    assert main(["sample", str(tmp_path / "run"), *FEW]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    assert state() == before


def plots_open():
    import matplotlib.pyplot as plt

    return plt.get_fignums()


# Files ----------------------------------------------------------------------------------------


def flip_a_bit(folder):
    path = next(folder.glob("weights-*.pt"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edit(**changes):
    def spoil(folder):
        info = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(info | changes))

    return spoil


def malicious(folder):
    """Put a pickle that runs code in the place of the weights, with the right hash."""

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(folder / "harm"),)

    torch.save(Harm(), folder / "weights-0.pt")
    data = (folder / "weights-0.pt").read_bytes()
    edit(weights={"file": "weights-0.pt", "sha256": hashlib.sha256(data).hexdigest()})(folder)


SPOILT = {
    "no folder": (shutil.rmtree, "holds no run, run.json is missing: make one"),
    "no JSON": (lambda f: (f / "run.json").unlink(), "holds no run, run.json is missing"),
    "JSON cut off": (lambda f: (f / "run.json").write_text('{"format": 1'), "run.json is damaged"),
    "JSON of another kind": (lambda f: (f / "run.json").write_text("[]"), "run.json is damaged"),
    "JSON without settings": (edit(settings={}), "run.json is damaged"),
    "another format": (edit(format=99), "has format 99"),
    "no weights": (lambda f: next(f.glob("*.pt")).unlink(), ".pt is missing"),
    "weights with a bit flipped": (flip_a_bit, "is damaged: its SHA-256"),
    "weights that run code": (malicious, "is damaged: it holds no tensors"),
}


@pytest.mark.parametrize("command", ["sample", "report"])
@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_a_damaged_run_is_refused(command, spoil, said, run, capsys):
    spoil(run)
    assert main([command, str(run)]) == 2
    assert said in error_of(capsys)
    assert not (run / "harm").exists()


def test_a_run_is_not_overwritten_unasked(run, learned, capsys):
    before = (run / "run.json").read_text()
    arguments = [str(learned / "clouds.csv"), "--out", str(run), *SMALL, "--seed", "1"]
    assert main(["fit", *arguments]) == 2
    assert "holds a run: choose another --out, or add --overwrite" in error_of(capsys)
    assert (run / "run.json").read_text() == before
    assert main(["fit", *arguments, "--overwrite"]) == 0
    assert weights_of(run) != json.loads(before)["weights"]["sha256"]
    assert not (run / "draws.nc").exists()  # they were drawn from other weights
    assert len(list(run.glob("weights-*.pt"))) == 1


def test_a_failure_while_saving_leaves_the_old_run(run, monkeypatch):
    loaded, replace = base.load_run(run), os.replace

    def full(source, target):
        if Path(target).name == "run.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    other = loaded._replace(tensors={n: t + 1 for n, t in loaded.tensors.items()})
    with pytest.raises(OSError, match="No space"):
        base.save_run(run, other)
    assert base.load_run(run).info == loaded.info
    assert not list(run.glob(".part-*"))


def test_a_folder_that_cannot_be_written_is_an_error(learned, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    data = str(learned / "clouds.csv")
    assert main(["fit", data, "--out", str(tmp_path / "file")]) == 2
    assert "must be a folder" in error_of(capsys)
    assert main(["fit", data, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "Not a directory" in error_of(capsys)


# Interrupting ---------------------------------------------------------------------------------


def interrupt_at(monkeypatch, cls, name, call):
    """Let a method raise KeyboardInterrupt at a call."""
    method, count = getattr(cls, name), iter(range(1, 1 << 30))

    def interrupted(self, *args, **kwargs):
        if next(count) == call:
            raise KeyboardInterrupt
        return method(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, interrupted)


LEFT = {
    "at once": (1, [], "the best so far, after 0 steps", {0}),
    "finding when to stop": (20, [], "the best so far, after", set(range(1, 20))),
    "learning": (24 + 2, [], "is not finished", set(range(1, 25))),
    "without stopping": (20, ["--validation", "0"], "", {19}),
}


@pytest.mark.parametrize("name", LEFT)
def test_interrupting_keeps_what_was_learned(name, learned, tmp_path, capsys, monkeypatch):
    call, options, said, steps = LEFT[name]
    interrupt_at(monkeypatch, SVI, "step", call)
    folder = tmp_path / "run"
    arguments = [str(learned / "clouds.csv"), "--out", str(folder), *SMALL, "--lr", "0.05"]
    assert main(["fit", *arguments, *options]) == 130
    printed = capsys.readouterr().out
    assert said in " ".join(printed.split())
    assert f"The energy is kept in {folder}" in printed
    found = base.load_run(folder)
    assert found.info["learning"]["interrupted"]
    assert found.info["learning"]["steps"] in steps
    assert base.energy_of(found)(torch.randn(4, 2)).any() == (found.info["learning"]["steps"] > 0)
    assert main(["sample", str(folder), *FEW]) == 0


def test_interrupting_a_look_leaves_a_run_that_can_be_reported(learned, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, fit._Watch, "look", 3)
    arguments = [str(learned / "clouds.csv"), "--out", str(tmp_path / "run"), *SMALL]
    assert main(["fit", *arguments]) == 130
    assert main(["sample", str(tmp_path / "run"), *FEW]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0


def test_interrupting_the_judgement_keeps_the_energy(learned, tmp_path, capsys, monkeypatch):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "score", interrupted)
    arguments = [str(learned / "clouds.csv"), "--out", str(tmp_path / "run"), *SMALL]
    assert main(["fit", *arguments]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "run"), *FEW]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "The held-out rows were not judged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "shape", "said"),
    [
        (70 + 35, (1, 40), "1 finished of 2 chains are kept, the 4 draws of the next are not"),
        (30 + 21, (1, 20), "the first 20 draws of the first chain are kept"),
    ],
    ids=["second chain", "first chain"],
)
def test_interrupting_keeps_draws(call, shape, said, run, capsys, monkeypatch):
    (run / "draws.nc").unlink()
    whole = draw.sample(base.load_run(run), draw.Draws(1.0, 40, 30, 1, "nuts", 0))
    interrupt_at(monkeypatch, RecordedNUTS, "sample", call)
    assert main(["sample", str(run), *FEW]) == 130
    assert said in " ".join(capsys.readouterr().out.split())
    draws = draw.read_draws(run / "draws.nc", base.load_run(run))
    values = draws["posterior"]["x"].values
    assert values.shape == (*shape, 2)
    assert (values[0] == whole["posterior"]["x"].values[0, : shape[1]]).all()
    lp = whole["sample_stats"]["lp"].values[0, : shape[1]]
    assert (draws["sample_stats"]["lp"].values[0] == lp).all()
    assert main(["report", str(run)]) == 0


@pytest.mark.parametrize("call", [5, 33])
def test_interrupting_before_there_are_draws_keeps_the_old_ones(call, run, capsys, monkeypatch):
    before = (run / "draws.nc").read_bytes()
    interrupt_at(monkeypatch, RecordedNUTS, "sample", call)
    assert main(["sample", str(run), *FEW]) == 2
    assert "draws of the first chain: nothing is kept" in error_of(capsys)
    assert (run / "draws.nc").read_bytes() == before


# Draws and reports ----------------------------------------------------------------------------

WRONG = {
    "beta zero": (["sample", "run", "--beta", "0"], "must be above 0"),
    "beta negative": (["sample", "run", "--beta=-1"], "must be above 0"),
    "beta NaN": (["sample", "run", "--beta", "nan"], "must be above 0"),
    "beta infinite": (["sample", "run", "--beta", "inf"], "must be above 0 and finite"),
    "beta text": (["sample", "run", "--beta", "hot"], "invalid number value"),
    "kernel": (["sample", "run", "--kernel", "gibbs"], "invalid choice"),
    "draws": (["sample", "run", "--draws", "7"], "must be at least 8"),
    "chains": (["sample", "run", "--chains", "0"], "must be at least 1"),
    "seed": (["fit", "--seed", "-1"], "must be at least 0"),
    "steps": (["fit", "--steps", "1.5"], "invalid whole number value"),
    "held out": (["fit", "--held-out", "1"], "must be above 0 and below 1"),
    "hidden": (["fit", "--hidden", "8,x"], "invalid list of whole numbers"),
    "no command": ([], "required"),
    "no run": (["sample"], "required"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_version_and_help_are_no_errors(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyro-ebm {ebm.__version__}\n"
    for command in ([], ["fit"], ["sample"], ["report"], ["demo"]):
        assert main([*command, "--help"]) == 0
        assert "None" not in capsys.readouterr().out


@pytest.mark.parametrize("kernel", sorted(draw.KERNELS))
def test_draws_follow_the_energy(kernel, run):
    options = ["--draws", "400", "--warmup", "100", "--chains", "1", "--beta", "2"]
    assert main(["sample", str(run), *options, "--kernel", kernel]) == 0
    loaded = base.load_run(run)
    draws = draw.read_draws(run / "draws.nc", loaded)
    assert draws["posterior"].attrs["beta"] == 2.0
    assert draws["posterior"]["column"].values.tolist() == ["length", "width"]
    energy = base.energy_of(loaded)
    law = base.law_of(energy, 2.0)
    z = energy.whiten(
        (report.drawn_rows(draws) - loaded.tensors["mean"]) / loaded.tensors["scale"]
    )
    lp = torch.from_numpy(draws["sample_stats"]["lp"].values).flatten()
    torch.testing.assert_close(lp, -law.potential(z), **EXACT)
    # The mean of the potential, against particles of the Gaussian.
    particles = torch.randn(100_000, 2)
    weight = torch.softmax(-2.0 * energy(particles), 0)
    truth = (weight * law.potential(particles)).sum()
    from arviz import ess

    error = lp.std() / math.sqrt(ess(lp.numpy()[None]))
    assert abs(lp.mean() + truth) < 5 * error


def test_a_report_draws_pictures_and_speaks(run, capsys):
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "x[length]" in printed
    assert "The chains cannot be fully trusted" in printed  # of 40 draws
    assert "x[0]" not in printed
    assert "2 chains of 40 draws after 30 of warm-up, by NUTS at beta = 1." in printed
    for name in PICTURES:
        assert (run / name).read_bytes().startswith(b"\x89PNG")
        assert str(run / name) in printed


def test_good_chains_are_said_to_be_good():
    assert "can be trusted" in text.trust([], ["a"])[0]


@pytest.mark.parametrize("spoil", ["missing", "other weights", "no netCDF"])
def test_a_report_needs_draws_of_its_weights(spoil, run, capsys):
    path, said = run / "draws.nc", "cannot be read as draws"
    if spoil == "missing":
        path.unlink()
        said = "is missing: draw with `pyro-ebm sample"
    elif spoil == "no netCDF":
        path.write_text("nothing")
    else:
        loaded = base.load_run(run)
        base.save_run(run, loaded._replace(tensors={n: 2 * t for n, t in loaded.tensors.items()}))
        said = "holds draws from other weights"
    assert main(["report", str(run)]) == 2
    assert said in error_of(capsys)


def test_a_table_of_one_column_with_an_odd_name_is_reported(tmp_path):
    path = tmp_path / "a.csv"
    write_csv(path, rows(40, 1), "$cost_{per} a very long name of a column/that goes on & on$")
    assert main(["fit", str(path), "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert main(["sample", str(tmp_path / "run"), *FEW[:-1], "1"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "pairs.png").exists()


def test_a_picture_has_four_columns_at_most(learned):
    wide = torch.from_numpy(rows(50, 7))
    found = base.load_run(learned / "run")
    some = report.telling_columns(found._replace(tensors=found.tensors | {"train": wide}))
    assert len(some) == 4
    assert 0 in some  # of the largest variance


def test_a_long_cloud_is_thinned():
    assert len(plots._thin(np.zeros((10_000, 2)))) <= plots.MOST


@pytest.mark.slow
def test_the_demo_runs_all_three(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "20", "--draws", "20", "--warmup", "20", "--chains", "2"]
    assert main(["demo", *small]) == 0
    printed = capsys.readouterr().out
    for part in ("== 1. ", "== 2. ", "== 3. ", "== In plain words ==", "178 wines", "runs/demo"):
        assert part in printed
    assert "The chains cannot be fully trusted" in printed
    assert sorted(p.suffix for p in (tmp_path / "runs" / "demo").iterdir()) == sorted(
        [".json", ".nc", ".pt", *[".png"] * len(PICTURES)]
    )
    assert main(["demo", "--out", "runs/demo"]) == 2  # it replaces its own folder only
    assert "holds a run" in error_of(capsys)
    with monkeypatch.context() as patch:
        interrupt_at(patch, SVI, "step", 3)
        assert main(["demo", *small]) == 130
    assert "The demo stops here" in capsys.readouterr().out


# Around it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "arguments", "name"),
    [
        ("sklearn.datasets", ["fit"], "scikit-learn"),
        ("sklearn.datasets", ["demo"], "scikit-learn"),
        ("h5netcdf", ["sample", "run"], "h5netcdf"),
        ("matplotlib", ["report", "run"], "matplotlib"),
    ],
)
def test_a_missing_extra_is_named(module, arguments, name, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(arguments) == 2
    error = error_of(capsys)
    assert f"needs {name}, which is not installed" in error
    assert 'pip install "pyro-ebm[demo]"' in error


@pytest.mark.parametrize("ending", ["a terminal", "a file", "a terminal in CI"])
def test_the_bar_shows_in_a_terminal_only(ending, capsys, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    if "CI" in ending:
        monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: "terminal" in ending, raising=False)
    with base.progress(3, "learning") as bar:
        bar.update()
    assert ("learning" in capsys.readouterr().err) == (ending == "a terminal")


def test_an_interrupt_elsewhere_ends_quietly(run, capsys, monkeypatch):
    def interrupted(draws):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "summary", interrupted)
    assert main(["report", str(run)]) == 130
    assert capsys.readouterr().err == "pyro-ebm: interrupted\n"


def python(*arguments, **options):
    command = [sys.executable, "-W", "error", "-m", "pyro_ebm", *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)


def test_it_runs_as_a_module():
    process = python("--help", stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out.startswith("usage: pyro-ebm")


def test_a_reader_that_has_seen_enough_is_no_error(learned):
    reader, writer = os.pipe()
    os.close(reader)
    process = python("report", str(learned / "run"), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (141, "")
