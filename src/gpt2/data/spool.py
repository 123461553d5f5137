"""Documents on disk in buckets, to shuffle more of them than memory holds; and the hashes of those seen before."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.data.array_file import ArrayFile
from gpt2.data.near_duplicates import mix
from gpt2.data.shards import token_format

BUCKET_BYTES = 64 * 2**20  # of tokens, to be sorted in memory
_MAX_BUCKETS = 4096
_BUFFER_BYTES = 64 * 2**20  # of all buckets, before they are appended to their files
_RECORD = np.dtype([("key", "<u8"), ("length", "<i8"), ("size", "<i8")])

Documents = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Spool:
    """Documents in the order of a random key, which is a pure function of the seed and the document's number.

    A document goes to the bucket that its key falls in; each bucket is sorted in memory. Every bucket is two files:
    tokens, and a record of each document.
    """

    def __init__(self, folder: Path, seed: int, vocab_size: int, expected_tokens: int) -> None:
        self._folder, self._seed = folder, seed
        self._dtype = token_format(vocab_size).dtype
        expected = max(1, expected_tokens * self._dtype.itemsize // BUCKET_BYTES)
        self._bits = min(_MAX_BUCKETS, 1 << (expected - 1).bit_length()).bit_length() - 1
        self._buffers: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = {}
        self._buffered = 0
        self._sizes: dict[str, list[int]] = {}  # by file name: bytes of tokens and of records
        self.tokens = {"train": 0, "val": 0}
        folder.mkdir(exist_ok=True)

    def add(
        self, split: str, tokens: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, hashes: np.ndarray,
        numbers: np.ndarray,
    ) -> None:  # fmt: skip
        """Append documents; see `gpt2.data.stream.Encoded`."""
        keys = _random_keys(self._seed, numbers)
        buckets = (keys >> np.uint64(64 - self._bits)).astype(np.int64) if self._bits else np.zeros(len(keys), np.int64)
        records = np.empty(len(keys), _RECORD)
        records["key"], records["length"], records["size"] = keys, lengths, sizes
        of_token = np.repeat(buckets, lengths)
        stored = tokens.astype(self._dtype)
        for bucket in np.unique(buckets).tolist():
            part = stored[of_token == bucket]
            self._buffers.setdefault((split, bucket), []).append((part, records[buckets == bucket]))
            self._buffered += part.nbytes
        self.tokens[split] += len(tokens)
        if self._buffered > _BUFFER_BYTES:
            self._flush()

    def sync(self) -> dict[str, Any]:
        """Write what is in memory, and return what `resume` needs."""
        self._flush()
        return {"sizes": self._sizes, "tokens": self.tokens}

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from what `sync` returned: what was written since is removed."""
        self._sizes = {name: list(sizes) for name, sizes in saved["sizes"].items()}
        self.tokens = dict(saved["tokens"])
        for path in self._folder.iterdir():
            kind = ("tokens", "records").index(path.suffix[1:])
            size = self._sizes.get(path.stem, [0, 0])[kind]
            with path.open("r+b") as file:
                file.truncate(size)

    def shuffled(self) -> Iterator[tuple[str, Documents]]:
        """The documents of each split in the order of their keys, a bucket at a time."""
        self._flush()
        for split in ("train", "val"):
            for bucket in range(1 << self._bits):
                name = _bucket_name(split, bucket)
                if name not in self._sizes:
                    continue
                tokens = np.fromfile(self._folder / f"{name}.tokens", self._dtype)
                records = np.fromfile(self._folder / f"{name}.records", _RECORD)
                yield split, _sorted(tokens, records)

    def _flush(self) -> None:
        for (split, bucket), parts in self._buffers.items():
            name = _bucket_name(split, bucket)
            sizes = self._sizes.setdefault(name, [0, 0])
            for kind, suffix in enumerate(("tokens", "records")):
                data = np.concatenate([part[kind] for part in parts])
                with (self._folder / f"{name}.{suffix}").open("ab") as file:
                    data.tofile(file)
                sizes[kind] += data.nbytes
        self._buffers, self._buffered = {}, 0


class DocumentHashes:
    """The 64-bit hashes of all documents so far: 8 bytes each, in sorted arrays that are merged when they are alike."""

    def __init__(self, path: Path) -> None:
        self._file = ArrayFile(path)
        self._levels: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes; returns, for each, whether it is new: bool (documents,)."""
        is_new = np.zeros(len(hashes), bool)
        unique, first = np.unique(hashes, return_index=True)
        is_new[first] = True
        for level in self._levels:
            places = np.minimum(np.searchsorted(level, hashes), len(level) - 1)
            is_new &= level[places] != hashes
        added = unique[is_new[first]]
        if len(added):
            self._file.append(added)
            self._insert(added)
        return is_new

    def sync(self) -> int:
        """Append new hashes to the file; returns how many it has, for `resume`."""
        return self._file.sync()

    def resume(self, count: int) -> None:
        """Continue after the first `count` hashes of the file."""
        self._file.truncate(count)
        hashes = np.fromfile(self._file.path, np.uint64)
        self._levels = [np.sort(hashes)] if len(hashes) else []

    def _insert(self, hashes: np.ndarray) -> None:
        self._levels.append(hashes)
        while len(self._levels) > 1 and len(self._levels[-2]) <= 2 * len(self._levels[-1]):
            last = self._levels.pop()
            self._levels[-1] = np.sort(np.concatenate([self._levels[-1], last]), kind="stable")


def _bucket_name(split: str, bucket: int) -> str:
    return f"{split}-{bucket:04d}"


def _random_keys(seed: int, numbers: np.ndarray) -> np.ndarray:
    """A random 64-bit key of each number."""
    with np.errstate(over="ignore"):
        start = mix(np.array([seed % (1 << 64)], np.uint64))
        return mix(numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start)


def _sorted(tokens: np.ndarray, records: np.ndarray) -> Documents:
    """The documents of a bucket in the order of their keys."""
    order = np.argsort(records["key"], kind="stable")
    lengths = records["length"]
    starts = np.cumsum(lengths) - lengths
    pieces: Sequence[np.ndarray] = [tokens[starts[i] : starts[i] + lengths[i]] for i in order]
    unused = np.zeros(len(order), np.int64)
    return np.concatenate(pieces), lengths[order], records["size"][order], unused.astype(np.uint64), unused
