"""Texts that are always there: a file or corpus by name, a run's own validation data, Python's language reference."""

import tomllib
from pathlib import Path
from typing import Any

from gpt2.data.resolve import find_shards, resolve_texts
from gpt2.data.shards import open_shards
from gpt2.data.sources import Texts, split_documents
from gpt2.errors import UserError
from gpt2.evaluation.perplexity import Text, prepare_rolling, word_units
from gpt2.evaluation.prepare import Part
from gpt2.files import expand_path
from gpt2.model import GPTConfig
from gpt2.tokenizer import Tokenizer

MOST_CHARACTERS = 1_000_000  # of validation data that is evaluated by default
BUILT_IN = "python-docs"


def rolling_protocol(stride: int | None, config: GPTConfig) -> str:
    """How the windows of a text are laid, for the results."""
    size = config.block_size
    return f"every token once after <|endoftext|>, documents apart; windows of {size} tokens, stride {stride or size}"


def prepare_texts(
    texts: list[Text], tokenizer: Tokenizer, config: GPTConfig, stride: int | None, limit: int | None = None
) -> list[Part]:
    """Plain texts, each a document of its own."""
    texts = texts[:limit]
    return [Part(prepare_rolling(texts, tokenizer, config, word_units(texts), stride))]


def texts_of_source(ref: str) -> list[Text]:
    """The documents of what `--data` names: a text file, a folder, rows with a column of text, or a corpus."""
    source = resolve_texts(ref)
    texts = [Text.plain("".join(document.iter_chunks()), document.name) for document in source.documents]
    return [text for text in texts if text.scored]


def validation_texts(model: str, tokenizer: Tokenizer) -> list[Text] | None:
    """The held-out text of a run folder, its first million characters; None for a model that is no run.

    Raises UserError where the run's data is no longer there, or is not plain text.
    """
    path = expand_path(model) / "config.toml"
    if not path.is_file():
        return None
    settings = _settings(path)
    ref = settings.get("data")
    if not isinstance(ref, str):
        raise UserError(f"{path} names no data")
    shards = find_shards(ref)
    if shards is not None:
        val = open_shards(shards.path, "val")
        ids = val.read(0, min(len(val), MOST_CHARACTERS // 4)).tolist()
        return _first([Text.plain(text, str(shards.path)) for text in _split(ids, tokenizer)])
    return _first(_held_out(resolve_texts(ref, settings.get("columns"))))


def _settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _split(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """The documents that <|endoftext|> divides."""
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.end_of_text:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tokenizer.decode(document) for document in documents if document]


def _held_out(source: Texts) -> list[Text]:
    _, parts = split_documents(source)
    return [Text.plain("".join(document.iter_chunks(start, stop)), document.name) for document, start, stop in parts]


def _first(texts: list[Text]) -> list[Text]:
    """As many of the texts as have a million characters together; the last one may be cut."""
    chosen, left = [], MOST_CHARACTERS
    for text in texts:
        if text.scored and left > 0:
            chosen.append(Text.plain(text.scored[:left], text.where))
            left -= len(text.scored)
    if not chosen:
        raise UserError("the run held out no text")
    return chosen
