"""Rows are the same in every file format; errors are one line that names the row."""

import csv
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.data.columns import Columns, detect_columns
from gpt2.data.prepare import prepare
from gpt2.data.resolve import Rows, resolve_data, resolve_texts
from gpt2.data.rows import find_columns, read_rows
from gpt2.errors import UserError
from gpt2.tokenizer import ByteTokenizer

HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
PAIRS = [
    {"prompt": "What is 2+2?", "answer": "4"},
    {"prompt": 'Say "hi",\nplease\r\n', "answer": "hi\tthere"},
    {"prompt": "日本 😀\u2028", "answer": " x "},
]


def as_jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode()


def as_csv(rows: Sequence[dict[str, Any]], dialect: str = "excel") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), dialect=dialect)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), out, row_group_size=2)
    return out.getvalue()


FORMATS: dict[str, Callable[[Sequence[dict[str, Any]]], bytes]] = {
    "jsonl": as_jsonl,
    "ndjson": lambda rows: b"\xef\xbb\xbf" + as_jsonl(rows),
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": as_csv,
    "tsv": lambda rows: as_csv(rows, "excel-tab"),
    "parquet": as_parquet,
}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    path = written(tmp_path, f"rows.{ending}", FORMATS[ending](PAIRS))
    assert [row for _, row in read_rows([path])] == PAIRS


def test_json_with_one_row_per_line(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.json", as_jsonl(PAIRS))
    assert list(read_rows([path])) == [(f"{path} line {i}", row) for i, row in enumerate(PAIRS, 1)]


@given(values=st.lists(st.lists(st.text('ab",\n\r é', max_size=6), min_size=2, max_size=2), min_size=1, max_size=6))
@settings(deadline=None)
def test_csv_rows_have_their_line_numbers(values: list[list[str]], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("csv")
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in values]
    content = as_csv(rows)
    found = list(read_rows([written(folder, "rows.csv", content)]))
    assert [row for _, row in found] == rows
    lines = content.decode().split("\n")
    for where, row in found:
        line = lines[int(where.rpartition(" ")[2]) - 1]
        start = row["prompt"].split("\n")[0].replace('"', '""')
        assert line.startswith((start, f'"{start}'))


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.jsonl", '\n{"text": "a"}\n  \n{"text": "b"}')
    assert list(read_rows([path])) == [(f"{path} line 2", {"text": "a"}), (f"{path} line 4", {"text": "b"})]
    path = written(tmp_path, "rows.csv", 'text\n\n"a\n\nb"\n\nc\n')
    assert list(read_rows([path])) == [(f"{path} line 3", {"text": "a\n\nb"}), (f"{path} line 7", {"text": "c"})]


def test_row_files_of_a_pattern_or_a_folder(tmp_path: Path) -> None:
    def files(ref: str) -> list[Path]:
        data = resolve_data(ref)
        assert isinstance(data, Rows)
        return list(data.files)

    for name in ("b.jsonl", "a.JSONL", ".hidden.jsonl", "runs/x/metrics.jsonl", "runs/x/config.toml", "odd[1].jsonl"):
        written(tmp_path, name, as_jsonl(PAIRS))
    written(tmp_path, "sub/c.csv", as_csv(PAIRS))
    names = [tmp_path / name for name in ("a.JSONL", "b.jsonl", "odd[1].jsonl", "sub/c.csv")]
    assert files(str(tmp_path)) == names
    assert files(f"{tmp_path}/*.jsonl") == names[1:3]
    assert files(f"{tmp_path}/[ab].*") == names[:2]
    assert files(f"{tmp_path}/**/c.csv") == names[3:]
    assert files(f"{tmp_path}/odd[1].jsonl") == [tmp_path / "odd[1].jsonl"]
    with pytest.raises(UserError, match="no file, folder or corpus"):
        resolve_data(f"{tmp_path}/nowhere.jsonl")
    written(tmp_path, "c.txt", "text")
    with pytest.raises(UserError, match=r"has both rows \(.*\) and text \(.*c\.txt\): name one kind"):
        resolve_texts(str(tmp_path))
    with pytest.raises(UserError, match=r"matches both rows \(.*\) and other files \(.*c\.txt\): name one kind"):
        resolve_data(f"{tmp_path}/*.*")


# Columns


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "a"}, Columns(text="text")),
        ({"id": 1, "content": "a"}, Columns(text="content")),
        ({"prompt": "a", "answer": "b"}, Columns(prompt="prompt", answer="answer")),
        ({"completion": "b", "prompt": "a", "text": "ab"}, Columns(prompt="prompt", answer="completion")),
        ({"question": "a", "answer": "b"}, Columns(prompt="question", answer="answer")),
        (
            {"instruction": "a", "input": "", "output": "b", "text": "c"},
            Columns(prompt="instruction", input="input", answer="output"),
        ),
        ({"instruction": "a", "response": "b"}, Columns(prompt="instruction", answer="response")),
        ({"prompt": "a", "messages": []}, Columns(messages="messages")),
        ({"conversations": []}, Columns(messages="conversations")),
    ],
)
def test_columns_are_detected_by_name(row: dict[str, Any], columns: Columns) -> None:
    assert detect_columns("file", "line 1", row) == columns


