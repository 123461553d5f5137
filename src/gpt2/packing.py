"""Several documents in one row, none of which sees another: what attention may look at, and where each word stands."""

from typing import Self

import torch
from torch import Tensor


class Packing:
    """Rows of documents side by side, read as if each stood alone.

    documents: (B, T) integers; neighbours with equal ones are of the same document.

    positions: int64 (B, T), counted from 0 in each document.
    mask:      (B, 1, T, T), True where a position may look at another: at itself and what its document has before it.
    """

    def __init__(self, documents: Tensor) -> None:
        index = torch.arange(documents.size(1), device=documents.device)
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = torch.where(begins, index, 0).cummax(1).values  # (B, T): where the document of each position begins
        self.positions = index - starts
        self.mask = ((starts[:, :, None] == starts[:, None, :]) & (index[:, None] >= index))[:, None]

    def layer(self, index: int) -> Self:
        """The same for every layer."""
        return self

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to look at, (B, H, T, D) each: these and no others, for nothing came before."""
        return k, v
