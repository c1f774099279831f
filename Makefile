# `make demo` and `make test` do everything from a fresh clone; both share one environment.
# `make gpu` needs no environment of its own.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-cluster gpu lint clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.installed
	rm -rf runs/demo runs/demo-data
	$(BIN)/fedforward demo --out runs/demo

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m "not cluster"
	$(BIN)/python -m pytest -n 0 -m cluster

# One federation after the other: each has a dozen processes.
test-cluster: .venv/.installed
	$(BIN)/python -m pytest -n 0 -m cluster

# On a machine with a GPU, with the packages that `python3` has there: nine minutes at most.
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --device cuda --out runs/gpu

clean:
	rm -rf .venv runs
