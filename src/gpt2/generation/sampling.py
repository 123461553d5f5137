"""Logits to a token: pure functions, one definition for every decoder.

The order is that of `transformers`: temperature, then top-k, then top-p over what top-k left.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.errors import UserError

GREEDY_BELOW = 1e-20  # colder than this nothing but the most likely token has a chance, and a division could overflow


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The defaults sample from the model's own distribution.

    temperature: divides the logits; 0 takes the most likely token, always.
    top_k:       only the k most likely tokens; 0 for all.
    top_p:       only the smallest set of most likely tokens whose probabilities sum to p; 1 for all.

    Raises UserError for settings that leave nothing to choose from.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 (all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be over 0 and at most 1, not {self.top_p}")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution a token is drawn from: logits (B, V) -> probabilities (B, V) in float32."""
    logits = logits.float()
    if sampling.temperature < GREEDY_BELOW:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.size(-1):
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return logits.softmax(-1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row (more if the last are equal), the others at minus infinity."""
    smallest_kept = logits.topk(k, -1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The nucleus of Holtzman et al. 2020: a token stays while those more likely than it sum to less than `p`."""
    ordered, order = logits.sort(-1, descending=True)
    share = ordered.softmax(-1)
    dropped = share.cumsum(-1) - share >= p
    dropped[..., 0] = False  # whatever the rounding, the most likely token stays
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def random_stream(seed: int, sample: int) -> torch.Generator:
    """The random stream of one sample of one request: its text does not depend on what runs beside it."""
    digest = hashlib.sha256(f"{seed}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def draw(probs: Tensor, streams: Sequence[torch.Generator]) -> Tensor:
    """One token a row, (B, V) -> (B,), each row by one number of its own stream (inverse transform sampling)."""
    precise = torch.float32 if probs.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    u = torch.stack([torch.rand((), generator=stream, dtype=torch.float64) for stream in streams])  # (B,)
    cdf = probs.to(precise).cumsum(-1)  # (B, V)
    at = (u.to(probs.device, precise) * cdf[:, -1]).unsqueeze(1)
    return torch.searchsorted(cdf, at, right=True).clamp_(max=probs.size(-1) - 1).squeeze(1)
