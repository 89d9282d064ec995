# Each target works from nothing: it makes its own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
# Two processes. The tests of a file stay together, so that what they share is computed once.
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

.PHONY: help demo test test-oldest lint docs results clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## watch a real model forget the capitals of the world (writes out/demo)
	rm -rf out/demo out/demo.part
	$(BIN)/kfade demo --out out/demo

test: $(READY)  ## all tests
	$(BIN)/pytest $(TWO)

# The oldest torch on PyPI is a CUDA build (it runs without a GPU): 2.5 GB to download, 5 GB on disk.
test-oldest: $(OLDEST)/.ready  ## all tests with the oldest versions (Python 3.10-3.12; downloads an old torch, 2.5 GB)
	$(OLDEST)/bin/pytest $(TWO)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results: $(READY)  ## draw the pages and figures of the benchmarks again from their committed results
	$(BIN)/python benchmarks/experiments/results.py
	$(BIN)/python benchmarks/fit_growth.py --draw
	$(BIN)/python benchmarks/families.py --page

# The page of the command line comes from the commands, so the site builds in the environment of the tests.
docs: $(VENV)/.docs  ## the documentation site (writes site/; needs Python 3.11 or newer)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove the virtual environments, the site and what runs wrote
	rm -rf $(VENV) $(OLDEST) site out

$(VENV)/.docs: $(READY)
	$(BIN)/pip install --quiet --constraint requirements/constraints.txt --editable '.[docs]'
	touch $@

$(READY): VERSIONS := constraints
$(OLDEST)/.ready: VERSIONS := oldest
$(READY): requirements/constraints.txt
$(OLDEST)/.ready: requirements/oldest.txt
%/.ready: pyproject.toml requirements/no-deps.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --constraint requirements/$(VERSIONS).txt --editable '.[dev]'
	$(@D)/bin/pip install --quiet --no-deps --requirement requirements/no-deps.txt
	touch $@
