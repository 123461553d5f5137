"""Where text comes from: Shakespeare, the Python language reference, your own files and folders.

`open_source` turns what a user types after `--data` into a `Source`: a name and its documents. A document
knows its size and gives its text in pieces, so that a corpus of any size passes through little memory.
"""

import codecs
import hashlib
import io
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gpt2.data.data_files import (
    TEXT_SUFFIXES,
    UNAMBIGUOUS_ROW_SUFFIXES,
    data_name,
    glob_files,
    is_glob,
    list_files,
    read_error,
    write_error,
)
from gpt2.data.rows import find_row_files, open_rows
from gpt2.data.text_cache import cache_texts
from gpt2.errors import UserError, did_you_mean
from gpt2.files import cache_home, check_regular_file, expand_path, file_sha256, staging_folder

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

BUILTIN_SOURCES = {
    "shakespeare": "tinyshakespeare: 1.1 MB of the plays, downloaded once",
    "tiny_shakespear": "the same, under the original project's spelling",
    "super_tiny_shakespear": "the first 1,000 characters of tinyshakespeare, to overfit in seconds",
    "python-docs": "the Python language reference that every interpreter carries; needs no network",
}
CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_log = logging.getLogger("gpt2")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, in memory or in a file; `name` is what messages call it.

    begin, end: which bytes of the file are its own; None for all that follow.
    """

    name: str
    data: bytes | Path = field(repr=False)
    start: int = 0
    stop: int | None = None

    @property
    def size(self) -> int:
        """Bytes of UTF-8, a leading byte order mark included."""
        if self.stop is not None:
            return self.stop - self.start
        if isinstance(self.data, bytes):
            return len(self.data)
        try:
            return self.data.stat().st_size
        except OSError as error:
            raise read_error(self.data, error) from None

    def iter_chunks(self, start: int = 0, stop: int | None = None, chunk_bytes: int = CHUNK_BYTES) -> Iterator[str]:
        """The text of bytes [start, stop), in pieces of about `piece_bytes`.

        Either end is moved forward to the next character, so neighbouring ranges neither lose nor share one.
        Newlines stay as they are; a byte order mark at the head of the document is dropped. Pieces end only
        where GPT-2's pre-tokenization ends a token whatever the context, so tokenizing them one by one equals
        tokenizing the whole; where a block has no such place, the piece grows.

        Raises `UserError` at the first byte that is not UTF-8, or when the file cannot be read.
        """
        with self._open() as handle:
            position, end = (_character_boundary(handle, self._file_offset(offset)) for offset in (start, stop))
            handle.seek(position)
            decoder = codecs.getincrementaldecoder("utf-8")()
            text, searched = "", 0
            while position < end:
                block = handle.read(min(chunk_bytes, end - position))
                if not block:
                    raise UserError(f"{self.name} became shorter while it was being read")
                try:
                    text += decoder.decode(block, final=position + len(block) >= end)
                except UnicodeDecodeError as error:
                    offset = position - len(decoder.getstate()[0]) + error.start
                    raise UserError(f"{self.name} is not UTF-8 text: bad byte at offset {offset:,}") from None
                position += len(block)
                cut = _last_safe_split(text, searched)
                if cut:
                    yield text[:cut]
                    text = text[cut:]
                searched = max(0, len(text) - 1)
            if text:
                yield text

    def _file_offset(self, offset: int | None) -> int | None:
        """Where in the file a place in the document is; None stands for the end of either."""
        place = self.stop if offset is None else self.start + offset
        return place if place is None or self.stop is None else min(place, self.stop)

    def _open(self) -> BinaryIO:
        if isinstance(self.data, bytes):
            return io.BytesIO(self.data)
        try:
            return self.data.open("rb")
        except OSError as error:
            raise read_error(self.data, error) from None


class DocumentSlice(NamedTuple):
    """The bytes [start, stop) of a document."""

    document: Document
    start: int
    stop: int


@dataclass(frozen=True)
class Source:
    """A corpus: a name, and its documents in an order that does not change from one machine to the next."""

    name: str
    documents: tuple[Document, ...]


def open_source(ref: str, columns: str | None = None) -> Source:
    """The corpus that `ref` names: one of `SOURCES`, a text file, a folder of them, or rows with a column of text.

    A name wins over a path of the same spelling (`./shakespeare` is the path). In a folder, files ending in
    .txt, .md, .text and .rst count, at any depth, in the order of their paths; hidden and empty ones do not, and
    neither does what lies in a run folder, a model folder or a folder of shards. A pattern such as ``notes/*.txt``
    is the files that it matches. Of rows (.jsonl, .csv, .parquet and their like) each text is a document.

    columns: which column of the rows is the text, "text=NAME"; None to go by what the first row has.

    Raises `UserError` when there is no such thing, when it has no text, or when it is plainly not text.
    """
    if ref not in BUILTIN_SOURCES and (files := find_row_files(ref)):
        return _source_from_rows(ref, files, columns)
    if columns is not None:
        raise UserError(f"{ref} has no rows, of which --columns '{columns}' could name some")
    if ref in ("shakespeare", "tiny_shakespear"):
        return Source("shakespeare", (Document("tinyshakespeare", _shakespeare()),))
    if ref == "super_tiny_shakespear":
        with _shakespeare().open(encoding="utf-8", newline="") as handle:
            head = handle.read(1000)
        return Source(ref, (Document(ref, head.encode()),))
    if ref == "python-docs":
        return Source(ref, _python_docs())
    path = expand_path(ref)
    if path.is_dir():
        return Source(data_name(ref), _documents_from_folder(path))
    if is_glob(ref) and (matching := glob_files(ref)):
        return Source(data_name(ref), _documents_from_files(matching, ref))
    if not path.exists():
        meant, names = did_you_mean(ref, BUILTIN_SOURCES), ", ".join(BUILTIN_SOURCES)
        raise UserError(f"no file, folder or corpus '{ref}'{meant}: the corpora are {names}")
    _check_is_text(path)
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    return Source(path.stem, (Document(str(path), path),))


def holdout_stride(val_fraction: float) -> int:
    """Each so many-th document is held out, 0 for none. Raises `UserError` for a fraction beyond 0 to 0.5."""
    if not 0 <= val_fraction <= 0.5:
        raise UserError(f"the validation fraction must lie between 0 and 0.5, not {val_fraction:g}")
    return round(1 / val_fraction) if val_fraction else 0


def split_documents(source: Source, val_fraction: float = 0.1) -> tuple[list[DocumentSlice], list[DocumentSlice]]:
    """Train and validation parts of a corpus, the same ones every time.

    With ten documents or more every tenth is held out whole; with fewer, the last tenth of each (for one file
    of Shakespeare that is the customary 90/10 split). "Ten" is 1/`val_fraction`, rounded; 0 holds out
    nothing.
    """
    every = holdout_stride(val_fraction)
    whole = [DocumentSlice(document, 0, document.size) for document in source.documents]
    if not every:
        return whole, []
    if len(whole) >= every:
        train = [part for index, part in enumerate(whole) if index % every != every - 1]
        return train, whole[every - 1 :: every]
    train, val = [], []
    for document, _, size in whole:
        border = int(size * (1 - val_fraction))
        train.append(DocumentSlice(document, 0, border))
        val.append(DocumentSlice(document, border, size))
    return train, val


def download(url: str, path: Path, sha256: str, timeout: float = 30.0) -> Path:
    """The file at `path`, fetched from `url` first if it is not there; `timeout` is in seconds of silence.

    The file appears whole, with the right checksum, or not at all. One already there is never overwritten.
    Raises `UserError` saying what could not be had, from where, and where to put it by hand.
    """
    if path.exists():
        _check_sha256(path, sha256, url)
        return path
    with ExitStack() as stack:
        try:
            partial = stack.enter_context(staging_folder(path)) / path.name
        except OSError as error:
            raise write_error(path.parent, error) from None
        try:
            with partial.open("wb") as handle:
                found = _download_to(url, handle, timeout)
            if found != sha256:
                raise OSError(f"what came has sha256 {found[:12]}…, not {sha256[:12]}…")
            partial.replace(path)
        except (OSError, HTTPException) as error:
            failure = f"cannot download {path.name} from {url} ({_error_reason(error)})"
            raise UserError(f"{failure}: put it at {path} by hand") from None
    return path


def _download_to(url: str, out: BinaryIO, timeout: float) -> str:
    """Stream `url` into `out` behind a progress bar; the sha256 of what came."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    digest, done = hashlib.sha256(), 0
    with (
        urllib.request.urlopen(url, timeout=timeout) as response,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        length = int(response.headers.get("Content-Length") or 0)
        task = progress.add_task(url.rsplit("/", 1)[-1], total=length or None)
        while block := response.read(1 << 16):
            out.write(block)
            digest.update(block)
            done += len(block)
            progress.update(task, completed=done)
    if length and done != length:
        raise OSError(f"the connection ended after {done:,} of {length:,} bytes")
    return digest.hexdigest()


def _error_reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(reason) or type(reason).__name__


def _check_sha256(path: Path, sha256: str, url: str) -> None:
    check_regular_file(path)
    try:
        found = file_sha256(path)
    except OSError as error:
        raise read_error(path, error) from None
    if found != sha256:
        difference = f"sha256 {found[:12]}…, not {sha256[:12]}…"
        raise UserError(f"{path} is not the file from {url} ({difference}): remove it to have that one fetched")


def _shakespeare() -> Path:
    return download(SHAKESPEARE_URL, cache_home() / "tinyshakespeare" / "input.txt", SHAKESPEARE_SHA256)


def _python_docs() -> tuple[Document, ...]:
    """One document per topic of the interpreter's own help, by name; each opens with its title.

    The help repeats itself: "if" and "for" stand in "compound" again. A topic that larger ones already
    contain for the most part is left out, or the validation split would be text that training has seen.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python was built without pydoc_data, where python-docs comes from") from None
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


def _source_from_rows(ref: str, files: list[Path], columns: str | None) -> Source:
    chosen, rows = open_rows(ref, files, columns)
    if chosen.text is None:
        raise UserError(
            f"the rows of {ref} are prompts and answers, which `gpt2 finetune` learns from: for plain text, say which "
            "column it is in with --columns text=NAME"
        )
    name = data_name(ref)
    path, ends = cache_texts(name, files, chosen, rows)
    if not len(ends):
        raise UserError(f"every text in {ref} is empty")
    places = pairwise([0, *ends.tolist()])
    return Source(name, tuple(Document(f"{name} text {i}", path, *place) for i, place in enumerate(places, 1)))


def _documents_from_folder(folder: Path) -> tuple[Document, ...]:
    found, passed_over = list_files(folder, (*TEXT_SUFFIXES, *UNAMBIGUOUS_ROW_SUFFIXES))
    files = [file for file in found if file.suffix.lower() in TEXT_SUFFIXES]
    passed_over += [f"{file} (rows, not text)" for file in found if file.suffix.lower() in UNAMBIGUOUS_ROW_SUFFIXES]
    if passed_over:
        others = f" and {len(passed_over) - 1:,} more" if len(passed_over) > 1 else ""
        _log.warning("%s: passed over %s%s", folder, min(passed_over), others)
    if not files:
        raise UserError(f"no text files in {folder}: files ending in {', '.join(TEXT_SUFFIXES)} count")
    return _documents_from_files(files, folder)


def _documents_from_files(files: list[Path], ref: str | Path) -> tuple[Document, ...]:
    """One document for each file that is not empty."""
    for file in files:
        _check_is_text(file)
    filled = [file for file in files if file.stat().st_size]
    if not filled:
        raise UserError(f"every text file in {ref} is empty")
    return tuple(Document(str(file), file) for file in filled)


def _check_is_text(path: Path) -> None:
    """Refuse what plainly is no text before hours go by; the rest shows when it is decoded."""
    check_regular_file(path)
    try:
        with path.open("rb") as handle:
            head = handle.read(8192)
    except OSError as error:
        raise read_error(path, error) from None
    if b"\0" in head:
        raise UserError(f"{path} is not a text file: it has a zero byte at offset {head.index(0):,}")


def _character_boundary(handle: BinaryIO, offset: int | None) -> int:
    """Where the first character at or behind `offset` starts (the end, for None), past a byte order mark."""
    end = handle.seek(0, os.SEEK_END)
    if offset is None or offset >= end:
        return end
    handle.seek(offset)
    following = handle.read(3)
    if offset == 0:
        return 3 if following == _BYTE_ORDER_MARK else 0
    continuations = len(following) - len(following.lstrip(bytes(range(0x80, 0xC0))))
    return offset + continuations


def _last_safe_split(text: str, start: int) -> int:
    """The last place behind `begin` where a cut leaves the GPT-2 tokens as they are; 0 when there is none.

    Best after a newline that stands alone between two other characters. Failing that (Windows line ends, one
    endless line), before the whitespace behind a word: GPT-2's pattern never joins it to what stands before.
    """
    newline = text.rfind("\n", start, len(text) - 1)
    while newline > 0:
        if not text[newline - 1].isspace() and not text[newline + 1].isspace():
            return newline + 1
        newline = text.rfind("\n", start, newline)
    for index in range(len(text) - 1, max(start, 0), -1):
        if text[index] in " \t\r\n" and not text[index - 1].isspace():
            return index
    return 0
