"""Sequence packing: documents of unequal length -> rows of one length, with no document in two rows.

A document of n tokens takes n - 1 positions of a row, each with a token and the one that follows as its target. The
document numbers in the batch mask attention between documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from gpt2.data.loader import Batch, epoch_rng, row_numbers
from gpt2.errors import DataError
from gpt2.loss import IGNORE_INDEX

_LARGE_DOCUMENT_DIVISOR = 8  # a document longer than 1/8 of a row is placed before the shorter ones


@dataclass(frozen=True)
class TokenizedDocuments:
    """D concatenated documents with N tokens in total.

    tokens:        (N,) uint16, or int32 for a vocabulary that needs it.
    loss_mask:     (N,) bool: the tokens that count in the loss. The first of a document never does.
    offsets:       (D + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]], at least two.
    answer_starts: (D,) int64: the start of the last answer in document i, which truncation keeps.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    answer_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.answer_starts)


class Truncation(NamedTuple):
    """The number of truncated documents, and of tokens and targets that they lost."""

    documents: int
    tokens: int
    targets: int


class Spans(NamedTuple):
    """Parts of documents: tokens [start, stop) of the flat arrays, both int64."""

    starts: np.ndarray
    stops: np.ndarray

    def num_targets(self, documents: TokenizedDocuments) -> np.ndarray:
        """Number of targets of each span, int64: tokens in the loss mask, except the first of the span."""
        before = np.concatenate(([0], np.cumsum(documents.loss_mask, dtype=np.int64)))
        return before[self.stops] - before[np.minimum(self.starts + 1, self.stops)]


def truncate_documents(documents: TokenizedDocuments, indices: np.ndarray, block_size: int) -> tuple[Spans, Truncation]:
    """The part of each chosen document that fits a row of `block_size`, and the tokens lost.

    The oldest tokens are removed first, but not the last answer and the token before it, which predicts its first. An
    answer that is too long by itself is cut at the end.
    """
    whole = Spans(documents.offsets[indices], documents.offsets[indices + 1])
    excess = np.maximum(whole.stops - whole.starts - (block_size + 1), 0)
    front = np.minimum(excess, np.maximum(documents.answer_starts[indices] - 1, 0))
    kept = Spans(whole.starts + front, whole.stops - (excess - front))
    lost = int(whole.num_targets(documents).sum() - kept.num_targets(documents).sum())
    return kept, Truncation(int((excess > 0).sum()), int(excess.sum()), lost)


class PackedRows:
    """Documents packed into rows of `block_size` positions.

    Large documents are placed first, by decreasing size, then the small ones in a random order drawn from `seed`, so
    that a row is not a group of neighbours; each goes to the row where it leaves the least room (best fit decreasing:
    Johnson 1974). The rest of a row is padding: `pad_token`, with targets ignored.
    """

    def __init__(
        self, documents: TokenizedDocuments, spans: Spans, block_size: int, pad_token: int, seed: int = 0
    ) -> None:
        self.documents, self.block_size, self.pad_token = documents, block_size, pad_token
        sizes = spans.stops - spans.starts - 1
        shuffled = epoch_rng(seed, 0).permutation(len(sizes))
        priority = np.where(sizes * _LARGE_DOCUMENT_DIVISOR > block_size, -sizes, 0)[shuffled]
        order = shuffled[np.argsort(priority, kind="stable")]
        row_of, count = pack_best_fit(sizes[order], block_size)
        members = order[np.argsort(row_of, kind="stable")]  # row by row
        self.spans = Spans(spans.starts[members], spans.stops[members])
        self.row_offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=count))))
        self.num_padding = count * block_size - int(sizes.sum())

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows by index, (len(rows), block_size); the padding of a row is a document of its own."""
        shape = (len(rows), self.block_size)
        tokens, targets = np.full(shape, self.pad_token, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        numbers = np.zeros(shape, np.int64)
        flat, loss_mask = self.documents.tokens, self.documents.loss_mask
        for i, row in enumerate(rows.tolist()):
            position = 0
            members = range(self.row_offsets[row], self.row_offsets[row + 1])
            for number, member in enumerate(members):
                start, stop = self.spans.starts[member], self.spans.stops[member]
                end = position + int(stop - start) - 1
                tokens[i, position:end] = flat[start : stop - 1]
                np.copyto(targets[i, position:end], flat[start + 1 : stop], where=loss_mask[start + 1 : stop])
                numbers[i, position:end] = number
                position = end
            numbers[i, position:] = len(members)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(numbers))


def pack_best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Place items of these sizes (D,), each 1 to `capacity`, in order, each in the row with the least sufficient room.

    Returns the row of each item, int64 (D,), and the number of rows.
    """
    rows_with: list[list[int]] = [[] for _ in range(capacity)]  # rows by their remaining room
    rooms = 0  # bit n is set if some row has room n
    row_of, count = np.empty(len(sizes), np.int64), 0
    for i, size in enumerate(sizes.tolist()):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1  # the lowest bit
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            row, room = count, capacity
            count += 1
        left = room - size
        if left:
            rows_with[left].append(row)
            rooms |= 1 << left
        row_of[i] = row
    return row_of, count


