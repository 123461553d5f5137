"""Random logits and histories, for tests of sampling."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from gpt2.generation.filters import History

seeds = st.integers(0, 10**6)
tokens = st.integers(0, 8)
histories = st.integers(1, 25).flatmap(
    lambda length: st.lists(st.lists(tokens, min_size=length, max_size=length), min_size=1, max_size=3)
)


def random_logits(seed: int, rows: int, size: int, scale: float = 3.0, masked_fraction: float = 0.0) -> Tensor:
    """(rows, size), with `masked_fraction` of them at minus infinity, but never a whole row."""
    own = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=own) * scale
    out = torch.rand(rows, size, generator=own) < masked_fraction
    out[:, seed % size] = False
    return logits.masked_fill(out, -math.inf)


def make_histories(rows: list[list[int]], prompt_length: int = 0, end_tokens: tuple[int, ...] = ()) -> list[History]:
    return [History(tokens, prompt_length, end_tokens) for tokens in rows]