def test_columns_can_be_specified() -> None:
    row = "line 1", {"question": "a", "more": "b", "reply": "c", "talk": [], "body": "text"}
    named = detect_columns("file", *row, "prompt=question, answer=reply")
    assert named.get_conversation(row).messages == [("user", "a"), ("assistant", "c")]
    named = detect_columns("file", *row, "prompt=question,input=more,answer=reply")
    assert named.get_conversation(row).messages == [("user", "a\n\nb"), ("assistant", "c")]
    assert detect_columns("file", *row, "text=body").get_text(row) == "text"
    assert detect_columns("file", *row, "messages=talk") == Columns(messages="talk")


@pytest.mark.parametrize("wanted", ["body", "text=", "=a", "promt=a,answer=b", "prompt=a", "text=a,answer=b", ","])
def test_invalid_column_specifications_are_refused(wanted: str) -> None:
    with pytest.raises(UserError, match="--columns '") as caught:
        detect_columns("file", "line 1", {}, wanted)
    assert ("did you mean 'prompt'" in str(caught.value)) == (wanted == "promt=a,answer=b")


def test_conversations_of_both_formats_end_with_the_last_answer() -> None:
    columns = Columns(messages="messages")
    conversation = [("system", "s"), ("user", ""), ("assistant", "b"), ("user", "c")]
    openai = [{"role": role, "content": text, "weight": 1} for role, text in conversation]
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names.get(role, role), "value": text} for role, text in conversation]
    for messages in (openai, sharegpt):
        assert columns.get_conversation(("line 1", {"messages": messages})).messages == conversation[:3]


PAIR = Columns(prompt="prompt", answer="answer")
MESSAGES = Columns(messages="messages")


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        (PAIR, {"prompt": "a"}, "x line 7 has no 'answer'"),
        (PAIR, {"answer": "a", "prompt": None}, "x line 7 has no 'prompt'"),
        (PAIR, {"prompt": "a", "answer": " \n"}, "x line 7: 'answer' is empty"),
        (PAIR, {"prompt": "a", "answer": 4}, "x line 7: 'answer' is a number, not text"),
        (PAIR, {"prompt": ["a"], "answer": "b"}, "x line 7: 'prompt' is a list, not text"),
        (MESSAGES, {}, "x line 7 has no 'messages'"),
        (MESSAGES, {"messages": "hi"}, "x line 7: 'messages' is text, not a list of messages"),
        (MESSAGES, {"messages": ["hi"]}, "x line 7, message 1 is text, not an object with role and content"),
        (MESSAGES, {"messages": []}, "x line 7: the conversation has no message of the assistant"),
        (MESSAGES, {"messages": [{"role": "user", "content": "a"}]}, "the conversation has no message of the"),
        (MESSAGES, {"messages": [{"role": "usr", "content": "a"}]}, "x line 7, message 1: role 'usr' is not one of"),
        (MESSAGES, {"messages": [{"role": "usr", "content": "a"}]}, r"\(did you mean 'user'\?\)"),
        (MESSAGES, {"messages": [{"role": "user"}]}, "x line 7, message 1 has no 'content'"),
        (
            MESSAGES,
            {"messages": [{"from": "gpt", "value": ""}]},
            "x line 7, message 1: the assistant's 'value' is empty",
        ),
        (
            MESSAGES,
            {"messages": [{"role": "tool", "content": True}]},
            "message 1: 'content' is true or false, not text",
        ),
    ],
)
def test_errors_of_a_row_are_one_line(columns: Columns, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        columns.get_conversation(("x line 7", row))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl line 2 is not JSON: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl line 2 is a list, not an object with columns"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl line 2 is not UTF-8 text"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl line 1 is not JSON: "),
        ("a.jsonl", "\n\n", r"there are no rows in .*a\.jsonl"),
        (
            "a.jsonl",
            '{"a": 1, "b": 2}',
            r"line 1: no known column among those of .*a\.jsonl \(a, b\): give --columns",
        ),
        ("a.json", '[{"text": "a"}, 2]', r"a\.json row 2 is a number, not an object"),
        ("a.json", '[{"text": "a"}', r"a\.json is not JSON: "),
        ("a.csv", "text,more\na,b\nc\n", r"a\.csv line 3 has 1 fields, the header has 2"),
        ("a.csv", "text,text\na,b\n", r"a\.csv line 1: two columns are called 'text'"),
        ("a.csv", 'text\na\n"b\nc\n', r"a\.csv line 3 is not CSV: unexpected end of data"),
        ("a.csv", b"text\na\n\xe9\n", r"a\.csv line 3 is not UTF-8 text"),
        ("a.csv", "text\n", r"there are no rows in .*a\.csv"),
    ],
)
def test_files_that_do_not_fit_their_suffix(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows([path], find_columns(str(path), [path])))
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "a.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a\.parquet needs pyarrow, .* pip install 'plain-gpt2\[data\]'"):
        list(read_rows([path]))


