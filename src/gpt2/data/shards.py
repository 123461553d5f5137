"""Token shards: files in the format of llm.c, with a `meta.json` that describes them.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros) and the tokens as
little-endian uint16, as in llm.c and modded-nanogpt. For more than 65,536 ids the tokens are uint32, with the magic
20240801 and version 7 that llm.c has for Llama 3. nanoGPT's `train.bin` and `val.bin`, without a header, are read,
too. Source: https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py
"""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from gpt2.errors import DataError
from gpt2.files import check_regular_file, file_sha256, read_error
from gpt2.progress import ProgressBar
from gpt2.terminal import shorten

HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000
SPLITS = ("train", "val")
META_FILENAME = "meta.json"
PARTIAL_SUFFIX = ".partial"  # of the folder in which a long preparation is kept until it is complete
_HEADERLESS_NAMES = tuple(f"{split}.bin" for split in SPLITS)
_MAX_OPEN_FILES = 256  # 100 billion tokens are 1,000 shards, more than a process may keep open


@dataclass(frozen=True)
class TokenFormat:
    """How tokens are stored: the numbers in the header of a shard, and the dtype."""

    magic: int
    version: int
    dtype: np.dtype[Any]

    @property
    def max_vocab_size(self) -> int:
        """How many ids there can be; a count of tokens in a header is an int32, and ids are not negative there."""
        return min(1 << 8 * self.dtype.itemsize, 1 << 31)


FORMATS = (TokenFormat(20240520, 1, np.dtype("<u2")), TokenFormat(20240801, 7, np.dtype("<u4")))
MAX_VOCAB_SIZE = FORMATS[-1].max_vocab_size


def token_format(vocab_size: int) -> TokenFormat:
    """The format with the fewest bits for a vocabulary."""
    return next(one for one in FORMATS if vocab_size <= one.max_vocab_size)


@dataclass(frozen=True)
class ShardFile:
    """One shard: its file name, its number of tokens, and the SHA-256 of the file."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class SplitMeta:
    """One split; `bytes` is the size of its text."""

    tokens: int
    documents: int
    bytes: int
    files: tuple[ShardFile, ...]


@dataclass(frozen=True)
class TokenizerMeta:
    """The tokenizer that made the shards."""

    name: str
    vocab_size: int
    fingerprint: str


@dataclass(frozen=True)
class ShardsMeta:
    """`meta.json`: the source of a folder of shards, its tokenizer, and its files."""

    source: str
    tokenizer: TokenizerMeta
    splits: dict[str, SplitMeta] = field(default_factory=dict)
    version: int = 1

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The folder's `meta.json`; None if there is none. Raises DataError for a file of another kind."""
        path = folder / META_FILENAME
        check_regular_file(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"cannot read {path} ({error})") from None
        try:
            if raw["version"] != 1:
                raise DataError(f"{path} has version {shorten(raw['version'])}; only version 1 is supported")
            splits = {
                name: SplitMeta(**{**split, "files": tuple(ShardFile(**file) for file in split["files"])})
                for name, split in raw["splits"].items()
            }
            for split in splits.values():
                for file in split.files:
                    if Path(file.name).name != file.name or len(file.name) > 255:  # or it could name a file elsewhere
                        raise DataError(f"{path} names {shorten(file.name)!r}, which is not a file name")
            return cls(raw["source"], TokenizerMeta(**raw["tokenizer"]), splits)
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{path} does not describe token shards: move it away to read them without it") from None

    def save(self, folder: Path) -> None:
        """Write `meta.json` atomically."""
        partial = folder / f".{META_FILENAME}.{os.getpid()}.partial"
        with partial.open("w", encoding="utf-8") as handle:
            json.dump({"version": self.version, **asdict(self)}, handle, indent=2)
            handle.write("\n")
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(folder / META_FILENAME)


