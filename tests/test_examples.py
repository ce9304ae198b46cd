"""Every example is listed here and runs at a small size, with warnings as errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

# The arguments that make an example small.
SMALL = {
    "double_well.py": "--draws 30 --warmup 30 --plot well.png",
    "free_energy.py": "--points 51 --plot free_energy.png",
    "kmeans.py": "--temperatures 4 --restarts 1 --plot kmeans.png",
    "ising_coupling.py": "--side 3 --draws 30 --warmup 30 --chains 4 --nodes 5 --plot j.png",
    "ring.py": "--chains 4 --draws 40 --warmup 40 --plot ring.png",
    "training_monitor.py": "--steps 30 --batch 32 --chains 32 --moves 2 --hidden 8 --plot m.png",
    "density_2d.py": "--steps 20 --batch 16 --chains 32 --hidden 8 --plot density.png",
    "two_moons.py": "--steps 20 --batch 16 --hidden 8 --test 100 --plot moons.png",
}

WARNINGS = [
    "error",
    "ignore::FutureWarning:arviz",  # its first import of the day announces version 1
]


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs(name, tmp_path):
    flags = [part for warning in WARNINGS for part in ("-W", warning)]
    done = subprocess.run(
        [sys.executable, *flags, str(EXAMPLES / name), *SMALL[name].split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example prints its result"
