# make quickstart   install into .venv and run the example study to its end
# make test         install and run the tests (at most 12 minutes on two cores)
# make test-ray     a submitted job, killed and interrupted runs, S3, poison rows, one and two workers (half an hour)
# make test-all     all slow ones too
# make check        ruff and mypy
#
# On Linux, PyPI's torch brings several GB of CUDA. Without a GPU, PyTorch's own index has a smaller build:
#   make quickstart PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
EXTRA ?= cpu
BIN := .venv/bin
ifdef PIP_EXTRA_INDEX_URL
export PIP_EXTRA_INDEX_URL
endif

.PHONY: quickstart install install-test test test-ray test-all check clean

quickstart: install
	$(BIN)/python jobs/run_study.py configs/digits.yaml

install: .venv/installed-$(EXTRA)

install-test: .venv/installed-$(EXTRA)-test

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed-$(EXTRA): .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[$(EXTRA)]"
	@touch $@

.venv/installed-$(EXTRA)-test: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[$(EXTRA),test]"
	@touch $@ .venv/installed-$(EXTRA)

test: install-test
	$(BIN)/python -m pytest

# Of the slow ones those that a change breaks most easily: a submitted job, a killed run and search, signals, S3, two
# workers, rows that kill their worker.
test-ray: install-test
	$(BIN)/python -m pytest -m slow tests/e2e tests/runtime -k "not adapt and not many_kills"
	$(BIN)/python -m pytest -m "slow and ray" tests/chaos

test-all: install-test
	$(BIN)/python -m pytest -m "not gpu"

check: install-test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs
