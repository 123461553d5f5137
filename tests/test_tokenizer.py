"""Tokenizers: parity with transformers and tiktoken, round trips, training, special tokens."""

import hashlib
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpt2.errors import UserError
from gpt2.generation.stream_decoder import StreamDecoder
from gpt2.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    get_tokenizer,
    load_tokenizer,
    train_bpe,
    with_special_tokens,
)
from tests.helpers.tokenizer_samples import HARD_TEXTS, SENTENCES, gpt2_tokenizer

# Parity


def test_gpt2_tokens_of_shakespeare(gpt2_vocabulary: None, shakespeare_file: Path) -> None:
    tokenizer = gpt2_tokenizer()
    text = shakespeare_file.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text[:100])
    assert len(tokens) == 31
    assert (tokens[0], tokens[1], tokens[-1]) == (5962, 22307, 1639)
    assert len(tokenizer.encode(text)) == 338025
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.decode([50256]) == END_OF_TEXT


@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_transformers_reads_saved_tokenizers(
    any_tokenizer: Tokenizer, files: list[str], shakespeare_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer
    from transformers import GPT2Tokenizer as Reference
    from transformers import GPT2TokenizerFast as FastReference  # pyright: ignore[reportAttributeAccessIssue]

    any_tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for other in {"tokenizer.json", "vocab.json", "merges.txt"} - set(files):
        (tmp_path / other).unlink()
    shakespeare = shakespeare_file.read_text(encoding="utf-8")[:20_000]
    for reader in (AutoTokenizer, Reference, FastReference):
        reference = reader.from_pretrained(tmp_path)
        assert reference.bos_token_id == reference.eos_token_id == any_tokenizer.end_of_text
        assert reference.unk_token_id == any_tokenizer.end_of_text
        assert reference.pad_token is None
        assert len(reference) == any_tokenizer.vocab_size
        for text in [*HARD_TEXTS, shakespeare]:
            special = any_tokenizer.encode(text, allow_special=True)
            assert reference(text)["input_ids"] == special
            assert reference.decode(special) == any_tokenizer.decode(special) == text
        ordinary = [i for i in range(any_tokenizer.vocab_size) if i != any_tokenizer.end_of_text][::97]
        assert [reference.decode([i]) for i in ordinary] == [any_tokenizer.decode([i]) for i in ordinary]


def test_gpt2_merges_recovered_from_ranks_encode_like_tiktoken(
    gpt2_vocabulary: None, shakespeare_file: Path, tmp_path: Path
) -> None:
    gpt2_tokenizer().save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    reference = tiktoken.get_encoding("gpt2")
    texts = [*HARD_TEXTS, shakespeare_file.read_text(encoding="utf-8")[:200_000]]
    books = sorted((shakespeare_file.parents[1] / "books").glob("*.txt"))[:20]
    texts += [book.read_text(encoding="utf-8", errors="replace")[10_000:30_000] for book in books]
    assert [e.ids for e in library.encode_batch(texts)] == [reference.encode_ordinary(text) for text in texts]


def test_gpt2_merges_are_those_of_openai(gpt2_vocabulary: None, tmp_path: Path) -> None:
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    openai = cache / hashlib.sha1(address.encode()).hexdigest()
    if not openai.is_file():
        pytest.skip(f"no {openai}")
    gpt2_tokenizer().save(tmp_path)
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == openai.read_text(encoding="utf-8")


def test_gpt2_from_a_folder_encodes_like_tiktoken(
    gpt2_vocabulary: None, shakespeare_file: Path, tmp_path: Path
) -> None:
    gpt2_tokenizer().save(tmp_path)
    reference = tiktoken.get_encoding("gpt2")
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, GPT2Tokenizer)
    for text in [*HARD_TEXTS, shakespeare_file.read_text(encoding="utf-8")[:200_000]]:
        assert loaded.encode(text) == reference.encode_ordinary(text)


def test_bytes_are_the_ids() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé🙂") == list("aé🙂".encode())
    assert tokenizer.encode(f"a{END_OF_TEXT}", allow_special=True) == [97, 256]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]


# Round trips

BYTES = ByteTokenizer()
BPE = train_bpe(SENTENCES, 300)


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("".join(HARD_TEXTS))
def test_round_trip_of_any_text(text: str) -> None:
    for tokenizer in (BYTES, BPE):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.end_of_text not in tokens
        assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text_in_gpt2(gpt2_vocabulary: None, text: str) -> None:
    tokenizer = gpt2_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 256)))
