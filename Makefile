# Everything runs in .venv, which the first target to need it makes from PyPI. PYTHON=python3.12 chooses another Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Options for pytest and for the suite: make test ARGS="-k trace", make conformance ARGS="ioas_map"
ARGS ?=

.PHONY: help test conformance vm compare coverage soak lint clean

help:
	@echo "make test         the project's own tests"
	@echo "make conformance  the conformance suite on the embedded model"
	@echo "make vm           the suite on a real kernel in a guest: make vm IMAGE=path/to/bzImage"
	@echo "make compare      the model's last run beside the recorded run of a real kernel"
	@echo "make coverage     errno sites of the model that the suite does not reach"
	@echo "make soak         the long runs, some hours: make soak ARGS=--quick, make soak ARGS=\"qemu caching\""
	@echo "make lint         ruff and mypy"

$(VENV)/base.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "iommulab needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Say make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing (Debian: apt install python3-venv)" >&2; exit 1; }
	@$(PIP) --editable .
	@touch $@

$(VENV)/test.stamp: $(VENV)/base.stamp
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/vm.stamp: $(VENV)/base.stamp
	@$(PIP) --editable '.[vm]'
	@touch $@

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto $(ARGS)

conformance: $(VENV)/base.stamp
	$(BIN)/iommulab conformance $(ARGS)

vm: $(VENV)/vm.stamp
	$(BIN)/iommulab conformance --on vm $(if $(IMAGE),--kernel-image $(IMAGE)) $(ARGS)

compare: $(VENV)/base.stamp
	$(BIN)/iommulab compare report/model.json recorded:7.3.4

coverage: $(VENV)/test.stamp
	$(BIN)/iommulab coverage $(ARGS)

soak: $(VENV)/test.stamp
	$(BIN)/python -m tests.soak $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) report build *.egg-info .coverage
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
