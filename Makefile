# `make demo`, `make quick` and `make test` need Python 3.11 (or 3.10 to 3.13), git and make; everything else they install into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo quick test check lint types bench torture mutants clean docs

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
	$(INSTALL) -e '.[demo,test,clients,docs]'
	touch $@

# Hugging Face PEFT and LyCORIS, in folders of their own, for the tests that exchange files with them and for the benchmark.
.peer/.version: constraints.txt | $(VENV)/.base
	rm -rf .peer
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target .peer peft==0.21.2
	touch $@

.peer-lycoris/.version: constraints.txt | $(VENV)/.base
	rm -rf .peer-lycoris
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target .peer-lycoris lycoris-lora==4.1.3 toml==0.10.2
	touch $@

demo: $(VENV)/.demo ## train, compare, save, reload: eight tasks on handwritten digits
	$(BIN)/python -m examples.multitask_digits

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

quick: $(VENV)/.test ## the main paths of every method in a minute: no other library's flows, no compiler, no other process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "quick and not compile and not processes" tests/contract tests/golden tests/tuners

test: $(VENV)/.test .peer/.version .peer-lycoris/.version ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

check: lint types test ## what has to pass before a change goes in

clean:
	rm -rf $(VENV) .peer .peer-lycoris demo_output

bench: $(VENV)/.demo .peer/.version .peer-lycoris/.version ## what an adapter costs, by turns with the peers
	$(BIN)/python -m benchmarks startup
	$(BIN)/python -m benchmarks scaling
	$(BIN)/python -m benchmarks steps
	$(BIN)/python -m benchmarks steps --add --model stack --method lokr-full-4 lokr-full-8 lokr-full-16
	$(BIN)/python -m benchmarks steps --add --compile
	$(BIN)/python -m benchmarks routing

MINUTES ?= 60
torture: $(VENV)/.base ## fail, kill and cut the power at each step of saves and loads, for MINUTES
	$(BIN)/python -m torture --minutes $(MINUTES) --resume

mutants: $(VENV)/.test ## test the tests: plant small faults in the code that guards files and states, for MINUTES
	OMP_NUM_THREADS=1 $(BIN)/python -m torture --only mutants --minutes $(MINUTES)

# `site/index.html` opens from disk. `NO_MKDOCS_2_WARNING` leaves out an announcement of the theme.
docs: $(VENV)/.test ## write the pages that come from the code, and build the documentation site
	$(BIN)/python docs/compatibility.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q
