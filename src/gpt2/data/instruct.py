"""Prompts and answers -> tokens for supervised fine-tuning, with the loss on the answers.

A row becomes one document: the prompt in the form of a chat template, the answer, and the end-of-text token. In a
conversation the loss counts every answer. Documents are packed into rows without attention between them
(`gpt2.data.packed`).
"""

import hashlib
import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpt2.data.columns import Columns, Row
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
from gpt2.data.resolve import Rows
from gpt2.data.rows import BadRows, read_rows
from gpt2.data.sources import holdout_stride
from gpt2.errors import DataError, UserError
from gpt2.progress import ProgressBar
from gpt2.templates import ChatTemplate
from gpt2.tokenizer import Tokenizer

_SHOWN_ROWS = 100  # between updates of the progress bar

_log = logging.getLogger("gpt2")


@dataclass(frozen=True)
class InstructDataset:
    """Conversations as tokens, in two splits; a `Dataset`.

    documents:                  all of them.
    train_indices, val_indices: the documents of each split, int64.
    """

    name: str
    tokenizer: Tokenizer
    documents: TokenizedDocuments
    train_indices: np.ndarray
    val_indices: np.ndarray

    @property
    def train_tokens(self) -> int:
        return int(self._full_spans(self.train_indices).num_targets(self.documents).sum())

    @property
    def val_tokens(self) -> int | None:
        if not len(self.val_indices):
            return None
        return int(self._full_spans(self.val_indices).num_targets(self.documents).sum())

    @property
    def fingerprint(self) -> str:
        """See `Dataset`; it covers the tokens, the loss mask, the split and the tokenizer."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for part in (self.documents.tokens, self.documents.loss_mask, self.documents.offsets, self.val_indices):
            digest.update(part.tobytes())
        return digest.hexdigest()[:16]

    @property
    def bytes_per_token(self) -> float | None:
        """See `Dataset`; special tokens have no bytes."""
        counts = self._target_counts(self.val_indices)
        lengths = [len(self.tokenizer.token_bytes(token)) for token in range(len(counts))]
        for token in self.tokenizer.special_tokens.values():
            lengths[token] = 0
        return float(counts @ np.array(lengths)) / counts.sum() if len(self.val_indices) else None

    def loader(self, batch_size: int, block_size: int, seed: int) -> PackedLoader:
        """See `Dataset`; documents are packed into rows, and truncation is logged."""
        read, cut = truncate_documents(self.documents, self.train_indices, block_size)
        if cut.documents:
            _log.warning(
                "%s: %d of %d documents are longer than a row of %d tokens and were truncated: %d tokens are lost, %d "
                "of them targets",
                *(self.name, cut.documents, len(self.train_indices), block_size, cut.tokens, cut.targets),
            )
        return PackedLoader(
            PackedRows(self.documents, read, block_size, self.tokenizer.end_of_text, seed), batch_size, seed
        )

    def validation_batches(self, batch_size: int, block_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
        if not len(self.val_indices):
            return iter(())
        read, _ = truncate_documents(self.documents, self.val_indices, block_size)
        return packed_evaluation_batches(
            self.documents, read, batch_size, block_size, self.tokenizer.end_of_text, max_tokens
        )

    def truncation(self, block_size: int) -> Truncation:
        """What rows of `block_size` tokens cut off from the training documents."""
        return truncate_documents(self.documents, self.train_indices, block_size)[1]

    def packed_rows(self, block_size: int) -> PackedRows:
        """The training documents packed into rows, as `loader` reads them with seed 0."""
        read, _ = truncate_documents(self.documents, self.train_indices, block_size)
        return PackedRows(self.documents, read, block_size, self.tokenizer.end_of_text)

    def token_counts(self, max_tokens: int) -> np.ndarray:
        """See `Dataset`; only targets count."""
        stride = max(1, -(-self.train_tokens // max(1, max_tokens)))
        return self._target_counts(self.train_indices, stride)

    def prompts(self, count: int) -> list[tuple[str, str]]:
        """See `Dataset`; the prompt as the model reads it, and the last answer, stripped."""
        chosen = (self.val_indices if len(self.val_indices) else self.train_indices)[:count]
        return [self._prompt_and_answer(int(document)) for document in chosen]

    def _prompt_and_answer(self, document: int) -> tuple[str, str]:
        start, stop = self.documents.offsets[document : document + 2]
        boundary = start + self.documents.answer_starts[document]
        prompt = self.documents.tokens[start:boundary].tolist()
        special = self.tokenizer.special_tokens.values()
        answer = [token for token in self.documents.tokens[boundary:stop].tolist() if token not in special]
        return self.tokenizer.decode(prompt), self.tokenizer.decode(answer).strip()

    def _full_spans(self, indices: np.ndarray) -> Spans:
        return Spans(self.documents.offsets[indices], self.documents.offsets[indices + 1])

    def _target_counts(self, indices: np.ndarray, stride: int = 1) -> np.ndarray:
        """How often each id is among every `stride`-th target of some documents, int64 (vocab_size,)."""
        selected = np.zeros(len(self.documents), np.bool_)
        selected[indices] = True
        is_target = self.documents.loss_mask & np.repeat(selected, np.diff(self.documents.offsets))
        targets = self.documents.tokens[is_target][::stride]
        return np.bincount(targets, minlength=self.tokenizer.vocab_size)


def open_instruct(
    rows: Rows,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    mask_prompt: bool = True,
    val_fraction: float = 0.1,
) -> InstructDataset:
    """Rows of prompts and answers as tokens.

    mask_prompt:  the loss counts the answers only; False counts every token.
    val_fraction: every n-th row is held out, n being 1/`val_fraction`, rounded; of fewer than n, the last one.

    Raises DataError, with file and line, for a row without anything to train on.
    """
    stride = holdout_stride(val_fraction)
    bad_rows = BadRows(rows.skip_bad_rows)
    with ProgressBar(f"tokenizing {rows.name}") as bar:
        read = _counted(read_rows(rows.files, rows.columns, bad_rows), bar)
        documents = tokenize_rows(read, rows.columns, tokenizer, template, mask_prompt, bad_rows)
    bad_rows.report(rows.name)
    indices = np.arange(len(documents))
    held_out = _validation_mask(len(documents), stride)
    data = InstructDataset(rows.name, tokenizer, documents, indices[~held_out], indices[held_out])
    _warn_about_train_val_overlap(data)
    return data


def _counted(rows: Iterator[Row], bar: ProgressBar) -> Iterator[Row]:
    """The rows, whose number is shown. How many there are is not known before all are read."""
    for number, row in enumerate(rows, 1):
        yield row
        if number % _SHOWN_ROWS == 0:
            bar.update(status=f"{number:,} rows")


def tokenize_rows(
    rows: Iterator[Row],
    columns: Columns,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    mask_prompt: bool = True,
    bad_rows: BadRows | None = None,
) -> TokenizedDocuments:
    """Each row as a document: its conversation in the form of the template, and the end-of-text token.

    Raises DataError for a bad row, unless `bad_rows` skips them.
    """
    bad_rows = bad_rows or BadRows()
    tokens, in_loss = array("i"), bytearray()
    lengths, answer_starts = array("q"), array("q")
    for row in rows:
        start, answer_start = len(tokens), 0
        try:
            segments = _encode_row(row, columns, tokenizer, template)
        except DataError as error:
            bad_rows.handle(error)
            continue
        for ids, is_answer, counts in segments:
            if is_answer:
                answer_start = len(tokens) - start
            tokens.extend(ids)
            in_loss.extend(bytes([counts if is_answer else not mask_prompt]) * len(ids))
        tokens.append(tokenizer.end_of_text)
        in_loss.append(True)
        answer_starts.append(answer_start)
        lengths.append(len(tokens) - start)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    offsets = np.concatenate(([0], np.cumsum(np.frombuffer(lengths, np.int64))))
    loss_mask = np.frombuffer(in_loss, np.bool_)
    loss_mask[offsets[:-1]] = False  # nothing precedes the first token
    ids = np.frombuffer(tokens, np.int32).astype(dtype)
    return TokenizedDocuments(ids, loss_mask, offsets, np.frombuffer(answer_starts, np.int64))


def _encode_row(
    row: Row, columns: Columns, tokenizer: Tokenizer, template: ChatTemplate
) -> list[tuple[list[int], bool, bool]]:
    """The segments of a row: their tokens, whether each is an answer, and whether the loss counts that answer.

    Raises DataError that names the row.
    """
    messages, answers_in_loss = columns.get_conversation(row)
    try:
        segments = template.encode(tokenizer, messages)
    except UserError as error:
        raise DataError(f"{row[0]}: {error}") from None
    if not any(is_answer and ids for ids, is_answer in segments):
        raise DataError(f"{row[0]}: with this template the row has no answer to train on")
    num_answers = sum(is_answer for _, is_answer in segments)
    if num_answers != len(answers_in_loss) and not all(answers_in_loss):
        raise DataError(f"{row[0]}: with this template single answers cannot be excluded from training")
    in_loss = iter(answers_in_loss if num_answers == len(answers_in_loss) else [True] * num_answers)
    return [(ids, is_answer, is_answer and next(in_loss)) for ids, is_answer in segments]


def _validation_mask(count: int, stride: int) -> np.ndarray:
    """The rows to hold out, bool (count,): every `stride`-th (none for 0); of fewer rows the last one."""
    held_out = np.zeros(count, np.bool_)
    if stride:
        held_out[stride - 1 :: stride] = True
        held_out[-1:] |= 1 < count < stride
    return held_out


def _warn_about_train_val_overlap(data: InstructDataset) -> None:
    """Log how many of the held-out rows are training rows, too."""
    documents = data.documents

    def digest(document: int) -> bytes:
        start, stop = documents.offsets[document : document + 2]
        return hashlib.blake2b(documents.tokens[start:stop].tobytes(), digest_size=16).digest()

    held_out = [digest(document) for document in data.val_indices.tolist()]
    shared = set(held_out).intersection(map(digest, data.train_indices.tolist()))
    if repeats := sum(key in shared for key in held_out):
        _log.warning(
            "%s: %d of the %d held-out rows are training rows, too: the validation loss will be too low",
            *(data.name, repeats, len(held_out)),
        )
