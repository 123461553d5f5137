"""How many documents are nearly identical to an earlier one: MinHash (Broder 1997), one permutation (Li et al. 2012).

The shingles of a document are its sequences of five tokens. A hash puts each in one of 32 bins; the least hash of each
bin is the document's signature, and each quarter of the signature is a key. Two documents of which a part s of all
shingles is in both (Jaccard) have a key in common with a probability of about 1 - (1 - s^8)^4: 0.99 for s = 0.95,
0.89 for 0.9, 0.52 for 0.8, and 0.02 for 0.5.
"""

from pathlib import Path

import numpy as np

from gpt2.data.array_file import ArrayFile

NUM_KEYS = 4

_BINS = 32
_SHINGLE_TOKENS = 5
_MIN_SHINGLES = 64  # with fewer, many bins would be empty
_SLOT_BITS = 23  # 32 MB of memory for each of the keys of a document
_REPLAYED_DOCUMENTS = 1 << 16
_EMPTY = np.uint64((1 << 64) - 1)
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
                     0x27D4EB2F165667C5], np.uint64)  # fmt: skip


def near_duplicate_keys(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The keys of documents that lie one after the other, uint64 (documents, 4); 0 for those of under 68 tokens."""
    shingles = np.zeros(max(0, len(tokens) - _SHINGLE_TOKENS + 1), np.uint64)
    for i, factor in enumerate(_FACTORS):
        shingles += tokens[i : i + len(shingles)].astype(np.uint64) * factor
    shingles = mix(shingles)
    counts = np.maximum(lengths - _SHINGLE_TOKENS + 1, 0)
    within = np.repeat(np.arange(len(lengths)), lengths)  # the document of each token
    is_whole = within[: len(shingles)] == within[_SHINGLE_TOKENS - 1 :][: len(shingles)]
    shingles, within = shingles[is_whole], within[: len(shingles)][is_whole]
    signatures = np.full(len(lengths) * _BINS, _EMPTY)
    np.minimum.at(signatures, within * _BINS + (shingles >> np.uint64(59)).astype(np.int64), shingles)
    places = np.arange(1, _BINS + 1, dtype=np.uint64)
    parts = mix(signatures.reshape(-1, _BINS) + places).reshape(len(lengths), NUM_KEYS, _BINS // NUM_KEYS)
    keys = mix(np.bitwise_xor.reduce(parts, axis=2))
    keys[counts < _MIN_SHINGLES] = 0
    return keys


class NearDuplicates:
    """The keys of earlier documents, in tables of a fixed size: a new key may replace an old one in its slot.

    So the count is a lower bound when there are more than some millions of documents.
    """

    def __init__(self, path: Path) -> None:
        """path: the file with the keys of all documents so far, for `resume`."""
        self._file = ArrayFile(path)
        self._tables = np.zeros((NUM_KEYS, 1 << _SLOT_BITS), np.uint32)

    def add(self, keys: np.ndarray) -> int:
        """Add the keys of documents (documents, 4); return how many have a key in common with an earlier one."""
        keys = keys[keys.any(axis=1)]
        self._file.append(keys)
        slots = (keys & np.uint64((1 << _SLOT_BITS) - 1)).astype(np.int64)
        marks = np.maximum(keys >> np.uint64(32), np.uint64(1)).astype(np.uint32)
        is_near = np.zeros(len(keys), np.bool_)
        for i, table in enumerate(self._tables):
            is_near |= table[slots[:, i]] == marks[:, i]
            _, first = np.unique(keys[:, i], return_index=True)
            is_first = np.zeros(len(keys), np.bool_)
            is_first[first] = True
            is_near |= ~is_first
            table[slots[:, i]] = marks[:, i]
        return int(is_near.sum())

    def sync(self) -> int:
        """Append new keys to the file; return how many documents it has, for `resume`."""
        return self._file.sync()

    def resume(self, count: int) -> None:
        """Continue after the first `count` documents of the file."""
        with self._file.path.open("rb") as file:
            for start in range(0, count, _REPLAYED_DOCUMENTS):
                read = NUM_KEYS * min(_REPLAYED_DOCUMENTS, count - start)
                self.add(np.fromfile(file, np.uint64, read).reshape(-1, NUM_KEYS))
        self._file.truncate(count, NUM_KEYS)


def mix(values: np.ndarray) -> np.ndarray:
    """A random-looking 64-bit number for each one, by the finalizer of SplitMix64 (Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
