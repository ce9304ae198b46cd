"""The benchmarks run with our contenders, which need no other library."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.densities import DENSITIES, table

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "samplers.py"


@pytest.mark.slow
def test_the_table_shows_speed_with_its_quality(tmp_path):
    flags = "table --quick --targets mlp --contenders ebm-chees-eager ebm-nuts-eager"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags.split(), "--output", "table.json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| R-hat | mean error |" in done.stdout
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["failed"] for row in rows] == ["", ""]
    for (run,) in (row["runs"] for row in rows):
        assert run["ess_bulk"] > 0
        assert run["gradients"]["executed"] >= run["gradients"]["sampling"] > 0


@pytest.mark.slow
def test_the_table_of_log_z_names_peers_that_are_missing(tmp_path):
    flags = ["--quick", "--targets", "bimodal", "--contenders", "smc", "ebmkit AIS, HMC"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.log_z", *flags, "--output", str(tmp_path / "t.json")],
        cwd=SCRIPT.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, *peer = json.loads((tmp_path / "t.json").read_text())["rows"][1:]
    assert ours["rmse"] < 1.0
    assert ours["gradients"] > ours["energies"] > 0
    assert all("not installed" in row["missing"] for row in peer) or "rmse" in peer[0]


@pytest.mark.slow
def test_rbms_are_measured_with_peers_or_without(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.learning", "rbm", "--quick", "--output", "rows.json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]["rbm"]
    reached = {row["digits, test"]: row for row in rows if "digits, test" in row}
    assert reached["Chow-Liu tree"]["mean"] == pytest.approx(-21.25, abs=0.01)
    for who in ("exact gradient", "CD-1", "PCD-1"):
        assert -28.0 < reached[who]["mean"] < 0.0  # -28 is about that of independent pixels
    peer = reached["rbms PCD-1"]
    assert "not installed" in str(peer["seeds"]) or peer["mean"] < 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_of_the_benchmark_is_that_of_its_draws(name):
    x = DENSITIES[name]().sample(5_000)
    _, mass, entropy = table(name)
    surprise = -DENSITIES[name]().log_prob(x)
    assert abs(mass.sum() - 1) < 1e-6  # of the pinwheel, 5 sd reach beyond the grid
    error = surprise.std() / len(x) ** 0.5
    assert abs(surprise.mean() - entropy) <= 5 * error + 1e-6
    # A planted fault: draws that are a tenth too wide are seen.
    wide = -DENSITIES[name]().log_prob(1.1 * x)
    assert wide.mean() - entropy > 5 * error


@pytest.mark.slow
@pytest.mark.parametrize("part", ["learning_plane", "learning_cost", "learning_discrete"])
def test_a_part_of_the_learning_benchmarks_runs(part):
    torch.set_default_dtype(torch.float32)  # as by its command line; the fixture sets it back
    rows = importlib.import_module(f"benchmarks.{part}").run(True)
    assert rows
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert row.get("missing") or all(map(math.isfinite, numbers)), row
