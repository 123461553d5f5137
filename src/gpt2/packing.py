"""Several sequences packed into one row: positions and an attention mask."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Rows of packed sequences, each of which the model computes as if it were alone.

    positions: int64 (B, T), the position of each token in its own sequence.
    mask:      bool (B, 1, T, T), True where a token attends to another.
    """

    positions: Tensor
    mask: Tensor

    @classmethod
    def of_documents(cls, documents: Tensor) -> Self:
        """Adjacent positions with equal numbers in `documents`, integers (B, T), belong to the same document.

        A token attends to itself and to the earlier ones of its document.
        """
        index = torch.arange(documents.size(1), device=documents.device)
        is_first = torch.ones_like(documents, dtype=torch.bool)
        is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = torch.where(is_first, index, 0).cummax(1).values  # (B, T): first position of the document
        mask = (starts[:, :, None] == starts[:, None, :]) & (index[:, None] >= index)
        return cls(index - starts, mask[:, None])

    def layer(self, index: int) -> Self:
        """The same mask for every layer."""
        return self

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to, (B, H, T, D) each, unchanged: there is no cache."""
        return k, v
