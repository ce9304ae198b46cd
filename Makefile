# `make demo` and `make test` need nothing but Python with pip: each makes the virtual environment VENV,
# installs into it what it needs (once: stamp files in VENV remember) and runs.
#   make test PYTHON=python3.12 VENV=/somewhere/else WORKERS=8

PYTHON ?= python3
VENV ?= .venv
# Test processes. Each computes on one thread, so that they do not fight over the cores.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo bench test test-fast test-cuda test-arviz1 lint format docs all clean

help:
	@echo "make demo       learn an energy from real data, draw from it, report: about two minutes"
	@echo "make test       lint, types and all tests with coverage: what continuous integration runs"
	@echo "make test-fast  the tests without the slow ones"
	@echo "make test-cuda  the tests that need a CUDA device"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff reformat and mend what it can"
	@echo "make docs       the documentation, warnings as errors, into docs/_build/html"
	@echo "make bench      our samplers against those of other libraries: the table, hours"
	@echo "make all        lint, test, docs"
	@echo "make clean      remove the environment and everything that was built"

# Environment -----------------------------------------------------------------------------------

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pyro_ebm needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One stamp for each extra: .venv/.with-test, .venv/.with-demo, .venv/.with-docs.
$(VENV)/.with-%: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing pyro_ebm with what '$*' needs into $(VENV); PyTorch is large, so this may take minutes ..."
	$(PIP_INSTALL) -e ".[$*]"
	@touch $@

# Front doors -----------------------------------------------------------------------------------

demo: $(VENV)/.with-demo
	$(BIN)/pyro-ebm demo

# In this order, so that the last line is pytest's count.
test: lint test-arviz1
	$(PYTEST) -n $(WORKERS) --cov

# Parts -----------------------------------------------------------------------------------------

test-fast: $(VENV)/.with-test
	$(PYTEST) -n $(WORKERS) -m "not slow"

test-cuda: $(VENV)/.with-test
	$(PYTEST) -m gpu

# The export to ArviZ 1, which needs Python 3.12, in a light environment of its own without torch.
test-arviz1: $(VENV)/.with-test
	ARVIZ1_VENV=$(VENV)-arviz1 bash tests/arviz1/run.sh

lint: $(VENV)/.with-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.with-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.with-docs
	@rm -rf docs/generated
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# BENCH takes any arguments of the script, for example BENCH="--targets schools --chains 64".
bench: $(VENV)/.with-bench
	$(BIN)/python benchmarks/samplers.py table --output runs/bench.json $(BENCH)

all: lint test docs

# An environment that was not made here stays.
clean:
	for made in $(VENV) $(VENV)-arviz1; do if [ -e $$made/.made ]; then rm -rf $$made; fi; done
	rm -rf build dist *.egg-info docs/_build docs/generated .coverage .coverage.* htmlcov \
	    .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
