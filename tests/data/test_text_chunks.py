"""Documents are read exactly, in bounded chunks whose tokens are those of the whole text."""

from itertools import groupby, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.data import sources
from gpt2.data.sources import Document
from gpt2.errors import UserError
from gpt2.tokenizer import END_OF_TEXT, Tokenizer, get_tokenizer, train_bpe


def whole(document: Document, chunk_bytes: int = 1 << 20) -> str:
    return "".join(document.iter_chunks(chunk_bytes=chunk_bytes))


# Many rare cases: every kind of space, characters of one to four bytes, contractions.
texts = st.text(alphabet="ab1'! \n\r\t\x0b\x1c\x85\xa0\u2028\u3000é字😀", max_size=200)


@given(text=texts, chunk_bytes=st.integers(1, 40))
def test_chunks_concatenate_to_the_text(text: str, chunk_bytes: int) -> None:
    assert whole(Document("t", text.encode()), chunk_bytes) == text


@given(text=texts, cuts=st.lists(st.integers(0, 800), max_size=4), chunk_bytes=st.integers(1, 40))
def test_neighbouring_byte_ranges_neither_lose_nor_share_a_character(
    text: str, cuts: list[int], chunk_bytes: int
) -> None:
    document = Document("t", text.encode())
    edges = [0, *sorted(min(cut, document.size) for cut in cuts), document.size]
    ranges = [document.iter_chunks(a, b, chunk_bytes) for a, b in pairwise(edges)]
    assert "".join(piece for pieces in ranges for piece in pieces) == text


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """Trained on pairs of the characters of `texts`, so that a split in a wrong place changes the tokens."""
    alphabet = "ab1'! \n\r\t\x1c\xa0é字"
    return train_bpe([f" {x}{y}{x}{y}" * 3 for x in alphabet for y in alphabet], 600)


@given(text=texts, chunk_bytes=st.integers(1, 40))
@settings(max_examples=300)
def test_tokens_of_chunks_equal_tokens_of_the_text(text: str, chunk_bytes: int, bpe: Tokenizer) -> None:
    pieces = Document("t", text.encode()).iter_chunks(chunk_bytes=chunk_bytes)
    assert [token for piece in pieces for token in bpe.encode(piece)] == bpe.encode(text)


@pytest.mark.usefixtures("gpt2_vocabulary")
@pytest.mark.parametrize("chunk_bytes", [50, 1000, 30_000])
def test_tokens_of_chunks_of_shakespeare(shakespeare_file: Path, chunk_bytes: int) -> None:
    text = shakespeare_file.read_bytes()[:200_000]
    for tokenizer in (get_tokenizer("gpt2"), train_bpe([text[:50_000].decode()], 600)):
        for form in (text, text.replace(b"\n", b"\r\n"), text.replace(b"\n", b"  ")):
            pieces = list(Document("t", form).iter_chunks(chunk_bytes=chunk_bytes))
            assert len(pieces) > len(form) / chunk_bytes / 3
            joined = [token for tokens in tokenizer.encode_batch(pieces) for token in tokens]
            assert joined == tokenizer.encode(form.decode())


def test_chunks_have_about_the_requested_size(shakespeare_file: Path) -> None:
    for form in (lambda b: b, lambda b: b.replace(b"\n", b"\r\n"), lambda b: b.replace(b"\n", b" ")):
        document = Document("t", form(shakespeare_file.read_bytes()))
        assert max(map(len, document.iter_chunks(chunk_bytes=5000))) < 10_000


def test_text_without_a_safe_split_is_one_chunk() -> None:
    assert list(Document("t", "字".encode() * 10_000).iter_chunks(chunk_bytes=1000)) == ["字" * 10_000]


