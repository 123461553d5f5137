"""A corpus of any size -> token shards: on all cores, in bounded memory, resumable at any moment.

The folder OUT.partial holds the shards and `progress.json`, which says how far they are good. A process that dies
leaves both; the next one truncates the open shards to what was recorded and goes on, so the result does not depend on
where a run was interrupted. At the end the folder is renamed.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2.byte_level import encode_pieces
from gpt2.data.corpora import Layout
from gpt2.data.corpus_files import Block, FileQueue, Position, Reader
from gpt2.data.near_duplicates import NearDuplicates, near_duplicate_keys
from gpt2.data.shards import PARTIAL_SUFFIX, ShardFile, ShardsMeta, ShardWriter, SplitMeta, TokenizerMeta
from gpt2.data.spool import DocumentHashes, Spool
from gpt2.data.text_blocks import map_in_order
from gpt2.errors import DataError
from gpt2.files import LockFile, write_error
from gpt2.hub import HubDataset, HubFile
from gpt2.progress import ProgressBar, print_status
from gpt2.tokenizer import Tokenizer
from gpt2.vocabulary import END_OF_TEXT

PROGRESS_FILENAME = "progress.json"
HASHES_FILENAME = "hashes"
KEYS_FILENAME = "near-duplicate-keys"
SPOOL_FOLDER = "spool"  # of documents to shuffle
SOURCE_FOLDER = "source"  # of the files that are being read
CHECKPOINT_SECONDS = 30.0  # a shard that is complete is recorded at once

_log = logging.getLogger("gpt2.data")


class Encoded(NamedTuple):
    """Documents as tokens: all tokens, and of each document their number, its bytes of text, hashes and number.

    hashes: uint64 (documents, 5): of the text, and its keys (see `near_duplicates`); (documents, 0) without `dedup`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray
    numbers: np.ndarray

    def select(self, chosen: np.ndarray) -> "Encoded":
        """The documents for which `chosen`, bool (documents,), is true."""
        if chosen.all():
            return self
        tokens = self.tokens[np.repeat(chosen, self.lengths)]
        return Encoded(tokens, self.lengths[chosen], self.sizes[chosen], self.hashes[chosen], self.numbers[chosen])


@dataclass(frozen=True)
class Options:
    """What decides the shards of a corpus, beside its files and the tokenizer.

    max_tokens: of the train split; None for all.
    shuffle:    seed of the order of documents; None for their own.
    dedup:      drop documents whose text occurred before.
    """

    layout: Layout
    shard_tokens: int
    max_tokens: int | None = None
    shuffle: int | None = None
    dedup: bool = False


@dataclass
class State:
    """`progress.json`: what is made, from which files, and how far it is."""

    identity: dict[str, Any]
    commit: str
    files: dict[str, list[dict[str, Any]]]
    split: str = "train"  # whose files are being read
    position: list[int] = field(default_factory=lambda: [0, 0])
    documents: int = 0  # of this split that were read
    duplicates: int = 0
    near_duplicates: int = 0  # that were kept
    spooled: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the file atomically."""
        partial = folder / f"{PROGRESS_FILENAME}.new"
        with partial.open("w", encoding="utf-8") as handle:
            json.dump(asdict(self), handle)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(folder / PROGRESS_FILENAME)

    @classmethod
    def load(cls, folder: Path) -> "State | None":
        """The state of a folder; None if nothing was recorded. Raises DataError for a file of another kind."""
        path = folder / PROGRESS_FILENAME
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"cannot read {path} ({error}): remove {folder} to start again") from None


class SplitOutput:
    """The shards of both splits, and the number of documents and bytes of text in each."""

    def __init__(self, folder: Path, options: Options, vocab_size: int) -> None:
        first = int(options.layout.first_shard_is_val)
        self._options = options
        self.writers = {
            "train": ShardWriter(folder, "train", options.shard_tokens, vocab_size=vocab_size, first_index=first),
            "val": ShardWriter(folder, "val", options.shard_tokens, vocab_size=vocab_size),
        }
        self.counts = {split: {"documents": 0, "bytes": 0} for split in self.writers}

    @property
    def is_full(self) -> bool:
        """Whether the train split has all the tokens that were asked for."""
        return self._options.max_tokens is not None and self.writers["train"].tokens >= self._options.max_tokens

    @property
    def closed_shards(self) -> int:
        return sum(len(writer.files) for writer in self.writers.values())

    def write(self, split: str, documents: Encoded) -> None:
        """Append documents. A document counts for the split in which it starts."""
        tokens, starts = documents.tokens, np.cumsum(documents.lengths) - documents.lengths
        sizes = documents.sizes
        if self._options.layout.first_shard_is_val and split == "train":
            room = self._options.shard_tokens - self.writers["val"].tokens
            head = int(np.searchsorted(starts, room))
            self._append("val", tokens[:room], sizes[:head])
            tokens, sizes, starts = tokens[room:], sizes[head:], starts[head:] - room
        if split == "train" and self._options.max_tokens is not None:
            room = max(0, self._options.max_tokens - self.writers["train"].tokens)
            tokens, sizes = tokens[:room], sizes[: int(np.searchsorted(starts, room))]
        self._append(split, tokens, sizes)

    def _append(self, split: str, tokens: np.ndarray, sizes: np.ndarray) -> None:
        self.writers[split].write(tokens)
        self.counts[split]["documents"] += len(sizes)
        self.counts[split]["bytes"] += int(sizes.sum())

    def sync(self) -> dict[str, Any]:
        """Sync the shards, and return what `resume` needs."""
        return {
            split: {"open": writer.sync(), "files": [asdict(file) for file in writer.files], **self.counts[split]}
            for split, writer in self.writers.items()
        }

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from what `sync` returned."""
        for split, values in saved.items():
            self.writers[split].resume([ShardFile(**file) for file in values["files"]], values["open"])
            self.counts[split] = {"documents": values["documents"], "bytes": values["bytes"]}

    def close(self) -> dict[str, SplitMeta]:
        """Complete the open shards."""
        for writer in self.writers.values():
            with writer:
                pass
        return {
            split: SplitMeta(writer.tokens, files=tuple(writer.files), **self.counts[split])
            for split, writer in self.writers.items()
        }


