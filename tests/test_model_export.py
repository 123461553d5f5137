"""torch.export and torch.compile of the model, with a dynamic batch and a dynamic length."""

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

from gpt2.model import GPT, GPTConfig
from tests.helpers.transformers_reference import random_model

SHAPES = [(2, 7), (1, 1), (5, 16), (3, 2)]


@pytest.fixture
def model() -> GPT:
    return random_model(GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16)).eval()


def tokens_of(shape: tuple[int, int]) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(shape[0]))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_takes_any_batch_and_length(model: GPT, strict: bool) -> None:
    dynamic = {"tokens": {0: Dim("B", min=1, max=64), 1: Dim("T", min=1, max=16)}}
    program = export(model, (tokens_of((2, 7)),), dynamic_shapes=dynamic, strict=strict)
    run = program.module()
    for shape in SHAPES:
        torch.testing.assert_close(run(tokens_of(shape)), model(tokens_of(shape)))


def test_one_compiled_graph_takes_any_batch_and_length(model: GPT) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for shape in [(2, 7), (5, 16), (3, 2), (4, 9)]:
        assert torch.equal(compiled(tokens_of(shape)), model(tokens_of(shape)))
    assert len(graphs) == 1


def test_the_loss_compiles_as_one_graph(model: GPT) -> None:
    loss = torch.compile(model.loss, backend="eager", dynamic=True, fullgraph=True)
    for shape in SHAPES[2:]:
        tokens = tokens_of(shape)
        torch.testing.assert_close(loss(tokens, tokens), model.loss(tokens, tokens))
