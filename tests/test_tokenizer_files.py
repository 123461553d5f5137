"""Tokenizer files: saved, loaded, invalid, or downloaded without a network."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import tokenizers

from gpt2 import vocabulary
from gpt2.downloads import download
from gpt2.errors import UserError
from gpt2.tokenizer import (
    END_OF_TEXT,
    GPT2_FINGERPRINT,
    BPETokenizer,
    ByteTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    get_tokenizer,
    load_tokenizer,
    train_bpe,
)
from gpt2.tokenizer_components import SPLIT_PATTERNS
from tests.helpers.tokenizer_samples import HARD_TEXTS, SENTENCES, gpt2_tokenizer


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


# Folders


def test_fingerprint_is_the_same_after_save_and_load(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    any_tokenizer.save(tmp_path)
    for file in (None, "tokenizer.json", "merges.txt"):
        if file == "merges.txt" and any_tokenizer.name == "bpe":
            break  # only a trained tokenizer needs its merges
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


def test_fingerprints_of_different_tokenizers_differ(gpt2_vocabulary: None, small_bpe: BPETokenizer) -> None:
    assert GPT2Tokenizer().fingerprint == GPT2_FINGERPRINT
    # 257 tokens each with the same bytes, in another order.
    assert train_bpe([], 257).fingerprint != ByteTokenizer().fingerprint
    assert len({GPT2_FINGERPRINT, ByteTokenizer().fingerprint, small_bpe.fingerprint}) == 3


def test_gpt2_vocabulary_with_another_pre_tokenizer_is_not_gpt2(gpt2_vocabulary: None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    gpt2_tokenizer().save(tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda spec: spec["pre_tokenizer"].update({"add_prefix_space": True}))
    loaded = get_tokenizer(tmp_path)
    assert loaded.name == "bpe"
    assert loaded.encode("Hello") == gpt2_tokenizer().encode(" Hello")
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
        (lambda spec: spec["model"]["vocab"].update({"a b": 300}), "'a b' has characters that do not represent bytes"),
        (lambda spec: spec["model"]["vocab"].update(qq=298), "ids are not 0 to 300"),
        (lambda spec: spec["model"]["vocab"].update(qq=70_000), "go up to 70,000, but it has only 301 tokens"),
        (lambda spec: spec["model"]["vocab"].update(qq=1.5), "ids are not 0 to 300"),
        (lambda spec: spec["added_tokens"][0].update(id=300), "an added token has two ids"),
    ],
)
def test_an_invalid_tokenizer_json(saved_bpe: Path, change: Callable, complaint: str) -> None:
    edit_json(saved_bpe / "tokenizer.json", change)
    with pytest.raises(UserError, match=complaint) as caught:
        load_tokenizer(saved_bpe)
    assert str(saved_bpe / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_without_end_of_text_or_without_a_byte(saved_bpe: Path) -> None:
    (saved_bpe / "tokenizer.json").unlink()
    (saved_bpe / "tokenizer_config.json").unlink()
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


def test_invalid_merges(saved_bpe: Path) -> None:
    (saved_bpe / "tokenizer.json").unlink()
    merges = saved_bpe / "merges.txt"
    whole = merges.read_text(encoding="utf-8")
    half_lines = "\n".join(whole.split("\n")[:20]) + "\n"
    for broken, complaint in {
        half_lines: "is it truncated",
        whole + "three words here\n": "line 45 is not a pair",
        whole + "q q\n": "qq",
        "": "is it truncated",
    }.items():
        merges.write_text(broken, encoding="utf-8")
        with pytest.raises(UserError, match=complaint) as caught:
            load_tokenizer(saved_bpe)
        assert str(merges) in str(caught.value)
    merges.unlink()
    with pytest.raises(UserError, match=r"no .*merges\.txt"):
        load_tokenizer(saved_bpe)


@pytest.mark.parametrize("broken", ["{", "[]", '{"added_tokens_decoder": {"1": {}}}', '{"added_tokens_decoder": 5}'])
def test_a_broken_tokenizer_config_beside_vocab_json(broken: str, saved_bpe: Path) -> None:
    (saved_bpe / "tokenizer.json").unlink()
    (saved_bpe / "tokenizer_config.json").write_text(broken)
    with pytest.raises(UserError, match=r"cannot use .*tokenizer_config\.json: "):
        load_tokenizer(saved_bpe)
    (saved_bpe / "tokenizer_config.json").unlink()
    assert load_tokenizer(saved_bpe) is not None


# Network


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


def test_without_network_the_error_names_addresses_and_paths(tmp_path: Path) -> None:
    damaged = tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    for case in ("nothing there", "a damaged file"):
        if case == "a damaged file":
            damaged.write_bytes(b"#version: 0.2\n")
        run = run_gpt2_tokenizer(tmp_path)
        message = run.stderr.strip().split("\n")[-1]
        assert message.startswith("gpt2.errors.ModelFilesError: cannot get GPT-2's vocabulary: cannot download"), (
            run.stderr
        )
        assert "(Connection refused): put it at" in message
        for name in ("vocab.bpe", "encoder.json"):
            assert f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}" in message
        assert str(damaged) in message
        assert str(tmp_path / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6") in message


def test_a_folder_needs_no_network(gpt2_vocabulary: None, tmp_path: Path) -> None:
    gpt2_tokenizer().save(tmp_path)
    code = f"print(load_tokenizer(Path({str(tmp_path)!r})).encode('Hello'))"
    run = run_gpt2_tokenizer(tmp_path / "empty", code)
    assert run.stdout == "[15496]\n"
    assert "ModelFilesError: cannot get GPT-2's vocabulary" in run.stderr


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
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


def test_a_silent_server_times_out(silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(vocabulary, "_GPT2_URL", silent_server)
    monkeypatch.setattr(vocabulary, "download", partial(download, timeout=0.2))
    vocabulary.gpt2_encoding.cache_clear()
    start = time.monotonic()
    with pytest.raises(UserError, match="timed out"):
        GPT2Tokenizer()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_deeply_nested_file_is_one_line(name: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(pre_tokenizer=split_by("(a+)+$", spec)),
        lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [spec["pre_tokenizer"]] * 1000}),
        lambda spec: spec.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        lambda spec: spec.update(
            normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": "a", "content": "aa"}] * 3}
        ),
        lambda spec: spec.update(normalizer={"type": "Sequence", "normalizers": 5}),
        lambda spec: spec.update(decoder={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
        lambda spec: spec["model"].update(dropout=0.5),
    ],
)
def test_components_that_are_not_of_a_gpt2_are_refused(saved_bpe: Path, change: Callable) -> None:
    edit_json(saved_bpe / "tokenizer.json", change)
    with pytest.raises(UserError, match=r"cannot use .*tokenizer\.json: its .*|dropout") as caught:
        load_tokenizer(saved_bpe)
    assert "\n" not in str(caught.value)


def split_by(pattern: str, spec: dict) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = spec["pre_tokenizer"] | {"use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


@pytest.mark.parametrize("pattern", sorted(SPLIT_PATTERNS))
def test_the_known_patterns_are_accepted(pattern: str, saved_bpe: Path) -> None:
    edit_json(saved_bpe / "tokenizer.json", lambda spec: spec.update(pre_tokenizer=split_by(pattern, spec)))
    tokenizer = get_tokenizer(saved_bpe)
    assert tokenizer.decode(tokenizer.encode("It's 1,234 words\n\n  so.")) == "It's 1,234 words\n\n  so."


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "merges.txt"])
def test_a_link_out_of_the_folder_is_refused(name: str, saved_bpe: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (saved_bpe / name).rename(secret)
    (saved_bpe / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name} is a link to a file outside its folder"):
        load_tokenizer(saved_bpe)


def test_the_vocabulary_is_kept_in_our_own_cache(
    gpt2_vocabulary: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree(os.environ["TIKTOKEN_CACHE_DIR"], tmp_path / "home" / "tiktoken")
    monkeypatch.setenv("GPT2_HOME", str(cache.parent))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    vocabulary.gpt2_encoding.cache_clear()
    assert GPT2Tokenizer().fingerprint == GPT2_FINGERPRINT
