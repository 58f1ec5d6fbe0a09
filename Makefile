# Needs Python 3.11 or later and GNU make. Everything else is installed by the first target that needs it.
#
#   make demo         the recall demonstration: trains, measures, draws
#   make test         style, types, documentation, tests, on the releases in constraints.txt
#   make test-floor   the small matrix of tests on the oldest releases that pyproject.toml allows
#   make test-newest  the small matrix of tests on the newest releases there are when it is first run
#   make test-long    the tests that take minutes each: long examples of the pages on a real model
#   make docs         the documentation, served on this machine
#   make clean        removes the environments and everything that was built
#
# PYTHON=python3.12       another interpreter
# TORCH_INDEX=https://... an index to take torch from, such as PyTorch's own index of CPU wheels

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --only-binary :all: \
  $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.DELETE_ON_ERROR:
.PHONY: demo test lint types report pages units test-long test-floor test-newest small docs clean

demo: $(VENV)/.demo
	$(BIN)/mnemic demo

# two at a time: the tests keep two cores busy, and the rest fills the gaps
test: $(VENV)/.test
	$(MAKE) --jobs 2 units lint types report pages

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright

report: $(VENV)/.test
	$(BIN)/python benchmarks/report.py --check

pages: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # not quiet, or no warning would count

units: $(VENV)/.test
	$(BIN)/pytest -n 2 --dist worksteal -m "not long"

test-long: $(VENV)/.test
	$(BIN)/pytest -m long

test-floor: .venv-floor.txt
	$(MAKE) small VENV=.venv-floor CONSTRAINTS=$<

test-newest:
	$(MAKE) small VENV=.venv-newest CONSTRAINTS=

small: $(VENV)/.small
	$(BIN)/pytest -n 2 --dist worksteal -m "small and not long"

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf .venv .venv-* site dist build .pytest_cache .ruff_cache .hypothesis

# torch comes first, for its index is for nothing else
$(VENV)/.torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	@echo "installing into $(VENV); the first time takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[plot,train,serve,docs,test]'
	@touch $@

$(VENV)/.small: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[plot,train,serve,test]'
	@touch $@

.venv-floor.txt: pyproject.toml .ci/floors
	$(PYTHON) .ci/floors >$@
