# `make train` and `make test` need Python 3.11 or newer and make; each sets up what it needs, once.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= demo

.PHONY: help train test check check-static format clean

help:
	@echo "make train   train the default model on real text: two workers, about three minutes (RUN=name, ARGS=overrides)"
	@echo "make test    run the whole test suite"
	@echo "make check   format, lint, types, tests"
	@echo "make format  rewrite the sources in the house format"

train: .venv/installed
	$(BIN)/moetrain train run.name=$(RUN) $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest $(ARGS)

check: check-static test

check-static: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("moetrain needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --quiet --disable-pip-version-check -e .
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ .venv/installed

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
