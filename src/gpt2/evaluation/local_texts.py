"""Local texts to evaluate on: a file or corpus by name, the validation data of a run, Python's language reference."""

import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

from gpt2.data.resolve import find_shards, resolve_texts
from gpt2.data.shards import open_shards
from gpt2.data.sources import Document, Texts, split_documents
from gpt2.errors import DataError
from gpt2.evaluation.perplexity import Text, prepare_rolling, word_units
from gpt2.evaluation.prepare import ScoringPass
from gpt2.files import expand_path
from gpt2.model import GPTConfig
from gpt2.tokenizer import Tokenizer

MAX_CHARACTERS = 1_000_000  # of validation data
BUILT_IN = "python-docs"


def rolling_protocol(stride: int | None, config: GPTConfig) -> str:
    """The protocol of `prepare_texts`, for the results."""
    size = config.block_size
    windows = f"windows of {size} tokens, stride {stride or size}"
    return f"every token scored once, the first after <|endoftext|>; documents separate; {windows}"


def prepare_texts(
    texts: list[Text], tokenizer: Tokenizer, config: GPTConfig, stride: int | None, limit: int | None = None
) -> list[ScoringPass]:
    """The scoring pass of plain texts, each a separate document."""
    texts = texts[:limit]
    return [ScoringPass(prepare_rolling(texts, tokenizer, config, word_units(texts), stride))]


def texts_of_source(ref: str) -> list[Text]:
    """The documents of a `--data` source: a text file, a folder, rows with a text column, or a corpus."""
    source = resolve_texts(ref)
    return [text for document in source.documents for text in _plain_texts(document) if text.scored]


def validation_texts(model: str, tokenizer: Tokenizer) -> list[Text] | None:
    """The validation text of a run folder, its first million characters; None if the model is not a run.

    Raises UserError if the data of the run is missing or is not plain text.
    """
    path = expand_path(model) / "config.toml"
    if not path.is_file():
        return None
    settings = _settings(path)
    ref = settings.get("data")
    if not isinstance(ref, str):
        raise DataError(f"{path} has no setting 'data'")
    shards = find_shards(ref)
    if shards is not None:
        val = open_shards(shards.path, "val")
        ids = val.read(0, min(len(val), MAX_CHARACTERS // 4)).tolist()
        return _first([Text.plain(text, str(shards.path)) for text in _split(ids, tokenizer)])
    return _first(_held_out(resolve_texts(ref, settings.get("columns"), settings.get("bad_rows", "error"))))


def _settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _split(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """The documents, which <|endoftext|> separates."""
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.end_of_text:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tokenizer.decode(document) for document in documents if document]


def _held_out(source: Texts) -> list[Text]:
    _, spans = split_documents(source)
    return [text for span in spans for text in _plain_texts(*span)]


def _plain_texts(document: Document, start: int = 0, stop: int | None = None) -> list[Text]:
    """The texts that <|endoftext|> separates in a part of a document."""
    texts = groupby(document.iter_texts(start, stop), key=lambda text: text is None)
    return [Text.plain("".join(filter(None, chunks)), document.name) for is_end, chunks in texts if not is_end]


def _first(texts: list[Text]) -> list[Text]:
    """The first million characters of the texts; the last text may be truncated."""
    chosen, left = [], MAX_CHARACTERS
    for text in texts:
        if text.scored and left > 0:
            chosen.append(Text.plain(text.scored[:left], text.where))
            left -= len(text.scored)
    if not chosen:
        raise DataError("the run has no validation text")
    return chosen
