# make demo | study | test | check: each makes its own environment (.venv) when there is none; ARGS="…" is handed on.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help env demo study test check gpu gpu-container clean
ENV := .venv/.installed
BIN := .venv/bin
ARGS ?=
PYTHON ?= $(BIN)/python

help:
	@echo "make demo    train a small model with SFR over two pipeline stages, export it, compare it (at most 10 minutes)"
	@echo "make study   compare seven objectives on real text (an evening on two cores; goes on where it stopped)"
	@echo "make test    run the tests            make check   ruff, types, layers"
	@echo "make gpu     check this machine's GPU: tests, trainings compared with the CPU's, benchmarks"
	@echo "make gpu-container   build the package into NVIDIA's PyTorch image (docker)"
	@echo "make env     make or update .venv     make clean   remove .venv and caches"
	@echo 'ARGS="…" is handed on: make demo ARGS="--tiny", make test ARGS="tests/flow -x"'

$(ENV): setup.py constraints.txt tools/environment.sh
	@tools/environment.sh
	@touch $@

env: $(ENV)

demo: $(ENV)
	@HF_HUB_OFFLINE=1 $(BIN)/megatron-sfr demo $(ARGS)

study: $(ENV)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m examples.dictionary_styles.study $(ARGS)

test: $(ENV)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

check: $(ENV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tools/check_layers.py

# No environment is made: Transformer Engine is built for the torch that is there. PYTHON=python takes a container's.
gpu:
	@HF_HUB_OFFLINE=1 $(PYTHON) -m tools.gpu_check $(ARGS)

gpu-container:
	docker build --tag megatron-sfr:gpu $(ARGS) .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
