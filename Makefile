# One virtual environment serves every target; it is rebuilt when the metadata or the pins change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Else every process that the tests start compiles the libraries anew: it takes three times as long to begin.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart test lint types clean

help:  ## List the targets.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	# Compiled when imported: most of what is installed never is.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[test]"
	@touch $@

quickstart: $(VENV)/.installed  ## Train a tiny model on short data, ask it for facts at 16x the length.
	$(BIN)/python recipes/quickstart.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

test: lint types  ## Lint, types, doctests and tests.
	# One thread each: two processes of two threads on two cores wait for each other three times as long.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

clean:  ## Remove the virtual environment and the caches.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