def encode_block(block: Block, tokenizer: Tokenizer, options: Options) -> Encoded:
    """The documents of a block as tokens, with their end-of-text tokens; numbered from `block.first`.

    With separators, a text can be several documents, of one number; a document of whitespace only is left out.
    """
    texts, numbers = block.texts, list(range(block.first, block.first + len(block.texts)))
    if options.layout.separators and any(END_OF_TEXT in text or not text or text.isspace() for text in texts):
        parts = [(piece, number) for text, number in zip(texts, numbers, strict=True) for piece in _split(text)]
        texts, numbers = [piece for piece, _ in parts], [number for _, number in parts]
    pieces: list[str | None] = [None] * (2 * len(texts))
    is_before = options.layout.end_of_text == "before"
    pieces[int(is_before) :: 2] = texts
    tokens = encode_pieces(tokenizer, pieces)
    ends = np.flatnonzero(tokens == tokenizer.end_of_text)
    bounds = np.append(ends, len(tokens)) if is_before else np.concatenate(([0], ends + 1))
    sizes = [len(text) if text.isascii() else len(text.encode("utf-8", "replace")) for text in texts]
    lengths, hashes = np.diff(bounds), np.empty((len(texts), 0), np.uint64)
    if options.dedup:
        exact = np.array([_hash(text) for text in texts], np.uint64)
        hashes = np.column_stack([exact, near_duplicate_keys(tokens, lengths)])
    return Encoded(tokens, lengths, np.array(sizes, np.int64), hashes, np.array(numbers, np.int64))


