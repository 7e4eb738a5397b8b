# Two commands set everything up on a machine that has Python 3.11 or newer:
#   make demo   install into .venv, make a small random checkpoint, and ask it about the files in docs/media
#   make test   install the test extra into .venv; lint, types, tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Options for pytest, e.g. make test PYTEST="tests/test_keys.py -x"
PYTEST ?=

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

# Stamps: installation is skipped until pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

out/nano/config.json: | $(VENV)/.installed
	$(BIN)/omni-jax init out/nano --preset nano

demo: $(VENV)/.installed out/nano/config.json
	$(BIN)/omni-jax generate --model out/nano --text 'What do you see?' --max-new-tokens 16

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(PYTEST)

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
