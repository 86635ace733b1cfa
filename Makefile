# Everything below sets itself up: a virtual environment in .venv, versions from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?= ../shared/data

.PHONY: setup simulate test test-all lint clean

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

test: lint  ## everything that takes seconds
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m "not slow"

test-all: lint  ## the slow ones too
	HF_HUB_OFFLINE=1 $(BIN)/pytest

clean:
	rm -rf $(VENV) build dist
