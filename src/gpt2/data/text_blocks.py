"""Texts in blocks, and blocks to tokens: by threads, in order, in bounded memory.

`TextBlock` is what one thread encodes at a time: pieces of one or of many documents. `CachedTexts` are a million short
documents in one file, in memory 8 bytes each.
"""

import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

import numpy as np

from gpt2.data.sources import Document, DocumentSlice, separate_texts
from gpt2.errors import DataError
from gpt2.files import read_error
from gpt2.vocabulary import END_OF_TEXT

BLOCK_BYTES = 1 << 18  # of text; the work of one task of a thread

_SEPARATOR = END_OF_TEXT.encode()

Work = TypeVar("Work")
Result = TypeVar("Result")


class TextBlock(NamedTuple):
    """Pieces of text in order, None for each end-of-text token between them; and how many documents start in them."""

    pieces: list[str | None]
    documents: int

    @property
    def num_bytes(self) -> int:
        """Of the pieces in UTF-8."""
        return sum(len(p) if p.isascii() else len(p.encode("utf-8", "replace")) for p in self.pieces if p is not None)


def blocks_of_slices(parts: Iterable[DocumentSlice], *, append_end_of_text: bool) -> Iterator[TextBlock]:
    """The texts of parts of documents, in blocks of about `BLOCK_BYTES`.

    append_end_of_text: end each part that reaches the end of its document with the token.
    """
    pieces: list[str | None] = []
    documents = characters = 0
    for part in parts:
        previous = None
        for text in part.document.iter_texts(part.start, part.stop, chunk_bytes=BLOCK_BYTES):
            documents += previous is None and text is not None
            previous = text
            pieces.append(text)
            characters += len(text or "")
            if characters >= BLOCK_BYTES:
                yield TextBlock(pieces, documents)
                pieces, documents, characters = [], 0, 0
        if append_end_of_text and previous is not None and part.stop == part.document.size:
            pieces.append(None)
    if pieces:
        yield TextBlock(pieces, documents)


@dataclass(frozen=True)
class CachedTexts(Sequence[Document]):
    """Many documents in one file of UTF-8; each is a `Document` when it is asked for.

    ends: the byte offset at which each ends; none is empty.
    """

    name: str
    path: Path
    ends: "array[int]" = field(repr=False)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...

    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        number = range(len(self))[index]
        return Document(
            f"{self.name} text {number + 1}", self.path, self.ends[number - 1] if number else 0, self.ends[number]
        )

    @property
    def sizes(self) -> np.ndarray:
        """The bytes of each document, int64."""
        return np.diff(np.frombuffer(self.ends, np.int64), prepend=0)

    def blocks(self, chosen: np.ndarray) -> Iterator[TextBlock]:
        """The documents for which `chosen`, bool (documents,), is true, each with an end-of-text token, in blocks.

        The pieces are those of `blocks_of_slices`. Raises DataError if the file cannot be read.
        """
        ends = np.frombuffer(self.ends, np.int64)
        first = 0
        try:
            with self.path.open("rb") as file:
                while first < len(ends):
                    start = int(ends[first - 1]) if first else 0
                    last = max(first + 1, int(np.searchsorted(ends, start + BLOCK_BYTES, "right"))) if first else 1
                    selected = (first + np.flatnonzero(chosen[first:last])).tolist()
                    if last == 1 or int(ends[last - 1]) - start > BLOCK_BYTES:  # byte order mark; large document
                        yield from blocks_of_slices(map(self._whole, selected), append_end_of_text=True)
                    elif selected:
                        file.seek(start)
                        data = file.read(int(ends[last - 1]) - start)
                        spans = [(self.ends[i - 1] - start, self.ends[i] - start) for i in selected]
                        yield _make_block([data[begin:end].decode() for begin, end in spans], _SEPARATOR in data)
                    first = last
        except OSError as error:
            raise read_error(self.path, error) from None
        except UnicodeDecodeError:
            raise DataError(f"{self.path} was changed: remove its folder") from None

    def _whole(self, index: int) -> DocumentSlice:
        document = self[index]
        return DocumentSlice(document, 0, document.size)


def _make_block(texts: list[str], has_separators: bool) -> TextBlock:
    if not has_separators:
        pieces: list[str | None] = [None] * (2 * len(texts))
        pieces[::2] = texts
        return TextBlock(pieces, len(texts))
    pieces, documents = [], 0
    for text in texts:
        found = list(separate_texts([text], is_start=True))
        if found and found[-1] is not None:
            found.append(None)
        documents += found.count(None)
        pieces += found
    return TextBlock(pieces, documents)


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    items: Iterable[Work], function: Callable[[Work], Result], workers: int
) -> Iterator[tuple[Work, Result]]:
    """Each item with `function` of it, in order, computed by threads; a few items are in memory at a time."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    waiting: deque[tuple[Work, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            while len(waiting) > 2 * workers or (waiting and waiting[0][1].done()):
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
