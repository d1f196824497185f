# `make demo` and `make test` set everything up on a fresh machine with Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-all test-optimised lint docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m train.demo

PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Every law, on some of its cases; CONTRIBUTING.md has the times.
test: $(VENV)/.test
	$(PYTEST)

# Trainings, processes that are killed and resumed, and another part of the cases for every commit.
test-slow: export TEST_SAMPLE ?= $(shell git rev-parse HEAD 2>/dev/null || date +%F)
test-slow: $(VENV)/.test
	@echo TEST_SAMPLE=$(TEST_SAMPLE)
	$(PYTEST) -m 'slow and not exhaustive'

# Everything, all cases of all families.
test-all: $(VENV)/.test
	$(PYTEST) -m ''

# The tests of `make test`, compiled with XLA's optimisations as in normal use.
test-optimised: $(VENV)/.test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.docs
	$(BIN)/python .ci/notebook_page.py
	$(BIN)/zensical build --clean --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache
