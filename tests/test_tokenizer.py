"""Tokenizers against transformers, tiktoken and themselves: the same tokens, and the same text again."""

import hashlib
import json
import logging
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpt2 import tokenizer as tokenizer_module
from gpt2.errors import UserError
from gpt2.tokenizer import (
    END_OF_TEXT,
    GPT2_FINGERPRINT,
    BPETokenizer,
    ByteTokenizer,
    GPT2Tokenizer,
    StreamDecoder,
    Tokenizer,
    get_tokenizer,
    load_tokenizer,
    train_bpe,
)
from gpt2.vocabulary import cut_long_words

SENTENCES = [
    "A quick brown fox jumps over the lazy dog; it wasn't the first time, and they'll say it isn't the last.",
    "The lazy dog wasn't amused. It'd seen 1024 foxes and 2048 foxes, and in 1999 it'd had enough of foxes!",
    "So the dog said to the foxes: the first fox that jumps over this dog will be the last that jumps.",
]
HARD_TEXTS = [
    "",
    "Hello, I'm a language model,",
    "naïve café, Ελληνικά, русский, 日本語, العربية, हिन्दी, e\u0301 o\u0308",
    "🙂 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "a  b   c\n\n\n   d\t\te \r\n\r\n f  \u00a0 \u2003\u3000 \x85 \x1c \x1f end   ",
    "".join(map(chr, range(32))) + "\x7f\x80\x9f\xad\xa0",
    "x" * 1000 + " " * 1000 + "\n" * 100,
    "def f(x):\n    return x**2  # 3.14159, 1e-5, 0x7f\n",
    "it's IT'S don't DON'T we're ’tis I'dve 'sx",
    "a" + END_OF_TEXT + " b" + END_OF_TEXT + END_OF_TEXT,
    "<|endoftext <|endoftext|",
]


@cache
def gpt2() -> Tokenizer:
    """GPT-2's tokenizer, made once; for tests that have asked for `gpt2_vocabulary`."""
    return GPT2Tokenizer()


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": gpt2,
    "bytes": ByteTokenizer,
    "bpe": lambda: train_bpe(SENTENCES, 300),
}


