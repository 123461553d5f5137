"""Parquet files, a row group at a time, in bounded memory."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2.data.columns import Row
from gpt2.errors import DataError, missing_extra
from gpt2.files import check_regular_file, read_error
from gpt2.terminal import shorten

_PARQUET_BATCH_ROWS = 1024  # rows in memory at a time, fewer if they may be large
_PARQUET_BATCH_BYTES = 1 << 28
_PARQUET_BUFFER_BYTES = 1 << 20  # of the file in memory; otherwise it is the whole column of a row group
_PARQUET_MAX_GROWTH = 1000  # decoded bytes per byte of the file
_PARQUET_FREE_BYTES = 1 << 26  # decoded bytes that any file may have


def read_parquet(path: Path, names: Collection[str] | None = None) -> Iterator[Row | DataError]:
    """The rows of a Parquet file. Only the columns in `names` (None: all) are decoded; the others are None."""
    number = 0
    with open_parquet(path) as file:
        unread = {name: None for name in file.schema_arrow.names if names is not None and name not in names}
        read = [name for name in file.schema_arrow.names if name not in unread]
        if not read:
            yield from ((f"{path} row {i}", dict(unread)) for i in range(1, file.metadata.num_rows + 1))
            return
        for batch in _iter_batches(path, file, read):
            for row in _decode_batch(path, batch, number):
                yield row if isinstance(row, DataError) else (row[0], unread | row[1])
            number += batch.num_rows


def read_parquet_column(
    path: Path, column: str, add_names: Callable[[Iterable[str]], None]
) -> Iterator[list[str | Row | DataError]]:
    """The texts of one column, in lists; of a row without text the row, as `read_parquet` has it.

    add_names: called with the names of all columns.
    """
    number = 0
    with open_parquet(path) as file:
        add_names(file.schema_arrow.names)
        if column not in file.schema_arrow.names or not _is_text(file.schema_arrow.field(column).type):
            for row in read_parquet(path, (column,)):
                yield [row]
            return
        for batch in _iter_batches(path, file, [column]):
            try:
                values: list[Any] = batch.column(0).to_pylist()
            except UnicodeDecodeError:
                values = [None]
            yield [*_decode_batch(path, batch, number)] if None in values else values
            number += batch.num_rows


def read_parquet_texts(path: Path, column: str, start_row: int = 0) -> Iterator[list[str]]:
    """The texts of one column from a row on, in lists; null is "".

    Raises DataError for a column that does not exist or is not text, and for a damaged file.
    """
    with open_parquet(path) as file:
        if column not in file.schema_arrow.names:
            raise DataError(
                f"{path} has no column '{column}': it has {shorten(', '.join(file.schema_arrow.names), 300)}",
                field="columns",
            )
        kind = file.schema_arrow.field(column).type
        if not _is_text(kind):
            raise DataError(f"the column '{column}' of {path} is {kind}, not text", field="columns")
        group, number = 0, 0
        while group < file.num_row_groups and number + file.metadata.row_group(group).num_rows <= start_row:
            number += file.metadata.row_group(group).num_rows
            group += 1
        for batch in _iter_batches(path, file, [column], group):
            skipped = min(max(0, start_row - number), batch.num_rows)
            number += batch.num_rows
            try:
                texts = batch.column(0).slice(skipped).to_pylist()
            except UnicodeDecodeError as error:
                rows = f"{number - batch.num_rows + 1:,} to {number:,}"
                raise DataError(f"{path}: '{column}' of a row from {rows} is not UTF-8 text ({error.reason})") from None
            yield [text or "" for text in texts]


def text_columns(path: Path) -> list[str]:
    """The names of the columns of a Parquet file, without decoding any. Raises DataError for a damaged file."""
    with open_parquet(path) as file:
        return list(file.schema_arrow.names)


def count_rows(path: Path) -> int:
    """The number of rows of a Parquet file. Raises DataError for a damaged file."""
    with open_parquet(path) as file:
        return file.metadata.num_rows


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. Raises DataError for what cannot be read, while it is open, too."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise missing_extra("pyarrow", "data", f"reading {path}") from None
    check_regular_file(path)
    try:
        handle = path.open("rb")
    except OSError as error:
        raise read_error(path, error) from None
    with handle:
        try:
            yield pq.ParquetFile(handle, pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last for the name of a column
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(f"{path} is not a readable Parquet file: {reason}") from None


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type is text."""
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _iter_batches(path: Path, file: Any, columns: list[str], first_group: int = 0) -> Iterator[Any]:
    """Batches of some columns, from a row group on.

    Raises DataError if they decode to far more than the size of the file.
    """
    allowed = _PARQUET_FREE_BYTES + _PARQUET_MAX_GROWTH * path.stat().st_size
    message = (
        f"{path} decodes to more than {allowed:,} bytes, {_PARQUET_MAX_GROWTH:,} times its size: it is damaged, or "
        "made to exhaust memory"
    )
    leaves = [i for i in range(len(file.schema)) if _is_in_columns(file.schema.column(i).path, columns)]
    decoded = 0
    for group in range(first_group, file.num_row_groups):
        # A reader of no rows raises where a column's metadata are broken: `column(i)` alone would end the process.
        next(file.reader.iter_batches(0, [group], leaves), None)
        meta = file.metadata.row_group(group)
        size = max((meta.column(i).total_uncompressed_size for i in leaves), default=0)
        if size > allowed:
            raise DataError(message)
        rows = min(_PARQUET_BATCH_ROWS, max(1, _PARQUET_BATCH_BYTES // max(1, size)))  # a value may be the whole chunk
        for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
            decoded += batch.nbytes
            if decoded > allowed:
                raise DataError(message)
            yield batch


def _is_in_columns(path: str, columns: list[str]) -> bool:
    """Whether a path such as ``messages.list.element.content`` belongs to one of the columns."""
    return any(path == name or path.startswith(f"{name}.") for name in columns)


def _decode_batch(path: Path, batch: Any, before: int) -> Iterator[Row | DataError]:
    """The rows of a batch, after `before` earlier ones; a DataError for one that has no equal in Python."""
    try:
        records = batch.to_pylist()
    except (ValueError, OverflowError):  # not UTF-8, or a time that datetime cannot hold
        records = None
    for i in range(batch.num_rows):
        location = f"{path} row {before + i + 1}"
        try:
            yield location, batch.slice(i, 1).to_pylist()[0] if records is None else records[i]
        except (ValueError, OverflowError) as error:
            yield DataError(f"{location} cannot be decoded: {str(error).splitlines()[0]}")
