# `make demo` and `make test` need Python 3.11 (or 3.10 to 3.13), git and make; everything else they install into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test check lint types clean

# torch goes first and by itself: what depends on it is then content with the build that is there.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(INSTALL) -e '.[demo,test]'
	touch $@

demo: $(VENV)/.demo ## train, compare, save, reload: eight tasks on handwritten digits
	$(BIN)/python -m examples.multitask_digits

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

test: $(VENV)/.test ## the whole test suite
	$(BIN)/python -m pytest -n 2

check: lint types test ## what has to pass before a change goes in

clean:
	rm -rf $(VENV) demo_output