@pytest.fixture(params=list(MAKERS))
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each of the three kinds in turn."""
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    return MAKERS[request.param]()


@pytest.fixture
def small_bpe() -> BPETokenizer:
    return train_bpe(SENTENCES, 300)


@pytest.fixture
def saved_bpe(small_bpe: BPETokenizer, tmp_path: Path) -> Path:
    """A folder with the files of `small_bpe`."""
    folder = tmp_path / "saved"
    folder.mkdir()
    small_bpe.save(folder)
    return folder


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# The same as others


def test_gpt2_tokens_of_shakespeare(gpt2_vocabulary: None, shakespeare_file: Path) -> None:
    tokenizer = gpt2()
    text = shakespeare_file.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text[:100])
    assert len(tokens) == 31
    assert (tokens[0], tokens[1], tokens[-1]) == (5962, 22307, 1639)
    assert len(tokenizer.encode(text)) == 338025
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.decode([50256]) == END_OF_TEXT


@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_transformers_reads_what_we_save(
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
    gpt2().save(tmp_path)
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
    gpt2().save(tmp_path)
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == openai.read_text(encoding="utf-8")


def test_gpt2_from_a_folder_encodes_like_tiktoken(
    gpt2_vocabulary: None, shakespeare_file: Path, tmp_path: Path
) -> None:
    gpt2().save(tmp_path)
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


# There and back


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
    tokenizer = gpt2()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 256)))
@example([0xE2, 0x82, 256, 0xAC, 0xF0, 0x9F, 0x99, 0x82, 0xED, 0xA0, 0x80, 0xC3])
def test_stream_shows_the_same_text_as_decode(tokens: list[int]) -> None:
    for tokenizer in (BYTES, BPE):
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(token) for token in tokens]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(tokens)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.lists(st.integers(0, 50256)))
def test_stream_shows_the_same_text_as_decode_in_gpt2(gpt2_vocabulary: None, tokens: list[int]) -> None:
    tokenizer = gpt2()
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, tokens)) + stream.flush() == tokenizer.decode(tokens)


def test_stream_never_shows_half_a_character() -> None:
    stream = StreamDecoder(BYTES)
    assert [stream.push(byte) for byte in "a🙂é".encode()] == ["a", "", "", "", "🙂", "", "é"]
    assert stream.flush() == ""
    assert [stream.push(0xF0), stream.push(0x9F), stream.flush()] == ["", "", "\ufffd"]
    assert stream.push(ord("b")) == "b"  # flushed, it starts anew


def test_batch_is_each_by_itself(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode_batch(HARD_TEXTS) == [any_tokenizer.encode(text) for text in HARD_TEXTS]
    assert any_tokenizer.encode_batch([]) == []


def test_half_a_surrogate_pair_becomes_the_replacement_character(any_tokenizer: Tokenizer) -> None:
    texts = ["a\ud800b", "\ud83d\ude42", "plain"]
    assert [any_tokenizer.decode(t) for t in any_tokenizer.encode_batch(texts)] == ["a\ufffdb", "🙂", "plain"]
    assert any_tokenizer.decode(any_tokenizer.encode(texts[0])) == "a\ufffdb"


def test_a_million_spaces(gpt2_vocabulary: None) -> None:
    text = " " * 1_000_001 + "x"  # tiktoken alone panics here
    tokenizer = gpt2()
    tokens, short = tokenizer.encode_batch([text, "a b"])
    assert tokenizer.decode(tokens) == text
    assert short == [64, 275]


# End of text


def test_text_cannot_inject_the_special_token(any_tokenizer: Tokenizer) -> None:
    text = f"one{END_OF_TEXT}two{END_OF_TEXT}"
    end = any_tokenizer.end_of_text
    assert any_tokenizer.decode([end]) == END_OF_TEXT
    assert end not in any_tokenizer.encode(text)
    assert end not in any_tokenizer.encode_batch([text])[0]
    expected = [*any_tokenizer.encode("one"), end, *any_tokenizer.encode("two"), end]
    assert any_tokenizer.encode(text, allow_special=True) == expected


def test_text_cannot_inject_the_special_token_after_a_trip(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    any_tokenizer.save(tmp_path)
    for travelled in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(any_tokenizer))):
        assert travelled is not None
        assert travelled.encode(END_OF_TEXT) == any_tokenizer.encode(END_OF_TEXT) != [travelled.end_of_text]


# Training


def test_trained_bpe_keeps_gpt2s_order(small_bpe: BPETokenizer) -> None:
    assert small_bpe.vocab_size == 300
    assert small_bpe.end_of_text == 299
    assert small_bpe.token_bytes(0) == b"!"  # GPT-2's own first byte
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


# Folders


def test_fingerprint_survives_the_folder(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    any_tokenizer.save(tmp_path)
    for file in (None, "tokenizer.json", "merges.txt"):
        if file == "merges.txt" and any_tokenizer.name == "bpe":
            break  # a trained one needs its merges, the others do not
        if file:
            (tmp_path / file).unlink()
        loaded = get_tokenizer(tmp_path)
        assert type(loaded) is type(any_tokenizer)
        assert loaded.fingerprint == any_tokenizer.fingerprint
        assert (loaded.vocab_size, loaded.end_of_text) == (
            any_tokenizer.vocab_size,
            any_tokenizer.end_of_text,
        )
        assert loaded.encode_batch(HARD_TEXTS) == any_tokenizer.encode_batch(HARD_TEXTS)


def test_saving_again_writes_the_same_files(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        (any_tokenizer if name == "first" else get_tokenizer(tmp_path / "first")).save(folder)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"}


def test_fingerprints_tell_the_kinds_apart(gpt2_vocabulary: None, small_bpe: BPETokenizer) -> None:
    assert GPT2Tokenizer().fingerprint == GPT2_FINGERPRINT
    # 257 tokens each, and the same bytes; but not in the same order.
    assert train_bpe([], 257).fingerprint != ByteTokenizer().fingerprint
    assert len({GPT2_FINGERPRINT, ByteTokenizer().fingerprint, small_bpe.fingerprint}) == 3


def test_gpt2_words_cut_another_way_are_not_gpt2(gpt2_vocabulary: None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    gpt2().save(tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda spec: spec["pre_tokenizer"].update({"add_prefix_space": True}))
    loaded = get_tokenizer(tmp_path)
    assert loaded.name == "bpe"
    assert loaded.encode("Hello") == gpt2().encode(" Hello")
    loaded.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello")["input_ids"] == loaded.encode("Hello")


def test_another_pre_tokenizer_is_kept(saved_bpe: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    digits = {"type": "Digits", "individual_digits": True}

    def cut_digits(spec: dict) -> None:
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}

    edit_json(saved_bpe / "tokenizer.json", cut_digits)
    loaded = get_tokenizer(saved_bpe)
    again = tmp_path / "again"
    again.mkdir()
    loaded.save(again)
    (again / "config.json").write_text('{"model_type": "gpt2"}')
    expected = loaded.encode("it's 1999, 1024")
    assert get_tokenizer(again).encode("it's 1999, 1024") == expected
    assert AutoTokenizer.from_pretrained(again)("it's 1999, 1024")["input_ids"] == expected


def test_padding_and_truncation_in_a_file_are_not_applied(saved_bpe: Path, small_bpe: BPETokenizer) -> None:
    library = tokenizers.Tokenizer.from_file(str(saved_bpe / "tokenizer.json"))
    library.enable_padding(length=64)
    library.enable_truncation(4)
    library.save(str(saved_bpe / "tokenizer.json"))
    assert get_tokenizer(saved_bpe).encode_batch(SENTENCES) == small_bpe.encode_batch(SENTENCES)


def test_a_folder_without_tokenizer_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(UserError, match=r"no tokenizer in .*tokenizer\.json"):
        get_tokenizer(tmp_path)


def replace_end_of_text(vocab: dict[str, int]) -> None:
    vocab["</s>"] = vocab.pop(END_OF_TEXT)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda spec: spec["model"].update(type="WordPiece"), "not byte-level BPE"),
        (lambda spec: spec.update(pre_tokenizer={"type": "Metaspace"}), "not byte-level BPE"),
        (lambda spec: spec.update(pre_tokenizer=None), "not byte-level BPE"),
        (lambda spec: spec.clear(), "not byte-level BPE"),
        (lambda spec: spec["model"].update(vocab=[]), "not byte-level BPE"),
        (lambda spec: spec["model"]["merges"].append(["q", "q"]), "qq"),
        (lambda spec: spec["model"]["vocab"].update({"a b": 300}), "'a b' is not spelled"),
        (lambda spec: spec["model"]["vocab"].update(qq=400), "ids are not 0 to 300"),
        (lambda spec: spec["model"]["vocab"].update(qq=1.5), "ids are not 0 to 300"),
        (lambda spec: spec["added_tokens"][0].update(id=300), "ids are not 0 to 299"),
    ],
)
def test_a_tokenizer_json_that_will_not_do(saved_bpe: Path, change: Callable, complaint: str) -> None:
    edit_json(saved_bpe / "tokenizer.json", change)
    with pytest.raises(UserError, match=complaint) as caught:
        load_tokenizer(saved_bpe)
    assert str(saved_bpe / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_without_end_of_text_or_without_a_byte(saved_bpe: Path) -> None:
    (saved_bpe / "tokenizer.json").unlink()
    edit_json(saved_bpe / "vocab.json", replace_end_of_text)
    with pytest.raises(UserError, match=r"vocab\.json: it has no <\|endoftext\|>"):
        load_tokenizer(saved_bpe)
    edit_json(saved_bpe / "vocab.json", lambda vocab: vocab.update({END_OF_TEXT: vocab.pop("!")}))
    edit_json(saved_bpe / "vocab.json", lambda vocab: vocab.update({"aa": vocab.pop("</s>")}))
    with pytest.raises(UserError, match="lacks 1 of the 256 bytes"):
        load_tokenizer(saved_bpe)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_truncated_json_file(saved_bpe: Path, name: str) -> None:
    if name != "tokenizer.json":
        (saved_bpe / "tokenizer.json").unlink()
    whole = (saved_bpe / name).read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\xff\xfe", b"[]"):
        (saved_bpe / name).write_bytes(broken)
        with pytest.raises(UserError, match=name) as caught:
            load_tokenizer(saved_bpe)
        assert "\n" not in str(caught.value)


def test_merges_that_will_not_do(saved_bpe: Path) -> None:
    (saved_bpe / "tokenizer.json").unlink()
    merges = saved_bpe / "merges.txt"
    whole = merges.read_text(encoding="utf-8")
    half_lines = "\n".join(whole.split("\n")[:20]) + "\n"
    for broken, complaint in {
        half_lines: "cut short",
        whole + "three words here\n": "line 45 is not a pair",
        whole + "q q\n": "qq",
        "": "cut short",
    }.items():
        merges.write_text(broken, encoding="utf-8")
        with pytest.raises(UserError, match=complaint) as caught:
            load_tokenizer(saved_bpe)
        assert str(merges) in str(caught.value)
    merges.unlink()
    with pytest.raises(UserError, match=r"no .*merges\.txt"):
        load_tokenizer(saved_bpe)


# Names and ids


def test_names() -> None:
    assert get_tokenizer("bytes").name == "bytes"
    with pytest.raises(UserError, match=r"'bpe:512'.*`gpt2 train`.*`gpt2 data prepare`"):
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


# Without a network


def run_gpt2_tokenizer(cache: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """Make GPT-2's tokenizer in a fresh process, behind a proxy that refuses every connection."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    code = f"from gpt2.tokenizer import *\nfrom pathlib import Path\n{code}\nGPT2Tokenizer()"
    proxies = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"], closed)
    quiet = {"NO_PROXY": "", "no_proxy": "", "TIKTOKEN_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **proxies, **quiet},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_network_the_error_says_what_to_put_where(tmp_path: Path) -> None:
    damaged = tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    for case in ("nothing there", "a damaged file"):
        if case == "a damaged file":
            damaged.write_bytes(b"#version: 0.2\n")
        run = run_gpt2_tokenizer(tmp_path)
        message = run.stderr.strip().split("\n")[-1]
        assert message.startswith("gpt2.errors.UserError: cannot get GPT-2's vocabulary (ProxyError)"), run.stderr
        for name in ("vocab.bpe", "encoder.json"):
            assert f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}" in message
        assert str(damaged) in message
        assert str(tmp_path / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6") in message


def test_a_folder_needs_no_network(gpt2_vocabulary: None, tmp_path: Path) -> None:
    gpt2().save(tmp_path)
    code = f"print(load_tokenizer(Path({str(tmp_path)!r})).encode('Hello'))"
    run = run_gpt2_tokenizer(tmp_path / "empty", code)
    assert run.stdout == "[15496]\n"
    assert "UserError: cannot get GPT-2's vocabulary" in run.stderr


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[socket.socket] = []
        done = threading.Event()

        def accept() -> None:
            server.settimeout(0.1)
            while not done.is_set():
                try:
                    accepted.append(server.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        done.set()
        thread.join()
        for connection in accepted:
            connection.close()


def test_a_silent_server_is_not_waited_for(silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(tokenizer_module, "_GPT2_URL", silent_server)
    monkeypatch.setattr(tokenizer_module, "_CONNECT_AND_READ_SECONDS", (0.2, 0.2))
    tokenizer_module._gpt2_encoding.cache_clear()
    start = time.monotonic()
    with pytest.raises(UserError, match="ReadTimeout"):
        GPT2Tokenizer()
    assert time.monotonic() - start < 5


def test_importing_is_light() -> None:
    heavy = "{'tiktoken', 'tokenizers', 'torch', 'requests'}"
    code = f"import sys, gpt2.tokenizer; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_file_nested_without_end_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(UserError, match=f"cannot use .*{name}: "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(pre_tokenizer={"pretokenizers": [{"type": "ByteLevel"}]}),
        lambda spec: spec["added_tokens"][0].update(content=5),
        lambda spec: spec["added_tokens"][0].update(content=float("inf")),
        lambda spec: spec["model"].update(continuing_subword_prefix="##########"),
        lambda spec: spec["model"].update(end_of_word_suffix="</w>"),
    ],
)
def test_a_tokenizer_json_that_made_the_library_panic(saved_bpe: Path, change: Callable) -> None:
    edit_json(saved_bpe / "tokenizer.json", change)
    with pytest.raises(UserError, match=r"cannot use .*tokenizer\.json: ") as caught:
        load_tokenizer(saved_bpe)
    assert "\n" not in str(caught.value)


def test_an_endless_word_is_learned_from_in_time_that_grows_with_its_length() -> None:
    def seconds(length: int) -> float:
        rng = random.Random(0)
        text = "".join(rng.choice("abcdefgh") for _ in range(length))
        began = time.process_time()
        assert train_bpe([text], 300).vocab_size == 300
        return time.process_time() - began

    assert seconds(200_000) < 10  # one word made of all would take minutes


@pytest.mark.parametrize("text", ["a" * 5000, " " * 5000, "_-" * 2500, "字" * 5000, "x " * 2000 + "1" * 3500 + " y\n"])
def test_endless_words_are_cut_and_nothing_is_lost(text: str) -> None:
    pieces = list(cut_long_words(text))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert max(map(len, re.findall(r"\w+|\s+|(?:[^\w\s]|_)+", max(pieces, key=len)))) <= 1000


@given(st.text(alphabet="ab1_-'! \n\t\u3000é字😀", max_size=300))
def test_words_of_all_days_are_not_cut(text: str) -> None:
    assert list(cut_long_words(text)) == [text]