class ShardWriter:
    """Writes one split as `train_000000.bin`, `train_000001.bin`, ... of `shard_tokens` tokens each.

    A context manager. The header of an open shard has a token count of 0, so readers refuse one that a crash left
    behind. A split without tokens has no file.

    vocab_size:  decides the format, see `token_format`.
    first_index: the number of the first shard.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        shard_tokens: int = SHARD_TOKENS,
        *,
        vocab_size: int = FORMATS[0].max_vocab_size,
        first_index: int = 0,
    ) -> None:
        if not 0 < shard_tokens < 1 << 31:
            raise DataError(f"a shard has 1 to {(1 << 31) - 1:,} tokens, not {shard_tokens:,}", field="shard_tokens")
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.files: list[ShardFile] = []  # closed shards
        self._format, self._first_index = token_format(vocab_size), first_index
        self._handle: BinaryIO | None = None
        self._tokens = 0  # in the open shard

    def write(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append token ids. Raises ValueError for an id that the format cannot store."""
        ids = np.asarray(tokens) if isinstance(tokens, np.ndarray) else np.asarray(tokens, dtype=np.int64)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._format.max_vocab_size:
            bits = 8 * self._format.dtype.itemsize
            raise ValueError(f"token ids must be in [0, {self._format.max_vocab_size}) to fit in {bits} bits")
        while ids.size:
            if self._handle is None:
                self._handle = self._current_path().open("wb")
                self._handle.write(_header(self._format, 0))
            part = ids[: self.shard_tokens - self._tokens]
            self._handle.write(part.astype(self._format.dtype).tobytes())
            self._tokens += part.size
            ids = ids[part.size :]
            if self._tokens == self.shard_tokens:
                self._close_shard()

    @property
    def tokens(self) -> int:
        """Number of tokens written so far, in all shards."""
        return sum(file.tokens for file in self.files) + self._tokens

    def sync(self) -> int:
        """Sync the open shard, if there is one; returns its number of tokens, for `resume`."""
        if self._handle is not None:
            self._handle.flush()
            os.fsync(self._handle.fileno())
        return self._tokens

    def resume(self, files: Sequence[ShardFile], open_tokens: int) -> None:
        """Go on after closed shards and the first `open_tokens` tokens of an open one; what follows is removed."""
        self.files, self._tokens = list(files), open_tokens
        if open_tokens:
            self._handle = self._current_path().open("r+b")
            self._handle.write(_header(self._format, 0))  # the shard may have been closed after the state was saved
            self._handle.truncate(HEADER_BYTES + self._format.dtype.itemsize * open_tokens)
            self._handle.seek(0, os.SEEK_END)

    def _current_path(self) -> Path:
        return self.folder / f"{self.split}_{self._first_index + len(self.files):06d}.bin"

    def _close_shard(self) -> None:
        """Write the token count into the header, sync the file, and compute its checksum."""
        assert self._handle is not None
        with self._handle as handle:
            handle.seek(0)
            handle.write(_header(self._format, self._tokens))
            handle.flush()
            os.fsync(handle.fileno())
        path = self._current_path()
        self.files.append(ShardFile(path.name, self._tokens, file_sha256(path)))
        self._handle, self._tokens = None, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is None:
            return
        if kind is None:
            self._close_shard()
        else:
            self._handle.close()


class TokenShards:
    """The tokens of one split, as one sequence over all its files, memory-mapped.

    Every file is checked when it is opened: magic, version, and a size that matches the count in the header. A read
    checks the size of the file again, and that the ids are below `vocab_size`.
    """

    def __init__(self, paths: Sequence[Path], vocab_size: int = MAX_VOCAB_SIZE) -> None:
        self.paths, self.vocab_size = tuple(paths), vocab_size
        layout = [check_shard(path) for path in self.paths]
        self.counts = tuple(count for _, count, _ in layout)
        self._dtypes = [dtype for _, _, dtype in layout]
        self._shard_starts = np.cumsum((0, *self.counts))  # in tokens; the total is last
        self._header_bytes = [header for header, _, _ in layout]
        self._cached_memmap = lru_cache(maxsize=_MAX_OPEN_FILES)(self._open_memmap)

    def __len__(self) -> int:
        return int(self._shard_starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), uint16 or uint32, from one or several files.

        Raises ValueError for a range outside the data, and DataError for a file whose size has changed since it was
        opened, and for ids that are not in the vocabulary.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"tokens [{start}, {stop}) are outside the {len(self)} tokens")
        first = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        parts = []
        for index in range(first, len(self.paths)):
            begin = int(self._shard_starts[index])
            if begin >= stop:
                break
            self._check_size(index)
            parts.append(self._cached_memmap(index)[max(start - begin, 0) : stop - begin])
            self._check_ids(index, parts[-1], max(start - begin, 0))
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def _check_size(self, index: int) -> None:
        """Raise DataError for a file of another size: to read a truncated memory map would kill the process."""
        path, width = self.paths[index], self._dtypes[index].itemsize
        size = self._header_bytes[index] + width * self.counts[index]
        try:
            found = path.stat().st_size
        except OSError as error:
            raise read_error(path, error) from None
        if found != size:
            raise DataError(f"{path} was changed while in use: it has {found:,} bytes and had {size:,}")

    def _check_ids(self, index: int, tokens: np.ndarray, position: int) -> None:
        largest = int(tokens.max(initial=0))
        if largest >= self.vocab_size:
            position += int(tokens.argmax())
            raise DataError(
                f"{self.paths[index]} has token {largest:,} at position {position:,}, and its tokenizer has only"
                f" {self.vocab_size:,}: name the tokenizer that made these shards, or prepare them again"
            )

    def _open_memmap(self, index: int) -> np.ndarray:
        header, count = self._header_bytes[index], self.counts[index]
        return np.memmap(self.paths[index], dtype=self._dtypes[index], mode="r", offset=header, shape=(count,))


