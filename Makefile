# `make demo` and `make test` need Python 3.11 or newer with pip, and a package registry; everything else they set up here.
# make test CONSTRAINTS=file    installs under a pip constraints file
# make test TESTS=tests/test_adc.py
# make test-fast                the groups that take no long time, for between two edits
# make coverage                 all tests, and which lines of rqtool/ they ran
# make lint                     ruff and mypy, in the same environment
# make format                   lays all Python files out as `make lint` asks for, and lists the lines that stay too long
# make count                    how many branches, long lines, nodes a line, ... the code has
# make shades REF=commit        the same six jobs on that commit and on HEAD, and what differs
# make bench                    times the kernels and writes docs/performance.md; on a quiet machine
# make bench-peers              the same layer through other tools, in an environment of their own
# make experiments SHARED=dir    data and weights for docs/results.md; see tools/experiments.py

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
TESTS ?=
SHARED ?= ../shared
REF ?=
FORMATTED := rqtool tests examples tools

.PHONY: demo test test-fast coverage lint format count shades bench bench-peers experiments venv clean

demo: venv
	$(BIN)/rqtool demo

test: venv
	$(BIN)/python -m pytest $(TESTS)

test-fast: venv
	$(BIN)/python -m pytest -m "not slow" $(TESTS)

coverage: venv
	rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest $(TESTS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

lint: .venv/linters
	$(BIN)/python -m ruff check $(FORMATTED)
	$(BIN)/python -m ruff format --check $(FORMATTED)
	$(BIN)/python -m mypy

format: .venv/linters
	$(BIN)/python -m ruff check --fix --exit-zero $(FORMATTED)
	$(BIN)/python -m ruff format $(FORMATTED)
	$(BIN)/python tools/wrap.py $(FORMATTED)
	$(BIN)/python -m ruff format $(FORMATTED)

count: venv
	$(BIN)/python tools/count.py

shades: venv
	$(BIN)/python tools/shades.py $(REF)

bench: venv
	$(BIN)/python tools/bench.py

bench-peers: .venv-peers/installed
	.venv-peers/bin/python tools/bench_peers.py

experiments: venv
	$(BIN)/python tools/experiments.py --shared $(SHARED)

venv: .venv/installed

# Where Python comes without ensurepip (Debian splits it off), the outer pip fills the environment.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[test]'
	touch $@

.venv/linters: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[lint]'
	touch $@

.venv-peers/installed: pyproject.toml
	$(PYTHON) -m venv .venv-peers || { $(PYTHON) -m venv --clear --without-pip .venv-peers && $(PYTHON) -m pip --python .venv-peers/bin/python install pip; }
	.venv-peers/bin/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e . aihwkit-lightning
	touch $@

clean:
	rm -rf .venv .venv-peers build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage .coverage.* .ci/tmp
	find rqtool tests -name __pycache__ -type d -prune -exec rm -rf {} +
