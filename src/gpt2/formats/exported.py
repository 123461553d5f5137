"""A `torch.export` program: the model as a graph of PyTorch's operators, which runs without this package."""

from pathlib import Path

import torch
from torch.export import Dim

from gpt2.formats.stored import model_from_state_dict
from gpt2.model import GPT


def write(model: GPT, path: Path, dtype: torch.dtype) -> None:
    """Write tokens (batch, length) -> logits (batch, length, vocab_size), batch and length dynamic."""
    model = model_from_state_dict(model.config, {name: p.detach().to(dtype) for name, p in model.named_parameters()})
    length = Dim("length", min=1, max=model.config.block_size)
    example = torch.zeros(2, min(3, model.config.block_size), dtype=torch.int64)
    shapes = {"tokens": {0: Dim("batch", min=1), 1: length}}
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=shapes)
    torch.export.save(program, path)
