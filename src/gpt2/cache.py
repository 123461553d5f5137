"""What attention remembers between calls."""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer: two buffers of (B, n_head, max_length, head_dim), filled from the left."""

    def __init__(self, keys: Tensor, values: Tensor, length: int = 0) -> None:
        self.keys, self.values, self.length = keys, values, length

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions, (B, n_head, T, head_dim) each, and return all S = length + T as views."""
        end = self.length + k.size(2)
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """A static key/value cache for every layer, allocated once. Made by ``model.make_cache``."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers

    @classmethod
    def allocate(
        cls, n_layer: int, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """An empty cache; `shape` is (B, n_head, max_length, head_dim)."""

        def buffer() -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls([LayerCache(buffer(), buffer()) for _ in range(n_layer)])

    @property
    def length(self) -> int:
        """How many positions are remembered."""
        return self.layers[0].length

    @property
    def max_length(self) -> int:
        """How many positions fit."""
        return self.layers[0].keys.size(2)

    def repeat(self, n: int) -> "KVCache":
        """A new cache with every row n times: one prompt read once, continued n ways."""
        return KVCache(
            [
                LayerCache(layer.keys.repeat_interleave(n, 0), layer.values.repeat_interleave(n, 0), layer.length)
                for layer in self.layers
            ]
        )
