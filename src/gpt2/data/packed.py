"""Documents of unequal length -> rows of one length, in which none is cut in two and none sees another.

A document of n tokens takes n - 1 positions of a row: at each it reads a token and learns the one that follows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from gpt2.data.loader import Batch, epoch_rng
from gpt2.errors import UserError
from gpt2.loss import IGNORE_INDEX

_LARGE_DOCUMENT_DIVISOR = 8  # a document that takes more than this part of a row is placed before the smaller ones


@dataclass(frozen=True)
class TokenizedDocuments:
    """D documents of N tokens in all, one after the other.

    tokens:  (N,) uint16, or int32 for a vocabulary that needs it.
    learned: (N,) bool: which tokens count in the loss. The first of a document never does: nothing precedes it.
    offsets: (D + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]], two at least.
    answers: (D,) int64: where in document i its last answer begins, which is kept when the document is too long.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    answer_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.answer_starts)


class Truncation(NamedTuple):
    """What did not fit: how many documents were cut, and how many tokens they lost, of which so many to learn from."""

    documents: int
    tokens: int
    targets: int


class Spans(NamedTuple):
    """What is read of some documents: the tokens from `starts` to `stops`, int64, in the flat arrays."""

    starts: np.ndarray
    stops: np.ndarray

    def num_targets(self, documents: TokenizedDocuments) -> np.ndarray:
        """How many tokens each has to learn from, int64: those that count, and are not the first of what is read."""
        before = np.concatenate(([0], np.cumsum(documents.loss_mask, dtype=np.int64)))
        return before[self.stops] - before[np.minimum(self.starts + 1, self.stops)]


def truncate_documents(documents: TokenizedDocuments, indices: np.ndarray, block_size: int) -> tuple[Spans, Truncation]:
    """As much of each chosen document as a row of `block_size` takes, and what was left out.

    The oldest tokens go first, as a conversation's oldest turns are forgotten, but neither the last answer nor the
    token before it, from which its first is learned. An answer that is too long by itself loses its end.
    """
    whole = Spans(documents.offsets[indices], documents.offsets[indices + 1])
    excess = np.maximum(whole.stops - whole.starts - (block_size + 1), 0)
    front = np.minimum(excess, np.maximum(documents.answer_starts[indices] - 1, 0))
    kept = Spans(whole.starts + front, whole.stops - (excess - front))
    lost = int(whole.num_targets(documents).sum() - kept.num_targets(documents).sum())
    return kept, Truncation(int((excess > 0).sum()), int(excess.sum()), lost)


class PackedRows:
    """Documents side by side in rows of `block_size` positions.

    The large ones are placed first, in decreasing size, and then the small ones in an order drawn from `seed`, so
    that a row is no collection of neighbours; each goes where it leaves the least room (best fit decreasing: Johnson
    1974). What is left of a row is filled up with the token `filling`, and nothing is learned there.
    """

    def __init__(
        self, documents: TokenizedDocuments, spans: Spans, block_size: int, pad_token: int, seed: int = 0
    ) -> None:
        self.documents, self.block_size, self.pad_token = documents, block_size, pad_token
        sizes = spans.stops - spans.starts - 1
        shuffled = epoch_rng(seed, 0).permutation(len(sizes))
        first = np.where(sizes * _LARGE_DOCUMENT_DIVISOR > block_size, -sizes, 0)[shuffled]
        order = shuffled[np.argsort(first, kind="stable")]
        row_of, count = pack_best_fit(sizes[order], block_size)
        members = order[np.argsort(row_of, kind="stable")]  # row by row
        self.spans = Spans(spans.starts[members], spans.stops[members])
        self.row_offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=count))))
        self.num_padding = count * block_size - int(sizes.sum())

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def batch(self, rows: np.ndarray) -> Batch:
        """These rows, of `block_size` positions each; the filling is a document of its own."""
        shape = (len(rows), self.block_size)
        tokens, targets = np.full(shape, self.pad_token, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        numbers = np.zeros(shape, np.int64)
        flat, learned = self.documents.tokens, self.documents.loss_mask
        for i, row in enumerate(rows.tolist()):
            position = 0
            members = range(self.row_offsets[row], self.row_offsets[row + 1])
            for number, member in enumerate(members):
                start, stop = self.spans.starts[member], self.spans.stops[member]
                end = position + int(stop - start) - 1
                tokens[i, position:end] = flat[start : stop - 1]
                np.copyto(targets[i, position:end], flat[start + 1 : stop], where=learned[start + 1 : stop])
                numbers[i, position:end] = number
                position = end
            numbers[i, position:] = len(members)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(numbers))


