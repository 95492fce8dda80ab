# The few verbs of this project. `make help` lists them.

# The first interpreter that runs and fits; a name on the PATH alone may be an empty shim.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
  $$name -c '$(FITS)' >/dev/null 2>&1 && echo $$name && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STATE := $(abspath .state)
PORT ?= 4200

.DEFAULT_GOAL := help
.PHONY: help venv demo test check bench gpu ui serve clean

help:  ## list these verbs
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{printf "make %-8s %s\n", $$1, $$2}'

venv: $(STAMP)  ## create .venv and install everything (the other verbs do it when needed)

$(STAMP): pyproject.toml
	@$(PYTHON) -c '$(FITS)' 2>/dev/null || { \
	  echo "Photon needs Python 3.11 or 3.12; '$(PYTHON)' says: $$($(PYTHON) --version 2>&1 | head -1)"; \
	  echo "Install one of them, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## the main job: data, training, evaluation, ONNX, scoring and report into out/demo
	$(BIN)/photon retrain --preset demo --output out/demo

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest

check: $(STAMP)  ## linter, formatter, layers contract and type checker
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(STAMP)  ## run the benchmarks into benchmarks/results
	@for bench in benchmarks/bench_*.py; do echo "$$bench"; $(BIN)/python "$$bench" || exit 1; done

gpu:  ## run the checks that need a GPU into benchmarks/results/gpu.json (with .venv, or with PYTHON if there is none)
	@if test -x $(BIN)/python; then $(BIN)/python benchmarks/gpu_checks.py; else $(PYTHON) benchmarks/gpu_checks.py; fi

ui: $(STAMP)  ## show the tracked runs at http://127.0.0.1:5000
	MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true \
	  $(BIN)/mlflow ui --backend-store-uri sqlite:///$(STATE)/mlflow.db

serve: $(STAMP)  ## run the schedules of prefect.yaml on this machine until Ctrl-C
	$(BIN)/python -m flows.serve --port $(PORT)

clean:  ## delete results and caches; keeps data, the environment and the tracked runs
	rm -rf out build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
