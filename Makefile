# Everything from nothing but python3, pip and make:
#   make demo    train the digits example on two Ray workers
#   make test    the whole test suite
# On Linux the plain torch file of PyPI is the CUDA build (some GB). For the small CPU build name PyTorch's CPU wheel
# index: make demo TORCH_INDEX=URL

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.raylit-installed
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-long test-hosts chaos lint bench clean

help:
	@echo "make demo    train the digits example on two Ray workers (installs into $(VENV) the first time)"
	@echo "make test    run the whole test suite"
	@echo "make test-long   tests that take minutes on several hosts, which the suite skips"
	@echo "make test-hosts  hosts of their own on this machine, clusters/onprem.yaml and Slurm on them, and faults; needs root"
	@echo "make chaos   20 runs on a cluster of three hosts, with one fault each; make chaos ARGS='--seed 7 --runs 20'"
	@echo "make lint    ruff and mypy"
	@echo "make bench   measure a training step against a hand-written loop"
	@echo "make clean   remove $(VENV), caches and runs/"
	@echo "PYTHON=python3.12 picks the interpreter; TORCH_INDEX=URL the wheel index that torch comes from."

install: $(STAMP)

# The stamp is written last, so an install that broke off is done again.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else "raylit needs Python 3.10 to 3.13, $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % v)'
	@# Some distributions ship venv without ensurepip: then the machine's own pip puts one there.
	@test -x $(PY) && $(PY) -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 \
	  || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install --quiet pip; }
	@echo "Installing into $(VENV); the first time this takes some minutes."
	@# torch first and alone, from the index that was asked for; what it needs comes with the pins below.
	$(PIP) install --quiet --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet -c constraints.txt hatchling editables
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[test,examples,lint]'
	@touch $@

demo: $(STAMP)
	$(PY) examples/01_digits/main.py --num-workers 2 --max-epochs 10 $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -q --durations=10 $(ARGS)

test-long: $(STAMP)
	RAYLIT_TEST_LONG=1 $(PY) -m pytest -q --durations=10 -m long $(ARGS)

test-hosts: $(STAMP)
	RAYLIT_TEST_HOSTS=1 $(PY) -m pytest -q -s --durations=10 tests/hosts $(ARGS)

chaos: $(STAMP)
	$(PY) -m tests.chaos.chaos $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(STAMP)
	$(PY) benchmarks/step_overhead.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist runs