@example([0xE2, 0x82, 256, 0xAC, 0xF0, 0x9F, 0x99, 0x82, 0xED, 0xA0, 0x80, 0xC3])
def test_streamed_text_equals_decode(tokens: list[int]) -> None:
    for tokenizer in (BYTES, BPE):
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(token) for token in tokens]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(tokens)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.lists(st.integers(0, 50256)))
def test_streamed_text_equals_decode_in_gpt2(gpt2_vocabulary: None, tokens: list[int]) -> None:
    tokenizer = gpt2_tokenizer()
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, tokens)) + stream.flush() == tokenizer.decode(tokens)


def test_stream_never_returns_half_a_character() -> None:
    stream = StreamDecoder(BYTES)
    assert [stream.push(byte) for byte in "a🙂é".encode()] == ["a", "", "", "", "🙂", "", "é"]
    assert stream.flush() == ""
    assert [stream.push(0xF0), stream.push(0x9F), stream.flush()] == ["", "", "\ufffd"]
    assert stream.push(ord("b")) == "b"  # after a flush it starts again


def test_encode_batch_equals_encode(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode_batch(HARD_TEXTS) == [any_tokenizer.encode(text) for text in HARD_TEXTS]
    assert any_tokenizer.encode_batch([]) == []


def test_half_a_surrogate_pair_becomes_the_replacement_character(any_tokenizer: Tokenizer) -> None:
    texts = ["a\ud800b", "\ud83d\ude42", "plain"]
    assert [any_tokenizer.decode(t) for t in any_tokenizer.encode_batch(texts)] == ["a\ufffdb", "🙂", "plain"]
    assert any_tokenizer.decode(any_tokenizer.encode(texts[0])) == "a\ufffdb"


# End of text


def test_text_cannot_inject_the_special_token(any_tokenizer: Tokenizer) -> None:
    text = f"one{END_OF_TEXT}two{END_OF_TEXT}"
    end = any_tokenizer.end_of_text
    assert any_tokenizer.decode([end]) == END_OF_TEXT
    assert end not in any_tokenizer.encode(text)
    assert end not in any_tokenizer.encode_batch([text])[0]
    expected = [*any_tokenizer.encode("one"), end, *any_tokenizer.encode("two"), end]
    assert any_tokenizer.encode(text, allow_special=True) == expected


def test_text_cannot_inject_the_special_token_after_save_or_pickle(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    any_tokenizer.save(tmp_path)
    for loaded in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(any_tokenizer))):
        assert loaded is not None
        assert loaded.encode(END_OF_TEXT) == any_tokenizer.encode(END_OF_TEXT) != [loaded.end_of_text]


# Training


def test_trained_bpe_has_gpt2s_byte_order(small_bpe: BPETokenizer) -> None:
    assert small_bpe.vocab_size == 300
    assert small_bpe.end_of_text == 299
    assert small_bpe.token_bytes(0) == b"!"  # the first byte of GPT-2
    assert sorted(small_bpe.token_bytes(i) for i in range(256)) == [bytes([i]) for i in range(256)]
    assert len(small_bpe.encode(SENTENCES[0])) < len(SENTENCES[0]) * 0.7
    assert any(small_bpe.token_bytes(i).startswith(b" ") for i in range(256, 299))


def test_training_is_deterministic_across_processes(small_bpe: BPETokenizer) -> None:
    code = (
        "import sys; from gpt2.tokenizer import train_bpe;"
        "sys.stdout.write(train_bpe(sys.stdin.read().split('|'), 300).fingerprint)"
    )
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            input="|".join(SENTENCES),
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout == small_bpe.fingerprint
    assert train_bpe(iter(SENTENCES), 299).fingerprint != small_bpe.fingerprint


def test_short_text_gives_a_smaller_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gpt2"):
        tokenizer = train_bpe(["ab ab"], 1000)
    assert tokenizer.vocab_size < 260
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert f"{tokenizer.vocab_size} tokens, not 1000" in caplog.text
    assert train_bpe([], 257).vocab_size == 257


@pytest.mark.parametrize("vocab_size", [0, 256, 65537])
def test_impossible_vocabulary_sizes(vocab_size: int) -> None:
    with pytest.raises(UserError, match=f"257 to 65536 tokens, not {vocab_size}"):
        train_bpe(SENTENCES, vocab_size)


# Names and ids


