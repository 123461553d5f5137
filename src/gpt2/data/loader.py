"""Shards -> batches. A batch is a pure function of (data, seed, step).

There is no iterator state to checkpoint. Step 1,000 has the same rows in a resumed run, in a run that never stopped, on
one rank of eight, and in a micro-batch of gradient accumulation.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gpt2.errors import DataError
from gpt2.loss import IGNORE_INDEX


class Batch(NamedTuple):
    """The input of a training step: B rows of T positions, on any device.

    tokens:    int64 (B, T).
    targets:   int64 (B, T): the token that follows each; -100 where the loss does not count.
    documents: int64 (B, T), equal for neighbouring tokens of one document; None if every row is one document.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; asynchronous from pinned memory."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in pinned (page-locked) memory, for fast copies to a GPU."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def split(self, micro_batch_size: int) -> "list[Batch]":
        """Micro-batches of `micro_batch_size` rows each, for gradient accumulation."""
        return [
            self._map_tensors(lambda tensor, i=i: tensor[i : i + micro_batch_size])
            for i in range(0, len(self.tokens), micro_batch_size)
        ]

    def with_targets_ignored(self) -> "Batch":
        """The batch with every target ignored (-100)."""
        return self._replace(targets=torch.full_like(self.targets, IGNORE_INDEX))

    @property
    def num_targets(self) -> int:
        """Number of targets that are not ignored."""
        return int((self.targets != IGNORE_INDEX).sum())

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        documents = None if self.documents is None else function(self.documents)
        return Batch(function(self.tokens), function(self.targets), documents)


class BatchLoader(Protocol):
    """Random access to batches by step, counted from 0, of `batch_size` rows."""

    batch_size: int

    @property
    def windows_per_epoch(self) -> int:
        """Number of rows in an epoch."""
        ...

    def batch(self, step: int) -> Batch: ...

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of `batch(step)`, without reading the others."""
        ...


class TokenSequence(Protocol):
    """A long sequence of token ids, such as `TokenShards`."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...


class TokenLoader:
    """Training batches, epoch by epoch and without replacement.

    An epoch divides the data into windows of `block_size` tokens, from a random offset, and visits each once in a
    random order; both are drawn from (seed, epoch). Rows are numbered over all steps: row r of step s is number
    s * batch_size + r, and epochs follow each other without a gap.

    document_start_token: the token that starts a document, to mask attention between documents in a row; None for no
        such mask.

    Raises DataError if the data is shorter than one window and the token after it.
    """

    def __init__(
        self,
        tokens: TokenSequence,
        batch_size: int,
        block_size: int,
        seed: int,
        *,
        document_start_token: int | None = None,
    ) -> None:
        if len(tokens) < block_size + 1:
            raise DataError(
                f"the data has {len(tokens):,} tokens, and a block size of {block_size:,} needs"
                f" {block_size + 1:,}: use more text or a smaller block size",
                field="block_size",
            )
        self.tokens, self.batch_size, self.block_size, self.seed = tokens, batch_size, block_size, seed
        self.document_start_token = document_start_token
        # One window less than would fit leaves the offset at least block_size values to choose from.
        self.windows_per_epoch = max(1, (len(tokens) - block_size) // block_size)
        self._last_epoch_starts = lru_cache(maxsize=1)(self._epoch_starts)

    def batch(self, step: int) -> Batch:
        """Step `step`, counted from 0: (batch_size, block_size); `targets` is `tokens` shifted by one."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of `batch(step)`: the part that a rank or a micro-batch reads."""
        numbers = row_numbers(self, step, start, stop)
        windows = np.empty((len(numbers), self.block_size + 1), np.int64)
        for window, row in zip(windows, numbers, strict=True):
            begin = self._window_start(row)
            window[:] = self.tokens.read(begin, begin + self.block_size + 1)
        tokens = torch.from_numpy(windows)  # (B, T + 1)
        return _make_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), self.document_start_token)

    def _window_start(self, row: int) -> int:
        """The offset in the data of the window of a row, numbered over all steps."""
        epoch, index = divmod(row, self.windows_per_epoch)
        return int(self._last_epoch_starts(epoch)[index])

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        """The offsets of the windows of an epoch, in order, int64 (windows_per_epoch,)."""
        random = epoch_rng(self.seed, epoch)
        spare = len(self.tokens) - 1 - self.windows_per_epoch * self.block_size
        offset = random.integers(spare, endpoint=True)
        return offset + random.permutation(self.windows_per_epoch) * self.block_size


def row_numbers(loader: BatchLoader, step: int, start: int, stop: int) -> range:
    """Rows [start, stop) of batch `step`, numbered over all steps. Raises ValueError for rows outside a batch."""
    if not 0 <= start <= stop <= loader.batch_size:
        raise ValueError(f"rows [{start}, {stop}) are outside a batch of {loader.batch_size}")
    first = step * loader.batch_size
    return range(first + start, first + stop)


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    """The random generator of one epoch."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % (1 << 64), epoch], np.uint64)))


def _make_batch(tokens: Tensor, targets: Tensor, document_start_token: int | None) -> Batch:
    """A batch whose documents start with the given token; None makes each row one document."""
    return Batch(tokens, targets, None if document_start_token is None else (tokens == document_start_token).cumsum(1))


def evaluation_batches(
    tokens: TokenSequence,
    batch_size: int,
    block_size: int,
    max_tokens: int | None = None,
    *,
    document_start_token: int | None = None,
) -> Iterator[Batch]:
    """A split in order, each token (except the first, which nothing precedes) the target exactly once.

    Yields batches of (B, T) with B <= `batch_size` and T <= `block_size`. Windows do not overlap; the last is padded
    with token 0 and target -100. `max_tokens` limits the targets. document_start_token: see `TokenLoader`.

    Raises DataError if there is no token to predict.
    """
    total = len(tokens) - 1 if max_tokens is None else min(len(tokens) - 1, max_tokens)
    if total < 1:
        raise DataError(f"nothing to evaluate on: the split has {len(tokens)} token(s), and none to predict")
    block_size = min(block_size, total)
    starts = range(0, total, block_size)
    for first in range(0, len(starts), batch_size):
        rows = starts[first : first + batch_size]
        inputs = torch.zeros(len(rows), block_size, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE_INDEX)
        for row, start in enumerate(rows):
            length = min(block_size, total - start)
            window = torch.from_numpy(tokens.read(start, start + length + 1).astype(np.int64))
            inputs[row, :length], targets[row, :length] = window[:-1], window[1:]
        yield _make_batch(inputs, targets, document_start_token)


def prefetch_batches(
    loader: BatchLoader, start: int, stop: int, device: torch.device, *, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """The batches of steps [start, stop), each read by a thread while the device computes the one before.

    On the CPU; in pinned memory if `device` is a GPU. Yields the rows of `rank`: each of the `world_size` ranks has an
    equal share of a batch.
    """
    share = loader.batch_size // world_size

    def read(step: int) -> Batch:
        batch = loader.rows(step, rank * share, (rank + 1) * share)
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        ahead = thread.submit(read, start) if start < stop else None
        for step in range(start, stop):
            assert ahead is not None
            batch = ahead.result()
            ahead = thread.submit(read, step + 1) if step + 1 < stop else None
            yield batch
