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

from gpt2.data.dataset import TokenData
from gpt2.data.shards import (
    MAX_VOCAB_SIZE,
    SHARD_TOKENS,
    ShardsMeta,
    ShardWriter,
    SplitMeta,
    TokenizerMeta,
    TokenShards,
    holds_shards,
    open_shards,
    shard_files,
    verify_shards,
)
from gpt2.data.sources import SOURCES, Part, Source, cache_home, open_source, split_documents, unwritable
from gpt2.errors import UserError
from gpt2.files import path_of, work_folder
from gpt2.tokenizer import Tokenizer, get_tokenizer, load_tokenizer, train_bpe

_PIECE_BYTES = 1 << 18  # small enough to keep every thread of the tokenizer busy
_BATCH_LENGTH = 1 << 22  # characters of text in memory at a time; as tokens they take some ten times that
_SAMPLE_TOKENS = 1_000_000
_RECIPE = 1  # raise it when the same text and tokenizer come to give other shards than before


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
    with _whole_folder(folder) as partial:
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


def open_data(ref: str, tokenizer: str | Tokenizer | None = None, columns: str | None = None) -> TokenData:
    """The data that `ref` names, as tokens: a folder of shards, one shard, or text that `open_source` knows.

    `tokenizer` is "gpt2" (the default), "bytes", "bpe:N" (trained on the train split), a folder, or a tokenizer
    itself. For shards it may be left out, and one that did not make them is refused. Text is tokenized once and kept
    under `cache_home()`; a file counts as the same text while its path, size and time of change are the same.
    `columns` is for rows of text: see `open_source`.

    Raises `UserError`: no such data, the wrong tokenizer, text too short, a cache that cannot be written.
    """
    path = named_shards(ref)
    if path is not None:
        return _open_made(path, tokenizer, path.resolve().name.removesuffix(".bin"))
    source, spec = open_source(ref, columns), tokenizer or "gpt2"
    identity = spec if isinstance(spec, str) and bpe_size(spec) else _as_tokenizer(spec).fingerprint
    key = _cache_key(source, identity)
    folder = cache_home() / "shards" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', source.name)}-{key}"
    if not folder.exists():
        prepare(source, tokenizer_for(source, spec), folder)
    return _open_made(folder, None, source.name)


def named_shards(ref: str) -> Path | None:
    """The folder of shards, or the one shard, that `ref` names; None where it names text."""
    path = path_of(ref)
    return path if ref not in SOURCES and holds_shards(path) else None


def tokenizer_for(source: Source, spec: str | Tokenizer, val_fraction: float = 0.1) -> Tokenizer:
    """The tokenizer that `spec` names: "gpt2", "bytes", a folder, or "bpe:N", learned from the train split."""
    size = bpe_size(spec) if isinstance(spec, str) else None
    if size is None:
        return _as_tokenizer(spec)
    train, _ = split_documents(source, val_fraction)
    return train_bpe(_texts(train), size)


def _as_tokenizer(spec: str | Tokenizer) -> Tokenizer:
    return get_tokenizer(spec) if isinstance(spec, str) else spec


def describe_shards(path: Path, preview_tokens: int = 64) -> str:
    """What a folder of shards, or one file, holds, in a few lines for a person: counts, tokenizer, how it begins.

    Every file's checksum is compared first. Raises `UserError` for what `verify_shards` and `open_data` do.
    """
    if not holds_shards(path):
        raise UserError(f"{path} holds no token shards")
    data = _open_made(path, None, path.name)
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


def _open_made(path: Path, wanted: str | Tokenizer | None, name: str) -> TokenData:
    """Open shards that exist, with the tokenizer that made them."""
    folder = path if path.is_dir() else path.parent
    meta = ShardsMeta.load(folder)
    tokenizer = _tokenizer_of(folder, meta, wanted)
    train = open_shards(path, "train", tokenizer.vocab_size)
    val = open_shards(path, "val", tokenizer.vocab_size) if shard_files(path, "val") else None
    if len(train) < 2:
        raise UserError(f"{path} is too short to train on: {len(train)} token(s)")
    if meta is None:
        _look_at_both_ends(train)
        if val is not None:
            _look_at_both_ends(val)
    return TokenData(name, folder, train, val if val is not None and len(val) > 1 else None, tokenizer, meta)


