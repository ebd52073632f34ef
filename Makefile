# Two commands are for users: `make demo` and `make test`. Both make what they need.
#
#   VENV=DIR      environment to use or to make (.venv)
#   PYTHON=NAME   Python 3.10 to 3.13 to make it with (python3)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                 index to take torch from: this one has builds for the CPU, a tenth of the size
#   QUICK=1       of test-clients: two of the clients, and no npm
#   ARGS="..."    passed on, such as ARGS="--port 3001" or ARGS="-k lora"

VENV ?= .venv
PYTHON ?= python3
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
TORCH_INDEX ?=
QUICK ?=
ARGS ?=

BIN = $(VENV)/bin
CLIENTS = $(VENV)-clients
LOWEST = build/lowest
NEWEST = build/newest
PYTEST = -m pytest -n auto --maxprocesses 4 --dist loadfile
PIP = -m pip install --disable-pip-version-check

# $(call install,DIR,OPTIONS,WHAT): torch from its own index where one is named, then the rest. What
# torch needs comes with the rest: that index holds a few versions of it only.
define install
@echo "Installs into $(1): torch and what it needs is a download of about 3 GB on Linux (CUDA),"
@echo "0.2 GB as a build for the CPU (TORCH_INDEX=https://download.pytorch.org/whl/cpu) or on macOS,"
@echo "nothing where $(1) has it; all other packages are some 0.2 GB."
$(if $(TORCH_INDEX),$(1)/bin/python $(PIP) $(2) torch --no-deps --index-url $(TORCH_INDEX))
$(1)/bin/python $(PIP) $(2) -e $(3)
endef

help:
	@echo "make demo    serve the bundled demo model on http://localhost:3000"
	@echo "make test    run the tests"
	@echo "make test-clients    try the clients of OpenAI, Hugging Face and others (npm, too, if there)"
	@echo "make test-numerics   run the tests with the numeric kernels of other processors"
	@echo "make test-families   try the pipeline classes of all families"
	@echo "make simulate        run the order of work with 10,000,000 random requests"
	@echo "make test-jobs       kill a process 50 times while it runs jobs, and look for lost ones"
	@echo "make test-postgres   run the tests of jobs on a PostgreSQL server from a wheel"
	@echo "make lint    check style and format"
	@echo "make types   check the types"
	@echo "make docs    build the documentation into docs/_build/html"
	@echo "make lowest  run the tests with the lowest versions of pyproject.toml"
	@echo "make newest  run the tests with the newest releases of all dependencies"
	@echo "make release-check   make test with each Python of PYTHONS, then make lowest and make newest"
	@echo "make clean   remove what was built; the environment stays"

demo: $(VENV)/.installed
	$(BIN)/bentoml diffusers demo $(ARGS)

test: $(VENV)/.installed-test
	BENTOML_DO_NOT_TRACK=True $(BIN)/python $(PYTEST) $(ARGS)

test-numerics: $(VENV)/.installed-test
	BENTOML_DO_NOT_TRACK=True $(BIN)/python -m tools.numerics $(ARGS)

test-families: $(VENV)/.installed-test
	BENTOML_DO_NOT_TRACK=True $(BIN)/python -m pytest -n auto --maxprocesses 4 -m families \
		tests/test_families.py $(ARGS)

test-clients: $(VENV)/.installed-test $(CLIENTS)/.installed$(if $(QUICK),-quick)
	BENTOML_DO_NOT_TRACK=True $(BIN)/python -m tools.clients --python $(CLIENTS)/bin/python \
		$(if $(QUICK),--quick) $(ARGS)

simulate: $(VENV)/.installed-test
	$(BIN)/python -m tools.simulation --requests 10000000 --processes 2 $(ARGS)

test-jobs: $(VENV)/.installed-test
	JOB_KILLS=50 BENTOML_DO_NOT_TRACK=True $(BIN)/python -m pytest tests/test_jobs.py -k lost $(ARGS)

test-postgres: $(VENV)/.installed-test-postgres
	BENTOML_DO_NOT_TRACK=True $(BIN)/python -m pytest tests/test_jobs.py -m postgres $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-lint
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	BENTOML_DO_NOT_TRACK=True $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

lowest: $(LOWEST)/.installed
	BENTOML_DO_NOT_TRACK=True $(LOWEST)/bin/python $(PYTEST) $(ARGS)

# What `pip install bentoml-diffusers` takes today: no constraints, and no pre-releases. It has no
# stamp: what is newest changes without a change here.
newest: | $(NEWEST)/bin/python
	$(call install,$(NEWEST),--upgrade --upgrade-strategy eager,".[test]")
	BENTOML_DO_NOT_TRACK=True $(NEWEST)/bin/python $(PYTEST) $(ARGS)

# What is run before a release, for all that pyproject.toml and README.md promise. The oldest Python
# has the lowest versions; only a new one gets the newest.
release-check:
	for python in $(PYTHONS); do $(MAKE) test PYTHON=$$python VENV=build/$$python || exit 1; done
	$(MAKE) lowest PYTHON=$(firstword $(PYTHONS))
	$(MAKE) newest PYTHON=$(lastword $(PYTHONS))

clean:
	rm -rf docs/_build build dist htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache

# A stamp says what was installed; a change of the dependencies makes it stale.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(VENV),-c constraints.txt,.)
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(VENV),-c constraints.txt,".[$*]")
	@touch $@

$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	sed -n 's/^  "\([A-Za-z_-]*\)>=\([0-9.]*\)[",].*/\1==\2/p' pyproject.toml > $(LOWEST)/lowest.txt
	$(call install,$(LOWEST),-c $(LOWEST)/lowest.txt,".[test]")
	$(LOWEST)/bin/python $(PIP) --no-index -r $(LOWEST)/lowest.txt  # fails where one is another
	@touch $@

$(CLIENTS)/.installed: tools/clients/requirements.txt | $(CLIENTS)/bin/python
	$(CLIENTS)/bin/python $(PIP) -r $<
	@touch $@

$(CLIENTS)/.installed-quick: tools/clients/requirements-quick.txt | $(CLIENTS)/bin/python
	$(CLIENTS)/bin/python $(PIP) -r $<
	@touch $@

$(CLIENTS)/bin/python:
	$(PYTHON) -m venv $(CLIENTS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(NEWEST)/bin/python:
	$(PYTHON) -m venv $(NEWEST)

.PHONY: help demo simulate test test-jobs test-postgres test-clients test-families test-numerics lint types docs lowest newest release-check clean
.PRECIOUS: $(VENV)/.installed-%
