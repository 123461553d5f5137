"""Models and references that the tests of beam and contrastive search share."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from gpt2.generation.beam_search import Hypothesis
from gpt2.generation.engine import Engine, GenerationRequest
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from tests.helpers.transformers_reference import random_model, to_transformers

CONFIGS = [
    GPTConfig(vocab_size=31, block_size=30, n_layer=2, n_head=2, n_embd=16, tie_word_embeddings=False),
    GPTConfig(vocab_size=60, block_size=30, n_layer=1, n_head=5, n_embd=40, tie_word_embeddings=False),
]
BYTE_CONFIG = replace(CONFIGS[0], vocab_size=257, block_size=64)  # for the byte tokenizer


def peaked_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A random model that clearly prefers some tokens, others at each position; float64, so that rounding does not
    swap candidates."""
    model = random_model(config, seed)
    with torch.no_grad():
        for embedding in (model.transformer.wte, model.transformer.wpe):
            embedding.weight *= 20
        model.transformer.ln_f.bias.zero_()
        model.lm_head.weight *= 10
    return model.double()


@cache
def model_pair(which: int, seed: int) -> tuple[GPT, Any]:
    """A model and the same model in transformers."""
    model = peaked_model(CONFIGS[which], seed)
    return model, to_transformers(model).double()


def transformers_beam_search(
    reference: Any, prompt: list[int], ends: Sequence[int], max_new_tokens: int, **given: Any
) -> list[Hypothesis]:
    ids = torch.tensor([prompt])
    found = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(ends) or None,
        return_dict_in_generate=True,
        output_scores=True,
        **given,
    )
    rows = found.sequences[:, len(prompt) :].tolist()
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    return [Hypothesis(row, score) for row, score in zip(rows, found.sequences_scores.tolist(), strict=True)]


def assert_same_hypotheses(ours: list[Hypothesis], others: list[Hypothesis]) -> None:
    assert [found.tokens for found in ours] == [found.tokens for found in others]
    assert [found.score for found in ours] == pytest.approx([found.score for found in others], rel=1e-5, abs=1e-6)


def greedy_decode(model: GPT, prompt: list[int], count: int, **given: Any) -> list[int]:
    engine = Engine(model, 1)
    sequence = engine.submit(GenerationRequest(prompt, Sampling(temperature=0, **given), count))
    while not engine.idle:
        engine.step()
    return sequence.new_tokens
