# Everything below sets itself up: a virtual environment in .venv, versions from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?= ../shared/data
# Test processes at once. Files stay whole: each holds what it shares (a deployment, a database) for itself.
WORKERS ?= 2
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

.PHONY: setup simulate quick test test-all lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

simulate: setup  ## the main job: ten synthetic banks, with and without each other, with and without privacy
	$(BIN)/accord simulate bank-demo --noise cohort --compare all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick: setup  ## unit and property tests
	$(PYTEST) -m "not slow" tests/unit tests/property

test: lint  ## everything that takes seconds
	$(PYTEST) -m "not slow"

test-all: lint  ## the slow ones too
	$(PYTEST)

clean:
	rm -rf $(VENV) build dist
