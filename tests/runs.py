"""What the trainings of the tests learn from, and what they say."""

from typing import Any

import gpt2

NUMBERS = "".join(f"The number {i} comes before the number {i + 1}, as everybody knows.\n" for i in range(400))


def talk(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """A sampler for `train`."""
    return gpt2.generate(model, tokenizer, prompt, max_new_tokens=length, seed=1)[0]
