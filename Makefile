# Two commands are for users: `make demo` and `make test`. Both make what they need.
#
#   VENV=DIR      environment to use or to make (.venv)
#   PYTHON=NAME   Python 3.10 or newer to make it with (python3)
#   ARGS="..."    passed on, such as ARGS="--port 3001" or ARGS="-k lora"

VENV ?= .venv
PYTHON ?= python3
ARGS ?=

BIN = $(VENV)/bin
LOWEST = build/lowest
PYTEST = -m pytest -n auto --maxprocesses 4 --dist loadfile
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e

help:
	@echo "make demo    serve the bundled demo model on http://localhost:3000"
	@echo "make test    run the tests"
	@echo "make test-numerics   run the tests with the numeric kernels of other processors"
	@echo "make lint    check style and format"
	@echo "make types   check the types"
	@echo "make docs    build the documentation into docs/_build/html"
	@echo "make lowest  run the tests with the lowest versions of pyproject.toml"
	@echo "make clean   remove what was built; the environment stays"

demo: $(VENV)/.installed
	$(BIN)/bentoml diffusers demo $(ARGS)

test: $(VENV)/.installed-test
	BENTOML_DO_NOT_TRACK=True $(BIN)/python $(PYTEST) $(ARGS)

test-numerics: $(VENV)/.installed-test
	BENTOML_DO_NOT_TRACK=True $(BIN)/python -m tools.numerics $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-lint
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	BENTOML_DO_NOT_TRACK=True $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

lowest: $(LOWEST)/.installed
	BENTOML_DO_NOT_TRACK=True $(LOWEST)/bin/python $(PYTEST) $(ARGS)

clean:
	rm -rf docs/_build build dist htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache

# A stamp says what was installed; a change of the dependencies makes it stale.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[$*]"
	@touch $@

$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	sed -n 's/^  "\([A-Za-z_-]*\)>=\([0-9.]*\)".*/\1==\2/p' pyproject.toml > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install -c $(LOWEST)/lowest.txt -e ".[test]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

.PHONY: help demo test test-numerics lint types docs lowest clean
.PRECIOUS: $(VENV)/.installed-%
