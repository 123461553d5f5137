# make demo: train a small GPT-2 here and sample from it.  make test: check the project.  make test-all: the slow checks too.
# make fuzz: try hostile files and requests for ten minutes.
# make soak: kill training runs at random moments, fifty times, and compare them with an uninterrupted run.
# make rehearsal: the path of docs/reproduce.md at 1/10,000 of its size, against a hub on this machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

.PHONY: demo test test-all fuzz soak rehearsal lint clean

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

# Ten minutes: one for each kind of folder, and thousands of requests. GPT2_FUZZ_SEED=N repeats a run.
fuzz: $(VENV)/test
	GPT2_FUZZ_SECONDS=60 $(BIN)/python -m pytest -s tests/fuzz

soak: $(VENV)/test
	$(BIN)/python benchmarks/soak.py --kills 50
	$(BIN)/python benchmarks/restart_soak.py --kills 20
	$(BIN)/python benchmarks/prepare_soak.py --kills 20

rehearsal: $(VENV)/test
	$(BIN)/python -m pytest -rP tests/train/test_rehearsal.py

lint: $(VENV)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/lint-imports

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# Without an NVIDIA driver, the CPU build of torch, where the index offers it: the default one is gigabytes of CUDA.
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
$(VENV)/torch: $(BIN)/pip constraints.txt
	@if ! command -v nvidia-smi > /dev/null; then \
	  echo "no NVIDIA driver: installing torch $(TORCH) for the CPU"; \
	  $(INSTALL) 'torch==$(TORCH)+cpu' 2> /dev/null || echo "the index has no CPU build: installing its default torch"; fi
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml constraints.txt
	$(INSTALL) -e '.[plot]'
	@touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/demo

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
