# Each target does its own set-up: it creates .venv and installs pyrovae there, once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test test-fast lint format notebooks bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(STAMP): setup.cfg pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pyrovae and what it needs into $(VENV) (torch alone is about 5 GB; a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train a VAE on real digits, print its test log-likelihood, write runs/demo/report.html
	@$(BIN)/pyrovae demo

test: $(STAMP)  ## every test, the slow statistical ones too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-fast: $(STAMP)  ## the tests to run all day
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

lint: $(STAMP)  ## ruff (code and notebooks), and mypy on the installed wheel
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf build && mkdir -p build/lint
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w build/lint .
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/lint/site build/lint/*.whl
	@MYPYPATH=build/lint/site $(BIN)/mypy -p pyrovae

format: $(STAMP)  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

notebooks: $(STAMP)  ## execute every notebook in place, with its full settings
	@$(BIN)/python notebooks/execute.py

bench: $(STAMP)  ## the benchmarks that take minutes; the recipes of benchmarks/reproduce take longer
	@$(BIN)/python -m benchmarks.log_likelihood
	@$(BIN)/python -m benchmarks.objectives
	@$(BIN)/python -m benchmarks.speed
	@$(BIN)/python -m benchmarks.classics

clean:  ## remove what was built (the environment and the runs stay)
	@rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
