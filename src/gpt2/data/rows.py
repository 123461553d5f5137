"""Rows of JSON, CSV and Parquet files, one at a time, each with its location for error messages."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from gpt2.errors import ConfigError, DataError, did_you_mean, missing_extra
from gpt2.files import check_regular_file, read_error

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_PARQUET_BATCH_ROWS = 1024  # rows in memory at a time

Row = tuple[str, dict[str, Any]]
"""A location, such as ``pairs.jsonl line 7``, and the columns."""
Message = tuple[str, str]
"""Role ("system", "user" or "assistant") and text."""

_TEXT_COLUMNS = ("text", "content")
_PROMPT_ANSWER_COLUMNS = (  # prompt, optional input, answer: names in order of preference
    ("prompt", (), ("answer", "completion", "response", "output")),
    ("question", (), ("answer",)),
    ("instruction", ("input", "context"), ("output", "response")),
)
_MESSAGES_COLUMNS = ("messages", "conversations")
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_TYPE_NAMES = {
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Columns:
    """The columns to read: a text, or a prompt (with an optional input) and its answer, or messages."""

    text: str | None = None
    prompt: str | None = None
    input: str | None = None
    answer: str | None = None
    messages: str | None = None

    def get_text(self, row: Row) -> str:
        """The text of a row. Raises DataError if there is none."""
        assert self.text is not None
        return _get_text_field(row, self.text)

    def get_messages(self, row: Row) -> list[Message]:
        """The conversation of a row, up to its last answer.

        Raises DataError for a row without an answer, or with a value that is not text where text is required.
        """
        location, record = row
        if self.messages is not None:
            return _parse_messages(location, self.messages, record.get(self.messages))
        assert self.prompt is not None
        assert self.answer is not None
        prompt, answer = _get_text_field(row, self.prompt), _get_text_field(row, self.answer)
        if self.input is not None and record.get(self.input) is not None:
            details = _get_text_field(row, self.input)
            prompt = f"{prompt}\n\n{details}" if details else prompt
        if not answer.strip():
            raise DataError(f"{location}: '{self.answer}' is empty")
        return [("user", prompt), ("assistant", answer)]


def read_rows(files: Sequence[Path]) -> Iterator[Row]:
    """The rows of all files in order. Few are in memory at a time, except for a .json file that is one list.

    Raises DataError, with file and line, for content that does not fit the file's suffix.
    """
    return chain.from_iterable(_READERS.get(path.suffix.lower(), _read_jsonl)(path) for path in files)


def open_rows(ref: str, files: Sequence[Path], columns: str | None = None) -> tuple[Columns, Iterator[Row]]:
    """The columns to read (see `detect_columns`), and all rows. Raises DataError if there are no rows."""
    rows = read_rows(files)
    first = next(rows, None)
    if first is None:
        raise DataError(f"there are no rows in {ref}")
    return detect_columns(ref, first, columns), chain([first], rows)


def detect_columns(ref: str, first: Row, spec: str | None = None) -> Columns:
    """The columns to read: those of `spec`, such as ``prompt=question,answer=reply``, else by the first row's names.

    Messages have precedence over prompt and answer, and these over text. Raises DataError if no name is known.
    """
    if spec:
        return _parse_columns(spec)
    location, record = first
    for name in _MESSAGES_COLUMNS:
        if name in record:
            return Columns(messages=name)
    for prompt, inputs, answers in _PROMPT_ANSWER_COLUMNS:
        answer = next((name for name in answers if name in record), None)
        if prompt in record and answer:
            return Columns(prompt=prompt, answer=answer, input=next((name for name in inputs if name in record), None))
    for name in _TEXT_COLUMNS:
        if name in record:
            return Columns(text=name)
    names = ", ".join(map(str, record)) or "none"
    raise DataError(
        f"{location}: no known column among those of {ref} ({names}): give --columns text=NAME, "
        "prompt=NAME,answer=NAME or messages=NAME",
        field="columns",
    )


def _parse_columns(spec: str) -> Columns:
    given: dict[str, str] = {}
    for part in spec.split(","):
        key, equals, name = (piece.strip() for piece in part.partition("="))
        keys = ("text", "prompt", "input", "answer", "messages")
        if key not in keys or not equals or not name:
            raise ConfigError(
                f"--columns '{spec}': '{part}' is not {', '.join(keys[:-1])} or messages, = and a column name"
                f"{did_you_mean(key, keys)}",
                field="columns",
            )
        given[key] = name
    if set(given) not in ({"text"}, {"messages"}, {"prompt", "answer"}, {"prompt", "input", "answer"}):
        raise ConfigError(
            f"--columns '{spec}' must name text, or messages, or prompt and answer (and input)", field="columns"
        )
    return Columns(**given)


def _get_text_field(row: Row, column: str) -> str:
    location, record = row
    value = record.get(column)
    if value is None:
        raise DataError(f"{location} has no '{column}'")
    if not isinstance(value, str):
        raise DataError(f"{location}: '{column}' is {_type_name(value)}, not text")
    return value


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _parse_messages(location: str, column: str, value: Any) -> list[Message]:
    if value is None:
        raise DataError(f"{location} has no '{column}'")
    if not isinstance(value, list):
        raise DataError(f"{location}: '{column}' is {_type_name(value)}, not a list of messages")
    messages = [_parse_message(f"{location}, message {i}", message) for i, message in enumerate(value, 1)]
    last = max((i for i, (role, _) in enumerate(messages) if role == "assistant"), default=None)
    if last is None:
        raise DataError(f"{location}: the conversation has no message of the assistant")
    return messages[: last + 1]


def _parse_message(location: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{location} is {_type_name(value)}, not an object with role and content")
    keys = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role, text = (_get_text_field((location, value), key) for key in keys)
    if role not in _ROLES:
        raise DataError(f"{location}: role '{role}' is not one of {', '.join(_ROLES)}{did_you_mean(role, _ROLES)}")
    if _ROLES[role] == "assistant" and not text.strip():
        raise DataError(f"{location}: the assistant's '{keys[1]}' is empty")
    return _ROLES[role], text


def _open_binary(path: Path) -> BinaryIO:
    check_regular_file(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise read_error(path, error) from None


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, numbered, with their line ends, without a byte order mark."""
    with _open_binary(path) as handle:
        for number, line in enumerate(handle, 1):
            try:
                yield number, (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).decode()
            except UnicodeDecodeError:
                raise DataError(f"{path} line {number:,} is not UTF-8 text") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _numbered_lines(path):
        if line.strip():
            location = f"{path} line {number}"
            yield location, _check_object(location, _parse_json(location, line))


