"""From a task's file to what is scored."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gpt2.errors import UserError
from gpt2.evaluation import formats
from gpt2.evaluation.choices import prepare_choices, prepare_completion
from gpt2.evaluation.detokenize import detokenize_1bw, detokenize_ptb, detokenize_wikitext
from gpt2.evaluation.fetch import TaskFile
from gpt2.evaluation.lambada import prepare_lambada
from gpt2.evaluation.measures import Measured, Prepared
from gpt2.evaluation.perplexity import Text, harness_units, prepare_rolling, prepare_strided, word_units
from gpt2.evaluation.records import Row, is_parquet, rows_of, text_of
from gpt2.evaluation.tasks import Task
from gpt2.evaluation.texts import (
    detokenized,
    guide_text,
    harness_pages,
    last_part,
    lines_of,
    wikitext_pages,
    wikitext_text,
)
from gpt2.model import GPTConfig
from gpt2.tokenizer import Tokenizer

HARNESS_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
GUIDE_METRICS = ("loss", "token_perplexity")


@dataclass(frozen=True)
class Part:
    """One pass over the data, and which of its metrics count; None for all."""

    prepared: Prepared
    metrics: tuple[str, ...] | None = None

    def chosen(self, found: Measured) -> Measured:
        """The metrics that count."""
        names = [name for name in found.metrics if self.metrics is None or name in self.metrics]
        return Measured({n: found.metrics[n] for n in names}, {n: found.stderr.get(n) for n in names})


def prepare(
    task: Task, file: TaskFile, tokenizer: Tokenizer, config: GPTConfig, limit: int | None, stride: int | None
) -> list[Part]:
    """The passes of a task over its first `limit` rows; None for all. Raises UserError for what is wrong with a row."""
    if task.kind in ("choices", "completion", "lambada"):
        assert callable(task.read)
        rows = [task.read(row) for row in islice(_rows(task, file), limit)]
        if not rows:
            raise UserError(f"there are no rows in {file.where}")
        if task.kind == "lambada":
            return [Part(prepare_lambada(rows, tokenizer, config))]
        if task.kind == "completion":
            return [Part(prepare_completion(rows, tokenizer, config))]
        return [Part(prepare_choices(rows, tokenizer, config, normalized=task.normalized))]
    if task.kind == "paper":
        texts, rows, newlines = _paper_texts(task, file, limit)
        units = word_units(texts, newlines=newlines)
        return [Part(prepare_rolling(texts, tokenizer, config, units, stride, rows=rows))]
    return _wikitext(task.kind, file, tokenizer, config, limit, stride)


def _wikitext(
    kind: str, file: TaskFile, tokenizer: Tokenizer, config: GPTConfig, limit: int | None, stride: int | None
) -> list[Part]:
    pages = wikitext_pages(file.content, file.where)
    original = wikitext_text(file.content, file.where) if limit is None else "\n".join(pages[:limit])
    pages = pages[:limit]
    parts = []
    if kind in ("guide", "harness"):
        texts = harness_pages(pages, file.where)
        rolling = prepare_rolling(texts, tokenizer, config, harness_units(texts))
        parts.append(Part(rolling, HARNESS_METRICS if kind == "guide" else None))
    if kind in ("guide", "strided"):
        text = Text(guide_text(original), original, file.where)
        strided = prepare_strided(text, tokenizer, config, word_units([text]), stride, rows=len(pages))
        parts.append(Part(strided, GUIDE_METRICS if kind == "guide" else None))
    return parts


def _rows(task: Task, file: TaskFile) -> Iterable[Row]:
    content, where = file.content, file.where
    if task.name.startswith("cbt") and not (is_parquet(content) or content.lstrip()[:1] in (b"{", b"[")):
        return _cbt_rows(text_of(content, where), where)
    if task.name == "lambada-original" and not (is_parquet(content) or content.lstrip()[:2] == b'{"'):
        lines = text_of(content, where).split("\n")
        return [(f"{where} line {i}", {"text": line}) for i, line in enumerate(lines, 1) if line.strip()]
    if file.labels is None:
        return rows_of(content, where)
    rows = list(rows_of(content, where))
    labels = text_of(file.labels, f"the labels in {where}").split()
    if len(labels) != len(rows):
        raise UserError(f"{where} has {len(rows)} rows and {len(labels)} labels")
    return [(place, {**record, "label": label}) for (place, record), label in zip(rows, labels, strict=True)]


def _cbt_rows(text: str, where: str) -> list[Row]:
    """The Children's Book Test as published: 20 numbered lines, and a 21st with question, answer and options."""
    rows: list[Row] = []
    sentences: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        index, _, rest = line.partition(" ")
        if index != "21":
            sentences.append(rest)
            continue
        fields = rest.split("\t")
        if len(fields) < 4:
            raise UserError(f"{where} line {number}: a question, an answer and options divided by tabs are needed")
        options = [option for option in fields[-1].strip().split("|") if option]
        record = {"sentences": sentences, "question": fields[0], "answer": fields[1], "options": options}
        rows.append((f"{where} line {number}", record))
        sentences = []
    return rows


def _paper_texts(task: Task, file: TaskFile, limit: int | None) -> tuple[list[Text], int, bool]:
    """The texts of a perplexity set, how many rows they are, and whether the end of a line is a word there."""
    content, where = file.content, file.where
    if task.read == "wikitext":
        pages = wikitext_pages(content, where)[:limit]
        return [detokenized("\n".join(pages), detokenize_wikitext, where)], len(pages), True
    if task.read == "ptb":
        lines = lines_of(content, where)[:limit]
        whole = "".join(f"{line.strip()}\n" for line in lines)
        return [detokenized(whole, detokenize_ptb, where)], len(lines), True
    if task.read == "1bw":
        lines = lines_of(content, where)[:limit]
        texts = [Text(detokenize_1bw(f"{line}\n").text, f"{line}\n", where) for line in lines]
        return texts, len(texts), True
    return [Text.plain(last_part(content, where), where)], 1, False


def prepare_task_file(
    content: bytes, where: str, tokenizer: Tokenizer, config: GPTConfig, limit: int | None
) -> list[Part]:
    """Any file of rows {query, choices, gold} or {context_options, continuation, gold}."""
    rows = [formats.generic(row) for row in islice(rows_of(content, where), limit)]
    if not rows:
        raise UserError(f"there are no rows in {where}")
    normalized = not any(len(set(row.contexts)) > 1 for row in rows)
    return [Part(prepare_choices(rows, tokenizer, config, normalized=normalized))]


def fingerprint_of(contents: Sequence[Any]) -> str:
    """SHA-256, in hex, of what is scored: equal data in another file format has the same."""
    import hashlib

    text = json.dumps(list(contents), ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
