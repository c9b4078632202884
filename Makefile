# make demo | smollm2 | study | test | check | docs: each creates the environment (.venv) if there is none; ARGS="…" is passed on.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help env demo smollm2 study test test-recovery check docs gpu gpu-container clean
ENV := .venv/.installed
BIN := .venv/bin
ARGS ?=
PYTHON ?= $(BIN)/python

help:
	@echo "make demo    train a small model with SFR over two pipeline stages, export it, compare it (10 minutes on two cores)"
	@echo "make smollm2 fine-tune a pretrained 135M model with and without SFR on eight personas (25 minutes on two cores)"
	@echo "make study   compare eight objectives on real text (several hours on two cores; a second call resumes)"
	@echo "make test    run the tests             make check   ruff, types, layers"
	@echo "make test-recovery   run those that kill trainings under real launchers, torchrun and Slurm"
	@echo "make docs    write the documentation's site to build/site"
	@echo "make gpu     check this machine's GPU: tests, trainings compared with the CPU's, benchmarks"
	@echo "make gpu-container   build an image with the package on NVIDIA's PyTorch image (docker)"
	@echo "make env     create or update .venv    make clean   remove .venv and caches"
	@echo 'ARGS="…" is passed on: make demo ARGS="--tiny", make test ARGS="tests/flow -x"'

$(ENV): setup.py constraints.txt tools/environment.sh
	@tools/environment.sh
	@touch $@

env: $(ENV)

demo: $(ENV)
	@HF_HUB_OFFLINE=1 $(BIN)/megatron-sfr demo $(ARGS)

smollm2: $(ENV)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m examples.smollm2_personas.run

study: $(ENV)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m examples.dictionary_styles.study $(ARGS)

test: $(ENV)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not recovery" $(ARGS)

test-recovery: $(ENV)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m recovery $(ARGS)

check: $(ENV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tools/check_layers.py

docs: $(ENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Does not create an environment: Transformer Engine is built for the installed torch. PYTHON=python uses a container's.
gpu:
	@HF_HUB_OFFLINE=1 $(PYTHON) -m tools.gpu_check $(ARGS)

gpu-container:
	docker build --tag megatron-sfr:gpu $(ARGS) .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
