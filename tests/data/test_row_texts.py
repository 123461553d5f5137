"""A million short rows: the fast reader and the tokens of many documents at once equal the slow ones."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpt2.byte_level import encode_pieces
from gpt2.data import row_texts, text_blocks
from gpt2.data.columns import Columns
from gpt2.data.prepare import prepare
from gpt2.data.resolve import resolve_texts
from gpt2.data.row_texts import read_texts
from gpt2.data.rows import BadRows, read_rows
from gpt2.data.sources import Document, Texts
from gpt2.data.text_blocks import CachedTexts
from gpt2.errors import DataError
from gpt2.tokenizer import ByteTokenizer, Tokenizer, get_tokenizer, train_bpe
from tests.data.test_rows import FORMATS, written

TEXT = Columns(text="text")
END = "<|endoftext|>"
ODD_LINES = [
    '{"text": "plain", "id": 1}',
    '{"text": "日本 \\ud83d\\ude00 \u2028 \x7f"}',
    '{"text": "\\ud800 half"}',
    '{"text": ""}',
    '{"text": null}',
    '{"txt": "another name"}',
    '{"text": 7}',
    '["text"]',
    '{"text": "a"} {"text": "b"}',
    '{"text": "a"},{"text": "b"}',
    '{"text": "not closed',
    '{"text": "spans',
    ' lines"}',
    '{"text": ["x"',
    '"y"]}',
    ' {"text": "indented"}\t',
    '{"text": "a", "text": "b"}',
    '{"text": 1e999}',
    "NaN",
    "",
    "  ",
    "\x00",
    "[" * 3000,
]


def slow_texts(path: Path, bad_rows: BadRows) -> list[str]:
    texts = []
    for row in read_rows([path], TEXT, bad_rows):
        try:
            texts.append(TEXT.get_text(row))
        except DataError as error:
            bad_rows.handle(error)
    return texts


def outcome(read: Callable[[BadRows], list[str]], *, skip: bool) -> tuple[Any, ...]:
    bad_rows = BadRows(skip)
    try:
        found = read(bad_rows)
    except DataError as error:
        return (str(error),)
    return found, bad_rows.total, bad_rows.skipped, [str(error) for error in bad_rows.errors]


@given(
    lines=st.lists(st.sampled_from(ODD_LINES) | st.just(ODD_LINES[0]), max_size=12),
    newline=st.sampled_from(["\n", "\r\n"]),
    end=st.booleans(),
    mark=st.booleans(),
    broken=st.booleans(),
    block=st.sampled_from([1, 60, 1 << 20]),
)
@example(lines=["{", '"text": "a"}'], newline="\n", end=True, mark=False, broken=False, block=1 << 20)
@settings(deadline=None, max_examples=150)
def test_the_fast_reader_of_jsonl_equals_the_slow_one(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    newline: str,
    end: bool,
    mark: bool,
    broken: bool,
    block: int,
) -> None:
    content = b"\xef\xbb\xbf" * mark + newline.join(lines).encode() + newline.encode() * end
    path = written(tmp_path_factory.mktemp("rows"), "a.jsonl", content.replace(b"plain", b"pl\xe9in", int(broken)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_texts, "_BLOCK_BYTES", block)
        for skip in (False, True):
            fast = outcome(lambda bad: [text for part in read_texts([path], TEXT, bad) for text in part], skip=skip)
            slow = outcome(lambda bad: slow_texts(path, bad), skip=skip)
            assert fast == slow


@pytest.mark.parametrize("ending", FORMATS)
def test_the_fast_readers_of_all_formats_equal_the_slow_one(
    ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    rows = [{"id": str(i), "text": f"naïve {i}\n日本" * (i % 5), "more": "x"} for i in range(3000)]
    path = written(tmp_path, f"rows.{ending}", FORMATS[ending](rows))
    fast = [text for part in read_texts([path], TEXT, BadRows()) for text in part]
    logged = [record.message for record in caplog.records]
    caplog.clear()
    assert fast == slow_texts(path, BadRows()) == [row["text"] for row in rows]
    assert logged == [record.message for record in caplog.records] == [f"{path}: columns that are not read: id, more"]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,n\none,1\ntwo\n"x"y,2\nthree,3\n'),
        ("a.csv", "n,m\n1,2\n"),
        ("a.json", '[{"text": "a"}, {"text": 1}, 5, {"text": "b"}]'),
        ("a.parquet", [{"text": "a"}, {"text": None}, {"text": "b"}]),
        ("a.parquet", [{"text": 1}]),
        ("a.parquet", [{"body": "a"}]),
    ],
)
def test_bad_rows_of_other_formats_are_the_same(name: str, content: Any, skip: bool, tmp_path: Path) -> None:
    if name == "a.parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
        content = FORMATS["parquet"](content)
    path = written(tmp_path, name, content)
    fast = outcome(lambda bad: [text for part in read_texts([path], TEXT, bad) for text in part], skip=skip)
    assert fast == outcome(lambda bad: slow_texts(path, bad), skip=skip)


TEXTS = [
    "a",
    " two words\n",
    "",
    " ",
    "\n\n",
    END,
    f"{END}{END}",
    f"x{END}y",
    "<|endof",
    "text|>",
    "日本\ud800",
    "don't  ",
]


@cache
def make_tokenizer(name: str) -> Tokenizer:
    return train_bpe(["two words, don't two words"] * 3, 268) if name == "bpe" else get_tokenizer(name)


@given(
    pieces=st.lists(st.none() | st.sampled_from(TEXTS) | st.text("ab <|endoftext>\n é", max_size=20), max_size=9),
    name=st.sampled_from(["gpt2", "bytes", "bpe"]),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_are_encoded_each_by_itself(pieces: list[str | None], name: str, gpt2_vocabulary: None) -> None:
    tokenizer = make_tokenizer(name)
    expected: list[int] = []
    for piece in pieces:
        expected += [tokenizer.end_of_text] if piece is None else tokenizer.encode(piece)
    assert encode_pieces(tokenizer, pieces).tolist() == expected


def test_long_whitespace_between_documents(gpt2_vocabulary: None) -> None:
    tokenizer = get_tokenizer("gpt2")
    pieces = ["a", None, " " * 600_000, None, "b", None]
    assert encode_pieces(tokenizer, pieces).tolist() == [
        token for piece in pieces for token in (tokenizer.encode(piece) if piece else [tokenizer.end_of_text])
    ]


@pytest.mark.parametrize("block", [1, 40, 1 << 18])
@pytest.mark.parametrize("fraction", [0.1, 0.0, 0.5])
def test_cached_texts_give_the_shards_of_single_documents(
    block: int, fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(3)
    texts = [f"\ufeff{rng.choice(TEXTS)}"] + ["".join(rng.choices(TEXTS, k=rng.randrange(1, 5))) for _ in range(200)]
    texts[50] = "long " * 100
    rows = written(tmp_path, "rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = resolve_texts(str(rows))
    assert isinstance(source.documents, CachedTexts)
    single = Texts(source.name, tuple(Document(document.name, document.data, document.start, document.stop)
                                      for document in source.documents))  # fmt: skip
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", block)
    fast = prepare(source, ByteTokenizer(), tmp_path / "fast", val_fraction=fraction)
    slow = prepare(single, ByteTokenizer(), tmp_path / "slow", val_fraction=fraction)
    assert fast == slow  # including checksums
    assert fast.splits["train"].documents > 80


def test_short_rows_are_not_opened_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = written(tmp_path, "rows.jsonl", "".join(f'{{"text": "row {i}"}}\n' for i in range(20_000)))
    source = resolve_texts(str(rows))
    assert isinstance(source.documents, CachedTexts)
    assert source.documents.ends.itemsize == 8
    made: list[int] = []
    real = CachedTexts.__getitem__
    monkeypatch.setattr(CachedTexts, "__getitem__", lambda self, index: made.append(index) or real(self, index))
    prepare(source, ByteTokenizer(), tmp_path / "out")
    assert len(made) <= 3


def test_cached_texts_are_a_sequence(tmp_path: Path) -> None:
    source = resolve_texts(str(written(tmp_path, "rows.jsonl", '{"text": "one"}\n{"text": "three"}\n')))
    documents = source.documents
    assert [document.name for document in documents] == ["rows text 1", "rows text 2"]
    assert documents[-1] == documents[1] == documents[1:][0]
    assert (documents[1].start, documents[1].stop) == (3, 8)
    with pytest.raises(IndexError):
        documents[2]
    assert isinstance(documents, CachedTexts)
    assert documents.sizes.tolist() == [3, 5]
    assert list(documents.blocks(np.array([True, True])))[-1].documents == 1
