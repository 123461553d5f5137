"""A corpus on the hub -> a folder of token shards: the plan, the download, and the preparation or its continuation."""

import hashlib
import json
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt2.byte_level import encode_pieces
from gpt2.data.corpora import HELD_OUT, OWN_SPLIT, HubCorpus
from gpt2.data.corpus_files import Reader
from gpt2.data.hub_files import Splits, get_corpus_files, get_token_files
from gpt2.data.near_duplicates import NearDuplicates
from gpt2.data.shards import (
    SHARD_TOKENS,
    ShardFile,
    ShardsMeta,
    SplitMeta,
    check_shard,
    token_format,
)
from gpt2.data.spool import DocumentHashes, Spool
from gpt2.data.stream import (
    HASHES_FILENAME,
    KEYS_FILENAME,
    SPOOL_FOLDER,
    Options,
    Preparation,
    SplitOutput,
    State,
    finish,
    partial_folder,
    tokenizer_meta,
)
from gpt2.data.text_blocks import count_cores
from gpt2.errors import ConfigError, DataError
from gpt2.hub import HubDataset, HubFile, fetch_dataset_file
from gpt2.progress import ProgressBar
from gpt2.tokenizer import Tokenizer, get_tokenizer
from gpt2.units import format_bytes, format_duration

_TOKENS_PER_BYTE = {".parquet": 0.5, ".jsonl": 0.25}  # at most, as a rule, for text in English
_BYTES_PER_TOKEN = 5  # at most, of GPT-2's tokens in English
_SAMPLE_SECONDS = 0.05
_SAMPLE_CHARACTERS = 1 << 16
_FORMAT_VERSION = 1  # increment when the same corpus and options give different shards

_log = logging.getLogger("gpt2.data")


@dataclass(frozen=True)
class CorpusOptions:
    """What can be asked of a corpus; see `gpt2.data.stream.Options`."""

    max_tokens: int | None = None
    shuffle: int | None = None
    dedup: bool = False
    shard_tokens: int = SHARD_TOKENS


def corpus_key(corpus: HubCorpus, tokenizer: str, options: CorpusOptions) -> str:
    """Sixteen hex digits that depend on the corpus, the options and the tokenizer's fingerprint; not on the network."""
    facts = json.dumps([_FORMAT_VERSION, str(corpus.ref), corpus.column, tokenizer, asdict(options)])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def prepare_corpus(
    corpus: HubCorpus, tokenizer: Tokenizer, folder: Path, options: CorpusOptions | None = None
) -> ShardsMeta:
    """Write a corpus as token shards to `folder`, or resume what an earlier process left there.

    Raises DataError for a data set, column or file that cannot be read, without network, and for a disk that is full;
    ConfigError for a folder with an unfinished preparation of something else.
    """
    folder, options = folder.absolute(), options or CorpusOptions()
    if (found := ShardsMeta.load(folder)) is not None:
        return _check_same(folder, found, corpus, tokenizer)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} contains other files: name a new folder for the shards")
    with partial_folder(folder, corpus.name) as partial, ThreadPoolExecutor(1) as background:
        saved = background.submit(tokenizer.save, partial)  # takes a second or two
        if corpus.is_tokens:
            meta = _fetch_tokens(corpus, tokenizer, partial, options)
        else:
            meta = _prepare_text(corpus, tokenizer, partial, options)
        if folder.exists():
            folder.rmdir()
        saved.result()
        finish(partial, folder, meta)
    return meta


def _check_same(folder: Path, found: ShardsMeta, corpus: HubCorpus, tokenizer: Tokenizer) -> ShardsMeta:
    same = found.source.split(" ")[0] == corpus.name and found.tokenizer.fingerprint == tokenizer.fingerprint
    if not same:
        raise DataError(f"{folder} contains other shards ({found.source}): name a new folder")
    return found


def _prepare_text(corpus: HubCorpus, tokenizer: Tokenizer, partial: Path, options: CorpusOptions) -> ShardsMeta:
    identity = {
        "corpus": str(corpus.ref),
        "column": corpus.column,
        "tokenizer": tokenizer.fingerprint,
        **asdict(options),
    }
    state = State.load(partial)
    if state is None:
        data, splits = get_corpus_files(corpus.ref)
        state = State(
            identity, data.commit, {split: [asdict(file) for file in files] for split, files in splits.items()}
        )
    elif state.identity != identity:
        names = [name for name, value in identity.items() if state.identity.get(name) != value]
        raise ConfigError(
            f"{partial} has an unfinished preparation with another {' and '.join(names)}: remove it, or name another"
            " folder"
        )
    else:
        _log.info("going on with %s at %s documents", partial, f"{state.documents:,}")
    splits = {split: [HubFile(**file) for file in files] for split, files in state.files.items()}
    data = HubDataset(corpus.ref.repo, state.commit, ())
    layout = corpus.layout or (OWN_SPLIT if "val" in splits else HELD_OUT)
    if layout.first_shard_is_val or layout.holdout:
        splits.pop("val", None)
        state.files.pop("val", None)
    settings = Options(layout, options.shard_tokens, options.max_tokens, options.shuffle, options.dedup)
    workers = count_cores()
    expected = _announce(corpus, splits, tokenizer, partial, settings, workers)
    state.save(partial)
    output = SplitOutput(partial, settings, tokenizer.vocab_size)
    spool = hashes = None
    if options.shuffle is not None:
        spool = Spool(partial / SPOOL_FOLDER, options.shuffle, tokenizer.vocab_size, expected)
    if options.dedup:
        hashes = DocumentHashes(partial / HASHES_FILENAME), NearDuplicates(partial / KEYS_FILENAME)
    if state.outputs:
        output.resume(state.outputs)
        if spool is not None:
            spool.resume(state.spooled["documents"])
        if hashes is not None:
            for one, count in zip(hashes, state.spooled["hashes"], strict=True):
                one.resume(count)
    reader = Reader(corpus.column, corpus.join)
    with ProgressBar(corpus.name) as bar:
        job = Preparation(partial, data, state, tokenizer, settings, reader, output, spool, hashes, bar, workers)
        made = job.run()
    if options.dedup:
        counts = f"{state.duplicates:,}", f"{state.near_duplicates:,}"
        _log.info("%s: %s duplicate documents were dropped; %s near-duplicates were kept", corpus.name, *counts)
    if made["train"].tokens < 2:
        raise DataError(
            f"{corpus.name} has {sum(split.tokens for split in made.values()):,} tokens, all of them in the validation "
            f"split, which is the first shard of {settings.shard_tokens:,}: use a smaller --shard-tokens"
        )
    source = f"{corpus.name} ({corpus.ref} at {state.commit}; {layout.describe()})"
    return ShardsMeta(source, tokenizer_meta(tokenizer), made)


