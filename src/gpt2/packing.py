"""Several documents packed into one row: positions and a block-diagonal causal attention mask."""

from typing import Self

import torch
from torch import Tensor


class Packing:
    """Rows of packed documents, each of which the model computes as if it were alone.

    documents: (B, T) integers; adjacent positions with equal numbers belong to the same document.

    positions: int64 (B, T), counted from 0 in each document.
    mask:      (B, 1, T, T), True where a position may attend to another: itself or an earlier one of its document.
    """

    def __init__(self, documents: Tensor) -> None:
        index = torch.arange(documents.size(1), device=documents.device)
        is_first = torch.ones_like(documents, dtype=torch.bool)
        is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = torch.where(is_first, index, 0).cummax(1).values  # (B, T): first position of the document
        self.positions = index - starts
        self.mask = ((starts[:, :, None] == starts[:, None, :]) & (index[:, None] >= index))[:, None]

    def layer(self, index: int) -> Self:
        """The same mask for every layer."""
        return self

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to, (B, H, T, D) each, unchanged: there is no cache."""
        return k, v
