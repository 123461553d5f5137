"""Documents of unequal length -> rows of one length, in which none is cut in two and none sees another.

A document of n tokens takes n - 1 positions of a row: at each it reads a token and learns the one that follows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from gpt2.data.loader import Batch, epoch_random
from gpt2.errors import UserError
from gpt2.loss import IGNORE

_LARGE = 8  # a document that takes more than this part of a row is placed before the smaller ones


@dataclass(frozen=True)
class Documents:
    """D documents of N tokens in all, one after the other.

    tokens:  (N,) uint16, or int32 for a vocabulary that needs it.
    learned: (N,) bool: which tokens count in the loss. The first of a document never does: nothing precedes it.
    offsets: (D + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]], two at least.
    answers: (D,) int64: where in document i its last answer begins, which is kept when the document is too long.
    """

    tokens: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.answers)


class Truncated(NamedTuple):
    """What did not fit: how many documents were cut, and how many tokens they lost, of which so many to learn from."""

    documents: int
    tokens: int
    learned: int


class Spans(NamedTuple):
    """What is read of some documents: the tokens from `starts` to `stops`, int64, in the flat arrays."""

    starts: np.ndarray
    stops: np.ndarray

    def targets(self, documents: Documents) -> np.ndarray:
        """How many tokens each has to learn from, int64: those that count, and are not the first of what is read."""
        before = np.concatenate(([0], np.cumsum(documents.learned, dtype=np.int64)))
        return before[self.stops] - before[np.minimum(self.starts + 1, self.stops)]


def spans(documents: Documents, chosen: np.ndarray, block_size: int) -> tuple[Spans, Truncated]:
    """As much of each chosen document as a row of `block_size` takes, and what was left out.

    The oldest tokens go first, as a conversation's oldest turns are forgotten, but neither the last answer nor the
    token before it, from which its first is learned. An answer that is too long by itself loses its end.
    """
    whole = Spans(documents.offsets[chosen], documents.offsets[chosen + 1])
    excess = np.maximum(whole.stops - whole.starts - (block_size + 1), 0)
    front = np.minimum(excess, np.maximum(documents.answers[chosen] - 1, 0))
    kept = Spans(whole.starts + front, whole.stops - (excess - front))
    lost = int(whole.targets(documents).sum() - kept.targets(documents).sum())
    return kept, Truncated(int((excess > 0).sum()), int(excess.sum()), lost)


class Rows:
    """Documents side by side in rows of `block_size` positions.

    The large ones are placed first, in decreasing size, and then the small ones in an order drawn from `seed`, so
    that a row is no collection of neighbours; each goes where it leaves the least room (best fit decreasing: Johnson
    1974). What is left of a row is filled up with the token `filling`, and nothing is learned there.
    """

    def __init__(self, documents: Documents, read: Spans, block_size: int, filling: int, seed: int = 0) -> None:
        self.documents, self.block_size, self.filling = documents, block_size, filling
        sizes = read.stops - read.starts - 1
        shuffled = epoch_random(seed, 0).permutation(len(sizes))
        first = np.where(sizes * _LARGE > block_size, -sizes, 0)[shuffled]
        order = shuffled[np.argsort(first, kind="stable")]
        row_of, count = best_fit(sizes[order], block_size)
        members = order[np.argsort(row_of, kind="stable")]  # row by row
        self.read = Spans(read.starts[members], read.stops[members])
        self.bounds = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=count))))
        self.padding = count * block_size - int(sizes.sum())

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def batch(self, rows: np.ndarray) -> Batch:
        """These rows, of `block_size` positions each; the filling is a document of its own."""
        shape = (len(rows), self.block_size)
        tokens, targets = np.full(shape, self.filling, np.int64), np.full(shape, IGNORE, np.int64)
        numbers = np.zeros(shape, np.int64)
        flat, learned = self.documents.tokens, self.documents.learned
        for i, row in enumerate(rows.tolist()):
            position = 0
            members = range(self.bounds[row], self.bounds[row + 1])
            for number, member in enumerate(members):
                start, stop = self.read.starts[member], self.read.stops[member]
                end = position + int(stop - start) - 1
                tokens[i, position:end] = flat[start : stop - 1]
                np.copyto(targets[i, position:end], flat[start + 1 : stop], where=learned[start + 1 : stop])
                numbers[i, position:end] = number
                position = end
            numbers[i, position:] = len(members)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(numbers))


def best_fit(sizes: np.ndarray, width: int) -> tuple[np.ndarray, int]:
    """Put things of these sizes (D,), each 1 to `width`, into rows in turn, each where the least room is left.

    Returns the row of each, int64 (D,), and how many rows there are.
    """
    rows_with: list[list[int]] = [[] for _ in range(width)]  # by the room that is left in them
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
            row, room = count, width
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

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        self.packed, self.batch_size, self.seed = rows, batch_size, seed
        self.windows_per_epoch = len(rows)
        self._latest = (-1, np.empty(0, np.int64))  # an epoch and the order of its rows

    def batch(self, step: int) -> Batch:
        """Step `step`, counted from 0: `batch_size` rows."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of `batch(step)`, which is all that a rank or a micro-batch has to read."""
        if not 0 <= start <= stop <= self.batch_size:
            raise ValueError(f"rows [{start}, {stop}) asked of a batch of {self.batch_size}")
        first = step * self.batch_size
        return self.packed.batch(np.array([self._row(number) for number in range(first + start, first + stop)], int))

    def _row(self, number: int) -> int:
        """Which row this one is, counted over all steps."""
        epoch, index = divmod(number, self.windows_per_epoch)
        latest, order = self._latest
        if epoch != latest:  # remembered for speed only: it follows from (seed, epoch)
            order = epoch_random(self.seed, epoch).permutation(self.windows_per_epoch)
            self._latest = epoch, order
        return int(order[index])


def packed_evaluation(
    documents: Documents, read: Spans, batch_size: int, block_size: int, filling: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Every target of what is read exactly once, or the first `max_tokens` of them, in batches of (B, T).

    B <= `batch_size` and T <= `block_size`. Raises `UserError` when there is nothing to predict.
    """
    if max_tokens is not None:
        read = _first_targets(documents, read, max_tokens)
    positions = int((read.stops - read.starts - 1).sum())
    if positions < 1:
        raise UserError("nothing to evaluate on: no token to predict")
    rows = Rows(documents, read, min(block_size, positions), filling)
    for first in range(0, len(rows), batch_size):
        yield rows.batch(np.arange(first, min(first + batch_size, len(rows))))


def _first_targets(documents: Documents, read: Spans, most: int) -> Spans:
    """The first documents, the last of them cut so that there are `most` targets in all, or as many as there are."""
    total = np.cumsum(read.targets(documents))
    count = int(np.searchsorted(total, most)) + 1
    if most < 1 or count > len(total):
        return Spans(read.starts[: 0 if most < 1 else None], read.stops[: 0 if most < 1 else None])
    starts, stops = read.starts[:count], read.stops[:count].copy()
    of_the_last = most - (int(total[count - 2]) if count > 1 else 0)
    begin = int(starts[-1]) + 1
    places = np.flatnonzero(documents.learned[begin : int(stops[-1])])
    stops[-1] = begin + int(places[of_the_last - 1]) + 1
    return Spans(starts, stops)
