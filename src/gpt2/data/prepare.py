"""Text -> tokens -> shards, once: `prepare` does it, `open_data` finds what was done before.

`open_data` is what `--data` means: shards that are there already (ours, llm.c's, modded-nanogpt's,
nanoGPT's), or text that is tokenized on first use and kept in the cache.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2.data.dataset import TokenDataset
from gpt2.data.shards import (
    MAX_VOCAB_SIZE,
    SHARD_TOKENS,
    ShardsMeta,
    ShardWriter,
    SplitMeta,
    TokenizerMeta,
    TokenShards,
    contains_shards,
    open_shards,
    shard_files,
    verify_shards,
)
from gpt2.data.sources import (
    BUILTIN_SOURCES,
    DocumentSlice,
    Source,
    cache_home,
    open_source,
    split_documents,
    write_error,
)
from gpt2.errors import UserError
from gpt2.files import expand_path, staging_folder
from gpt2.tokenizer import Tokenizer, get_tokenizer, load_tokenizer, train_bpe

_CHUNK_BYTES = 1 << 18  # small enough to keep every thread of the tokenizer busy
_BATCH_CHARACTERS = 1 << 22  # characters of text in memory at a time; as tokens they take some ten times that
_CHECKED_TOKENS = 1_000_000
_CACHE_VERSION = 1  # raise it when the same text and tokenizer come to give other shards than before


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    val_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
) -> ShardsMeta:
    """Tokenize a corpus into shards in `folder`, with the tokenizer's files and a `meta.json` beside them.

    Each document ends with the tokenizer's end of text; the train part of a document that is divided between
    the splits does not, and a corpus of one document has none at all. `folder` appears whole, at the end, or
    not at all; it must hold nothing yet, unless that is the very same data.

    Raises `UserError`: text that cannot be read or is too short, a folder that cannot be written.
    """
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} tokens, and shards, of 16 bits a token,"
            f" take {MAX_VOCAB_SIZE:,} at most"
        )
    train, val = split_documents(source, val_fraction)
    ends_marked = len(source.documents) > 1
    with _atomic_folder(folder) as partial:
        splits = {
            split: _write_split(parts, tokenizer, ShardWriter(partial, split, shard_tokens), ends_marked)
            for split, parts in (("train", train), ("val", val))
        }
        if splits["train"].tokens < 2:
            raise UserError(f"{source.name} is too short to train on: {splits['train'].tokens} token(s)")
        tokenizer.save(partial)
        made_with = TokenizerMeta(tokenizer.name, tokenizer.vocab_size, tokenizer.fingerprint)
        meta = ShardsMeta(source.name, made_with, splits)
        meta.save(partial)
    return meta


def open_data(ref: str, tokenizer: str | Tokenizer | None = None, columns: str | None = None) -> TokenDataset:
    """The data that `ref` names, as tokens: a folder of shards, one shard, or text that `open_source` knows.

    `tokenizer` is "gpt2" (the default), "bytes", "bpe:N" (trained on the train split), a folder, or a tokenizer
    itself. For shards it may be left out, and one that did not make them is refused. Text is tokenized once and kept
    under `cache_home()`; a file counts as the same text while its path, size and time of change are the same.
    `columns` is for rows of text: see `open_source`.

    Raises `UserError`: no such data, the wrong tokenizer, text too short, a cache that cannot be written.
    """
    path = find_shards(ref)
    if path is not None:
        return _open_existing_shards(path, tokenizer, path.resolve().name.removesuffix(".bin"))
    source, spec = open_source(ref, columns), tokenizer or "gpt2"
    identity = spec if isinstance(spec, str) and bpe_vocab_size(spec) else _resolve_tokenizer(spec).fingerprint
    key = _cache_key(source, identity)
    folder = cache_home() / "shards" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', source.name)}-{key}"
    if not folder.exists():
        prepare(source, make_tokenizer(source, spec), folder)
    return _open_existing_shards(folder, None, source.name)


def find_shards(ref: str) -> Path | None:
    """The folder of shards, or the one shard, that `ref` names; None where it names text."""
    path = expand_path(ref)
    return path if ref not in BUILTIN_SOURCES and contains_shards(path) else None


def make_tokenizer(source: Source, spec: str | Tokenizer, val_fraction: float = 0.1) -> Tokenizer:
    """The tokenizer that `spec` names: "gpt2", "bytes", a folder, or "bpe:N", learned from the train split."""
    size = bpe_vocab_size(spec) if isinstance(spec, str) else None
    if size is None:
        return _resolve_tokenizer(spec)
    train, _ = split_documents(source, val_fraction)
    return train_bpe(_iter_text_chunks(train), size)


def _resolve_tokenizer(spec: str | Tokenizer) -> Tokenizer:
    return get_tokenizer(spec) if isinstance(spec, str) else spec


def describe_shards(path: Path, preview_tokens: int = 64) -> str:
    """What a folder of shards, or one file, holds, in a few lines for a person: counts, tokenizer, how it begins.

    Every file's checksum is compared first. Raises `UserError` for what `verify_shards` and `open_data` do.
    """
    if not contains_shards(path):
        raise UserError(f"{path} holds no token shards")
    data = _open_existing_shards(path, None, path.name)
    if data.meta is not None:
        verify_shards(path)
    checked = "checksums hold" if data.meta is not None else "no meta.json, so nothing to check them against"
    lines = [
        f"source:    {data.meta.source if data.meta else 'unknown'}",
        f"tokenizer: {data.tokenizer.name}, {data.tokenizer.vocab_size:,} ids",
    ]
    for split, shards in (("train", data.train), ("val", data.val)):
        if shards is not None:
            start = data.tokenizer.decode(shards.read(0, min(preview_tokens, len(shards))).tolist())
            lines.append(f"{split + ':':11}{len(shards):,} tokens in {len(shards.paths)} file(s); {checked}")
            lines.append(f"           begins {start!r}")
    return "\n".join(lines)


def _open_existing_shards(path: Path, requested: str | Tokenizer | None, name: str) -> TokenDataset:
    """Open shards that exist, with the tokenizer that made them."""
    folder = path if path.is_dir() else path.parent
    meta = ShardsMeta.load(folder)
    tokenizer = _shards_tokenizer(folder, meta, requested)
    train = open_shards(path, "train", tokenizer.vocab_size)
    val = open_shards(path, "val", tokenizer.vocab_size) if shard_files(path, "val") else None
    if len(train) < 2:
        raise UserError(f"{path} is too short to train on: {len(train)} token(s)")
    if meta is None:
        _check_first_and_last_tokens(train)
        if val is not None:
            _check_first_and_last_tokens(val)
    return TokenDataset(name, folder, train, val if val is not None and len(val) > 1 else None, tokenizer, meta)


def _shards_tokenizer(folder: Path, meta: ShardsMeta | None, requested: str | Tokenizer | None) -> Tokenizer:
    """The tokenizer of the shards in `folder`; `UserError` when it is lost, or is not the one wanted."""
    own = load_tokenizer(folder)
    if own is None and meta is None:
        return _resolve_tokenizer(requested or "gpt2")
    if own is None or (meta is not None and own.fingerprint != meta.tokenizer.fingerprint):
        raise UserError(f"{folder} has lost the tokenizer that made its shards: make them anew")
    if requested is not None and not _matches_tokenizer(own, requested):
        other = (
            requested if isinstance(requested, str) else f"the model's own, {requested.name} ({requested.vocab_size:,})"
        )
        raise UserError(
            f"the shards in {folder} were made with tokenizer {own.name} ({own.vocab_size:,} tokens), not"
            f" {other}: leave the tokenizer out, or name the text that the shards were made from"
        )
    return own


def _matches_tokenizer(tokenizer: Tokenizer, requested: str | Tokenizer) -> bool:
    if not isinstance(requested, str):
        return tokenizer.fingerprint == requested.fingerprint
    size = bpe_vocab_size(requested)
    if size is not None:
        return tokenizer.name == "bpe" and tokenizer.vocab_size == size
    plain = tokenizer.name == requested and len(tokenizer.special_tokens) == 1
    return plain or tokenizer.fingerprint == get_tokenizer(requested).fingerprint


def bpe_vocab_size(spec: str) -> int | None:
    """The N of "bpe:N"; None for any other tokenizer."""
    match = re.fullmatch(r"bpe:(\d+)", spec)
    return int(match[1]) if match else None


def _check_first_and_last_tokens(shards: TokenShards) -> None:
    """Read some of shards that say nothing of their tokenizer, so that a wrong one shows before the run begins."""
    shards.read(0, min(_CHECKED_TOKENS, len(shards)))
    shards.read(max(0, len(shards) - _CHECKED_TOKENS), len(shards))


def _write_split(
    parts: list[DocumentSlice], tokenizer: Tokenizer, writer: ShardWriter, append_end_of_text: bool
) -> SplitMeta:
    """Tokenize the parts in order; `ends_marked` puts an end of text where a document ends."""
    with writer:
        for batch in _text_batches(parts):
            tokens = iter(tokenizer.encode_batch([text for text in batch if text is not None]))
            for text in batch:
                if text is not None:
                    writer.write(next(tokens))
                elif append_end_of_text:
                    writer.write([tokenizer.end_of_text])
    size = sum(part.stop - part.start for part in parts)
    return SplitMeta(writer.tokens, len(parts), size, tuple(writer.files))


def _text_batches(parts: list[DocumentSlice]) -> Iterator[list[str | None]]:
    """The pieces of all parts in lists that fit in memory, with a None where a document ends."""
    batch: list[str | None] = []
    length = 0
    for part in parts:
        for text in _iter_text_chunks([part]):
            batch.append(text)
            length += len(text)
            if length >= _BATCH_CHARACTERS:
                yield batch
                batch, length = [], 0
        if part.stop == part.document.size:
            batch.append(None)
    if batch:
        yield batch


def _iter_text_chunks(parts: list[DocumentSlice]) -> Iterator[str]:
    for part in parts:
        yield from part.document.iter_chunks(part.start, part.stop, chunk_bytes=_CHUNK_BYTES)


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and vanishes when it does not.

    Two processes may make the same data at once: the second finds the first one's, and leaves it be.
    """
    folder = folder.absolute()
    if not folder.name or folder.name == "..":
        raise UserError(f"{folder} has something else in it: name a new folder for the shards")
    try:
        if folder.exists() and any(folder.iterdir()) and ShardsMeta.load(folder) is None:
            raise UserError(f"{folder} has something else in it: name a new folder for the shards")
        with staging_folder(folder) as partial:
            yield partial
            try:
                partial.rename(folder)
            except OSError:
                if ShardsMeta.load(folder) != ShardsMeta.load(partial):
                    raise UserError(f"{folder} has other shards in it: name a new folder for these") from None
    except OSError as error:
        raise write_error(folder, error) from None


def _cache_key(source: Source, tokenizer: str) -> str:
    """Sixteen hex digits that change when the text or the tokenizer does."""
    digest = hashlib.sha256(f"{_CACHE_VERSION}\n{tokenizer}\n".encode())
    for document in source.documents:
        if isinstance(document.data, bytes):
            identity = hashlib.sha256(document.data).hexdigest()
        else:
            stat = document.data.stat()
            identity = f"{document.data.absolute()}\n{stat.st_size} {stat.st_mtime_ns}"
        digest.update(os.fsencode(f"{identity}\n"))  # a file's name need not be UTF-8
    return digest.hexdigest()[:16]
