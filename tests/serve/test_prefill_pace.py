"""Texts that come do not stop those that run: how much of a prompt the server reads between two of their tokens."""

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


class Watched:
    """A model, and how many tokens of each row were read at a time."""

    device = torch.device("cpu")

    def __init__(self, model: GPT) -> None:
        self.config, self.make_cache, self.lm_head = model.config, model.make_cache, model.lm_head
        self._model = model
        self.read: list[int] = []

    def hidden_states(self, tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
        self.read.append(tokens.size(1))
        return self._model.hidden_states(tokens, cache)


def prompt(length: int, seed: int) -> list[int]:
    """Tokens of which the first is `seed`."""
    return [(seed + 5 * i * i) % CONFIG.vocab_size for i in range(length)]


async def new_tokens(call: RequestHandle, most: int) -> list[int]:
    """The first tokens of a call's only text."""
    tokens: list[int] = []
    while len(tokens) < most:
        _, event = await asyncio.wait_for(call.events.get(), 20)
        assert isinstance(event, SampledToken)
        tokens.append(event.id)
    return tokens


def read_beside(speaking: int, length: int) -> list[int]:
    """How a prompt is cut while so many texts run. What is said after it is the same as ever."""
    model = Watched(random_model(CONFIG))
    asked = GenerationRequest(prompt(length, 63), GREEDY, 3)
    scheduler = Scheduler(model, slots=64)
    scheduler.start()

    async def go() -> tuple[list[int], list[int]]:
        running = [
            scheduler.submit("first", [GenerationRequest(prompt(1, seed), GREEDY, 10_000)]) for seed in range(speaking)
        ]
        for call in running:
            await new_tokens(call, 1)
        model.read.clear()
        told = await new_tokens(scheduler.submit("second", [asked]), 3)
        return told, [count for count in model.read if count > 1]

    try:
        told, read = asyncio.run(go())
    finally:
        scheduler.stop()
    engine = Engine(model, 1)
    alone = engine.submit(asked)
    while not engine.idle:
        engine.step()
    assert told == alone.new_tokens
    return read


def test_a_prompt_is_read_in_one_while_nobody_waits_for_it() -> None:
    assert read_beside(0, 190) == [190]


def test_a_prompt_is_read_in_small_pieces_beside_texts_that_run() -> None:
    assert read_beside(1, 60) == [MIN_PREFILL_TOKENS, MIN_PREFILL_TOKENS, 60 - 2 * MIN_PREFILL_TOKENS]


def test_the_more_texts_run_the_larger_the_pieces() -> None:
    assert read_beside(29, 190) == [60, 60, 60, 10]
