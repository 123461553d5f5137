"""Rows of JSON, CSV and Parquet files, one at a time, each with its location for error messages."""

import csv
import json
import logging
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
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
_LISTED_TEXTS = 1024
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


def read_rows(files: Sequence[Path], columns: Columns | None = None, bad_rows: BadRows | None = None) -> Iterator[Row]:
    """The rows of all files in order. Few are in memory at a time, except for a .json file that is one list.

    columns:  those that are read; None reads all. Of a Parquet file the others are None. The names of columns that
        were not read are logged at the end.
    bad_rows: what happens to rows that cannot be read; by default they are errors.

    Raises DataError, with file and line, for content that does not fit the file's suffix.
    """
    names = None if columns is None else columns.names
    unread: dict[str, None] = {}
    for row in _iter_rows(files, names, bad_rows or BadRows()):
        if names is not None and len(unread) < _MAX_UNREAD_NAMES:
            unread.update(dict.fromkeys(name for name in row[1] if name not in names))
        yield row
    if unread:
        listed = ", ".join(islice(map(str, unread), _MAX_UNREAD_NAMES))
        _log.warning("%s: columns that are not read: %s", files[0], listed)


def _iter_rows(files: Sequence[Path], names: Collection[str] | None, bad_rows: BadRows) -> Iterator[Row]:
    for path in files:
        for item in _READERS.get(path.suffix.lower(), _read_jsonl)(path, names):
            bad_rows.total += 1
            if isinstance(item, DataError):
                bad_rows.handle(item)
            else:
                yield item


def open_rows(
    ref: str, files: Sequence[Path], spec: str | None = None, bad_rows: BadRows | None = None
) -> tuple[Columns, Iterator[Row]]:
    """The columns to read (see `detect_columns`), by the names in the first 1,000 rows, and all rows.

    Raises DataError if there are no rows.
    """
    sample: list[Row] = []
    with suppress(DataError):  # it is raised again, unless it is skipped, when the rows are read
        sample.extend(islice(_iter_rows(files, (), BadRows(skip=True)), _SAMPLED_ROWS))
    if not sample:
        deque(_iter_rows(files, (), BadRows()), maxlen=0)  # raises the error that was suppressed, if there was one
        raise DataError(f"there are no rows in {ref}")
    names = dict.fromkeys(chain.from_iterable(record for _, record in sample))
    columns = detect_columns(ref, sample[0][0], names, spec)
    return columns, read_rows(files, columns, bad_rows)


def _open_binary(path: Path) -> BinaryIO:
    check_regular_file(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise read_error(path, error) from None


def _numbered_lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """The lines of a UTF-8 file, numbered, with their line ends, without a byte order mark; or why one is not text."""
    offset = 0
    with _open_binary(path) as handle:
        for number, line in enumerate(handle, 1):
            start, offset = offset, offset + len(line)
            text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if number == 1 and b"\0" in text:
                hint = encoding_hint(path, start)
                yield number, DataError(f"{path} is not UTF-8 text: it has a zero byte in line 1{hint}")
                continue
            try:
                yield number, text.decode()
            except UnicodeDecodeError as error:
                hint = encoding_hint(path, start + error.start)
                yield number, DataError(f"{path} line {number:,} is not UTF-8 text{hint}")


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file. Raises DataError for any other."""
    for _, line in _numbered_lines(path):
        if isinstance(line, DataError):
            raise line
        yield line


def _read_jsonl(path: Path, names: Collection[str] | None = None) -> Iterator[Row | DataError]:
    for number, line in _numbered_lines(path):
        if isinstance(line, DataError):
            yield line
        elif line.strip():
            yield _parse_row(f"{path} line {number}", line)


def read_jsonl_texts(path: Path, column: str | None, start_row: int = 0) -> Iterator[list[str]]:
    """The texts of one column of a .jsonl file from a row on, in lists; null is "". column: None to find it.

    Raises DataError for a row that cannot be read.
    """
    texts: list[str] = []
    for item in islice(_read_jsonl(path), start_row, None):
        if isinstance(item, DataError):
            raise item
        if column is None:
            column = detect_columns(str(path), item[0], item[1]).text
            if column is None:
                raise DataError(f"{path} has no text column: name one with --columns text=NAME", field="columns")
        missing = item[1].get(column) is None
        texts.append("" if missing else Columns(text=column).get_text(item))
        if len(texts) == _LISTED_TEXTS:
            yield texts
            texts = []
    yield texts


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
    """The rows below a header, each with the number of the line on which it starts."""
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
    reader = csv.reader(_text_lines(path), dialect, strict=True)
    header: list[str] = []
    line = 1
    while True:
        location = f"{path} line {line}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield DataError(f"{location} is not CSV: {error}")
            fields = []
        line = reader.line_num + 1
        if fields is None:
            return
        if header and fields:
            if len(fields) == len(header):
                yield location, dict(zip(header, fields, strict=True))
            else:
                yield DataError(f"{location} has {len(fields)} fields, the header has {len(header)}")
        elif fields:
            header = [name.strip() for name in fields]
            if duplicate := next((name for name, count in Counter(header).items() if count > 1), None):
                raise DataError(f"{location}: two columns are called '{shorten(duplicate)}'")


_READERS = {".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": read_parquet}