def _tokenizer_of(folder: Path, meta: ShardsMeta | None, wanted: str | Tokenizer | None) -> Tokenizer:
    """The tokenizer of the shards in `folder`; `UserError` when it is lost, or is not the one wanted."""
    own = load_tokenizer(folder)
    if own is None and meta is None:
        return _as_tokenizer(wanted or "gpt2")
    if own is None or (meta is not None and own.fingerprint != meta.tokenizer.fingerprint):
        raise UserError(f"{folder} has lost the tokenizer that made its shards: make them anew")
    if wanted is not None and not _is_wanted(own, wanted):
        other = wanted if isinstance(wanted, str) else f"the model's own, {wanted.name} ({wanted.vocab_size:,})"
        raise UserError(
            f"the shards in {folder} were made with tokenizer {own.name} ({own.vocab_size:,} tokens), not"
            f" {other}: leave the tokenizer out, or name the text that the shards were made from"
        )
    return own


def _is_wanted(own: Tokenizer, wanted: str | Tokenizer) -> bool:
    if not isinstance(wanted, str):
        return own.fingerprint == wanted.fingerprint
    size = bpe_size(wanted)
    if size is not None:
        return own.name == "bpe" and own.vocab_size == size
    plain = own.name == wanted and len(own.special_tokens) == 1
    return plain or own.fingerprint == get_tokenizer(wanted).fingerprint


def bpe_size(spec: str) -> int | None:
    """The N of "bpe:N"; None for any other tokenizer."""
    match = re.fullmatch(r"bpe:(\d+)", spec)
    return int(match[1]) if match else None


def _look_at_both_ends(shards: TokenShards) -> None:
    """Read some of shards that say nothing of their tokenizer, so that a wrong one shows before the run begins."""
    shards.read(0, min(_SAMPLE_TOKENS, len(shards)))
    shards.read(max(0, len(shards) - _SAMPLE_TOKENS), len(shards))


def _write_split(parts: list[Part], tokenizer: Tokenizer, writer: ShardWriter, ends_marked: bool) -> SplitMeta:
    """Tokenize the parts in order; `ends_marked` puts an end of text where a document ends."""
    with writer:
        for batch in _batches(parts):
            tokens = iter(tokenizer.encode_batch([text for text in batch if text is not None]))
            for text in batch:
                if text is not None:
                    writer.write(next(tokens))
                elif ends_marked:
                    writer.write([tokenizer.end_of_text])
    size = sum(part.stop - part.start for part in parts)
    return SplitMeta(writer.tokens, len(parts), size, tuple(writer.files))


def _batches(parts: list[Part]) -> Iterator[list[str | None]]:
    """The pieces of all parts in lists that fit in memory, with a None where a document ends."""
    batch: list[str | None] = []
    length = 0
    for part in parts:
        for text in _texts([part]):
            batch.append(text)
            length += len(text)
            if length >= _BATCH_LENGTH:
                yield batch
                batch, length = [], 0
        if part.stop == part.document.size:
            batch.append(None)
    if batch:
        yield batch


def _texts(parts: list[Part]) -> Iterator[str]:
    for part in parts:
        yield from part.document.pieces(part.start, part.stop, piece_bytes=_PIECE_BYTES)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and vanishes when it does not.

    Two processes may make the same data at once: the second finds the first one's, and leaves it be.
    """
    folder = folder.absolute()
    if not folder.name or folder.name == "..":
        raise UserError(f"{folder} has something else in it: name a new folder for the shards")
    try:
        if folder.exists() and any(folder.iterdir()) and ShardsMeta.load(folder) is None:
            raise UserError(f"{folder} has something else in it: name a new folder for the shards")
        with work_folder(folder) as partial:
            yield partial
            try:
                partial.rename(folder)
            except OSError:
                if ShardsMeta.load(folder) != ShardsMeta.load(partial):
                    raise UserError(f"{folder} has other shards in it: name a new folder for these") from None
    except OSError as error:
        raise unwritable(folder, error) from None


def _cache_key(source: Source, tokenizer: str) -> str:
    """Sixteen hex digits that change when the text or the tokenizer does."""
    digest = hashlib.sha256(f"{_RECIPE}\n{tokenizer}\n".encode())
    for document in source.documents:
        if isinstance(document.data, bytes):
            identity = hashlib.sha256(document.data).hexdigest()
        else:
            stat = document.data.stat()
            identity = f"{document.data.absolute()}\n{stat.st_size} {stat.st_mtime_ns}"
        digest.update(os.fsencode(f"{identity}\n"))  # a file's name need not be UTF-8
    return digest.hexdigest()[:16]
