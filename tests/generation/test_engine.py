"""The engine: results do not depend on what else it runs, and a sequence can be paused."""

import random

import pytest

from gpt2.generation.engine import Engine, GenerationRequest, Sequence
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from tests.helpers.engine_helpers import generate_alone
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=64, block_size=48, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(CONFIG)


@pytest.mark.parametrize("trial", range(40))
def test_prompts_with_shared_prefixes_in_a_small_prefill_budget(model: GPT, trial: int) -> None:
    """Rows whose prefill has not begun move when another sequence finishes: the prefix cache must not be confused."""
    rng = random.Random(trial)
    prefixes = [[rng.randrange(64) for _ in range(20)] for _ in range(3)]
    prompts = [[*rng.choice(prefixes)[: rng.randrange(8, 20)], rng.randrange(64)] for _ in range(30)]
    asked = [GenerationRequest(prompt, Sampling(temperature=0), rng.randrange(1, 5)) for prompt in prompts]
    engine = Engine(model, 3, prefill_chunk=4)
    sequences = [engine.submit(one) for one in asked]
    while not engine.idle:
        engine.step()
    assert [sequence.new_tokens for sequence in sequences] == [generate_alone(model, one) for one in asked]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_paused_sequence_has_the_same_tokens(model: GPT, temperature: float) -> None:
    """Also where the context is full, and where it is paused in the middle of its prompt or in the queue."""
    rng = random.Random(int(temperature))
    asked = [
        GenerationRequest([i, *range(rng.randrange(40))], Sampling(temperature), 20 + 30 * i, seed=i) for i in range(5)
    ]
    engine = Engine(model, 3, prefill_chunk=7)
    sequences = [engine.submit(one) for one in asked]
    paused: list[Sequence] = []
    while not (engine.idle and not paused):
        engine.step()
        running = [one for one in sequences if one.finish_reason is None and one not in paused]
        if running and rng.random() < 0.3:
            paused.append(rng.choice(running))
            engine.pause(paused[-1])
        elif paused and rng.random() < 0.5:
            engine.resume(paused.pop(0))
    assert [sequence.new_tokens for sequence in sequences] == [generate_alone(model, one) for one in asked]
    assert max(sequence.context_start for sequence in sequences) > 0


def test_a_paused_sequence_can_be_cancelled(model: GPT) -> None:
    engine = Engine(model, 1)
    sequence = engine.submit(GenerationRequest([1], max_new_tokens=5))
    engine.step()
    engine.pause(sequence)
    assert engine.idle
    engine.cancel(sequence)
    assert sequence.finish_reason == "cancelled"
