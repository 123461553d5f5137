"""Texts to train on, as documents, and the corpora that are built in.

A document is read in chunks, so a corpus of any size needs little memory.
"""

import codecs
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gpt2.data.encodings import encoding_hint
from gpt2.downloads import download
from gpt2.errors import ConfigError, DataError
from gpt2.files import cache_home, read_error
from gpt2.vocabulary import END_OF_TEXT

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

BUILTIN_SOURCES = {
    "shakespeare": "tinyshakespeare: 1.1 MB of Shakespeare's plays, downloaded once",
    "tiny_shakespear": "the same, under the original project's spelling",
    "super_tiny_shakespear": "the first 1,000 characters of tinyshakespeare, to overfit in seconds",
    "python-docs": "the Python language reference that every interpreter includes; needs no network",
}
CHUNK_BYTES = 1 << 20
MAX_CHUNK_CHARACTERS = 1 << 18  # without a place to split: a tokenizer takes hundreds of bytes for each character
_AFTER_LETTER = frozenset('0123456789!"#$%&()*+,-./:;<=>?@[\\]^_`{}~')  # not in "it's" or "<|endoftext|>"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SEPARATOR = END_OF_TEXT.encode()


@dataclass(frozen=True, slots=True)
class Document:
    """One text, in memory or in a file. Error messages use its `name`.

    start, stop: the byte range of the file that is this document; a `stop` of None is the end of the file.
    """

    name: str
    data: bytes | Path = field(repr=False)
    start: int = 0
    stop: int | None = None

    @property
    def size(self) -> int:
        """Bytes of UTF-8, including a leading byte order mark."""
        if self.stop is not None:
            return self.stop - self.start
        if isinstance(self.data, bytes):
            return len(self.data)
        try:
            return self.data.stat().st_size
        except OSError as error:
            raise read_error(self.data, error) from None

    def iter_chunks(self, start: int = 0, stop: int | None = None, chunk_bytes: int = CHUNK_BYTES) -> Iterator[str]:
        """The text of bytes [start, stop), in chunks of about `chunk_bytes`.

        Both ends move forward to the next character, and to the end of an ``<|endoftext|>``, so neighbouring ranges
        neither lose nor share one. Newlines are unchanged; a byte order mark at the start of the document is dropped.
        A chunk ends only where GPT-2's pre-tokenization ends a token in any context, so tokenizing the chunks one by
        one equals tokenizing the whole text; without such a place the chunk grows, up to `MAX_CHUNK_CHARACTERS`.

        Raises DataError at the first byte that is not UTF-8, or if the file cannot be read.
        """
        with self._open() as handle:
            position, end = self._boundary(handle, start), self._boundary(handle, stop)
            handle.seek(position)
            decoder = codecs.getincrementaldecoder("utf-8")()
            text, searched = "", 0
            while position < end:
                block = handle.read(min(chunk_bytes, end - position))
                if not block:
                    raise DataError(f"{self.name} was truncated while it was read")
                try:
                    text += decoder.decode(block, final=position + len(block) >= end)
                except UnicodeDecodeError as error:
                    offset = position - len(decoder.getstate()[0]) + error.start
                    hint = encoding_hint(self.data, offset)
                    raise DataError(f"{self.name} is not UTF-8 text: bad byte at offset {offset:,}{hint}") from None
                position += len(block)
                cut = _last_safe_split(text, searched)
                if cut:
                    yield text[:cut]
                    text = text[cut:]
                while len(text) > MAX_CHUNK_CHARACTERS + len(END_OF_TEXT):
                    cut = _forced_split(text)
                    yield text[:cut]
                    text = text[cut:]
                searched = max(0, len(text) - 1)
            if text:
                yield text

    def iter_texts(
        self, start: int = 0, stop: int | None = None, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[str | None]:
        """`iter_chunks` without ``<|endoftext|>``, which separates texts: None is yielded in its place.

        A text of whitespace only is left out with its separator, unless it is the whole document, or longer than
        `MAX_CHUNK_CHARACTERS`: so much is not held in memory.
        """
        return separate_texts(self.iter_chunks(start, stop, chunk_bytes), is_start=start == 0)

    def _boundary(self, handle: BinaryIO, offset: int | None) -> int:
        """The offset in the file of an offset in the document, moved as `iter_chunks` says; None is the end."""
        if offset is None:
            return _character_boundary(handle, self.stop)
        position = self.start + offset
        if offset:
            position = _separator_boundary(handle, position)
        return _character_boundary(handle, position if self.stop is None else min(position, self.stop))

    def _open(self) -> BinaryIO:
        if isinstance(self.data, bytes):
            return io.BytesIO(self.data)
        try:
            return self.data.open("rb")
        except OSError as error:
            raise read_error(self.data, error) from None


class DocumentSlice(NamedTuple):
    """Bytes [start, stop) of a document."""

    document: Document
    start: int
    stop: int


@dataclass(frozen=True)
class Texts:
    """A corpus: a name, and its documents in an order that is the same on every machine."""

    name: str
    documents: Sequence[Document]


def separate_texts(chunks: Iterable[str], *, is_start: bool) -> Iterator[str | None]:
    """Chunks of a document without ``<|endoftext|>``; see `Document.iter_texts`. is_start: the first is its start."""
    empty = is_start  # nothing but whitespace since the start or the last separator
    held, separated = "", False  # that whitespace, and whether there was a separator
    for chunk in chunks:
        for i, text in enumerate(chunk.split(END_OF_TEXT)):
            if i:
                if not empty:
                    yield None
                empty, held, separated = True, "", True
            if empty and (not text or text.isspace()) and len(held) + len(text) <= MAX_CHUNK_CHARACTERS:
                held += text
            elif text:
                if held:
                    yield held  # by itself: a chunk ended after it
                yield text
                empty, held = False, ""
    if held and not separated:
        yield held


def builtin_texts(name: str) -> Texts:
    """The corpus of a name in `BUILTIN_SOURCES`, downloaded on first use."""
    if name == "python-docs":
        return Texts(name, _python_docs())
    path = download(SHAKESPEARE_URL, cache_home() / "tinyshakespeare" / "input.txt", SHAKESPEARE_SHA256)
    if name == "super_tiny_shakespear":
        with path.open(encoding="utf-8", newline="") as handle:
            return Texts(name, (Document(name, handle.read(1000).encode()),))
    return Texts("shakespeare", (Document("tinyshakespeare", path),))


def holdout_stride(val_fraction: float) -> int:
    """The n of "every n-th document is held out"; 0 for none. Raises ConfigError for a fraction outside 0 to 0.5."""
    if not 0 <= val_fraction <= 0.5:
        raise ConfigError(f"the validation fraction must be 0 to 0.5, not {val_fraction:g}", field="val_fraction")
    return round(1 / val_fraction) if val_fraction else 0


def split_documents(texts: Texts, val_fraction: float = 0.1) -> tuple[list[DocumentSlice], list[DocumentSlice]]:
    """The train and validation split of a corpus; deterministic.

    Of ten documents or more, every tenth is held out whole; of fewer, the last tenth of each (for Shakespeare's one
    file the usual 90/10 split). "Ten" is 1/`val_fraction`, rounded; 0 holds out nothing.
    """
    every = holdout_stride(val_fraction)
    whole = [DocumentSlice(document, 0, document.size) for document in texts.documents]
    if not every:
        return whole, []
    if len(whole) >= every:
        train = [part for index, part in enumerate(whole) if index % every != every - 1]
        return train, whole[every - 1 :: every]
    train, val = [], []
    for document, _, size in whole:
        boundary = int(size * (1 - val_fraction))
        train.append(DocumentSlice(document, 0, boundary))
        val.append(DocumentSlice(document, boundary, size))
    return train, val


def _python_docs() -> tuple[Document, ...]:
    """One document for each topic of the interpreter's help, sorted by name; each starts with its title.

    The topics overlap: "compound" contains "if" and "for". A topic of which larger ones contain more than half is
    left out, to keep training text out of the validation split.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("python-docs needs pydoc_data, which this Python was built without") from None
    seen: set[str] = set()
    documents = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [p for p in topics[name].split("\n\n")[1:] if len(p) > 40]
        repeated = sum(len(p) for p in paragraphs if p in seen)
        if repeated * 2 <= sum(map(len, paragraphs)):
            seen.update(paragraphs)
            title = "" if "\n***" in topics[name][:200] else f"{name}\n{'*' * len(name)}\n\n"
            documents.append(Document(name, (title + topics[name]).encode()))
    return tuple(sorted(documents, key=lambda document: document.name))


def _character_boundary(handle: BinaryIO, offset: int | None) -> int:
    """The start of the first character at or after `offset` (None: the end), after a byte order mark."""
    end = handle.seek(0, os.SEEK_END)
    if offset is None or offset >= end:
        return end
    handle.seek(offset)
    following = handle.read(3)
    if offset == 0:
        return 3 if following == _BYTE_ORDER_MARK else 0
    continuations = len(following) - len(following.lstrip(bytes(range(0x80, 0xC0))))
    return offset + continuations


def _separator_boundary(handle: BinaryIO, offset: int) -> int:
    """The end of the ``<|endoftext|>`` that `offset` is within, or else `offset`."""
    start = max(0, offset - len(_SEPARATOR) + 1)
    handle.seek(start)
    found = handle.read(offset - start + len(_SEPARATOR) - 1).find(_SEPARATOR)
    return offset if found < 0 else start + found + len(_SEPARATOR)


def _forced_split(text: str) -> int:
    """The index `MAX_CHUNK_CHARACTERS`, or before it where that is within an ``<|endoftext|>``."""
    start = text.find(END_OF_TEXT, MAX_CHUNK_CHARACTERS - len(END_OF_TEXT) + 1)
    return start if 0 <= start < MAX_CHUNK_CHARACTERS else MAX_CHUNK_CHARACTERS


def _last_safe_split(text: str, start: int) -> int:
    """The last index after `start` where a cut does not change the GPT-2 tokens; 0 if there is none.

    Preferably after a single newline between two characters that are not whitespace. Otherwise (Windows line ends, one
    very long line) before whitespace that follows a word, or else before a digit or a punctuation mark that follows a
    letter: GPT-2's pattern never joins these.
    """
    if text[start:].isspace():
        return 0
    newline = text.rfind("\n", start, len(text) - 1)
    while newline > 0:
        if not text[newline - 1].isspace() and not text[newline + 1].isspace():
            return newline + 1
        newline = text.rfind("\n", start, newline)
    for index in range(len(text) - 1, max(start, 0), -1):
        if text[index] in " \t\r\n" and not text[index - 1].isspace():
            return index
    for index in range(len(text) - 1, max(start, 0), -1):
        if text[index] in _AFTER_LETTER and text[index - 1].isalpha():
            return index
    return 0
