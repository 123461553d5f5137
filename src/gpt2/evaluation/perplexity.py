"""Perplexity of texts: per token, per word, per byte, with the windows that each protocol takes."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpt2.errors import ConfigError, DataError
from gpt2.evaluation.encode import rolling_queries, strided_queries
from gpt2.evaluation.measures import Measured, Prepared, Record, exp_of, ratio_and_stderr
from gpt2.evaluation.scorer import Scored, check_queries
from gpt2.evaluation.tree import Query
from gpt2.model import GPTConfig
from gpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    """A document: what is scored, and the original that words, bytes and characters are counted in."""

    scored: str
    original: str
    where: str

    @classmethod
    def plain(cls, text: str, where: str) -> "Text":
        """A text that is scored as it is."""
        return cls(text, text, where)


@dataclass(frozen=True)
class Units:
    """How many words, bytes of UTF-8 and characters the originals have."""

    words: int
    bytes: int
    characters: int


def harness_units(texts: Sequence[Text]) -> Units:
    """Words are what `\\s+` divides, the empty ones at either end included, as lm-evaluation-harness counts them."""
    return _units(texts, sum(len(re.split(r"\s+", text.original)) for text in texts))


def word_units(texts: Sequence[Text], *, newlines: bool = False) -> Units:
    """Words are divided by whitespace; with `newlines` the end of a line is a word too, as it is in PTB's <eos>."""
    lines = sum(text.original.count("\n") for text in texts) if newlines else 0
    return _units(texts, sum(len(text.original.split()) for text in texts) + lines)


def _units(texts: Sequence[Text], words: int) -> Units:
    return Units(
        max(1, words),
        max(1, sum(len(text.original.encode("utf-8", "surrogatepass")) for text in texts)),
        max(1, sum(len(text.original) for text in texts)),
    )


def prepare_rolling(
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    config: GPTConfig,
    units: Units,
    stride: int | None = None,
    rows: int | None = None,
) -> Prepared:
    """Every token of every text scored once, the first after <|endoftext|>, as the harness's loglikelihood_rolling.

    stride: tokens that a window scores after the first; None for the whole context. rows: what the texts count as.
    """
    check_stride(stride, config)
    groups: list[list[Query]] = []
    for text, ids in zip(texts, tokenizer.encode_batch([text.scored for text in texts]), strict=True):
        windows = list(rolling_queries(ids, tokenizer.end_of_text, config.block_size, stride))
        check_queries(windows, config, text.where)
        groups += [[window] for window in windows]
    return _prepared(groups, texts, units, sum(query.scored for (query,) in groups), rows)


def prepare_strided(
    text: Text,
    tokenizer: Tokenizer,
    config: GPTConfig,
    units: Units,
    stride: int | None = None,
    rows: int | None = None,
) -> Prepared:
    """One stream in windows as in Hugging Face's guide to perplexity; stride None for the whole context.

    Per word, byte and character the mean loss is scaled by the tokens of the whole text, as the first token of a
    window without overlap is not scored.
    """
    check_stride(stride, config)
    ids = tokenizer.encode(text.scored)
    groups = [[query] for query in strided_queries(ids, config.block_size, stride or config.block_size)]
    return _prepared(groups, [text], units, len(ids), rows)


def check_stride(stride: int | None, config: GPTConfig) -> None:
    """Raise UserError for a stride that no window of the model can take."""
    if stride is not None and not 1 <= stride <= config.block_size:
        raise ConfigError(
            f"--stride must be between 1 and the model's context of {config.block_size}, not {stride}", field="stride"
        )


def _prepared(
    groups: list[list[Query]], texts: Sequence[Text], units: Units, tokens: int, rows: int | None
) -> Prepared:
    if not groups:
        raise DataError(f"{texts[0].where if texts else 'the text'}: there is nothing to score: too few tokens")

    def record(index: int, scored: list[Scored]) -> Record:
        (one,) = scored
        return -one.log_likelihood, float(len(one.logprobs))

    def summarize(records: Mapping[int, Record]) -> Measured:
        ordered = [records[i] for i in sorted(records)]
        loss, stderr = ratio_and_stderr([one[0] for one in ordered], [one[1] for one in ordered])
        found = Measured({"loss": loss}, {"loss": stderr})
        per = {"token_perplexity": 1.0}
        if len(records) == len(groups):  # what part of the words an interrupted run has scored is not known
            per |= {"word_perplexity": tokens / units.words, "byte_perplexity": tokens / units.bytes}
        for name, rate in per.items():
            scaled = None if stderr is None else stderr * rate
            found.metrics[name], found.stderr[name] = exp_of(loss * rate, scaled)
        if len(records) == len(groups):
            for name, count in (("bits_per_byte", units.bytes), ("bits_per_character", units.characters)):
                rate = tokens / count / math.log(2)
                found.metrics[name] = loss * rate
                found.stderr[name] = None if stderr is None else stderr * rate
        return found

    content = [[text.scored, text.original] if text.scored != text.original else text.scored for text in texts]
    return Prepared(groups, record, summarize, len(texts) if rows is None else rows, content)
