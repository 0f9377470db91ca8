# `make demo` and `make test` do all set-up themselves; nothing has to be installed by hand first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup lint format test unit integration system torture demo demo-ui bench clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.stamp  ## make .venv with everything that tests and the demo need

$(VENV)/.stamp: pyproject.toml scripts/setup_env.py
	$(PYTHON) scripts/setup_env.py $(VENV)
	@touch $@

lint: setup  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup  ## all three layers of tests
	$(BIN)/python scripts/run_tests.py

unit: setup  ## the tests that need no server (seconds)
	$(BIN)/python -m pytest tests/unit

integration: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/integration

system: setup
	$(BIN)/python -m pytest tests/system

torture: setup  ## kill tasks 60 times at random moments, and count what was lost, doubled or paid twice
	VLM_TORTURE_KILLS=60 $(BIN)/python -m pytest -s --timeout=3000 tests/integration/test_crash.py

demo: setup  ## tag the demo pictures under a real scheduler and show the result
	$(BIN)/python demo/run.py

demo-ui: setup  ## the same, and leave Airflow's UI up
	$(BIN)/python demo/run.py --ui

bench: setup  ## ours beside a bare loop, saturate and Data-Juicer
	$(BIN)/python benchmarks/tagging.py

clean:
	rm -rf $(VENV) .demo .bench .pytest_cache .mypy_cache .ruff_cache
