# Needs nothing but make and a Python from 3.10 to 3.13; everything else goes into .venv. `make PYTHON=python3.12 test` picks the
# Python that .venv is made with; `make clean` removes a .venv of another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# The pip that Python 3.10 brings finds no way through the oldest versions' requirements.
OLDEST := VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt VENV_OPTIONS=--upgrade-deps

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest docs gpu lint format clean

help: ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/examples.stamp ## train a digits classifier with HessianFree and print its curvature
	$(BIN)/python examples/digits.py fit --config configs/hessian_free.yaml

test: $(VENV)/dev.stamp ## run the tests on all cores, less the slow ones
	$(BIN)/pytest -n auto

test-slow: $(VENV)/dev.stamp ## run the slow tests too
	$(BIN)/pytest -n auto -m "not gpu and not browser"

test-oldest: ## run the tests with the oldest versions allowed, which are gigabytes; needs Python 3.10 to 3.12
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' \
		|| { echo "NumPy 1.26 is not built for Python 3.13 and later; set PYTHON=python3.10" >&2; exit 1; }
	$(MAKE) test $(OLDEST)

# With PYTHON=... in that Python as it is, for a machine that has torch for its card already; else in .venv.
gpu: $(if $(filter file,$(origin PYTHON)),$(VENV)/dev.stamp) ## run the gpu tests and measure on a CUDA device; PYTHON=... uses that Python as it is
	$(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(OPTIONS)

docs: $(VENV)/docs.stamp ## build the site into docs/_build/html, with every warning an error
	rm -rf docs/reference/generated docs/_build/html # pages of names that are gone
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

lint: $(VENV)/dev.stamp ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## reformat, and mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and builds; logs/ is kept
	rm -rf $(VENV) .venv-oldest build dist docs/_build docs/benchmarks/drawn docs/gallery docs/reference/generated *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
		|| { echo "newtonopt needs a Python from 3.10 to 3.13; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_OPTIONS) $(VENV)

# A stamp is older than what it depends on exactly when the environment is out of date.
$(VENV)/%.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing into $(VENV), once; this can take a few minutes"
	$(INSTALL) --editable '.[$*]'
	@touch $@
