"""Parquet files with unusual columns or sizes, and files that are not UTF-8."""

import random
import tracemalloc
from pathlib import Path

import pytest

from gpt2.data.columns import Columns
from gpt2.data.parquet import read_parquet_texts
from gpt2.data.prepare import prepare
from gpt2.data.resolve import resolve_texts
from gpt2.data.rows import read_rows
from gpt2.errors import UserError
from gpt2.tokenizer import ByteTokenizer
from tests.data.test_rows import HAS_PYARROW, written

# Parquet


@pytest.mark.skipif(not HAS_PYARROW, reason="Parquet needs pyarrow")
def test_only_the_columns_that_are_read_are_decoded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "when": pa.array([1, 2], pa.timestamp("ns")),  # with nanoseconds, which datetime lacks
            "far": pa.array([1 << 50, 2], pa.timestamp("s")),
            "long": pa.array([1 << 60, 2], pa.duration("s")),
            "text": ["one", "two"],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    source = resolve_texts(str(tmp_path / "a.parquet"))
    assert ["".join(document.iter_chunks()) for document in source.documents] == ["one", "two"]
    assert "columns that are not read: when, far, long\n" in caplog.text
    with pytest.raises(UserError, match=r"a\.parquet row 1 cannot be decoded: "):
        list(read_rows([tmp_path / "a.parquet"], Columns(text="far")))


@pytest.mark.skipif(not HAS_PYARROW, reason="Parquet needs pyarrow")
def test_a_parquet_row_that_is_not_utf8_is_named_or_skipped(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = pa.array([b"one", b"\xff", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": data}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet row 2 cannot be decoded: 'utf-8' codec") as caught:
        resolve_texts(str(tmp_path / "a.parquet"))
    assert "\n" not in str(caught.value)
    assert len(resolve_texts(str(tmp_path / "a.parquet"), bad_rows="skip").documents) == 2


@pytest.mark.skipif(not HAS_PYARROW, reason="Parquet needs pyarrow")
@pytest.mark.parametrize("form", ["many rows", "one cell"])
def test_a_small_parquet_file_cannot_become_a_huge_text(form: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    texts = ["ab" * 50] * 2_000_000 if form == "many rows" else ["a" * 100_000_000]
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), path, compression="zstd")
    assert path.stat().st_size < 50_000
    with pytest.raises(UserError, match=r"a\.parquet decodes to more than [\d,]+ bytes, 1,000 times its size"):
        for _ in read_rows([path], Columns(text="text")):
            pass


@pytest.mark.skipif(not HAS_PYARROW, reason="Parquet needs pyarrow")
def test_a_large_row_group_is_not_in_memory_at_once(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(1)
    texts = [rng.randbytes(15_000).hex() for _ in range(1000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="none", write_batch_size=16)
    assert (tmp_path / "a.parquet").stat().st_size > 30_000_000
    tracemalloc.start()  # Arrow reads through the file object: its buffers are bytes of Python
    try:
        assert sum(map(len, read_parquet_texts(tmp_path / "a.parquet", "text"))) == 1000
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


# Encodings


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("GB18030", "今天天气很好，我们去公园散步吧。\n" * 20),
        ("CP1252", "Café déjà vu, naïve façade – “quoted”\n" * 20),
        ("UTF-16", "hello there world\n" * 20),
        ("UTF-16LE", "hello there world\n" * 20),
        ("CP1251", "Привет, как дела? Это обычный текст.\n" * 20),
    ],
)
def test_the_message_guesses_the_encoding_and_says_how_to_convert(encoding: str, text: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", text.encode(encoding))
    conversion = rf"; it may be {encoding}: convert it with `iconv -f {encoding} -t UTF-8 '.*a\.txt' > NEW`$"
    with pytest.raises(UserError, match=conversion):
        prepare(resolve_texts(str(path)), ByteTokenizer(), tmp_path / "shards")
    path = written(tmp_path, "a.csv", f"text\n{text}".encode(encoding))
    with pytest.raises(UserError, match=rf"is not UTF-8 text.*; it may be {encoding}: ") as caught:
        resolve_texts(str(path))
    assert "\n" not in str(caught.value)


def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "日本語のテキストです。".encode() * 5 + b"\xff")
    with pytest.raises(UserError, match=r"bad byte at offset 165$"):
        prepare(resolve_texts(str(path)), ByteTokenizer(), tmp_path / "shards")
