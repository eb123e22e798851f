# Every target does its own set-up: a virtual environment in .venv with the exact versions of constraints.txt.
# It is made once, and again only when pyproject.toml or constraints.txt change.
#
#   TORCH_INDEX_URL=URL make serve    take torch from this package index (say, one with CPU-only or CUDA builds)
#   PYTHON=python3.12 make serve      make the environment with this interpreter
#   make test ARGS="-k scheduler"     hand arguments to pytest, `veneer serve`, the benchmarks
#   make bench BENCH_RESULTS=build    write results elsewhere than into the tree
#   make test-gpu PY=python3 SETUP=   use an environment that exists already, without set-up

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH_INDEX_URL ?=
ARGS ?=
BENCH_RESULTS ?= bench/results

VENV := .venv
GOLDENS_VENV := .venv-goldens
PY ?= $(VENV)/bin/python
SETUP ?= $(VENV)/.installed
SETUP_DEV ?= $(SETUP:$(VENV)/.installed=$(VENV)/.installed-dev)

PIP_INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt \
	$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

# Two files of tests at a time on two cores, each with one thread for its arithmetic.
PARALLEL = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile

# Runs a command, says how long it took, and keeps its exit status.
define timed
	@start=$$SECONDS; $(1); status=$$?; \
	took=$$((SECONDS - start)); printf '%s took %d min %02d s\n' "make $@" $$((took / 60)) $$((took % 60)); exit $$status
endef

.PHONY: help serve demo test test-all test-gpu check goldens bench bench-gpu clean

help: ## say what the targets do
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

serve: $(SETUP) ## serve the built-in base and its adapters on port 8000; other models and flags in ARGS
	@$(PY) -m server serve $(ARGS)

demo: $(SETUP) ## a guided tour: one base, several adapters, hot swap while streams run
	@$(PY) -m server demo

test: $(SETUP_DEV) ## the tests that fit in some minutes on two cores
	$(call timed,$(PARALLEL) $(ARGS))

test-all: $(SETUP_DEV) ## every test that needs no GPU, slow ones too
	$(call timed,$(PARALLEL) -m "not gpu" $(ARGS))

test-gpu: $(SETUP_DEV) ## the tests that need a CUDA device
	$(call timed,$(PY) -m pytest -m gpu $(ARGS))

check: $(SETUP_DEV) ## lint, format, strict types, and the rules of the house
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m pytest tests/house $(ARGS)

goldens: $(GOLDENS_VENV)/.installed ## write again what AdapterHub's library computes, with its own environment
	@$(GOLDENS_VENV)/bin/python tests/goldens/make_adapterhub.py tests/goldens/adapterhub

bench: $(SETUP_DEV) ## the benchmarks, on CPU; ARGS=--quick shows that they run, not how fast
	$(PY) -m bench.versus_peft --json $(BENCH_RESULTS)/versus_peft_float32.json $(ARGS)
	$(PY) -m bench.versus_peft --dtype bfloat16 --json $(BENCH_RESULTS)/versus_peft_bfloat16.json $(ARGS)
	$(PY) -m bench.mixed --json $(BENCH_RESULTS)/mixed.json $(ARGS)
	$(PY) -m bench.host_time --json $(BENCH_RESULTS)/host_time.json $(ARGS)
	$(PY) -m bench.step_profile --json $(BENCH_RESULTS)/step_profile.json $(ARGS)
	$(PY) -m bench.kinds --json $(BENCH_RESULTS)/kinds.json $(ARGS)
	$(PY) -m bench.loading --json $(BENCH_RESULTS)/loading.json $(ARGS)
	$(PY) -m bench.cold_start --json $(BENCH_RESULTS)/cold_start.json $(ARGS)
	$(PY) -m bench.over_capacity --json $(BENCH_RESULTS)/over_capacity.json $(ARGS)
	$(PY) -m bench.registered --json $(BENCH_RESULTS)/registered.json $(ARGS)
	$(PY) -m bench.serving --json $(BENCH_RESULTS)/serving.json $(ARGS)

bench-gpu: $(SETUP_DEV) ## the benchmarks, on a CUDA device
	$(PY) -m bench.versus_peft --device cuda --dtype bfloat16 --json $(BENCH_RESULTS)/versus_peft_cuda.json $(ARGS)
	$(PY) -m bench.serving --device cuda --dtype bfloat16 --json $(BENCH_RESULTS)/serving_cuda.json $(ARGS)

clean: ## remove the environment and what the tools leave behind
	rm -rf $(VENV) $(GOLDENS_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Veneer needs Python 3.11 or newer, and '$(PYTHON)' is not. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making the environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Veneer and what it needs (minutes the first time, seconds later)"
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Veneer and its development tools (minutes the first time, seconds later)"
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $(VENV)/.installed $@

$(GOLDENS_VENV)/.installed: tests/goldens/requirements-adapterhub.txt
	$(PYTHON) -m venv $(GOLDENS_VENV)
	$(GOLDENS_VENV)/bin/python -m pip install --disable-pip-version-check \
		$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) --requirement tests/goldens/requirements-adapterhub.txt
	@touch $@
