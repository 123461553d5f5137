"""Rows of JSON, CSV and Parquet files, one at a time, each with its location for error messages."""

import csv
import json
import logging
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from gpt2.data.columns import Columns, Row, detect_columns, type_name
from gpt2.data.encodings import encoding_hint
from gpt2.data.parquet import read_parquet
from gpt2.errors import DataError
from gpt2.files import check_regular_file, read_error
from gpt2.terminal import shorten

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
BAD_ROWS_CHOICES = ("error", "skip")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SAMPLED_ROWS = 1000  # whose columns are looked at to choose those to read
_NAMED_BAD_ROWS = 3
_MAX_UNREAD_NAMES = 20
_LONGEST_CSV_FIELD = (1 << 31) - 1  # characters; the csv module's own default is 131,072

_log = logging.getLogger("gpt2")


@dataclass
class BadRows:
    """What happens to rows that cannot be read or used: the first is an error, or they are skipped and counted."""

    skip: bool = False
    total: int = 0  # rows, including bad ones
    errors: list[DataError] = field(default_factory=list)  # the first few
    skipped: int = 0

    def handle(self, error: DataError) -> None:
        """Count a bad row; unless bad rows are skipped, raise its error."""
        if not self.skip:
            raise error
        self.skipped += 1
        if self.skipped <= _NAMED_BAD_ROWS:
            self.errors.append(error)

    def report(self, name: str) -> None:
        """Log what was skipped. Raises DataError if most rows were."""
        if not self.skipped:
            return
        named = "; ".join(str(error) for error in self.errors)
        more = f"; and {self.skipped - len(self.errors):,} more" if self.skipped > len(self.errors) else ""
        message = f"{name}: {self.skipped:,} of {self.total:,} rows are bad ({named}{more})"
        if self.skipped * 2 > self.total:
            raise DataError(f"{message}: too many to skip", field="bad_rows")
        _log.warning("%s and were skipped", message)


class UnreadColumns:
    """The names of columns that are there and not read, to be logged."""

    def __init__(self, names: Collection[str]) -> None:
        """names: the columns that are read."""
        self._names, self._unread = names, dict[str, None]()

    def add(self, names: Iterable[str]) -> None:
        """Add the columns of a row."""
        if len(self._unread) < _MAX_UNREAD_NAMES:
            self._unread.update(dict.fromkeys(name for name in names if name not in self._names))

    def report(self, first_file: Path) -> None:
        """Log the names."""
        if self._unread:
            listed = ", ".join(islice(map(str, self._unread), _MAX_UNREAD_NAMES))
            _log.warning("%s: columns that are not read: %s", first_file, listed)


def read_rows(files: Sequence[Path], columns: Columns | None = None, bad_rows: BadRows | None = None) -> Iterator[Row]:
    """The rows of all files in order. Few are in memory at a time, except for a .json file that is one list.

    columns:  those that are read; None reads all. Of a Parquet file the others are None. The names of columns that
        were not read are logged at the end.
    bad_rows: what happens to rows that cannot be read; by default they are errors.

    Raises DataError, with file and line, for content that does not fit the file's suffix.
    """
    names = None if columns is None else columns.names
    unread = UnreadColumns(names or ())
    for row in _iter_rows(files, names, bad_rows or BadRows()):
        if names is not None:
            unread.add(row[1])
        yield row
    unread.report(files[0])


def _iter_rows(files: Sequence[Path], names: Collection[str] | None, bad_rows: BadRows) -> Iterator[Row]:
    for path in files:
        for item in read_file(path, names):
            bad_rows.total += 1
            if isinstance(item, DataError):
                bad_rows.handle(item)
            else:
                yield item


def read_file(path: Path, names: Collection[str] | None) -> Iterator[Row | DataError]:
    """The rows of a file, and of those that cannot be read why. names: the columns that are read; None reads all."""
    return _READERS.get(path.suffix.lower(), _read_jsonl)(path, names)


def find_columns(ref: str, files: Sequence[Path], spec: str | None = None) -> Columns:
    """The columns to read (see `detect_columns`), by the names in the first 1,000 rows.

    Raises DataError if there are no rows.
    """
    sample: list[Row] = []
    with suppress(DataError):  # it is raised again, unless it is skipped, when the rows are read
        sample.extend(islice(_iter_rows(files, (), BadRows(skip=True)), _SAMPLED_ROWS))
    if not sample:
        deque(_iter_rows(files, (), BadRows()), maxlen=0)  # raises the error that was suppressed, if there was one
        raise DataError(f"there are no rows in {ref}")
    names = dict.fromkeys(chain.from_iterable(record for _, record in sample))
    return detect_columns(ref, sample[0][0], names, spec)