class PackedLoader:
    """Training batches, epoch by epoch: every row once, in an order drawn from (seed, epoch).

    Rows are numbered over all steps as in `TokenLoader`.
    """

    def __init__(self, packed_rows: PackedRows, batch_size: int, seed: int) -> None:
        self.packed_rows, self.batch_size, self.seed = packed_rows, batch_size, seed
        self.windows_per_epoch = len(packed_rows)
        self._last_epoch_order = lru_cache(maxsize=1)(self._epoch_order)

    def batch(self, step: int) -> Batch:
        """Step `step`, counted from 0: `batch_size` rows."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of `batch(step)`: the part that a rank or a micro-batch reads."""
        numbers = row_numbers(self, step, start, stop)
        return self.packed_rows.batch(np.array([self._row_index(number) for number in numbers], int))

    def _row_index(self, position: int) -> int:
        """The packed row at a position, numbered over all steps."""
        epoch, index = divmod(position, self.windows_per_epoch)
        return int(self._last_epoch_order(epoch)[index])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The packed rows of an epoch in order, int64 (windows_per_epoch,)."""
        return epoch_rng(self.seed, epoch).permutation(self.windows_per_epoch)


def packed_evaluation_batches(
    documents: TokenizedDocuments,
    spans: Spans,
    batch_size: int,
    block_size: int,
    pad_token: int,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """Every target of the spans exactly once, or the first `max_tokens` of them, in batches of (B, T).

    B <= `batch_size` and T <= `block_size`. Raises DataError if there is nothing to predict.
    """
    if max_tokens is not None:
        spans = _truncate_to_num_targets(documents, spans, max_tokens)
    positions = int((spans.stops - spans.starts - 1).sum())
    if positions < 1:
        raise DataError("nothing to evaluate on: no token to predict")
    rows = PackedRows(documents, spans, min(block_size, positions), pad_token)
    for first in range(0, len(rows), batch_size):
        yield rows.batch(np.arange(first, min(first + batch_size, len(rows))))


def _truncate_to_num_targets(documents: TokenizedDocuments, spans: Spans, max_targets: int) -> Spans:
    """The first spans, the last of them cut so that there are `max_targets` targets in total, or all spans."""
    total = np.cumsum(spans.num_targets(documents))
    count = int(np.searchsorted(total, max_targets)) + 1
    if max_targets < 1:
        return Spans(spans.starts[:0], spans.stops[:0])
    if count > len(total):
        return spans
    starts, stops = spans.starts[:count], spans.stops[:count].copy()
    remaining = max_targets - (int(total[count - 2]) if count > 1 else 0)
    start = int(starts[-1]) + 1
    targets = np.flatnonzero(documents.loss_mask[start : int(stops[-1])])
    stops[-1] = start + int(targets[remaining - 1]) + 1
    return Spans(starts, stops)
