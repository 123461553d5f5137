"""The KV cache: keys and values of earlier positions, for rows of different lengths."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor


class KVCache:
    """A static KV cache for all layers, allocated once by ``model.make_cache``.

    data:    (n_layer, 2, B, n_head, max_length, head_dim): keys, then values; each row is filled from the left.
    lengths: int64 (B,), a numpy array: the number of cached positions of each row. It may be written: setting it back
             to n truncates the row to n positions.
    """

    def __init__(self, data: Tensor, lengths: np.ndarray) -> None:
        self.data, self.lengths = data, lengths

    @classmethod
    def allocate(cls, n_layer: int, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> Self:
        """An empty cache; `shape` is (B, n_head, max_length, head_dim)."""
        data = torch.zeros(n_layer, 2, *shape, device=device, dtype=dtype)
        return cls(data, np.zeros(shape[0], dtype=np.int64))

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.lengths)

    def __getitem__(self, rows: slice) -> "KVCache":
        """A view of some of the rows."""
        return KVCache(self.data[:, :, rows], self.lengths[rows])

    @property
    def length(self) -> int:
        """The number of cached positions of the longest row."""
        return int(self.lengths.max())

    @property
    def max_length(self) -> int:
        """The number of positions that fit."""
        return self.data.size(4)

    def extend(self, count: int) -> "CacheExtension":
        """Make room for `count` new positions in every row; the layers fill them: see `CacheExtension`."""
        starts = self.lengths.copy()
        self.lengths += count
        return CacheExtension.from_lengths(self.data, starts, count)

    def repeat(self, n: int) -> "KVCache":
        """A new cache with every row n times: one prefill for n samples."""
        return KVCache(self.data.repeat_interleave(n, 2), self.lengths.repeat(n))

    def reorder(self, rows: Sequence[int]) -> None:
        """Replace row i by the old row ``rows[i]``, for all i at once."""
        moved = [i for i, row in enumerate(rows) if i != row]
        sources = [rows[i] for i in moved]
        if moved:
            end = int(self.lengths[sources].max())
            self.data[:, :, moved, :, :end] = self.data[:, :, sources, :, :end]
            self.lengths[moved] = self.lengths[sources]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make row `target` a copy of the first `length` positions of row `source`."""
        if source != target:
            self.data[:, :, target, :, :length] = self.data[:, :, source, :, :length]
        self.lengths[target] = length


class CacheExtension:
    """T new positions in each of B rows of a cache, with their attention mask.

    positions: (T,) if all rows have the same length, else (B, T): the position of each new token in its sequence.
    mask:      None if all rows have the same length, else (B, 1, T, S), True where a position may attend to another.
    """

    def __init__(self, data: Tensor, positions: Tensor, mask: Tensor | None, end: int) -> None:
        self.data, self.positions, self.mask, self.end = data, positions, mask, end

    @classmethod
    def from_lengths(cls, data: Tensor, lengths: np.ndarray, count: int) -> Self:
        """`count` positions after the `lengths` (B,) that are cached."""
        end = int(lengths.max()) + count
        if int(lengths.min()) + count == end:
            return cls(data, torch.arange(end - count, end, device=data.device), None, end)
        positions = (torch.from_numpy(lengths)[:, None] + torch.arange(count)).to(data.device)  # (B, T)
        mask = torch.arange(end, device=data.device) <= positions[:, None, :, None]  # (B, 1, T, S)
        return cls(data, positions, mask, end)

    def layer(self, index: int) -> "LayerCacheExtension":
        """The keys and values of one layer."""
        keys, values = self.data[index, 0], self.data[index, 1]
        return LayerCacheExtension(keys, values, self)


class LayerCacheExtension:
    """The cached keys and values of one layer, (B, n_head, max_length, head_dim) each, and where new ones go."""

    def __init__(self, keys: Tensor, values: Tensor, cache_extension: CacheExtension) -> None:
        self.keys, self.values, self.mask = keys, values, cache_extension.mask
        self._positions, self._end = cache_extension.positions, cache_extension.end

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new (B, n_head, T, head_dim), and return all S positions as views."""
        for cached, new in ((self.keys, k), (self.values, v)):
            if self.mask is None:
                cached[:, :, self._end - new.size(2) : self._end] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                cached[rows, :, self._positions] = new.transpose(1, 2).to(cached.dtype)
        return self.keys[:, :, : self._end], self.values[:, :, : self._end]
