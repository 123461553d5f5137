"""Rows of data files: JSON, CSV and Parquet, a row at a time, each with the place to name when it is wrong."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from gpt2.data.folders import ROW_SUFFIXES, TEXT_SUFFIXES, files_in, files_matching, is_pattern, unreadable
from gpt2.errors import UserError, did_you_mean, missing_extra
from gpt2.files import check_regular, path_of

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BATCH_ROWS = 1024  # of a Parquet file, in memory at a time

Row = tuple[str, dict[str, Any]]
"""Where it stands, such as ``pairs.jsonl line 7``, and its columns."""
Message = tuple[str, str]
"""Who speaks ("system", "user" or "assistant"), and what."""

_TEXT = ("text", "content")
_PAIRS = (  # prompt, what may stand beside it, and answers, in the order in which they are looked for
    ("prompt", (), ("answer", "completion", "response", "output")),
    ("question", (), ("answer",)),
    ("instruction", ("input", "context"), ("output", "response")),
)
_MESSAGES = ("messages", "conversations")
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_KINDS = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Columns:
    """Which columns of a row are read: a text, or a prompt (with or without an input) and its answer, or messages."""

    text: str | None = None
    prompt: str | None = None
    input: str | None = None
    answer: str | None = None
    messages: str | None = None

    def text_of(self, row: Row) -> str:
        """The text of a row. Raises `UserError` for one that has none."""
        assert self.text is not None
        return _field(row, self.text)

    def messages_of(self, row: Row) -> list[Message]:
        """The conversation of a row, which ends with an answer: what comes after the last one is left out.

        Raises `UserError` for a row without an answer, or with something else than text where text belongs.
        """
        where, record = row
        if self.messages is not None:
            return _conversation(where, self.messages, record.get(self.messages))
        assert self.prompt is not None
        assert self.answer is not None
        prompt, answer = _field(row, self.prompt), _field(row, self.answer)
        if self.input is not None and record.get(self.input) is not None:
            more = _field(row, self.input)
            prompt = f"{prompt}\n\n{more}" if more else prompt
        if not answer.strip():
            raise UserError(f"{where}: '{self.answer}' is empty")
        return [("user", prompt), ("assistant", answer)]


def row_files(ref: str) -> list[Path]:
    """The files of rows that `ref` names: one file, those of a pattern, or those of a folder that holds no text files.

    Empty when it names something else. Raises `UserError` for a pattern that names rows and other files together.
    """
    if is_pattern(ref):
        files = files_matching(ref)
        of_rows = [file for file in files if _holds_rows(file)]
        if of_rows and len(of_rows) < len(files):
            other = next(file for file in files if not _holds_rows(file))
            raise UserError(f"{ref} names rows ({of_rows[0]}) and other files ({other}): take one kind at a time")
        return of_rows
    path = path_of(ref)
    if path.is_dir():
        files, _ = files_in(path, (*TEXT_SUFFIXES, *ROW_SUFFIXES))
        return [] if any(file.suffix.lower() in TEXT_SUFFIXES for file in files) else files
    return [path] if _holds_rows(path) and path.exists() else []


def _holds_rows(path: Path) -> bool:
    return path.suffix.lower() in ROW_SUFFIXES


def read_rows(files: Sequence[Path]) -> Iterator[Row]:
    """The rows of all files in turn, a few in memory at a time (but those of a .json file that is one list).

    Raises `UserError`, with file and line, for what cannot be read as its ending says.
    """
    return chain.from_iterable(_READERS.get(path.suffix.lower(), _json_lines)(path) for path in files)


def open_rows(ref: str, files: Sequence[Path], columns: str | None = None) -> tuple[Columns, Iterator[Row]]:
    """The columns that count in these files (see `columns_of`), and all rows. Raises `UserError` when there is none."""
    rows = read_rows(files)
    first = next(rows, None)
    if first is None:
        raise UserError(f"there are no rows in {ref}")
    return columns_of(ref, first, columns), chain([first], rows)


def columns_of(ref: str, first: Row, wanted: str | None = None) -> Columns:
    """The columns that count: those of `wanted`, such as ``prompt=question,answer=reply``, or what the first row shows.

    Messages come before prompt and answer, and these before text. Raises `UserError` when there are none.
    """
    if wanted:
        return _named_columns(wanted)
    where, record = first
    for name in _MESSAGES:
        if name in record:
            return Columns(messages=name)
    for prompt, inputs, answers in _PAIRS:
        answer = next((name for name in answers if name in record), None)
        if prompt in record and answer:
            return Columns(prompt=prompt, answer=answer, input=next((name for name in inputs if name in record), None))
    for name in _TEXT:
        if name in record:
            return Columns(text=name)
    names = ", ".join(map(str, record)) or "none"
    raise UserError(
        f"{where}: no column is known among those of {ref} ({names}): say --columns text=NAME, prompt=NAME,answer=NAME "
        "or messages=NAME"
    )


def _named_columns(wanted: str) -> Columns:
    given: dict[str, str] = {}
    for part in wanted.split(","):
        key, equals, name = (piece.strip() for piece in part.partition("="))
        keys = ("text", "prompt", "input", "answer", "messages")
        if key not in keys or not equals or not name:
            raise UserError(
                f"--columns '{wanted}': '{part}' is not {', '.join(keys[:-1])} or messages, = and a column's name"
                f"{did_you_mean(key, keys)}"
            )
        given[key] = name
    if set(given) not in ({"text"}, {"messages"}, {"prompt", "answer"}, {"prompt", "input", "answer"}):
        raise UserError(f"--columns '{wanted}': it takes text, or messages, or prompt and answer (and input)")
    return Columns(**given)


def _field(row: Row, name: str) -> str:
    where, record = row
    value = record.get(name)
    if value is None:
        raise UserError(f"{where} has no '{name}'")
    if not isinstance(value, str):
        raise UserError(f"{where}: '{name}' is {_kind(value)}, not text")
    return value


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _conversation(where: str, name: str, value: Any) -> list[Message]:
    if value is None:
        raise UserError(f"{where} has no '{name}'")
    if not isinstance(value, list):
        raise UserError(f"{where}: '{name}' is {_kind(value)}, not a list of messages")
    messages = [_message(f"{where}, message {i}", one) for i, one in enumerate(value, 1)]
    last = max((i for i, (role, _) in enumerate(messages) if role == "assistant"), default=None)
    if last is None:
        raise UserError(f"{where}: nothing in the conversation is said by the assistant")
    return messages[: last + 1]


def _message(where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {_kind(value)}, not an object with role and content")
    who, what = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role, text = _field((where, value), who), _field((where, value), what)
    if role not in _ROLES:
        raise UserError(f"{where}: role '{role}' is not one of {', '.join(_ROLES)}{did_you_mean(role, _ROLES)}")
    if _ROLES[role] == "assistant" and not text.strip():
        raise UserError(f"{where}: the assistant's '{what}' is empty")
    return _ROLES[role], text


def _open(path: Path) -> BinaryIO:
    check_regular(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, each with its line end, less a byte order mark."""
    with _open(path) as handle:
        for number, line in enumerate(handle, 1):
            try:
                yield number, (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).decode()
            except UnicodeDecodeError:
                raise UserError(f"{path} line {number:,} is not UTF-8 text") from None


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _json_object(where, line)