def shard_files(path: Path, split: str) -> list[Path]:
    """The files of one split: those in `meta.json`, or else `*train*.bin` (`*val*.bin`) sorted by name.

    A single file is a train split.
    """
    if path.is_file():
        return [path] if split == "train" else []
    meta = ShardsMeta.load(path)
    if meta is None:
        return sorted(path.glob(f"*{split}*.bin"))
    return [path / file.name for file in meta.splits[split].files] if split in meta.splits else []


def open_shards(path: Path, split: str, vocab_size: int = MAX_VOCAB_SIZE) -> TokenShards:
    """One split ("train" or "val") of a folder of shards, or a single file as the train split.

    vocab_size: every id that is read must be below it.

    Raises DataError if there are no shards, or a file is missing, truncated, or of another kind.
    """
    files = shard_files(path, split)
    if not files:
        raise DataError(f"no {split} shards in {path}: their names match *{split}*.bin")
    return TokenShards(files, vocab_size)


def verify_shards(path: Path) -> ShardsMeta:
    """Compare every shard of a folder, or a single one, with the checksum in `meta.json`.

    Raises DataError that names the first file that differs.
    """
    folder = path if path.is_dir() else path.parent
    meta = ShardsMeta.load(folder)
    if meta is None:
        raise DataError(f"no {META_FILENAME} in {folder}: its shards have no checksums to verify")
    files = {folder / file.name: file for split in meta.splits.values() for file in split.files}
    if path != folder and path not in files:
        raise DataError(f"{path} is not among the shards that {folder / META_FILENAME} lists")
    shards = list(files) if path == folder else [path]
    with ProgressBar(f"verifying {path}") as bar:
        for number, shard in enumerate(shards):
            bar.update(number / len(shards), f"{number} of {len(shards)} shards")
            _, count, _ = check_shard(shard)
            if count != files[shard].tokens or file_sha256(shard) != files[shard].sha256:
                raise DataError(f"{shard} does not match {META_FILENAME} (another sha256): prepare the shards again")
    return meta


def contains_shards(path: Path) -> bool:
    """Return whether `path` is a token file, by its name, or a folder that contains one."""
    if path.is_file():
        return path.suffix == ".bin"
    return any(True for split in SPLITS for _ in path.glob(f"*{split}*.bin"))


def _header(form: TokenFormat, tokens: int) -> bytes:
    return struct.pack("<3i", form.magic, form.version, tokens).ljust(HEADER_BYTES, b"\0")


def check_shard(path: Path) -> tuple[int, int, np.dtype[Any]]:
    """(header bytes, number of tokens, dtype) of a valid shard. Raises DataError for any other."""
    check_regular_file(path)
    try:
        with path.open("rb") as handle:
            header = handle.read(HEADER_BYTES)
            size = handle.seek(0, os.SEEK_END)
    except (OSError, ValueError) as error:  # ValueError for an invalid file name
        raise DataError(f"cannot read {path} ({getattr(error, 'strerror', None) or error})") from None
    if size == 0:
        raise DataError(f"{path} is empty")
    form = next((one for one in FORMATS if header.startswith(struct.pack("<i", one.magic))), None)
    if form is None:
        return _check_headerless(path, size)
    if size < HEADER_BYTES:
        raise DataError(f"{path} is truncated: {size:,} bytes, less than its header")
    _, version, count = struct.unpack_from("<3i", header)
    if version != form.version:
        raise DataError(f"{path} has version {version} of the shard format; only version {form.version} is supported")
    width = form.dtype.itemsize
    if size != HEADER_BYTES + width * count:
        expected = f"{HEADER_BYTES + width * count:,} for the {count:,} tokens in its header"
        raise DataError(f"{path} is truncated or damaged: {size:,} bytes instead of {expected}")
    if count == 0:
        raise DataError(f"{path} has no tokens")
    return HEADER_BYTES, count, form.dtype


def _check_headerless(path: Path, size: int) -> tuple[int, int, np.dtype[Any]]:
    if path.name not in _HEADERLESS_NAMES:
        names = " or ".join(_HEADERLESS_NAMES)
        raise DataError(f"{path} is not a token shard: it lacks llm.c's header, and is not nanoGPT's {names}")
    if size % 2:
        raise DataError(f"{path} is truncated: {size:,} bytes is not a multiple of 2")
    return 0, size // 2, FORMATS[0].dtype
