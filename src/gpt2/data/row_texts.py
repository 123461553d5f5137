"""One text column of row files, in lists: the texts that `read_rows` gives, several times as fast.

A part of a file without anything unusual is read in one go. Any other part is read row by row by `gpt2.data.rows`,
which names what is wrong.
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from gpt2.data.columns import Columns, Row, detect_columns
from gpt2.data.parquet import read_parquet_column
from gpt2.data.rows import BadRows, UnreadColumns, csv_records, decode_lines, open_binary, parse_lines, read_file
from gpt2.errors import DataError

_BLOCK_BYTES = 1 << 20
_LISTED_ROWS = 1024

Item = TypeVar("Item")
Items = list[str | Row | DataError]
"""Of each row its text, or else the row, or why there is none."""


def read_texts(files: Sequence[Path], columns: Columns, bad_rows: BadRows) -> Iterator[list[str]]:
    """The texts of all rows in order, a part of a file at a time; see `read_rows`.

    Raises DataError for a row without text that is not skipped.
    """
    assert columns.text is not None
    unread = UnreadColumns(columns.names)
    for path in files:
        for items in _READERS.get(path.suffix.lower(), _jsonl_items)(path, columns.text, unread):
            bad_rows.total += len(items)
            texts: list[str] = []
            for item in items:
                if isinstance(item, str):
                    texts.append(item)
                    continue
                try:
                    texts.append(_text_of_row(item, columns))
                except DataError as error:
                    bad_rows.handle(error)
            yield texts
    unread.report(files[0])


def read_jsonl_texts(path: Path, column: str | None, start_row: int = 0) -> Iterator[list[str]]:
    """The texts of one column of a .jsonl file from a row on, in lists; null is "". column: None to find it.

    Raises DataError for a row that cannot be read.
    """
    if column is None:
        first = next(read_file(path, None), None)
        if first is None:
            return
        if isinstance(first, DataError):
            raise first
        column = detect_columns(str(path), *first).text
        if column is None:
            raise DataError(f"{path} has no text column: name one with --columns text=NAME", field="columns")
    columns = Columns(text=column)
    for items in _jsonl_items(path, column, UnreadColumns((column,))):
        kept, start_row = items[start_row:], max(0, start_row - len(items))
        yield [item if isinstance(item, str) else _text_of_row(item, columns, null="") for item in kept]


def _text_of_row(item: Row | DataError, columns: Columns, null: str | None = None) -> str:
    """The text of a row; `null`, if given, if it has none. Raises DataError for a row that cannot be read."""
    if isinstance(item, DataError):
        raise item
    if null is not None and item[1].get(columns.text or "") is None:
        return null
    return columns.get_text(item)


def _jsonl_items(path: Path, column: str, unread: UnreadColumns) -> Iterator[Items]:
    number, offset = 1, 0  # of the first line of a block
    with open_binary(path) as handle:
        while data := handle.read(_BLOCK_BYTES):
            data += handle.readline()
            found: Items | None = _scan_lines(data, column, unread, is_first=number == 1)
            if found is None:
                found = _add_names(parse_lines(path, decode_lines(path, io.BytesIO(data), number, offset)), unread)
            yield found
            number, offset = number + data.count(b"\n"), offset + len(data)


def _scan_lines(data: bytes, column: str, unread: UnreadColumns, *, is_first: bool) -> Items | None:
    """The texts of a column of lines of JSON; None unless each line is an object that has it, and no blank line."""
    decode = json.JSONDecoder().raw_decode
    texts: Items = []
    names = None
    try:
        lines = data.decode()
        position, size = int(is_first and lines.startswith("\ufeff")), len(lines)
        while position < size:
            record, end = decode(lines, position)
            stop = lines.find("\n", position)
            stop = size if stop < 0 else stop
            if end != stop and (end > stop or lines[end:stop].strip(" \t\r")):
                return None
            text = record[column]
            if type(text) is not str:
                return None
            texts.append(text)
            if record.keys() != names:
                names = record.keys()
                unread.add(names)
            position = stop + 1
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return texts


def _csv_items(path: Path, column: str, unread: UnreadColumns) -> Iterator[Items]:
    names: list[str] | None = None
    place: int | None = None
    for batch in _lists(csv_records(path)):
        items: Items = []
        for line, header, fields in batch:
            if header is not names:
                names, place = header, header.index(column) if column in header else None
                unread.add(header)
            if isinstance(fields, DataError):
                items.append(fields)
            elif place is None:
                items.append((f"{path} line {line}", {}))
            else:
                items.append(fields[place])
        yield items


def _parquet_items(path: Path, column: str, unread: UnreadColumns) -> Iterator[Items]:
    yield from read_parquet_column(path, column, unread.add)


def _json_items(path: Path, column: str, unread: UnreadColumns) -> Iterator[Items]:
    for rows in _lists(read_file(path, (column,))):
        yield _add_names(rows, unread)


def _add_names(rows: Iterable[Row | DataError], unread: UnreadColumns) -> Items:
    """The rows, whose columns are added to `unread`."""
    items: Items = []
    for row in rows:
        items.append(row)
        if not isinstance(row, DataError):
            unread.add(row[1])
    return items


def _lists(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lists of `_LISTED_ROWS`."""
    iterator = iter(items)
    while found := list(islice(iterator, _LISTED_ROWS)):
        yield found


_READERS = {".json": _json_items, ".csv": _csv_items, ".tsv": _csv_items, ".parquet": _parquet_items}
