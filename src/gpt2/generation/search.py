"""Shared by beam search and contrastive search: forward passes on the rows of one cache.

Both are deterministic. Of a `Sampling` they apply biases, penalties and bans (`sampling.apply_penalties`) and ignore
temperature, top-k, top-p and the other filters.
"""

import torch
from torch import Tensor

from gpt2.cache import KVCache
from gpt2.generation.engine import LanguageModel, check_finite
from gpt2.generation.sampling import Sampling

NO_PENALTIES = Sampling(temperature=0)  # no bias, penalty or ban


def forward_hidden_states(model: LanguageModel, tokens: list[list[int]], cache: KVCache) -> Tensor:
    """Run the model on (B, T) tokens that continue the cache: hidden states (B, T, C)."""
    return model.hidden_states(torch.tensor(tokens, device=model.device), cache)


def last_logits(model: LanguageModel, hidden: Tensor) -> Tensor:
    """The logits of the last position, float32: (B, T, C) -> (B, V). Raises NonFiniteLogitsError for nan or inf."""
    logits = model.lm_head(hidden[:, -1]).float()
    check_finite(logits)
    return logits


def reorder_cache(cache: KVCache, rows: list[int], prefix_length: int) -> None:
    """`cache.reorder` for rows of equal length whose first `prefix_length` positions are the same."""
    KVCache(cache.data[:, :, :, :, prefix_length:], cache.lengths - prefix_length).reorder(rows)
    cache.lengths[: len(rows)] = cache.lengths[rows]
