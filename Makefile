# make quickstart   install into .venv and run the example study
# make test         install and run the tests (at most 12 minutes on two cores)
# make test-ray     a submitted job, killed and interrupted runs, lost nodes, S3, one and two workers (half an hour)
# make test-chaos   attacks on whole studies: kills, flipped bits, double starts, full disks, faulty S3, poison (an hour)
# make test-all     all tests, including the slow ones
# make check        ruff and mypy
#
# On Linux, PyPI's torch includes several GB of CUDA. Without a GPU, use the smaller build of PyTorch's own index:
#   make quickstart PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
EXTRA ?= cpu
RAY_TESTS ?= tests/e2e tests/runtime
BIN := .venv/bin
ifdef PIP_EXTRA_INDEX_URL
export PIP_EXTRA_INDEX_URL
endif

.PHONY: quickstart install install-test test test-ray test-chaos test-all check clean

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

# Two processes with one thread each are faster than one with two: small networks gain nothing from threads.
test: install-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The slow tests that changes break most easily: a submitted job, a killed run and search, signals, lost nodes, S3,
# two workers.
test-ray: install-test
	$(BIN)/python -m pytest -m slow $(RAY_TESTS) -k "not adapt and not many_kills"

# CHAOS_KILLS, CHAOS_ROUNDS, CHAOS_FLIPS and CHAOS_DISKS set the number of repetitions (tests/chaos).
test-chaos: install-test
	$(BIN)/python -m pytest -s -m slow tests/chaos

test-all: install-test
	$(BIN)/python -m pytest -m "not gpu"

check: install-test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs
