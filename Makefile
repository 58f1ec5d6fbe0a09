# Needs Python 3.11 or later and GNU make. Everything else is installed into .venv by the first target that needs it.
#
#   make demo    the recall demonstration: trains, measures, draws
#   make test    style, types, documentation, tests: what CI runs
#   make docs    the documentation, served on this machine
#   make clean   removes .venv and everything that was built
#
# PYTHON=python3.12       another interpreter
# TORCH_INDEX=https://... an index to take torch from, such as PyTorch's own index of CPU wheels

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --only-binary :all: -c constraints.txt

.PHONY: demo test docs clean

demo: $(VENV)/.demo
	$(BIN)/mnemic demo

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/mnemic report --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/pytest -n 2

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) site dist build .pytest_cache .ruff_cache .hypothesis

# torch comes first and pinned: left to pip, a dependency would pull the newest build
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	@echo "installing into $(VENV); the first time takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[plot,train,docs,test]'
	@touch $@
