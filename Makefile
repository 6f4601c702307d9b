# Needs Python 3.11 or newer and make, nothing else:
#   make sample PROMPT="a flat icon of a dog"      makes an image with the bundled model
#   make test                                      runs the tests of every change, minutes
#   make test-all                                  runs all tests
#   make lint                                      ruff, mypy and the order of imports
# PYTHON=python3.12 picks the interpreter, VENV=folder the environment, ARGS="..." passes more flags on.

SHELL := /bin/sh
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PROMPT ?= a 3D render of a red apple
ARGS ?=

# The prompt reaches the shell through the environment, untouched: quotes, apostrophes and dollar signs are safe.
export HART_PROMPT := $(value PROMPT)
unexport PROMPT

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
REQUIREMENTS := requirements.txt pyproject.toml

.PHONY: help sample test test-all lint format clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

sample: $(VENV)/.installed
	@$(VENV)/bin/python sample.py --checkpoint=assets/emoji --prompt="$$HART_PROMPT" $(ARGS)

PYTEST := $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-dev
	$(PYTEST) -m 'not slow' tests $(ARGS)

test-all: $(VENV)/.installed-dev
	$(PYTEST) tests $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf .venv .venv312 .pytest_cache .mypy_cache .ruff_cache .hypothesis hart_jax.egg-info build

$(VENV)/.created:
	@$(PYTHON) -c 'import sys' 2>/dev/null || { \
	  echo 'error: no Python interpreter "$(PYTHON)"; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); hart_jax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo 'error: $(PYTHON) cannot make environments; on Debian and Ubuntu install the package python3-venv' >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(REQUIREMENTS)
	@echo "Installing hart_jax into $(VENV) (once, about two minutes) ..."
	@$(PIP) install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(REQUIREMENTS)
	@echo "Installing hart_jax and its test tools into $(VENV) (once, about two minutes) ..."
	@$(PIP) install --quiet -e '.[dev,data]'
	@touch $(VENV)/.installed $@
