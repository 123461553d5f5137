"""Several data sets as one: rows drawn by weight, still a pure function of (data, seed, step)."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain
from math import floor

import numpy as np
import torch

from gpt2.data.dataset import TokenDataset
from gpt2.data.loader import Batch, TokenLoader, epoch_rng, row_numbers
from gpt2.errors import DataError
from gpt2.tokenizer import Tokenizer

_BLOCK_ROWS = 1024  # rows in which each part has its share, in a random order


@dataclass(frozen=True)
class Mixture:
    """References to data sets, each with its share of the rows; shares add up to 1."""

    parts: tuple[tuple[str, Fraction], ...]

    @property
    def name(self) -> str:
        """The references and their shares."""
        return ",".join(f"{ref}:{float(share):g}" for ref, share in self.parts)


def find_mixture(ref: str) -> Mixture | None:
    """The mixture ``A:0.8,B:0.2``, whose weights need not add up to 1; None for any other reference.

    Raises DataError for a weight of 0 or a part without one.
    """
    parts = [part.strip() for part in ref.split(",")]
    matches = [re.fullmatch(r"(.+):(\d+(?:\.\d*)?|\.\d+)", part) for part in parts]
    if len(parts) < 2 or not any(matches):
        return None
    weights: list[tuple[str, Fraction]] = []
    for part, match in zip(parts, matches, strict=True):
        if match is None or not Fraction(match[2]):
            raise DataError(f"'{part}' in the mixture {ref} needs a weight over 0, as in {part.split(':')[0]}:0.2")
        weights.append((match[1], Fraction(match[2])))
    total = sum(weight for _, weight in weights)
    return Mixture(tuple((name, weight / total) for name, weight in weights))


def map_refs(ref: str, function: Callable[[str], str]) -> str:
    """The mixture `ref` with `function` of the reference of each part, and its weights as they are."""
    parts = [part.strip().rpartition(":") for part in ref.split(",")]
    return ",".join(f"{function(name)}:{weight}" for name, _, weight in parts)


@dataclass(frozen=True)
class MixtureDataset:
    """Token data sets with one tokenizer, each with its share of the rows; see `gpt2.data.dataset.Dataset`."""

    name: str
    parts: tuple[TokenDataset, ...]
    shares: tuple[Fraction, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.parts[0].tokenizer

    @property
    def train_tokens(self) -> int:
        return sum(part.train_tokens for part in self.parts)

    @property
    def val_tokens(self) -> int | None:
        counts = [part.val_tokens for part in self.parts if part.val_tokens is not None]
        return sum(counts) if counts else None

    @property
    def bytes_per_token(self) -> float | None:
        return None  # the validation tokens that are read depend on the shares

    @property
    def fingerprint(self) -> str:
        facts = [f"{part.fingerprint} {share}" for part, share in zip(self.parts, self.shares, strict=True)]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def loader(self, batch_size: int, block_size: int, seed: int) -> "MixtureLoader":
        return MixtureLoader(
            [part.loader(1, block_size, seed + i) for i, part in enumerate(self.parts)], self.shares, batch_size, seed
        )

    def validation_batches(self, batch_size: int, block_size: int, max_tokens: int | None) -> Iterator[Batch]:
        """The validation splits one after the other, each with its share of `max_tokens`."""
        return chain.from_iterable(
            part.validation_batches(batch_size, block_size, max_tokens and max(1, round(max_tokens * share)))
            for part, share in zip(self.parts, self.shares, strict=True)
        )

    def token_counts(self, max_tokens: int) -> np.ndarray:
        """How often each token occurs, by the parts' shares, scaled to about `max_tokens` in all."""
        counts = [part.token_counts(max_tokens) for part in self.parts]
        scaled = [
            found * (float(share) * max_tokens / found.sum()) for found, share in zip(counts, self.shares, strict=True)
        ]
        return np.sum(scaled, axis=0).astype(np.int64)

    def prompts(self, count: int) -> list[tuple[str, str]]:
        """Prompts of all parts in turn."""
        each = [part.prompts(count) for part in self.parts]
        return [found[i] for i in range(count) for found in each if i < len(found)][:count]


class MixtureLoader:
    """Batches of a mixture. Of any 1,024 rows from a multiple of that, each part has its share, give or take one.

    The part of a row is drawn from (seed, block of 1,024 rows); which of the part's own rows it is follows from the
    shares alone. So a row is found without those before it, on any rank and after any resume.
    """

    def __init__(self, parts: Sequence[TokenLoader], shares: Sequence[Fraction], batch_size: int, seed: int) -> None:
        self.parts, self.batch_size, self._seed = tuple(parts), batch_size, seed
        self._bounds = [sum(shares[: i + 1], Fraction(0)) for i in range(len(shares))]  # cumulative; the last is 1
        self._last_block = lru_cache(maxsize=1)(self._draw)

    @property
    def windows_per_epoch(self) -> int:
        """Number of rows of all parts together."""
        return sum(part.windows_per_epoch for part in self.parts)

    def epochs(self, rows: int) -> list[float]:
        """How often the first `rows` rows go through each part."""
        counts = [self._rows_before(i, rows) for i in range(len(self.parts))]
        return [count / part.windows_per_epoch for count, part in zip(counts, self.parts, strict=True)]

    def batch(self, step: int) -> Batch:
        """Step `step`, counted from 0: `batch_size` rows."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of `batch(step)`: the part that a rank or a micro-batch reads."""
        found = [self._row(row) for row in row_numbers(self, step, start, stop)]
        if not found:
            return self.parts[0].rows(0, 0, 0)
        documents = [row.documents for row in found if row.documents is not None]
        return Batch(
            torch.cat([row.tokens for row in found]),
            torch.cat([row.targets for row in found]),
            torch.cat(documents) if documents else None,
        )

    def _row(self, row: int) -> Batch:
        """A row, numbered over all steps."""
        block, index = divmod(row, _BLOCK_ROWS)
        parts, ranks = self._last_block(block)
        return self.parts[int(parts[index])].batch(int(ranks[index]))

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each row of a block: its part, and its number among the rows of that part."""
        before = [self._rows_before(i, block * _BLOCK_ROWS) for i in range(len(self.parts))]
        after = [self._rows_before(i, (block + 1) * _BLOCK_ROWS) for i in range(len(self.parts))]
        parts = np.repeat(np.arange(len(before)), np.subtract(after, before))
        parts = epoch_rng(self._seed, block).permutation(parts)
        ranks = np.empty(_BLOCK_ROWS, np.int64)
        for i, first in enumerate(before):
            ranks[parts == i] = first + np.arange(int((parts == i).sum()))
        return parts, ranks

    def _rows_before(self, part: int, rows: int) -> int:
        """How many of the first `rows` rows are of a part: exact at multiples of the block."""
        lower = self._bounds[part - 1] if part else Fraction(0)
        return floor(self._bounds[part] * rows) - floor(lower * rows)


def mix(mixture: Mixture, parts: Sequence[TokenDataset]) -> MixtureDataset:
    """The data sets of a mixture. Raises DataError if their tokenizers differ."""
    for (ref, _), part in zip(mixture.parts, parts, strict=True):
        if part.tokenizer.fingerprint != parts[0].tokenizer.fingerprint:
            first = mixture.parts[0][0]
            raise DataError(
                f"the parts of a mixture need one tokenizer: {ref} has {part.tokenizer.name}"
                f" ({part.tokenizer.vocab_size:,} tokens), {first} another one",
                field="tokenizer",
            )
    return MixtureDataset(mixture.name, tuple(parts), tuple(share for _, share in mixture.parts))
