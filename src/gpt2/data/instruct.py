"""Prompt and answer -> tokens to learn from: the prompt is read, the answer is learned.

A row becomes one document, the prompt as a template writes it, the answer, and an end of text; of a conversation every
answer is learned. Documents are packed whole into rows, where none sees another (`gpt2.data.packed`).
"""

import hashlib
import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpt2.data.data_files import data_name
from gpt2.data.loader import Batch
from gpt2.data.packed import (
    PackedLoader,
    PackedRows,
    Spans,
    TokenizedDocuments,
    Truncation,
    packed_evaluation_batches,
    truncate_documents,
)
from gpt2.data.rows import Columns, Row, find_row_files, open_rows
from gpt2.data.shards import contains_shards
from gpt2.data.sources import BUILTIN_SOURCES, holdout_stride
from gpt2.errors import UserError
from gpt2.files import expand_path
from gpt2.templates import ChatTemplate
from gpt2.tokenizer import Tokenizer

_log = logging.getLogger("gpt2")


@dataclass(frozen=True)
class InstructDataset:
    """What a run trains on: conversations as tokens, some of them held out.

    documents: all of them. train, val: which of them, int64.
    """

    name: str
    tokenizer: Tokenizer
    documents: TokenizedDocuments
    train_indices: np.ndarray
    val_indices: np.ndarray

    @property
    def train_tokens(self) -> int:
        """How many tokens there are to learn from."""
        return int(self._full_spans(self.train_indices).num_targets(self.documents).sum())

    @property
    def val_tokens(self) -> int | None:
        """The same of what is held out; None where nothing is."""
        return (
            int(self._full_spans(self.val_indices).num_targets(self.documents).sum()) if len(self.val_indices) else None
        )

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when a token, a mask, the split or the tokenizer does."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for part in (self.documents.tokens, self.documents.loss_mask, self.documents.offsets, self.val_indices):
            digest.update(part.tobytes())
        return digest.hexdigest()[:16]

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text (special tokens have none) for every token to learn of what is held out; None without any."""
        counts = self._target_counts(self.val_indices)
        lengths = [len(self.tokenizer.token_bytes(token)) for token in range(len(counts))]
        for token in self.tokenizer.special_tokens.values():
            lengths[token] = 0
        return float(counts @ np.array(lengths)) / counts.sum() if len(self.val_indices) else None

    def loader(self, batch_size: int, block_size: int, seed: int) -> PackedLoader:
        """Batches for training: whole documents, packed into rows; what did not fit is said in the log."""
        read, cut = truncate_documents(self.documents, self.train_indices, block_size)
        if cut.documents:
            _log.warning(
                "%s: %d of %d documents are longer than a row of %d tokens and were cut: %d tokens are lost, %d of "
                "them to be learned",
                *(self.name, cut.documents, len(self.train_indices), block_size, cut.tokens, cut.targets),
            )
        return PackedLoader(
            PackedRows(self.documents, read, block_size, self.tokenizer.end_of_text, seed), batch_size, seed
        )

    def validation_batches(self, batch_size: int, block_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """What is held out, every target once (or the first `max_tokens`), in batches of at most `rows` rows."""
        if not len(self.val_indices):
            return iter(())
        read, _ = truncate_documents(self.documents, self.val_indices, block_size)
        return packed_evaluation_batches(
            self.documents, read, batch_size, block_size, self.tokenizer.end_of_text, max_tokens
        )

    def truncation(self, block_size: int) -> Truncation:
        """What rows of `block_size` cut off from the training documents."""
        return truncate_documents(self.documents, self.train_indices, block_size)[1]

    def packed_rows(self, block_size: int) -> PackedRows:
        """The training documents in rows, as `loader` reads them with seed 0."""
        read, _ = truncate_documents(self.documents, self.train_indices, block_size)
        return PackedRows(self.documents, read, block_size, self.tokenizer.end_of_text)

    def token_counts(self, max_tokens: int) -> np.ndarray:
        """How often each id is to be learned, int64 (vocab_size,), in a sample of at most `most` training tokens."""
        every = max(1, -(-self.train_tokens // max(1, max_tokens)))
        return self._target_counts(self.train_indices, every)

    def prompts(self, count: int) -> list[tuple[str, str]]:
        """Of the first rows held out (or to learn from, if none is): the prompt as the model reads it, and the last
        answer, without white space around it.
        """
        chosen = (self.val_indices if len(self.val_indices) else self.train_indices)[:count]
        return [self._prompt_and_answer(int(document)) for document in chosen]

    def _prompt_and_answer(self, document: int) -> tuple[str, str]:
        start, stop = self.documents.offsets[document : document + 2]
        border = start + self.documents.answer_starts[document]
        prompt = self.documents.tokens[start:border].tolist()
        marks = self.tokenizer.special_tokens.values()
        answer = [token for token in self.documents.tokens[border:stop].tolist() if token not in marks]
        return self.tokenizer.decode(prompt), self.tokenizer.decode(answer).strip()

    def _full_spans(self, indices: np.ndarray) -> Spans:
        return Spans(self.documents.offsets[indices], self.documents.offsets[indices + 1])

    def _target_counts(self, indices: np.ndarray, stride: int = 1) -> np.ndarray:
        """How often each id is a target of the chosen documents, or of every so many-th of the targets."""
        wanted = np.zeros(len(self.documents) + 1, np.int8)
        wanted[indices] = 1
        learned = self.documents.loss_mask & np.repeat(wanted[:-1] > 0, np.diff(self.documents.offsets))
        targets = self.documents.tokens[learned][::stride]
        return np.bincount(targets, minlength=self.tokenizer.vocab_size)


def is_instruct_data(ref: str, columns: str | None = None) -> bool:
    """Whether `ref` names rows of prompts and answers, or of messages: no text.

    Raises `UserError` for rows that cannot be read, or whose columns are neither.
    """
    if ref in BUILTIN_SOURCES or contains_shards(expand_path(ref)):
        return False
    files = find_row_files(ref)
    return bool(files) and open_rows(ref, files, columns)[0].text is None


def open_instruct(
    ref: str,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    columns: str | None = None,
    mask_prompt: bool = True,
    val_fraction: float = 0.1,
) -> InstructDataset:
    """The rows that `ref` names (a file, a folder, a pattern) as data to learn from.

    columns: such as "prompt=question,answer=reply" or "messages=talk"; None to go by what the first row has.
    mask_prompt: learn the answers alone; False learns everything.
    val_fraction: every tenth row is held out, or as this says; of fewer than ten, the last one.

    Raises `UserError`, with file and line, for a row that nothing can be learned from.
    """
    every = holdout_stride(val_fraction)
    files = find_row_files(ref)
    if not files:
        raise UserError(f"no rows of prompts and answers at '{ref}': name a .jsonl, .csv or .parquet file")
    chosen, rows = open_rows(ref, files, columns)
    if chosen.text is not None:
        raise UserError(f"the rows of {ref} are texts, with no prompt and answer (or messages) to tell apart")
    documents = tokenize_rows(rows, chosen, tokenizer, template, mask_prompt)
    indices = np.arange(len(documents))
    held_out = _validation_mask(len(documents), every)
    data = InstructDataset(data_name(ref), tokenizer, documents, indices[~held_out], indices[held_out])
    _warn_about_train_val_overlap(data)
    return data


def tokenize_rows(
    rows: Iterator[Row], columns: Columns, tokenizer: Tokenizer, template: ChatTemplate, mask_prompt: bool = True
) -> TokenizedDocuments:
    """Each row as a document: what the template makes of it, and an end of text."""
    tokens, learned = array("i"), bytearray()
    lengths, answers = array("q"), array("q")
    for row in rows:
        begin, last = len(tokens), 0
        for ids, says in _encode_row(row, columns, tokenizer, template):
            if says:
                last = len(tokens) - begin
            tokens.extend(ids)
            learned.extend(bytes([says or not mask_prompt]) * len(ids))
        tokens.append(tokenizer.end_of_text)
        learned.append(True)
        answers.append(last)
        lengths.append(len(tokens) - begin)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    offsets = np.concatenate(([0], np.cumsum(np.frombuffer(lengths, np.int64))))
    counts = np.frombuffer(learned, np.bool_)
    counts[offsets[:-1]] = False  # nothing precedes the first
    return TokenizedDocuments(
        np.frombuffer(tokens, np.int32).astype(dtype), counts, offsets, np.frombuffer(answers, np.int64)
    )


def _encode_row(
    row: Row, columns: Columns, tokenizer: Tokenizer, template: ChatTemplate
) -> list[tuple[list[int], bool]]:
    """The pieces of a row. Raises `UserError` that names it."""
    messages = columns.get_messages(row)
    try:
        pieces = template.encode(tokenizer, messages)
    except UserError as error:
        raise UserError(f"{row[0]}: {error}") from None
    if not any(says and ids for ids, says in pieces):
        raise UserError(f"{row[0]}: the template leaves nothing of it to learn")
    return pieces


def _validation_mask(count: int, stride: int) -> np.ndarray:
    """Which of the rows are held out, bool (count,): every so many-th (none for 0), the last one of too few."""
    held_out = np.zeros(count, np.bool_)
    if stride:
        held_out[stride - 1 :: stride] = True
        held_out[-1:] |= 1 < count < stride
    return held_out


def _warn_about_train_val_overlap(data: InstructDataset) -> None:
    """Say in the log how many of the rows held out are to be learned from as well."""
    documents = data.documents

    def digest(document: int) -> bytes:
        some = slice(*documents.offsets[document : document + 2])
        return hashlib.blake2b(documents.tokens[some].tobytes(), digest_size=16).digest()

    held_out = [digest(document) for document in data.val_indices.tolist()]
    known = set(held_out)
    known = {key for document in data.train_indices.tolist() if (key := digest(document)) in known}
    if repeats := sum(key in known for key in held_out):
        _log.warning(
            "%s: %d of the %d rows held out are among the training rows, too: the validation loss will look better "
            "than it is",
            *(data.name, repeats, len(held_out)),
        )
