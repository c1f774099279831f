# `make demo` and `make test` do everything from a fresh clone; both share one environment.
# `make gpu` needs no environment of its own.
PYTHON ?= python3
BIN := .venv/bin

SECONDS ?= 60
KILLS ?= 100

.PHONY: demo docs test test-all test-cluster test-faults fuzz gpu lint wheel clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.installed
	rm -rf runs/demo runs/demo-data
	$(BIN)/fedforward demo --out runs/demo

# What only the site needs is installed when it is first asked for.
.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m "not cluster and not faults"
	$(BIN)/python -m pytest -n 0 -m cluster

# One federation after the other: each has a dozen processes.
test-cluster: .venv/.installed
	$(BIN)/python -m pytest -n 0 -m cluster

# Processes are killed, disks are full, clocks jump: `make test-faults KILLS=100`.
test-faults: .venv/.installed
	$(BIN)/python -m pytest -n 0 -m "faults or not faults" --kills $(KILLS) tests/faults

# What only fuzzing needs is installed when it is first asked for.
.venv/.fuzz: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[fuzz]'
	touch $@

# All targets from the corpus on, one after another: `make fuzz SECONDS=60`.
fuzz: .venv/.fuzz
	$(BIN)/python -m tests.fuzz.run --seconds $(SECONDS)

# On a machine with a GPU, with the packages that `python3` has there: nine minutes at most.
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --device cuda --out runs/gpu

# What `pip install` takes, in dist/.
wheel: .venv/.installed
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf .venv runs build dist
