# `make demo` and `make test` need Python 3.11 or newer with pip, and a package registry; everything else they set up here.
# make test CONSTRAINTS=file    installs under a pip constraints file
# make test TESTS=tests/test_adc.py
# make bench                    times the kernels and writes docs/performance.md; on a quiet machine
# make bench-peers              the same layer through other tools, in an environment of their own
# make experiments SHARED=dir    data and weights for docs/results.md; see examples/experiments.py

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
TESTS ?=
SHARED ?= ../shared

.PHONY: demo test bench bench-peers experiments venv clean

demo: venv
	$(BIN)/rqtool demo

test: venv
	$(BIN)/python -m pytest $(TESTS)

bench: venv
	$(BIN)/python examples/bench.py

bench-peers: .venv-peers/installed
	.venv-peers/bin/python examples/bench_peers.py

experiments: venv
	$(BIN)/python examples/experiments.py --shared $(SHARED)

venv: .venv/installed

# Where Python comes without ensurepip (Debian splits it off), the outer pip fills the environment.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[test]'
	touch $@

.venv-peers/installed: pyproject.toml
	$(PYTHON) -m venv .venv-peers || { $(PYTHON) -m venv --clear --without-pip .venv-peers && $(PYTHON) -m pip --python .venv-peers/bin/python install pip; }
	.venv-peers/bin/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e . aihwkit-lightning
	touch $@

clean:
	rm -rf .venv .venv-peers build dist *.egg-info .pytest_cache .hypothesis .ci/tmp
	find rqtool tests -name __pycache__ -type d -prune -exec rm -rf {} +
