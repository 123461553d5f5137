"""Chunked prefill in the server: how many prompt tokens a step has while other sequences decode."""

import asyncio
from typing import Any

import torch

from gpt2.generation.engine import Engine, GenerationRequest, SampledToken
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from gpt2.serve.scheduler import MIN_PREFILL_TOKENS, RequestHandle, Scheduler
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=64, block_size=2000, n_layer=1, n_head=2, n_embd=16)
GREEDY = Sampling(temperature=0)


class RecordingModel:
    """A model that records the number of tokens per row of each forward pass."""

    device = torch.device("cpu")

    def __init__(self, model: GPT) -> None:
        self.config, self.make_cache, self.lm_head = model.config, model.make_cache, model.lm_head
        self._model = model
        self.chunk_sizes: list[int] = []

    def hidden_states(self, tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
        self.chunk_sizes.append(tokens.size(1))
        return self._model.hidden_states(tokens, cache)


def prompt(length: int, seed: int) -> list[int]:
    """Tokens of which the first is `seed`."""
    return [(seed + 5 * i * i) % CONFIG.vocab_size for i in range(length)]


async def new_tokens(handle: RequestHandle, most: int) -> list[int]:
    """The first tokens of a request's only sequence."""
    tokens: list[int] = []
    while len(tokens) < most:
        _, event = await asyncio.wait_for(handle.events.get(), 20)
        assert isinstance(event, SampledToken)
        tokens.append(event.id)
    return tokens


def prefill_chunks(num_decoding: int, length: int) -> list[int]:
    """The chunks of a prompt while other sequences decode. Checks that its new tokens are the same as alone."""
    model = RecordingModel(random_model(CONFIG))
    asked = GenerationRequest(prompt(length, 63), GREEDY, 3)
    scheduler = Scheduler(model, slots=64)
    scheduler.start()

    async def go() -> tuple[list[int], list[int]]:
        running = [
            scheduler.submit("first", [GenerationRequest(prompt(1, seed), GREEDY, 10_000)])
            for seed in range(num_decoding)
        ]
        for handle in running:
            await new_tokens(handle, 1)
        model.chunk_sizes.clear()
        tokens = await new_tokens(scheduler.submit("second", [asked]), 3)
        return tokens, [count for count in model.chunk_sizes if count > 1]

    try:
        tokens, chunks = asyncio.run(go())
    finally:
        scheduler.stop()
    engine = Engine(model, 1)
    alone = engine.submit(asked)
    while not engine.idle:
        engine.step()
    assert tokens == alone.new_tokens
    return chunks


def test_prefill_is_not_chunked_while_nothing_decodes() -> None:
    assert prefill_chunks(0, 190) == [190]


def test_prefill_is_chunked_while_a_sequence_decodes() -> None:
    assert prefill_chunks(1, 60) == [MIN_PREFILL_TOKENS, MIN_PREFILL_TOKENS, 60 - 2 * MIN_PREFILL_TOKENS]


def test_chunks_grow_with_the_number_of_decoding_sequences() -> None:
    assert prefill_chunks(29, 190) == [60, 60, 60, 10]
