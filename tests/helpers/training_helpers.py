"""Text and settings for training runs of the tests."""

from dataclasses import replace
from typing import Any

import gpt2
from gpt2.config import TrainConfig

NUMBERS_TEXT = "".join(f"The number {i} comes before the number {i + 1}, as everybody knows.\n" for i in range(400))


def fixed_seed_sampler(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """A sampler for `train` with a fixed seed."""
    return gpt2.generate(model, tokenizer, prompt, max_new_tokens=length, seed=1)[0]


def with_frequent_saves(config: TrainConfig) -> TrainConfig:
    """A smaller run that saves every second step."""
    small = replace(config, n_layer=1, batch_size=4, max_steps=6, warmup_steps=2)
    return replace(small, eval_every=0, save_every=2, sample_tokens=5)
