# make demo: train a small GPT-2 here and sample from it.  make test: check the project.  make test-all: the slow checks too.
# make soak: kill training runs at random moments, fifty times, and compare them with an uninterrupted run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

.PHONY: demo test test-all soak lint clean

demo: $(VENV)/demo
	@$(BIN)/gpt2 train quickstart $(DEMO_FLAGS) > $(VENV)/last-run
	@run="$$(cat $(VENV)/last-run)"; \
	echo "--- samples:"; \
	$(BIN)/gpt2 sample "$$run" --num-samples 3 --max-new-tokens 120 --temperature 0.7 --seed 1; \
	echo "--- the loss: $$run/loss.png; more samples: $(BIN)/gpt2 sample $$run"

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

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
