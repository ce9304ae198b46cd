"""Fixtures for the tests and for the examples in docstrings."""

import os
from collections.abc import Iterator

# Before anything imports matplotlib; subprocesses inherit it.
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pyro
import pytest
import torch

# Nothing here imports pyro_ebm at the top: in pytest-xdist's workers coverage starts later.

# A failure repeats: no random search, nothing remembered between runs, no limit in wall time.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("fixed")

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine in turn."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def fresh_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give each test the same seed, an empty parameter store and argument checks.

    Tests run in float64, so that formulas can be compared to many digits; docstrings run in
    the default float32, as a reader would.
    """
    before = torch.get_default_dtype()
    is_doctest = isinstance(request.node, pytest.DoctestItem)
    torch.set_default_dtype(torch.float32 if is_doctest else torch.float64)
    pyro.clear_param_store()
    try:
        with torch.random.fork_rng(), pyro.validation_enabled():
            pyro.set_rng_seed(0)
            yield
    finally:
        pyro.clear_param_store()
        torch.set_default_dtype(before)


@pytest.fixture(scope="session", autouse=True)
def names_in_docstrings(doctest_namespace: dict[str, object]) -> None:
    """Let examples in docstrings say ``torch``, ``dist``, ``ebm`` and so on without imports."""
    import pyro.distributions as dist

    import pyro_ebm as ebm

    names = {"torch": torch, "pyro": pyro, "dist": dist, "constraints": dist.constraints}
    doctest_namespace.update(names, ebm=ebm)
