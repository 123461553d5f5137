# make demo: train a small GPT-2 here and let it talk.  make test: check the project.  make test-all: the slow checks too.
# make soak: kill trainings at random, fifty times, and compare them with one that was left alone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all soak lint clean

demo: $(VENV)/demo
	@$(BIN)/gpt2 train quickstart > $(VENV)/last-run
	@run=$$(cat $(VENV)/last-run); \
	echo "--- what it says now:"; \
	$(BIN)/gpt2 sample $$run --num-samples 3 --max-new-tokens 120 --temperature 0.7 --seed 1; \
	echo "--- the loss: $$run/loss.png; more talk: $(BIN)/gpt2 sample $$run"

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

soak: $(VENV)/test
	$(BIN)/python benchmarks/soak.py --kills 50
	$(BIN)/python benchmarks/restart_soak.py --kills 20

lint: $(VENV)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/lint-imports

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(BIN)/pip pyproject.toml constraints.txt
	$(INSTALL) -e '.[plot]'
	@touch $@

$(VENV)/test: $(BIN)/pip pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/demo

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