def _announce(
    corpus: HubCorpus, splits: Splits, tokenizer: Tokenizer, partial: Path, options: Options, workers: int
) -> int:
    """Log what the preparation needs; returns the expected tokens. Raises DataError for a disk that is too small."""
    files = [file for group in splits.values() for file in group]
    size = sum(file.size for file in files)
    most = int(sum(file.size * _TOKENS_PER_BYTE[Path(file.path).suffix] for file in files))
    tokens = min(corpus.tokens or most, most)
    if tokenizer.name == "bytes":
        tokens *= _BYTES_PER_TOKEN
    if options.max_tokens is not None and options.max_tokens < tokens:
        size, tokens = size * options.max_tokens // tokens, options.max_tokens
    shards = tokens * token_format(tokenizer.vocab_size).dtype.itemsize
    in_use = sum(sorted(file.size for file in files)[-2:])  # the file that is read, and the next one
    needed = shards * (2 if options.shuffle is not None else 1) + in_use
    check_disk(partial, needed, corpus.name)
    rate = measure_rate(tokenizer) * workers
    _log.info(
        "%s: %s files, %s to download, about %s tokens, %s of shards; tokenizing takes about %s on %d cores",
        corpus.name,
        f"{len(files):,}",
        format_bytes(size),
        f"{tokens:,}",
        format_bytes(shards),
        format_duration(tokens / rate),
        workers,
    )
    return tokens


def check_disk(folder: Path, needed: int, name: str) -> None:
    """Raise DataError when the disk of a folder, with what the folder has already, is too small."""
    existing = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if needed > free + existing:
        raise DataError(
            f"{name} needs about {format_bytes(needed)} at {folder}, and {format_bytes(free)} are free: name a folder "
            "on a larger disk, or ask for less with --max-tokens"
        )


def measure_rate(tokenizer: Tokenizer) -> float:
    """Tokens per second of one core on English text, measured in a twentieth of a second."""
    from gpt2.data.sources import builtin_texts

    documents = builtin_texts("python-docs").documents
    text = "".join("".join(document.iter_chunks()) for document in documents[:100])[:_SAMPLE_CHARACTERS]
    start, tokens = time.perf_counter(), 0
    while time.perf_counter() - start < _SAMPLE_SECONDS:
        tokens += len(encode_pieces(tokenizer, [text]))
    return tokens / (time.perf_counter() - start)


def _fetch_tokens(corpus: HubCorpus, tokenizer: Tokenizer, partial: Path, options: CorpusOptions) -> ShardsMeta:
    """Download token shards, the validation split first, until there are enough."""
    if tokenizer.fingerprint != get_tokenizer("gpt2").fingerprint:
        raise ConfigError(f"{corpus.name} has tokens of gpt2, not of {tokenizer.name}", field="tokenizer")
    if options.shuffle is not None or options.dedup:
        raise ConfigError(f"{corpus.name} has tokens, not documents: leave --shuffle and --dedup out")
    data, files = get_token_files(corpus.ref)
    check_disk(partial, min(corpus.download or 0, 2 * (options.max_tokens or corpus.tokens)), corpus.name)
    made: dict[str, SplitMeta] = {}
    for split in ("val", "train"):
        shards: list[ShardFile] = []
        for file in files[split]:
            if split == "train" and options.max_tokens is not None and _count(shards) >= options.max_tokens:
                break
            target = partial / Path(file.path).name
            path = fetch_dataset_file(data, file, target)
            if path != target:
                shutil.copyfile(path, target)
            _, count, _ = check_shard(target)
            shards.append(ShardFile(target.name, count, file.digest))
        made[split] = SplitMeta(_count(shards), 0, 0, tuple(shards))
    return ShardsMeta(f"{corpus.name} ({corpus.ref} at {data.commit})", tokenizer_meta(tokenizer), made)


def _count(shards: list[ShardFile]) -> int:
    return sum(shard.tokens for shard in shards)
