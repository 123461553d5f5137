"""The single-file model of docs/learn equals gpt2.model: names, logits, loss, gradients, greedy tokens."""

from types import ModuleType
from typing import Any

import pytest
import torch

from gpt2.model import GPT, GPTConfig
from tests.docs.test_pages import DOCS

FILE = DOCS / "learn" / "gpt2_from_scratch.py"


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FILE.parent))
    import gpt2_from_scratch  # pyright: ignore[reportMissingImports]

    return gpt2_from_scratch


def test_equals_the_model_of_the_package(scratch: ModuleType) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 97, "block_size": 32, "n_layer": 3, "n_head": 4, "n_embd": 48}
    ours, theirs = scratch.GPT(scratch.Config(**shape)), GPT(GPTConfig(**shape))
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(97, (2, 33))
    torch.testing.assert_close(ours(tokens[:, :-1]), theirs(tokens[:, :-1]), rtol=1e-4, atol=1e-4)
    losses = [model.loss(tokens[:, :-1], tokens[:, 1:]) for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-3, atol=1e-4)
    row = tokens[:1, :4]
    for _ in range(20):
        row = torch.cat([row, theirs(row)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert ours.generate(tokens[:1, :4], 20, temperature=0).tolist() == row.tolist()


def test_initialization_and_size(scratch: ModuleType) -> None:
    with torch.device("meta"):
        model = scratch.GPT(scratch.Config())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    torch.manual_seed(0)
    model = scratch.GPT(scratch.Config(vocab_size=300, block_size=16, n_layer=8, n_head=2, n_embd=64))
    torch.manual_seed(0)
    theirs = GPT(GPTConfig(vocab_size=300, block_size=16, n_layer=8, n_head=2, n_embd=64))
    for name, parameter in model.named_parameters():
        expected = theirs.get_parameter(name)
        assert parameter.std().item() == pytest.approx(expected.std().item(), rel=0.1), name


def test_is_about_150_lines() -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 160
