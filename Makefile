PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test test-fast check clean

$(VENV)/.test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

test: $(VENV)/.test  ## the whole suite
	$(BIN)/python -m pytest

test-fast: $(VENV)/.test  ## without the tests marked slow
	$(BIN)/python -m pytest -m 'not slow'

check: $(VENV)/.test  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
