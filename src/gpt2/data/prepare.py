"""Text -> tokens -> shards: `prepare` writes them, `open_data` opens them and prepares text on first use.

Shards of llm.c, modded-nanogpt and nanoGPT are opened as they are.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from gpt2.byte_level import encode_pieces
from gpt2.characters import read_meta_pkl
from gpt2.data.corpora import HubCorpus, find_corpus
from gpt2.data.dataset import TokenDataset
from gpt2.data.mixture import Mixture, MixtureDataset, mix
from gpt2.data.prepare_corpus import CorpusOptions, corpus_key, prepare_corpus
from gpt2.data.resolve import Shards, find_shards, resolve_texts
from gpt2.data.shards import (
    SHARD_TOKENS,
    SPLITS,
    ShardsMeta,
    ShardWriter,
    SplitMeta,
    TokenShards,
    open_shards,
    shard_files,
    verify_shards,
)
from gpt2.data.sources import Texts, holdout_stride, split_documents
from gpt2.data.stream import tokenizer_meta
from gpt2.data.text_blocks import CachedTexts, TextBlock, blocks_of_slices, count_cores, map_in_order
from gpt2.errors import ConfigError, DataError
from gpt2.files import cache_home, file_identity, staging_folder, write_error
from gpt2.progress import ProgressBar
from gpt2.tokenizer import Tokenizer, get_tokenizer, load_tokenizer, train_bpe

_CHECKED_TOKENS = 1_000_000
_log = logging.getLogger("gpt2")
_CACHE_VERSION = 3  # increment when the same text and tokenizer give different shards


def prepare(
    texts: Texts,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    val_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
) -> ShardsMeta:
    """Tokenize a corpus into shards in `folder`, with the tokenizer's files and a `meta.json`.

    Each document ends with the end-of-text token, except the train part of a document that both splits share, and a
    corpus of one document. An ``<|endoftext|>`` in a text ends a document, too. `folder` is written completely or not
    at all; it must be empty, or hold the same data.

    Raises DataError for text that cannot be read or is too short, and for a folder that cannot be written.
    """
    splits = _split_blocks(texts, val_fraction)
    total, done = sum(size for _, size in splits.values()), 0
    with _atomic_folder(folder) as partial, ProgressBar(f"tokenizing {texts.name}") as bar:

        def count_bytes(size: int) -> None:
            nonlocal done
            done += size
            bar.update(min(1.0, done / max(1, total)))

        made = {}
        for split, (blocks, size) in splits.items():
            writer = ShardWriter(partial, split, shard_tokens, vocab_size=tokenizer.vocab_size)
            made[split] = _write_split(blocks, size, tokenizer, writer, count_bytes)
        if made["train"].tokens < 2:
            raise DataError(f"{texts.name} is too short to train on: {made['train'].tokens} token(s)")
        tokenizer.save(partial)
        meta = ShardsMeta(texts.name, tokenizer_meta(tokenizer), made)
        meta.save(partial)
    return meta


def open_mixture(
    mixture: Mixture, tokenizer: str | Tokenizer | None = None, *, separate_documents: bool = False
) -> MixtureDataset:
    """The parts of a mixture as tokens. Raises DataError as `open_data` does, and for tokenizers that differ."""
    parts = [open_data(ref, tokenizer) for ref, _ in mixture.parts]
    return mix(mixture, [replace(part, separate_documents=separate_documents) for part in parts])


def open_data(data: str | Shards | Texts | HubCorpus, tokenizer: str | Tokenizer | None = None) -> TokenDataset:
    """Data as tokens: shards; or texts and corpora, which are tokenized once and kept under `cache_home()`.

    data:      a reference, or what `resolve_data` made of one.
    tokenizer: "gpt2" (the default), "bytes", "bpe:N" (trained on the train split), a folder, or a tokenizer. For shards
        it is optional, and a tokenizer other than theirs is refused.

    The cache key of a file is its path and contents. Raises UserError for data that does not exist or is too short, the
    wrong tokenizer, and a cache that cannot be written.
    """
    if isinstance(data, str):
        data = find_shards(data) or find_corpus(data) or resolve_texts(data)
    if isinstance(data, Shards):
        return _open_existing_shards(data.path, tokenizer, data.name)
    if isinstance(data, HubCorpus):
        return _open_corpus(data, tokenizer or "gpt2")
    spec = tokenizer or "gpt2"
    identity = spec if isinstance(spec, str) and bpe_vocab_size(spec) else _resolve_tokenizer(spec).fingerprint
    folder = cache_home() / "shards" / f"{_slug(data.name)}-{_cache_key(data, identity)}"
    _log.debug("%s: %s shards in %s", data.name, "existing" if folder.exists() else "writing", folder)
    if not folder.exists():
        prepare(data, make_tokenizer(data, spec), folder)
    return _open_existing_shards(folder, None, data.name)


def _open_corpus(corpus: HubCorpus, spec: str | Tokenizer) -> TokenDataset:
    """A corpus of the hub as tokens, prepared on first use."""
    tokenizer = corpus_tokenizer(corpus, spec)
    options = CorpusOptions()
    key = corpus_key(corpus, tokenizer.fingerprint, options)
    folder = cache_home() / "shards" / f"{_slug(corpus.name)}-{key}"
    if not folder.exists():
        prepare_corpus(corpus, tokenizer, folder, options)
    return _open_existing_shards(folder, None, corpus.name)


def corpus_tokenizer(corpus: HubCorpus, spec: str | Tokenizer) -> Tokenizer:
    """The tokenizer for a corpus of the hub. Raises ConfigError for one that would have to be trained on it."""
    if isinstance(spec, str) and bpe_vocab_size(spec):
        raise ConfigError(
            f"--tokenizer {spec} is not trained on {corpus.name}, which is not on this machine: name gpt2, bytes, or "
            "the folder of a tokenizer",
            field="tokenizer",
        )
    return _resolve_tokenizer(spec)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def make_tokenizer(texts: Texts, spec: str | Tokenizer, val_fraction: float = 0.1) -> Tokenizer:
    """The tokenizer that `spec` names: "gpt2", "bytes", a folder, or "bpe:N", trained on the train split."""
    size = bpe_vocab_size(spec) if isinstance(spec, str) else None
    if size is None:
        return _resolve_tokenizer(spec)
    blocks, total = _split_blocks(texts, val_fraction)["train"]
    done = 0
    with ProgressBar(f"training {spec} on {texts.name}") as bar:

        def iter_texts() -> Iterator[str]:
            nonlocal done
            for block in blocks:
                yield from filter(None, block.pieces)
                done += block.num_bytes

        def show() -> None:
            bar.update(min(1.0, done / max(1, total)), "merging" if done >= 0.99 * total else "reading")

        return train_bpe(iter_texts(), size, show)


def _resolve_tokenizer(spec: str | Tokenizer) -> Tokenizer:
    return get_tokenizer(spec) if isinstance(spec, str) else spec


def describe_shards(path: Path, preview_tokens: int = 64) -> str:
    """A summary of a folder of shards, or of one file: counts, tokenizer, first tokens.

    Checksums are verified first. Raises DataError as `verify_shards` and `open_data` do.
    """
    data = _open_existing_shards(path, None, path.name)
    if data.meta is not None:
        verify_shards(path)
    checked = "checksums match" if data.meta is not None else "not verified, as there is no meta.json"
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
    """Open shards that exist, with their tokenizer."""
    folder = path if path.is_dir() else path.parent
    meta = ShardsMeta.load(folder)
    tokenizer = _shards_tokenizer(folder, meta, requested)
    train = open_shards(path, "train", tokenizer.vocab_size)
    val = open_shards(path, "val", tokenizer.vocab_size) if shard_files(path, "val") else None
    if len(train) < 2:
        raise DataError(f"{path} is too short to train on: {len(train)} token(s)")
    if meta is None:
        for shards in filter(None, (train, val)):
            _check_first_and_last_tokens(shards)
    return TokenDataset(name, folder, train, val if val is not None and len(val) > 1 else None, tokenizer, meta)


def _shards_tokenizer(folder: Path, meta: ShardsMeta | None, requested: str | Tokenizer | None) -> Tokenizer:
    """The tokenizer of the shards in `folder`. Raises DataError if it is missing, or is not the requested one."""
    own = load_tokenizer(folder) or read_meta_pkl(folder)
    if own is None and meta is None:
        return _resolve_tokenizer(requested or "gpt2")
    if own is None or (meta is not None and own.fingerprint != meta.tokenizer.fingerprint):
        raise DataError(f"{folder} lacks the tokenizer that made its shards: prepare them again")
    if requested is not None and not _matches_tokenizer(own, requested):
        other = requested if isinstance(requested, str) else f"the model's {requested.name} ({requested.vocab_size:,})"
        raise DataError(
            f"the shards in {folder} were made with tokenizer {own.name} ({own.vocab_size:,} tokens), not {other}:"
            " leave the tokenizer out, or name the text that the shards were made from",
            field="tokenizer",
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
    """Read parts of shards whose tokenizer is not recorded, so that a wrong one is found before training starts."""
    shards.read(0, min(_CHECKED_TOKENS, len(shards)))
    shards.read(max(0, len(shards) - _CHECKED_TOKENS), len(shards))


def _split_blocks(texts: Texts, val_fraction: float) -> dict[str, tuple[Iterator[TextBlock], int]]:
    """Of each split its text in blocks, and its bytes; see `split_documents`."""
    documents, every = texts.documents, holdout_stride(val_fraction)
    if isinstance(documents, CachedTexts) and len(documents) >= max(every, 2):
        held_out = np.zeros(len(documents), np.bool_)
        if every:
            held_out[every - 1 :: every] = True
        chosen = {"train": ~held_out, "val": held_out}
        return {split: (documents.blocks(mask), int(documents.sizes[mask].sum())) for split, mask in chosen.items()}
    parts = dict(zip(SPLITS, split_documents(texts, val_fraction), strict=True))
    return {
        split: (
            blocks_of_slices(slices, append_end_of_text=len(documents) > 1),
            sum(part.stop - part.start for part in slices),
        )
        for split, slices in parts.items()
    }


def _write_split(
    blocks: Iterator[TextBlock],
    size: int,
    tokenizer: Tokenizer,
    writer: ShardWriter,
    count_bytes: Callable[[int], None],
) -> SplitMeta:
    """Tokenize blocks of `size` bytes in order, on all cores. count_bytes: takes the size of each that is written."""
    documents = 0

    def encode(block: TextBlock) -> np.ndarray:
        return encode_pieces(tokenizer, block.pieces)

    with writer:
        for block, tokens in map_in_order(blocks, encode, count_cores()):
            writer.write(tokens)
            documents += block.documents
            count_bytes(block.num_bytes)
    return SplitMeta(writer.tokens, documents, size, tuple(writer.files))


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` at the end of the block, and removed after an error.

    If another process has written the same data meanwhile, that is kept.
    """
    folder = folder.absolute()
    try:
        in_use = folder.exists() and any(folder.iterdir()) and ShardsMeta.load(folder) is None
        if in_use or not folder.name or folder.name == "..":
            raise DataError(f"{folder} contains other files: name a new folder for the shards")
        with staging_folder(folder) as partial:
            yield partial
            try:
                partial.rename(folder)
            except OSError:
                if ShardsMeta.load(folder) != ShardsMeta.load(partial):
                    raise DataError(f"{folder} contains other shards: name a new folder") from None
    except OSError as error:
        raise write_error(folder, error) from None


def _cache_key(texts: Texts, tokenizer: str) -> str:
    """Sixteen hex digits that depend on the text and the tokenizer."""
    digest = hashlib.sha256(f"{_CACHE_VERSION}\n{tokenizer}\n".encode())
    # of cached texts, the name of the folder is a hash of the rows
    documents = texts.documents[:1] if isinstance(texts.documents, CachedTexts) else texts.documents
    for document in documents:
        if isinstance(document.data, bytes):
            identity = hashlib.sha256(document.data).hexdigest()
        else:
            identity = f"{document.data.absolute()}\n{file_identity(document.data)}"
        digest.update(os.fsencode(f"{identity}\n"))  # file names need not be UTF-8
    return digest.hexdigest()[:16]
