# Each target works from nothing: it makes its own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lint clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## watch a real model forget the capitals of the world (writes out/demo)
	rm -rf out/demo out/demo.part
	$(BIN)/kfade demo --out out/demo

test: $(READY)  ## all tests
	$(BIN)/pytest

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the virtual environment and what runs wrote
	rm -rf $(VENV) out

$(READY): pyproject.toml requirements/constraints.txt requirements/no-deps.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements/constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --requirement requirements/no-deps.txt
	touch $@