def _split(text: str) -> list[str]:
    """The documents between the ``<|endoftext|>`` of a text, without those of whitespace only."""
    return [piece for piece in text.split(END_OF_TEXT) if piece.strip()]


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass
class Preparation:
    """A preparation that is under way: its folder, its state, and what it writes to."""

    folder: Path
    data: HubDataset
    state: State
    tokenizer: Tokenizer
    options: Options
    reader: Reader
    output: SplitOutput
    spool: Spool | None
    hashes: tuple[DocumentHashes, NearDuplicates] | None
    bar: ProgressBar
    workers: int
    saved_at: float = field(default_factory=time.monotonic)
    saved_shards: int = 0
    first_progress: tuple[float, int] | None = None  # time and tokens

    def run(self) -> dict[str, SplitMeta]:
        """Read and tokenize what is left, and return the splits."""
        splits = list(self.state.files)
        for split in splits[splits.index(self.state.split) :]:
            if split != self.state.split:
                self.state.split, self.state.position, self.state.documents = split, [0, 0], 0
            self._run_split(split)
        if self.spool is not None:
            self.save()
            for split, documents in self.spool.shuffled():
                self.output.write(split, Encoded(*documents))
        return self.output.close()

    def _run_split(self, split: str) -> None:
        files = [HubFile(**file) for file in self.state.files[split]]
        queue = FileQueue(self.data, files, self.folder / SOURCE_FOLDER)
        start = Position(*self.state.position)
        blocks = self.reader.blocks(queue, start, self.state.documents)
        try:
            for block, encoded in map_in_order(blocks, self._encode, self.workers):
                self._write(split, encoded)
                self.state.position = list(block.next)
                self.state.documents = block.first + len(block.texts)
                self._show_progress(queue, block.next)
                if self._save_if_due():
                    queue.release(block.next.file)
                if self._is_full():
                    return
        finally:
            queue.close()

    def _show_progress(self, queue: FileQueue, position: Position) -> None:
        now, tokens = time.monotonic(), self._tokens()
        self.first_progress = self.first_progress or (now, tokens)
        begun, before = self.first_progress
        rate = (tokens - before) / max(now - begun, 1e-9)
        status = f"{self.state.documents:,} documents, {tokens:,} tokens, {rate / 1e6:.1f}M tokens/s"
        self.bar.update(self._fraction(queue, position), status)

    def _encode(self, block: Block) -> Encoded:
        return encode_block(block, self.tokenizer, self.options)

    def _tokens(self) -> int:
        spooled = sum(self.spool.tokens.values()) if self.spool is not None else 0
        return spooled + sum(writer.tokens for writer in self.output.writers.values())

    def _is_full(self) -> bool:
        """Whether enough documents were read for the tokens that were asked for."""
        options = self.options
        if self.spool is None or options.max_tokens is None:
            return self.output.is_full
        first_shard = options.shard_tokens if options.layout.first_shard_is_val else 0
        return self.spool.tokens["train"] >= options.max_tokens + first_shard

    def _fraction(self, queue: FileQueue, position: Position) -> float:
        asked = self.options.max_tokens
        return max(queue.fraction(position), self._tokens() / asked if asked else 0.0)

    def _write(self, split: str, documents: Encoded) -> None:
        if self.hashes is not None:
            exact, near = self.hashes
            is_new = exact.add(documents.hashes[:, 0])
            self.state.duplicates += int((~is_new).sum())
            documents = documents.select(is_new)
            self.state.near_duplicates += near.add(documents.hashes[:, 1:])
        every = self.options.layout.holdout
        held_out = documents.numbers % every == every - 1 if every else np.zeros(len(documents.numbers), bool)
        for name, chosen in ((split, ~held_out), ("val", held_out)):
            if not chosen.any():
                continue
            if self.spool is not None:
                self.spool.add(name, *documents.select(chosen))
            else:
                self.output.write(name, documents.select(chosen))

    def _save_if_due(self) -> bool:
        is_new_shard = self.output.closed_shards > self.saved_shards
        if not is_new_shard and time.monotonic() - self.saved_at < CHECKPOINT_SECONDS:
            return False
        self.save()
        return True

    def save(self) -> None:
        """Record how far the preparation is."""
        self.state.outputs = self.output.sync()
        self.state.spooled = {
            "documents": self.spool.sync() if self.spool is not None else None,
            "hashes": [one.sync() for one in self.hashes] if self.hashes is not None else None,
        }
        self.state.save(self.folder)
        self.saved_at, self.saved_shards = time.monotonic(), self.output.closed_shards


@contextmanager
def partial_folder(folder: Path, what: str) -> Iterator[Path]:
    """The folder OUT.partial, locked, in which `folder` is prepared; what is in it is kept after an error.

    Raises DataError when another process prepares it, and for a disk that is full.
    """
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    lock_path = partial.with_name(partial.name + ".lock")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = LockFile(lock_path)
    except BlockingIOError:
        raise DataError(f"another process is preparing {folder}: wait for it, or name another folder") from None
    except OSError as error:
        raise write_error(folder, error) from None
    try:
        yield partial
    except (OSError, KeyboardInterrupt) as error:
        kept = f"finished work is kept in {partial}; the same command resumes from there"
        if isinstance(error, KeyboardInterrupt):
            print_status(f"stopped: {kept}")
            raise
        raise DataError(f"cannot write {what} ({error.strerror or error}): {kept}") from None
    finally:
        lock.release(lock_path)


def finish(partial: Path, folder: Path, meta: ShardsMeta) -> None:
    """Add `meta.json` to complete shards with their tokenizer, remove the rest, and rename the folder."""
    import shutil

    meta.save(partial)
    listed = {file.name for split in meta.splits.values() for file in split.files}
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name in (PROGRESS_FILENAME, HASHES_FILENAME, KEYS_FILENAME) or (
            path.suffix == ".bin" and path.name not in listed
        ):
            path.unlink()
    partial.rename(folder)


def tokenizer_meta(tokenizer: Tokenizer) -> TokenizerMeta:
    """What `meta.json` says of a tokenizer."""
    return TokenizerMeta(tokenizer.name, tokenizer.vocab_size, tokenizer.fingerprint)
