# Two commands do everything in a fresh clone: make demo, make test.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv native test pytest lint format demo fuzz dist clean distclean

help:
	@echo 'make demo       set up, then quantize, pack, reload, evaluate and time the shipped model'
	@echo 'make test       set up, then every check: lint and pytest'
	@echo 'make pytest     the test suite alone; PYTEST_ARGS="-k pattern" is passed on'
	@echo 'make lint       ruff check, ruff format --check, mypy --strict'
	@echo 'make format     let ruff fix and format the tree'
	@echo 'make fuzz       hostile inputs, 100,000 a target, an hour or more; FUZZ_CASES=1000 for fewer'
	@echo 'make venv       the set-up alone: $(VENV) with the package (editable) and its test tools'
	@echo 'make native     build the libraries of csrc/ again, after a change'
	@echo 'make dist       dist/: the sdist, the pure wheel and the wheel with the libraries built here'
	@echo 'make clean      remove caches and build output;  make distclean  also $(VENV)'

# The stamp is written last, so an interrupted installation is taken up again by the next make.
$(STAMP): pyproject.toml setup.py erq/_version.py $(wildcard csrc/*.* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "erq needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
			"Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[test]'
	@touch $@

venv: $(STAMP)

native: $(STAMP)
	$(BIN)/python csrc/build.py

test: lint pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)
	$(BIN)/erq demo

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.campaign

# Wheels come from the sdist, so that it is known to be whole; the pure one installs anywhere.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --sdist --outdir dist
	ERQ_BUILD_CPU=0 ERQ_BUILD_CUDA=0 $(BIN)/python -m pip wheel --no-deps --wheel-dir dist dist/erq-*.tar.gz
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist dist/erq-*.tar.gz

clean:
	rm -rf build dist erq.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
