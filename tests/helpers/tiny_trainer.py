"""A model of a few thousand parameters with its optimizers, for the tests of checkpoints and run folders."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gpt2.config import TrainConfig
from gpt2.model import GPT, GPTConfig
from gpt2.optimizers import build_optimizers
from gpt2.tokenizer import get_tokenizer
from gpt2.train.artifact import ModelArtifact
from gpt2.train.checkpoint import CheckpointState, load_optimizers, optimizer_tensors, write_checkpoint
from gpt2.weights import load

TOKENIZER = get_tokenizer("bytes")
SHAPE = GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=32, dropout=0.1)


class TinyTrainer:
    """A small model with its optimizers, and a step that changes all of their state."""

    def __init__(self, optimizer: str = "adamw", shape: GPTConfig = SHAPE) -> None:
        torch.manual_seed(len(optimizer))
        self.model = GPT(shape)
        self.optimizers: list[Optimizer] = build_optimizers(self.model, TrainConfig(optimizer=optimizer))

    def step(self) -> None:
        tokens = torch.randint(257, (2, 17))
        self.model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must bring back, copied."""
        found = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                found |= {f"{number}.{index}.{kind}": value.clone() for kind, value in state.items()}
        return found

    @property
    def artifact(self) -> ModelArtifact:
        return ModelArtifact(self.model.config, TOKENIZER)

    def save(self, folder: Path, step: int, keep: int = 9, metadata: dict[str, Any] | None = None) -> Path:
        weights, optimizer = self.artifact.weights(self.model), optimizer_tensors(self.model, self.optimizers)
        state = CheckpointState(step, self.artifact, weights, optimizer, metadata or {})
        return write_checkpoint(folder, state, keep)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def load_state(path: Path, optimizer: str = "adamw") -> dict[str, Tensor]:
    learner = TinyTrainer(optimizer)
    learner.model.load_state_dict(load(path / "model")[0].state_dict())
    load_optimizers(path, learner.model, learner.optimizers)
    return learner.state()


def file_contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
