"""Rows of data files: JSON, CSV and Parquet, a row at a time, each with the place to name when it is wrong."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from gpt2.data.data_files import ROW_SUFFIXES, TEXT_SUFFIXES, glob_files, is_glob, list_files, read_error
from gpt2.errors import UserError, did_you_mean, missing_extra
from gpt2.files import check_regular_file, expand_path

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_BATCH_ROWS = 1024  # of a Parquet file, in memory at a time

Row = tuple[str, dict[str, Any]]
"""Where it stands, such as ``pairs.jsonl line 7``, and its columns."""
Message = tuple[str, str]
"""Who speaks ("system", "user" or "assistant"), and what."""

_TEXT_COLUMNS = ("text", "content")
_PROMPT_ANSWER_COLUMNS = (  # prompt, what may stand beside it, and answers, in the order in which they are looked for
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
    """Which columns of a row are read: a text, or a prompt (with or without an input) and its answer, or messages."""

    text: str | None = None
    prompt: str | None = None
    input: str | None = None
    answer: str | None = None
    messages: str | None = None

    def get_text(self, row: Row) -> str:
        """The text of a row. Raises `UserError` for one that has none."""
        assert self.text is not None
        return _get_text_field(row, self.text)

    def get_messages(self, row: Row) -> list[Message]:
        """The conversation of a row, which ends with an answer: what comes after the last one is left out.

        Raises `UserError` for a row without an answer, or with something else than text where text belongs.
        """
        where, record = row
        if self.messages is not None:
            return _parse_messages(where, self.messages, record.get(self.messages))
        assert self.prompt is not None
        assert self.answer is not None
        prompt, answer = _get_text_field(row, self.prompt), _get_text_field(row, self.answer)
        if self.input is not None and record.get(self.input) is not None:
            more = _get_text_field(row, self.input)
            prompt = f"{prompt}\n\n{more}" if more else prompt
        if not answer.strip():
            raise UserError(f"{where}: '{self.answer}' is empty")
        return [("user", prompt), ("assistant", answer)]


def find_row_files(ref: str) -> list[Path]:
    """The files of rows that `ref` names: one file, those of a pattern, or those of a folder that holds no text files.

    Empty when it names something else. Raises `UserError` for a pattern that names rows and other files together.
    """
    if is_glob(ref):
        files = glob_files(ref)
        of_rows = [file for file in files if _is_row_file(file)]
        if of_rows and len(of_rows) < len(files):
            other = next(file for file in files if not _is_row_file(file))
            raise UserError(f"{ref} names rows ({of_rows[0]}) and other files ({other}): take one kind at a time")
        return of_rows
    path = expand_path(ref)
    if path.is_dir():
        files, _ = list_files(path, (*TEXT_SUFFIXES, *ROW_SUFFIXES))
        return [] if any(file.suffix.lower() in TEXT_SUFFIXES for file in files) else files
    return [path] if _is_row_file(path) and path.exists() else []


def _is_row_file(path: Path) -> bool:
    return path.suffix.lower() in ROW_SUFFIXES


def read_rows(files: Sequence[Path]) -> Iterator[Row]:
    """The rows of all files in turn, a few in memory at a time (but those of a .json file that is one list).

    Raises `UserError`, with file and line, for what cannot be read as its ending says.
    """
    return chain.from_iterable(_READERS.get(path.suffix.lower(), _read_jsonl)(path) for path in files)


def open_rows(ref: str, files: Sequence[Path], columns: str | None = None) -> tuple[Columns, Iterator[Row]]:
    """The columns that count in these files (see `columns_of`), and all rows. Raises `UserError` when there is none."""
    rows = read_rows(files)
    first = next(rows, None)
    if first is None:
        raise UserError(f"there are no rows in {ref}")
    return detect_columns(ref, first, columns), chain([first], rows)


def detect_columns(ref: str, first: Row, spec: str | None = None) -> Columns:
    """The columns that count: those of `wanted`, such as ``prompt=question,answer=reply``, or what the first row shows.

    Messages come before prompt and answer, and these before text. Raises `UserError` when there are none.
    """
    if spec:
        return _parse_columns(spec)
    where, record = first
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
    raise UserError(
        f"{where}: no column is known among those of {ref} ({names}): say --columns text=NAME, prompt=NAME,answer=NAME "
        "or messages=NAME"
    )


def _parse_columns(spec: str) -> Columns:
    given: dict[str, str] = {}
    for part in spec.split(","):
        key, equals, name = (piece.strip() for piece in part.partition("="))
        keys = ("text", "prompt", "input", "answer", "messages")
        if key not in keys or not equals or not name:
            raise UserError(
                f"--columns '{spec}': '{part}' is not {', '.join(keys[:-1])} or messages, = and a column's name"
                f"{did_you_mean(key, keys)}"
            )
        given[key] = name
    if set(given) not in ({"text"}, {"messages"}, {"prompt", "answer"}, {"prompt", "input", "answer"}):
        raise UserError(f"--columns '{spec}': it takes text, or messages, or prompt and answer (and input)")
    return Columns(**given)


def _get_text_field(row: Row, column: str) -> str:
    where, record = row
    value = record.get(column)
    if value is None:
        raise UserError(f"{where} has no '{column}'")
    if not isinstance(value, str):
        raise UserError(f"{where}: '{column}' is {_type_name(value)}, not text")
    return value


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _parse_messages(location: str, column: str, value: Any) -> list[Message]:
    if value is None:
        raise UserError(f"{location} has no '{column}'")
    if not isinstance(value, list):
        raise UserError(f"{location}: '{column}' is {_type_name(value)}, not a list of messages")
    messages = [_parse_message(f"{location}, message {i}", one) for i, one in enumerate(value, 1)]
    last = max((i for i, (role, _) in enumerate(messages) if role == "assistant"), default=None)
    if last is None:
        raise UserError(f"{location}: nothing in the conversation is said by the assistant")
    return messages[: last + 1]


def _parse_message(location: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{location} is {_type_name(value)}, not an object with role and content")
    who, what = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role, text = _get_text_field((location, value), who), _get_text_field((location, value), what)
    if role not in _ROLES:
        raise UserError(f"{location}: role '{role}' is not one of {', '.join(_ROLES)}{did_you_mean(role, _ROLES)}")
    if _ROLES[role] == "assistant" and not text.strip():
        raise UserError(f"{location}: the assistant's '{what}' is empty")
    return _ROLES[role], text


def _open_binary(path: Path) -> BinaryIO:
    check_regular_file(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise read_error(path, error) from None


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, each with its line end, less a byte order mark."""
    with _open_binary(path) as handle:
        for number, line in enumerate(handle, 1):
            try:
                yield number, (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).decode()
            except UnicodeDecodeError:
                raise UserError(f"{path} line {number:,} is not UTF-8 text") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _numbered_lines(path):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _parse_json_object(where, line)


def _parse_json_object(location: str, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{location} is {_type_name(record)}, not an object with columns")
    return record


def _read_json(path: Path) -> Iterator[Row]:
    """A .json file: one list of rows, or, as many of that name are, a row to a line."""
    first = next((line.lstrip() for _, line in _numbered_lines(path) if line.strip()), "")
    if not first.startswith("["):
        yield from _read_jsonl(path)
        return
    try:
        records = json.loads("".join(line for _, line in _numbered_lines(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    for number, record in enumerate(records, 1):
        where = f"{path} row {number}"
        if not isinstance(record, dict):
            raise UserError(f"{where} is {_type_name(record)}, not an object with columns")
        yield where, record


def _read_csv(path: Path) -> Iterator[Row]:
    """The rows under a header, with the number of the line on which each begins."""
    reader = csv.reader(
        (line for _, line in _numbered_lines(path)),
        "excel-tab" if path.suffix.lower() == ".tsv" else "excel",
        strict=True,
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
            raise UserError(f"{path} is not a Parquet file that can be read: {reason}") from None


_READERS = {".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
