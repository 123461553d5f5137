"""Documents of a corpus, file by file: downloads run one file ahead, and files are removed when they are done."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gpt2.data.columns import detect_columns
from gpt2.data.parquet import count_rows, read_parquet_texts, text_columns
from gpt2.data.row_texts import read_jsonl_texts
from gpt2.errors import DataError
from gpt2.files import file_digest
from gpt2.hub import HubDataset, HubFile, fetch_dataset_file

BLOCK_CHARACTERS = 1 << 18  # the work of one task of a thread

_STOP_SECONDS = 2.0  # to wait for a download that stops; it may be waiting for the server

_log = logging.getLogger("gpt2.data")


class Position(NamedTuple):
    """Where a document starts: the number of its file in its split, and its row."""

    file: int
    row: int


class Block(NamedTuple):
    """Some documents in order, the number of the first among all of the split, and where the next one starts."""

    texts: list[str]
    first: int
    next: Position


class FileQueue:
    """The files of a split in order, each fetched while the one before is read."""

    def __init__(self, data: HubDataset, files: list[HubFile], folder: Path) -> None:
        self.files = files
        self._data, self._folder = data, folder
        self._fetched: dict[int, Path | BaseException] = {}
        self._threads: dict[int, threading.Thread] = {}
        self._rows: dict[int, int] = {}
        self._stop = threading.Event()

    def get(self, index: int) -> Path:
        """The path of a file, whose successor is fetched from now on. Raises what the download raised."""
        self._start(index)
        self._threads[index].join()
        if isinstance(result := self._fetched[index], BaseException):
            raise result
        if index + 1 < len(self.files):
            self._start(index + 1)
        return result

    def release(self, before: int) -> None:
        """Remove the files before this one, unless they were put there by hand."""
        for file in self.files[:before]:
            self._target(file).unlink(missing_ok=True)

    def fetch_again(self, index: int) -> bool:
        """Remove a file that is damaged, so that `get` fetches it again; return whether it was damaged here."""
        path, file = self._target(self.files[index]), self.files[index]
        if not path.is_file() or file_digest(path, file.digest) == file.digest:
            return False
        _log.warning("%s is damaged, and is downloaded again", path)
        path.unlink()
        del self._threads[index]
        return True

    def fraction(self, position: Position) -> float:
        """How much of the bytes of all files is before a position."""
        total = sum(file.size for file in self.files) or 1
        done = sum(file.size for file in self.files[: position.file])
        if position.file >= len(self.files):
            return 1.0
        path = self._fetched.get(position.file)
        if position.file not in self._rows and isinstance(path, Path) and path.suffix == ".parquet":
            self._rows[position.file] = count_rows(path)
        rows = self._rows.get(position.file)
        part = min(1.0, position.row / rows) if rows else 0.0
        return (done + part * self.files[position.file].size) / total

    def close(self) -> None:
        """Stop the download that is under way, so that it writes nothing later."""
        self._stop.set()
        for thread in self._threads.values():
            thread.join(_STOP_SECONDS)

    def _target(self, file: HubFile) -> Path:
        return self._folder / file.path.replace("/", "--")

    def _start(self, index: int) -> None:
        if index not in self._threads:
            self._threads[index] = threading.Thread(target=self._fetch, args=(index,), daemon=True)
            self._threads[index].start()

    def _fetch(self, index: int) -> None:
        file = self.files[index]
        try:
            self._fetched[index] = fetch_dataset_file(
                self._data, file, self._target(file), show_progress=False, is_cancelled=self._stop.is_set
            )
        except BaseException as error:
            self._fetched[index] = error


@dataclass(frozen=True)
class Reader:
    """How the files of a corpus are read. column: None to find it; join: see `HubCorpus`."""

    column: str | None = None
    join: bool = False

    def blocks(self, queue: FileQueue, start: Position, first: int) -> Iterator[Block]:
        """The documents from `start` on, whose number is `first`. Raises DataError for a damaged file."""
        texts: list[str] = []
        length = 0
        where = start
        for text, where in self._documents(queue, start):
            texts.append(text)
            length += len(text)
            if length >= BLOCK_CHARACTERS:
                yield Block(texts, first, where)
                first, texts, length = first + len(texts), [], 0
        if texts:
            yield Block(texts, first, where)

    def _documents(self, queue: FileQueue, start: Position) -> Iterator[tuple[str, Position]]:
        """Documents, each with where the next one starts."""
        rows = self._rows(queue, start)
        if not self.join:
            yield from rows
            return
        lines: list[str] = []
        begin = start
        for text, after in rows:
            if _is_title(text) and any(line.strip() for line in lines):
                yield "".join(lines), begin
                lines = []
            lines.append(text)
            begin = after
        if lines:
            yield "".join(lines), begin

    def _rows(self, queue: FileQueue, start: Position) -> Iterator[tuple[str, Position]]:
        for index in range(start.file, len(queue.files)):
            row = start.row if index == start.file else 0
            retried = False
            while True:
                try:
                    for texts in self._read(queue.get(index), row):
                        for text in texts:
                            row += 1
                            yield text, Position(index, row)
                    break
                except DataError:
                    if retried or not queue.fetch_again(index):
                        raise
                    retried = True

    def _read(self, path: Path, start_row: int) -> Iterator[list[str]]:
        if path.suffix == ".jsonl":
            yield from read_jsonl_texts(path, self.column, start_row)
            return
        column = self.column
        if column is None:
            names = text_columns(path)
            column = detect_columns(str(path), str(path), names).text
            if column is None:
                raise DataError(f"{path} has no text column: name one with --columns text=NAME", field="columns")
        yield from read_parquet_texts(path, column, start_row)


def _is_title(line: str) -> bool:
    """Whether a line of WikiText is the title of an article, such as `` = Robert Boulter = ``."""
    text = line.strip()
    return text.startswith("= ") and text.endswith(" =") and not text.startswith("= =")