@pytest.mark.skipif(not HAS_PYARROW, reason="Parquet needs pyarrow")
def test_parquet_rows_are_numbered_over_row_groups_and_a_broken_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "a.parquet", as_parquet([*PAIRS, {"prompt": "x", "answer": None}]))
    rows = list(read_rows([path]))
    assert [where for where, _ in rows] == [f"{path} row {i}" for i in range(1, 5)]
    with pytest.raises(UserError, match=r"a\.parquet row 4 has no 'answer'"):
        PAIR.get_conversation(rows[3])
    conversation = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (row,) = read_rows([written(tmp_path, "talk.parquet", as_parquet(conversation))])
    assert MESSAGES.get_conversation(row).messages == [("user", "a"), ("assistant", "b")]
    with pytest.raises(UserError, match=r"b\.parquet is not a readable Parquet file: ") as caught:
        list(read_rows([written(tmp_path, "b.parquet", b"no parquet at all")]))
    assert "\n" not in str(caught.value)


# Rows of text


TEXTS = [f"Text {i}: naïve 日本語, it's\n\n  {'word ' * i}\n" for i in range(25)]


@pytest.mark.parametrize("count", [3, 25])
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_rows_of_text_give_the_same_shards_as_text_files(ending: str, count: int, tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS[:count])]
    rows.insert(1, {"id": "empty", "text": ""})
    for i, text in enumerate(TEXTS[:count]):
        written(tmp_path, f"files/{i:02}.txt", text)
    source = resolve_texts(str(written(tmp_path, f"rows.{ending}", FORMATS[ending](rows))))
    assert source.name == "rows"
    assert ["".join(document.iter_chunks(chunk_bytes=50)) for document in source.documents] == TEXTS[:count]
    assert [document.size for document in source.documents] == [len(text.encode()) for text in TEXTS[:count]]
    of_rows = prepare(source, ByteTokenizer(), tmp_path / "a")
    of_files = prepare(resolve_texts(str(tmp_path / "files")), ByteTokenizer(), tmp_path / "b")
    assert of_rows.splits == of_files.splits  # including checksums


def test_rows_of_text_are_cached_until_they_change(tmp_path: Path, gpt2_home: Path) -> None:
    path = written(tmp_path, "rows.jsonl", '{"body": "one"}\n{"body": "\\ud800 two"}\n')
    with pytest.raises(UserError, match="no known column"):
        resolve_texts(str(path))
    source = resolve_texts(str(path), "text=body")
    assert ["".join(document.iter_chunks()) for document in source.documents] == ["one", "\ufffd two"]
    assert resolve_texts(str(path), "text=body") == source
    assert len(list((gpt2_home / "texts").iterdir())) == 1
    written(tmp_path, "rows.jsonl", as_jsonl([{"body": "three"}]))
    assert ["".join(d.iter_chunks()) for d in resolve_texts(str(path), "text=body").documents] == ["three"]
    assert not [p for p in (gpt2_home / "texts").iterdir() if p.name.startswith(".")]


def test_a_row_without_text_leaves_no_cache(tmp_path: Path, gpt2_home: Path) -> None:
    path = written(tmp_path, "rows.jsonl", '{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl line 2 has no 'text'"):
        resolve_texts(str(path))
    assert not list((gpt2_home / "texts").iterdir())


def test_rows_that_are_not_text_are_refused(tmp_path: Path) -> None:
    pairs = str(written(tmp_path, "pairs.jsonl", as_jsonl(PAIRS)))
    with pytest.raises(UserError, match="are prompts and answers, for `gpt2 finetune`"):
        resolve_texts(pairs)
    assert len(resolve_texts(pairs, "text=answer").documents) == 3
    with pytest.raises(UserError, match=r"every text in .* is empty"):
        resolve_texts(str(written(tmp_path, "empty.csv", "text,x\n,1\n")))
    with pytest.raises(UserError, match="--columns 'text=a' is for rows, and python-docs has none"):
        resolve_texts("python-docs", "text=a")


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "rows.jsonl", '{"text": "one"}')
    monkeypatch.setenv("GPT2_HOME", str(written(tmp_path, "file", "in the way")))
    with pytest.raises(UserError, match=r"cannot write .*texts.* set GPT2_HOME to a writable folder"):
        resolve_texts(str(path))


def test_long_csv_cells_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", as_csv([{"text": "a" * 200_000}]))
    assert [row for _, row in read_rows([path])] == [{"text": "a" * 200_000}]


def test_bad_rows_of_text_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "rows.csv", 'text,n\none,1\ntwo\n"x"y,2\nthree,3\nfour,4\n')
    with pytest.raises(UserError, match=r"rows\.csv line 3 has 1 fields, the header has 2"):
        resolve_texts(str(path))
    source = resolve_texts(str(path), bad_rows="skip")
    assert ["".join(document.iter_chunks()) for document in source.documents] == ["one", "three", "four"]
    assert "rows: 2 of 5 rows are bad (" in caplog.text
    assert "columns that are not read: n\n" in caplog.text
