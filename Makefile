# Two commands, nothing before them: `make demo` and `make test`. Both make .venv with the versions in constraints.txt.
# Where packages come from is pip's own configuration (PIP_INDEX_URL and so on); a plain `torch` serves on any machine.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
JOBS ?= 2

.PHONY: demo test lint types unit system clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(RUN) examples/digits.py

test: system lint types unit

lint: $(VENV)/.test
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

# setuptools maps passes/, codegen/ and targets/ into the package; mypy wants to see them where they are imported from.
types: $(VENV)/.test
	@rm -rf build/types && mkdir -p build/types/graphopt
	@ln -s $(CURDIR)/graphopt/* $(CURDIR)/passes $(CURDIR)/codegen $(CURDIR)/targets build/types/graphopt/
	$(RUN) -m mypy -p graphopt

unit: $(VENV)/.test
	$(RUN) -m pytest -n $(JOBS) -q

# Emulators that some tests need. Installed only where they are missing and it may be; those tests are skipped otherwise.
system:
	@sh .ci/system

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with make PYTHON=..." >&2; exit 3; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); sh .ci/system venv && $(PYTHON) -m venv $(VENV); }

$(VENV)/.demo: pyproject.toml constraints.txt | $(RUN)
	$(RUN) -m pip install -qq -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(RUN)
	$(RUN) -m pip install -qq -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