def _parse_json(location: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location} is not JSON: {error}") from None


def _check_object(location: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{location} is {_type_name(record)}, not an object with columns")
    return record


def _read_json(path: Path) -> Iterator[Row]:
    """A .json file: one list of rows, or one row per line."""
    first = next((line.lstrip() for _, line in _numbered_lines(path) if line.strip()), "")
    if not first.startswith("["):
        yield from _read_jsonl(path)
        return
    records = _parse_json(str(path), "".join(line for _, line in _numbered_lines(path)))
    for number, record in enumerate(records, 1):
        location = f"{path} row {number}"
        yield location, _check_object(location, record)


def _read_csv(path: Path) -> Iterator[Row]:
    """The rows below a header, each with the number of the line on which it starts."""
    reader = csv.reader(
        (line for _, line in _numbered_lines(path)),
        "excel-tab" if path.suffix.lower() == ".tsv" else "excel",
        strict=True,
    )
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            location, line = f"{path} line {line}", reader.line_num + 1
            if header and fields:
                if len(fields) != len(header):
                    raise DataError(f"{location} has {len(fields)} fields, the header has {len(header)}")
                yield location, dict(zip(header, fields, strict=True))
            elif fields:
                header = [name.strip() for name in fields]
                if duplicate := next((name for name in header if header.count(name) > 1), None):
                    raise DataError(f"{location}: two columns are called '{duplicate}'")
    except csv.Error as error:
        raise DataError(f"{path} line {line} is not CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise missing_extra("pyarrow", "data", f"reading {path}") from None
    number = 0
    with _open_binary(path) as handle:
        try:
            for batch in pq.ParquetFile(handle).iter_batches(_PARQUET_BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(f"{path} is not a readable Parquet file: {reason}") from None


_READERS = {".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
