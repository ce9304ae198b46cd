"""The benchmark of the samplers runs with our contenders, which need no other library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
