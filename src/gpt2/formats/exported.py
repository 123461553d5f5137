"""A `torch.export` program: the model as a graph of PyTorch's operators, which runs without this package."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from gpt2.formats.stored import model_from_state_dict
from gpt2.model import GPT


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The model's own attention without a cache; whether there is one cannot be asked of a symbolic length."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class _Logits(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        for block in model.transformer.h:
            setattr(block.get_submodule("attn"), "attention_fn", _causal_attention)  # noqa: B010

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.lm_head(self.model.transformer(tokens))


def write(model: GPT, path: Path, dtype: torch.dtype) -> None:
    """Write tokens (batch, length) -> logits (batch, length, vocab_size), batch and length dynamic."""
    model = model_from_state_dict(model.config, {name: p.detach().to(dtype) for name, p in model.named_parameters()})
    length = Dim("length", min=1, max=model.config.block_size)
    example = torch.zeros(2, min(3, model.config.block_size), dtype=torch.int64)
    shapes = {"tokens": {0: Dim("batch", min=1), 1: length}}
    program = torch.export.export(_Logits(model.eval()), (example,), dynamic_shapes=shapes)
    torch.export.save(program, path)