def pack_best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Put things of these sizes (D,), each 1 to `width`, into rows in turn, each where the least room is left.

    Returns the row of each, int64 (D,), and how many rows there are.
    """
    rows_with: list[list[int]] = [[] for _ in range(capacity)]  # by the room that is left in them
    rooms = 0  # bit n is set when some row has room for n more
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

    The rows of all steps form one long line, as those of `Loader` do: row r of step s is number s * batch_size + r.
    """

    def __init__(self, packed_rows: PackedRows, batch_size: int, seed: int) -> None:
        self.packed_rows, self.batch_size, self.seed = packed_rows, batch_size, seed
        self.windows_per_epoch = len(packed_rows)
        self._epoch_cache = (-1, np.empty(0, np.int64))  # an epoch and the order of its rows

    def batch(self, step: int) -> Batch:
        """Step `step`, counted from 0: `batch_size` rows."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of `batch(step)`, which is all that a rank or a micro-batch has to read."""
        if not 0 <= start <= stop <= self.batch_size:
            raise ValueError(f"rows [{start}, {stop}) asked of a batch of {self.batch_size}")
        first = step * self.batch_size
        return self.packed_rows.batch(
            np.array([self._row_index(number) for number in range(first + start, first + stop)], int)
        )

    def _row_index(self, position: int) -> int:
        """Which row this one is, counted over all steps."""
        epoch, index = divmod(position, self.windows_per_epoch)
        latest, order = self._epoch_cache
        if epoch != latest:  # remembered for speed only: it follows from (seed, epoch)
            order = epoch_rng(self.seed, epoch).permutation(self.windows_per_epoch)
            self._epoch_cache = epoch, order
        return int(order[index])


def packed_evaluation_batches(
    documents: TokenizedDocuments,
    spans: Spans,
    batch_size: int,
    block_size: int,
    pad_token: int,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """Every target of what is read exactly once, or the first `max_tokens` of them, in batches of (B, T).

    B <= `batch_size` and T <= `block_size`. Raises `UserError` when there is nothing to predict.
    """
    if max_tokens is not None:
        spans = _truncate_to_num_targets(documents, spans, max_tokens)
    positions = int((spans.stops - spans.starts - 1).sum())
    if positions < 1:
        raise UserError("nothing to evaluate on: no token to predict")
    rows = PackedRows(documents, spans, min(block_size, positions), pad_token)
    for first in range(0, len(rows), batch_size):
        yield rows.batch(np.arange(first, min(first + batch_size, len(rows))))


def _truncate_to_num_targets(documents: TokenizedDocuments, spans: Spans, max_targets: int) -> Spans:
    """The first documents, the last of them cut so that there are `most` targets in all, or as many as there are."""
    total = np.cumsum(spans.num_targets(documents))
    count = int(np.searchsorted(total, max_targets)) + 1
    if max_targets < 1 or count > len(total):
        return Spans(spans.starts[: 0 if max_targets < 1 else None], spans.stops[: 0 if max_targets < 1 else None])
    starts, stops = spans.starts[:count], spans.stops[:count].copy()
    of_the_last = max_targets - (int(total[count - 2]) if count > 1 else 0)
    begin = int(starts[-1]) + 1
    places = np.flatnonzero(documents.loss_mask[begin : int(stops[-1])])
    stops[-1] = begin + int(places[of_the_last - 1]) + 1
    return Spans(starts, stops)
