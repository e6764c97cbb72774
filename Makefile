# make setup | quickstart | test | test-full | mutants | gpu-check | bench | lint | clean. Everything runs from .venv, on a CPU, and needs no GPU.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.north-setup
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup system test test-full lint mutants gpu-check quickstart bench clean

setup: system $(STAMP)

# tmux runs the terminals, bubblewrap isolates the commands of the model.
system:
	@missing=""; \
	command -v tmux >/dev/null || missing="$$missing tmux"; \
	command -v bwrap >/dev/null || missing="$$missing bubblewrap"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing$$missing"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	else \
		echo "north_lightning needs$$missing. Install with:  sudo apt-get install -y$$missing"; exit 1; \
	fi

# The CPU build of torch is asked for by its exact name, so that the CUDA build (several GB) can never be taken: first
# from wherever pip is configured to look, then from PyTorch's own index of CPU wheels. All else comes with --no-deps from
# a lock file (see the head of requirements/cpu.txt).
$(STAMP): requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
		{ echo "Python 3.11 is needed ('$(PYTHON)' is not): make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "Install with:  sudo apt-get install -y python3.11-venv"; rm -rf $(VENV); exit 1; }
	$(PIP) install -q --no-deps '$(TORCH)' 2>/dev/null || $(PIP) install -q --no-deps --retries 1 --timeout 30 --index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) install -qq --no-deps --only-binary :all: -r requirements/cpu.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two tests at a time, a process each; then, one by one, those that need the machine for themselves.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not alone and not long"
	$(BIN)/python -m pytest -m "alone and not long"

# Also the trials marked `long`: hundreds of kills, thousands of generated cases.
test-full: lint
	$(BIN)/python -m pytest -m "long or not long"

# A seeded sample of mutations of the core that the tests have to notice; ARGS="--seed 1 --count 100 --only losses".
mutants: setup
	$(BIN)/python tests/mutants.py $(ARGS)

# At most eight minutes on one large GPU; needs no setup but torch. PYTHON names the interpreter that has it.
gpu-check:
	$(PYTHON) tests/benchmarks/gpu_check.py $(ARGS)

bench: setup
	@set -e; for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

quickstart: setup
	$(BIN)/python -m north_lightning recipe --config configs/quickstart/recipe.yaml

clean:
	rm -rf $(VENV) runs wandb .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