def open_binary(path: Path) -> BinaryIO:
    """A file to read. Raises DataError for what cannot be read."""
    check_regular_file(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise read_error(path, error) from None


def decode_lines(
    path: Path, lines: Iterable[bytes], number: int = 1, offset: int = 0
) -> Iterator[tuple[int, str | DataError]]:
    """Lines of a UTF-8 file, numbered, with their line ends, without a byte order mark; or why one is not text.

    number, offset: the number of the first line, and the byte at which it starts.
    """
    for n, line in enumerate(lines, number):
        start, offset = offset, offset + len(line)
        text = line.removeprefix(_BYTE_ORDER_MARK) if n == 1 else line
        if n == 1 and b"\0" in text:
            hint = encoding_hint(path, start)
            yield n, DataError(f"{path} is not UTF-8 text: it has a zero byte in line 1{hint}")
            continue
        try:
            yield n, text.decode()
        except UnicodeDecodeError as error:
            hint = encoding_hint(path, start + error.start)
            yield n, DataError(f"{path} line {n:,} is not UTF-8 text{hint}")


def _numbered_lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """The lines of a file; see `decode_lines`."""
    with open_binary(path) as handle:
        yield from decode_lines(path, handle)


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file. Raises DataError for any other."""
    for _, line in _numbered_lines(path):
        if isinstance(line, DataError):
            raise line
        yield line


def _read_jsonl(path: Path, names: Collection[str] | None = None) -> Iterator[Row | DataError]:
    return parse_lines(path, _numbered_lines(path))


def parse_lines(path: Path, lines: Iterable[tuple[int, str | DataError]]) -> Iterator[Row | DataError]:
    """The rows of lines of JSON, numbered; see `decode_lines`. Blank lines are left out."""
    for number, line in lines:
        if isinstance(line, DataError):
            yield line
        elif line.strip():
            yield _parse_row(f"{path} line {number}", line)


def _parse_row(location: str, text: str) -> Row | DataError:
    try:
        return _check_object(location, _parse_json(location, text))
    except DataError as error:
        return error


def _parse_json(location: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location} is not JSON: {error}") from None


def _check_object(location: str, record: Any) -> Row | DataError:
    if isinstance(record, dict):
        return location, record
    return DataError(f"{location} is {type_name(record)}, not an object with columns")


def _read_json(path: Path, names: Collection[str] | None = None) -> Iterator[Row | DataError]:
    """A .json file: one list of rows, or one row per line."""
    first = next((line.lstrip() for _, line in _numbered_lines(path) if isinstance(line, str) and line.strip()), "")
    if not first.startswith("["):
        yield from _read_jsonl(path)
        return
    records = _parse_json(str(path), "".join(_text_lines(path)))
    for number, record in enumerate(records, 1):
        yield _check_object(f"{path} row {number}", record)


def _read_csv(path: Path, names: Collection[str] | None = None) -> Iterator[Row | DataError]:
    for line, header, fields in csv_records(path):
        yield (
            fields if isinstance(fields, DataError) else (f"{path} line {line}", dict(zip(header, fields, strict=True)))
        )


def csv_records(path: Path) -> Iterator[tuple[int, list[str], list[str] | DataError]]:
    """Of each row below the header: the number of the line on which it starts, the header, and its fields.

    Instead of the fields of a row that does not fit the header, the error.
    """
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
    reader = csv.reader(_text_lines(path), dialect, strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield line, header, DataError(f"{path} line {line} is not CSV: {error}")
            fields = []
        start, line = line, reader.line_num + 1
        if fields is None:
            return
        if header and fields:
            if len(fields) != len(header):
                problem = f"{path} line {start} has {len(fields)} fields, the header has {len(header)}"
                yield start, header, DataError(problem)
            else:
                yield start, header, fields
        elif fields:
            header = [name.strip() for name in fields]
            if duplicate := next((name for name, count in Counter(header).items() if count > 1), None):
                raise DataError(f"{path} line {start}: two columns are called '{shorten(duplicate)}'")


_READERS = {".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": read_parquet}