def _json_object(where: str, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is {_kind(record)}, not an object with columns")
    return record


def _json_file(path: Path) -> Iterator[Row]:
    """A .json file: one list of rows, or, as many of that name are, a row to a line."""
    first = next((line.lstrip() for _, line in _lines(path) if line.strip()), "")
    if not first.startswith("["):
        yield from _json_lines(path)
        return
    try:
        records = json.loads("".join(line for _, line in _lines(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    for number, record in enumerate(records, 1):
        where = f"{path} row {number}"
        if not isinstance(record, dict):
            raise UserError(f"{where} is {_kind(record)}, not an object with columns")
        yield where, record


def _csv_rows(path: Path) -> Iterator[Row]:
    """The rows under a header, with the number of the line on which each begins."""
    reader = csv.reader(
        (line for _, line in _lines(path)), "excel-tab" if path.suffix.lower() == ".tsv" else "excel", strict=True
    )
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            where, line = f"{path} line {line}", reader.line_num + 1
            if header and fields:
                if len(fields) != len(header):
                    raise UserError(f"{where} has {len(fields)} fields, and the header {len(header)}")
                yield where, dict(zip(header, fields, strict=True))
            elif fields:
                header = [name.strip() for name in fields]
                if twice := next((name for name in header if header.count(name) > 1), None):
                    raise UserError(f"{where}: two columns are called '{twice}'")
    except csv.Error as error:
        raise UserError(f"{path} line {line} is not CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise missing_extra("pyarrow", "data", f"reading {path}") from None
    number = 0
    with _open(path) as handle:
        try:
            for batch in pq.ParquetFile(handle).iter_batches(_BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"{path} is not a Parquet file that can be read: {reason}") from None


_READERS = {".json": _json_file, ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}
