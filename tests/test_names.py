"""The names that people of the field search for are found by a plain search of the package."""

from pathlib import Path

import pytest

import gpt2

NAMES = {  # a name, and the file in which it must be
    "prefill": "generation/engine.py",
    "kv_cache": "generation/engine.py",
    "prefix cache": "generation/engine.py",
    "chunked prefill": "generation/engine.py",
    "continuous batching": "generation/engine.py",
    "batch invariant": "generation/engine.py",
    "early_stopping": "train/setup.py",
    "grad_accum": "train/trainer.py",
    "clip_grad_norm": "train/trainer.py",
    "activation_checkpointing": "config.py",
    "all_reduce": "distributed/process_group.py",
    "world_size": "distributed/process_group.py",
    "log_likelihood": "evaluation/scorer.py",
    "top_logprobs": "serve/schema.py",
    "speculative decoding": "generation/speculative.py",
}


@pytest.mark.parametrize(("name", "file"), NAMES.items())
def test_a_plain_search_finds_the_name(name: str, file: str) -> None:
    assert name in (Path(gpt2.__file__).parent / file).read_text(encoding="utf-8").lower()
