"""The step that a CUDA graph captures equals the model; the capture itself needs a GPU."""

import pytest
import torch

from gpt2.generation import cuda_graphs
from gpt2.generation.cuda_graphs import GraphedGPT
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel
from gpt2.generation.sampling import Sampling
from gpt2.model import GPTConfig
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=257, block_size=300, n_layer=2, n_head=2, n_embd=32)


def decode_batch(model: LanguageModel) -> list[list[int]]:
    """Sequences of different lengths that start and finish, beyond the lengths of two graphs and the context."""
    engine = Engine(model, 3)
    sequences = [
        engine.submit(GenerationRequest(list(range(1, 2 + 40 * i)), Sampling(0.7 * (i % 2)), 60 + 50 * i, seed=i))
        for i in range(6)
    ]
    while not engine.idle:
        engine.step()
    return [sequence.new_tokens for sequence in sequences]


def test_captured_steps_equal_the_model() -> None:
    model, captured = random_model(CONFIG), []

    def capture(step: cuda_graphs.DecodeStep) -> cuda_graphs.DecodeStep:
        captured.append(step)
        return step

    assert decode_batch(GraphedGPT(model, capture)) == decode_batch(model)
    assert len(captured) >= 5  # 1 to 3 rows, three lengths


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_replayed_graphs_equal_the_model_on_a_gpu() -> None:
    model = random_model(CONFIG).to("cuda")
    assert decode_batch(GraphedGPT(model)) == decode_batch(model)
