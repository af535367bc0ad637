# Two commands do everything on a fresh machine with Python 3.11+:
#   make quickstart   creates .venv, installs, runs the quickstart on real data
#   make test         creates .venv, installs, passes the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test test-slow lint tutorials-smoke docs clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-tutorials: $(BIN)/python pyproject.toml constraints.txt
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[tutorials]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed-tutorials
	$(PIP_INSTALL) -e '.[test]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-tutorials
	$(PIP_INSTALL) -e '.[docs]'
	touch $@

quickstart: $(VENV)/.installed-tutorials
	$(BIN)/python tutorials/plot_quickstart.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tutorials-smoke: $(VENV)/.installed-test
	for script in tutorials/plot_*.py; do echo "== $$script"; PYRO_BNN_SMOKE=1 MPLBACKEND=Agg $(BIN)/python $$script || exit 1; done

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs/source docs/build/html

clean:
	rm -rf $(VENV) build dist docs/build docs/source/generated docs/source/gallery