def test_names() -> None:
    assert get_tokenizer("bytes").name == "bytes"
    with pytest.raises(UserError, match=r"'bpe:512' is trained on text.*gpt2 data prepare"):
        get_tokenizer("bpe:512")
    with pytest.raises(UserError, match="did you mean 'bytes'"):
        get_tokenizer("byte")
    with pytest.raises(UserError, match="did you mean 'gpt2'"):
        get_tokenizer("gpt-2")
    with pytest.raises(UserError, match="no tokenizer 'no/such/folder'"):
        get_tokenizer(Path("no/such/folder"))


def test_unknown_ids(any_tokenizer: Tokenizer) -> None:
    for token in (-1, any_tokenizer.vocab_size, 10**9):
        with pytest.raises(UserError, match=f"token {token} is not in the vocabulary"):
            any_tokenizer.decode([0, token])
        with pytest.raises(UserError, match=f"token {token} is not in the vocabulary"):
            StreamDecoder(any_tokenizer).push(token)


# Special tokens

SPECIAL = ["<|user|>", "a long mark", "<|user|>s", "日"]
SPECIAL_TEXT = f"Hi<|user|>there,<|user|>s a long mark!日{END_OF_TEXT}<|user"


@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_special_tokens_are_added_saved_and_read_here_and_in_transformers(
    any_tokenizer: Tokenizer, files: list[str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    more = with_special_tokens(any_tokenizer, SPECIAL)
    size = any_tokenizer.vocab_size
    assert (type(more), more.name, more.end_of_text) == (type(any_tokenizer), any_tokenizer.name, size - 1)
    assert more.special_tokens == {END_OF_TEXT: size - 1, **{text: size + i for i, text in enumerate(SPECIAL)}}
    assert more.vocab_size == size + 4
    assert more.fingerprint != any_tokenizer.fingerprint
    ids = more.encode(SPECIAL_TEXT, allow_special=True)
    assert [i for i in ids if i >= size - 1] == [size, size + 2, size + 1, size + 3, size - 1]
    for text in [*HARD_TEXTS, SPECIAL_TEXT]:
        assert more.encode(text) == any_tokenizer.encode(text)
        assert more.decode(more.encode(text, allow_special=True)) == text
    more.save(tmp_path)
    for other in {"tokenizer.json", "vocab.json", "merges.txt"} - set(files):
        (tmp_path / other).unlink()
    for loaded in (get_tokenizer(tmp_path), pickle.loads(pickle.dumps(more))):
        assert type(loaded) is type(more)
        assert (loaded.fingerprint, loaded.special_tokens) == (more.fingerprint, more.special_tokens)
        assert loaded.encode(SPECIAL_TEXT) == more.encode(SPECIAL_TEXT)
        assert loaded.encode(SPECIAL_TEXT, allow_special=True) == ids
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert reference(SPECIAL_TEXT)["input_ids"] == ids
    assert reference.decode(ids) == SPECIAL_TEXT
    assert reference.decode(ids, skip_special_tokens=True) == "Hithere, !<|user"
    assert set(reference.all_special_tokens) == {END_OF_TEXT, *SPECIAL}
    assert len(reference) == more.vocab_size


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ([""], "needs visible characters, not ''"),
        (["\n "], "visible characters"),
        (["\ud800"], "not UTF-8"),
        (["<|a|>", "<|a|>"], "'<|a|>' is a token of the vocabulary already"),
        (["a"], "'a' is a token"),
        (["Ġ"], "is a token"),  # the space in vocabulary files
        ([END_OF_TEXT], "overlaps"),
        ([f"<{END_OF_TEXT}"], "overlaps"),
        (["endof"], "overlaps"),
        (["mark<|"], "overlaps"),
        (["text|>x"], "overlaps"),
        ([f"<{i}>" for i in range(65536 - 257 + 1)], "make 65,537, and a vocabulary has 65,536 at most"),
    ],
)
def test_invalid_special_tokens(texts: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        with_special_tokens(BYTES, texts)


def test_a_special_token_of_byte_level_characters_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with_special_tokens(BYTES, ["µ§"])
    assert "transformers encodes 'µ§' to the same id, but decodes it as bytes" in caplog.text


def test_added_tokens_that_match_in_plain_text_use_the_library(tmp_path: Path) -> None:
    with_special_tokens(BYTES, ["<think>"]).save(tmp_path)
    spec = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(re.sub(r'(<think>"[^}]*"special": )true', r"\1false", spec))
    loaded = get_tokenizer(tmp_path)
    assert isinstance(loaded, BPETokenizer)
    assert loaded.encode("a<think>") == [97, 257]


def test_importing_loads_no_heavy_module() -> None:
    heavy = "{'tiktoken', 'tokenizers', 'torch', 'requests'}"
    code = f"import sys, gpt2.tokenizer; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
