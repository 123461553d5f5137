"""Rows and texts of task files: JSON lines, JSON, Parquet, plain text, each also as .gz or inside an archive."""

import gzip
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2.errors import DataError, missing_extra
from gpt2.files import check_regular_file

Row = tuple[str, dict[str, Any]]
"""Where a row stands, such as ``piqa.jsonl line 7``, and its fields."""

MAX_BYTES = 2**31  # of an uncompressed file: what claims more is damaged or hostile
_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def read_bytes(path: Path, member: str | None = None) -> bytes:
    """The content of a file, uncompressed; of an archive (.zip, .tar.gz, .tgz), the one file whose path ends so.

    Raises UserError for a file that is missing, damaged, or larger than 2 GiB.
    """
    check_regular_file(path)
    name = path.name.lower()
    try:
        if name.endswith((".zip", ".tgz", ".tar.gz")):
            return _read_member(path, member)
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
            return _read_all(file, path)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _read_all(file: Any, path: Path) -> bytes:
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DataError(f"{path} holds more than {MAX_BYTES >> 30} GiB")
    return content


def _read_member(path: Path, member: str | None) -> bytes:
    if member is None:
        raise DataError(f"{path} is an archive: unpack it and name the file in it")
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(member)]
            if names:
                with archive.open(names[0]) as file:
                    return _read_all(file, path)
    else:
        with tarfile.open(path) as archive:
            for info in archive:
                if info.isfile() and info.name.endswith(member):
                    return _read_all(archive.extractfile(info), path)
    raise DataError(f"{path} holds no {member}")


def is_parquet(content: bytes) -> bool:
    """Whether these are the bytes of a Parquet file."""
    return content[:4] == b"PAR1"


def text_of(content: bytes, where: str) -> str:
    """UTF-8 bytes as text, line ends as they are. Raises UserError for what is no UTF-8."""
    try:
        return content.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: bad byte at offset {error.start:,}") from None


def rows_of(content: bytes, where: str) -> Iterator[Row]:
    """The rows of a file: Parquet, one JSON list, or JSON lines. Raises UserError with the line that is wrong."""
    if is_parquet(content):
        yield from _parquet_rows(content, where)
        return
    text = text_of(content, where)
    if text.lstrip()[:1] == "[":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}") from None
        yield from ((f"{where} row {i}", _object(value, f"{where} row {i}")) for i, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{where} line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place} is not JSON: {error}") from None
            yield place, _object(value, place)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {_kind(value)}, not an object with fields")
    return value


def _parquet_rows(content: bytes, where: str) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise missing_extra("pyarrow", "data", f"reading {where}") from None
    try:
        for number, record in enumerate(pq.read_table(io.BytesIO(content)).to_pylist(), 1):
            yield f"{where} row {number}", record
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{where} is not a readable Parquet file: {reason}") from None


def text_field(row: Row, name: str) -> str:
    """A field that is text. Raises UserError where it is missing or something else."""
    value = _field(row, name)
    if not isinstance(value, str):
        raise DataError(f"{row[0]}: '{name}' is {_kind(value)}, not text")
    return value


def texts_field(row: Row, name: str) -> list[str]:
    """A field that is a list of at least two texts."""
    value = _field(row, name)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) for text in value):
        raise DataError(f"{row[0]}: '{name}' must be a list of two texts or more")
    return value


def index_field(row: Row, name: str, count: int) -> int:
    """A field that is the index of one of `count` things, as a number or in digits."""
    value = _field(row, name)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or not 0 <= value < count:
        raise DataError(f"{row[0]}: '{name}' must be a whole number from 0 to {count - 1}, not {value!r}")
    return int(value)


def _field(row: Row, name: str) -> Any:
    where, record = row
    if record.get(name) is None:
        raise DataError(f"{where} has no '{name}'")
    return record[name]


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)