def test_newlines_are_kept_and_a_leading_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    document = Document("windows", path)
    assert document.size == 13
    assert whole(document) == "one\r\ntwo\r\n"
    assert whole(document, 1) == "one\r\ntwo\r\n"
    assert "".join(document.iter_chunks(0, 1)) == ""
    assert "".join(document.iter_chunks(1, 6)) == "one"


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize(("bad", "offset"), [(b"\xff", 1234), (b"\xe2\x82", 1234), (b"\xed\xa0\x80", 1234)])
def test_a_bad_byte_is_named_with_its_offset(bad: bytes, offset: int, chunk_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes((b"a bc\n" * 1000)[:offset] + bad + b" and on")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text: bad byte at offset 1,234(;|$)"):
        whole(Document(str(path), path), chunk_bytes)


def test_an_incomplete_character_at_the_end_is_an_error() -> None:
    with pytest.raises(UserError, match="offset 5"):
        whole(Document("t", "price€".encode()[:-1]))


@pytest.mark.parametrize(
    "text", ["a", "ab", " ", "你", "1", "\n", "!", "x<|endoftext|>", "<|endoftext|>x" * 3 + "y" * 100]
)
def test_a_text_without_a_place_to_split_is_read_in_bounded_chunks(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_CHUNK_CHARACTERS", 64)
    whole = text * (1000 // len(text))
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8", newline="")
    document = Document("a", tmp_path / "a.txt")
    chunks = list(document.iter_chunks(chunk_bytes=50))
    assert "".join(chunks) == whole
    assert max(map(len, chunks)) <= 64 + len(END_OF_TEXT) + 50
    assert sum(chunk.count(END_OF_TEXT) for chunk in chunks) == whole.count(END_OF_TEXT)  # none was cut


def joined_texts(document: Document, chunk_bytes: int = 1 << 20) -> list[str]:
    groups = groupby(document.iter_texts(chunk_bytes=chunk_bytes), key=lambda text: text is None)
    return ["".join(filter(None, pieces)) for is_end, pieces in groups if not is_end]


separated_texts = st.lists(texts | st.just(END_OF_TEXT) | st.text(" \n\t", max_size=90), max_size=12).map("".join)


@given(text=separated_texts, chunk_bytes=st.integers(1, 40))
def test_texts_are_those_between_the_separators(text: str, chunk_bytes: int) -> None:
    parts = text.split(END_OF_TEXT)
    expected = [part for part in parts if part and (not part.isspace() or len(parts) == 1)]
    assert joined_texts(Document("t", text.encode()), chunk_bytes) == expected


@given(text=separated_texts, chunk_bytes=st.integers(1, 40))
@settings(max_examples=300)
def test_tokens_of_the_pieces_of_texts_equal_tokens_of_the_texts(text: str, chunk_bytes: int, bpe: Tokenizer) -> None:
    document = Document("t", text.encode())
    pieces = list(document.iter_texts(chunk_bytes=chunk_bytes))
    assert "" not in pieces
    tokens = [token for piece in pieces if piece for token in bpe.encode(piece)]
    assert tokens == [token for whole in joined_texts(document) for token in bpe.encode(whole)]


@pytest.mark.parametrize("space", [" ", "\n", "\r\n", "\u3000", " \t\n"])
@pytest.mark.parametrize("frame", ["{}", "{}x", f"x{END_OF_TEXT}{{}}{END_OF_TEXT}y", f"{END_OF_TEXT}{{}}y"])
def test_whitespace_is_read_in_bounded_pieces(
    space: str, frame: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_CHUNK_CHARACTERS", 64)
    text = frame.format(space * 1000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    pieces = list(Document("a", tmp_path / "a.txt").iter_texts(chunk_bytes=50))
    assert "".join(piece or END_OF_TEXT for piece in pieces).removeprefix(END_OF_TEXT) == text.removeprefix(END_OF_TEXT)
    assert max(len(piece) for piece in pieces if piece) <= 64 + len(END_OF_TEXT) + 50


def test_minified_text_is_split_where_the_tokens_are_the_same(gpt2_vocabulary: None, tmp_path: Path) -> None:
    whole = '{"key":[1,2,3],"don\'t":"it\'s","naïve":{"x1":0.5}}' * 2000
    (tmp_path / "a.json").write_text(whole, encoding="utf-8")
    chunks = list(Document("a", tmp_path / "a.json").iter_chunks(chunk_bytes=1000))
    tokenizer = get_tokenizer("gpt2")
    assert len(chunks) > 50
    assert [token for chunk in chunks for token in tokenizer.encode(chunk)] == tokenizer.encode(whole)
