# `make demo` and `make test` need Python 3.11 or newer with pip, and a package registry; everything else they set up here.
# make test CONSTRAINTS=file    installs under a pip constraints file
# make test TESTS=tests/test_adc.py
# make experiments SHARED=dir    data and weights for docs/results.md; see examples/experiments.py

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
TESTS ?=
SHARED ?= ../shared

.PHONY: demo test experiments venv clean

demo: venv
	$(BIN)/rqtool demo

test: venv
	$(BIN)/python -m pytest $(TESTS)

experiments: venv
	$(BIN)/python examples/experiments.py --shared $(SHARED)

venv: .venv/installed

# Where Python comes without ensurepip (Debian splits it off), the outer pip fills the environment.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .ci/tmp
	find rqtool tests -name __pycache__ -type d -prune -exec rm -rf {} +
