# make quickstart   sets up .venv and runs the main job on the standard library's sources
# make test         sets up .venv and passes lint, types, import contracts and tests
# make test-launchers   sets up .venv-launchers with Ray, submitit and SkyPilot (1 GB), and tests launchers and cloud/ with them
# make test-gpu-programs   sets up .venv-gpu with XLA's compiler for GPUs (400 MB), which needs none, and compiles every mesh for H100s
# EXTRA=cuda13 or EXTRA=tpu installs jax for that accelerator; PYTHON=python3.12 picks an interpreter.
PYTHON ?= python3
EXTRA ?=
VENV ?= .venv
BIN := $(VENV)/bin
empty :=
space := $(empty) $(empty)
comma := ,
# `uv` installs in a fifth of the time where it is there; pip is enough.
INSTALL = $(if $(shell command -v uv),uv pip install -q --python $(BIN)/python,$(BIN)/python -m pip install -q --disable-pip-version-check)
extras = $(if $(strip $(1)),[$(subst $(space),$(comma),$(strip $(1)))])

.PHONY: quickstart test test-launchers test-gpu-programs lint soak clean

# What the quickstart takes from the command line: make quickstart RUN=runs/seed1 ARGS="--train.seed 1"
RUN ?= runs/quickstart
ARGS ?=

quickstart: $(VENV)/installed$(EXTRA)
	$(BIN)/llm-jax sweep experiments/quickstart.py --workers 2 --run $(RUN) $(ARGS)
	$(BIN)/llm-jax fit $(RUN)
	$(BIN)/llm-jax forecast $(RUN)
	$(BIN)/llm-jax verify $(RUN)
	$(BIN)/llm-jax report $(RUN)

test: $(VENV)/dev$(EXTRA) lint
	$(BIN)/python -m pytest -m "not slow" -n 2

lint: $(VENV)/dev$(EXTRA)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

LAUNCHERS := .venv-launchers
test-launchers:
	$(PYTHON) -m venv $(LAUNCHERS)
	$(LAUNCHERS)/bin/python -m pip install -q --disable-pip-version-check -e ".[dev,ray,slurm]" skypilot
	$(LAUNCHERS)/bin/python -m pytest tests/scaling/test_ray.py tests/scaling/test_slurm.py tests/test_cloud.py

GPU_PROGRAMS := .venv-gpu
test-gpu-programs:
	$(PYTHON) -m venv $(GPU_PROGRAMS)
	$(GPU_PROGRAMS)/bin/python -m pip install -q --disable-pip-version-check -e ".[dev]" jax-cuda13-plugin
	$(GPU_PROGRAMS)/bin/python -m pytest tests/training/test_gpu_programs.py

soak: $(VENV)/dev$(EXTRA)
	$(BIN)/python -m pytest

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("llm_jax needs Python 3.11 or newer; this is %d.%d. Try: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed$(EXTRA): $(BIN)/python setup.cfg
	$(INSTALL) -e ".$(call extras,$(EXTRA))"
	@touch $@

$(VENV)/dev$(EXTRA): $(BIN)/python setup.cfg
	$(INSTALL) -e ".$(call extras,dev $(EXTRA))"
	@touch $@

clean:
	rm -rf $(VENV) $(LAUNCHERS) $(GPU_PROGRAMS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
