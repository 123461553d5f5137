"""Token shards have llm.c's format to the byte; damaged ones are refused."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.data.prepare import prepare
from gpt2.data.shards import ShardWriter, open_shards, verify_shards
from gpt2.errors import UserError
from gpt2.tokenizer import ByteTokenizer
from tests.helpers.shard_files import corpus, everything, llmc_file

BYTES = ByteTokenizer()


def test_shards_are_llmc_files_to_the_byte(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", shard_tokens=4) as writer:
        writer.write([1, 2])
        writer.write(np.array([65535, 4, 5, 6, 7, 8, 9], np.uint16))
        assert writer.tokens == 9
    names = ["train_000000.bin", "train_000001.bin", "train_000002.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name for file in writer.files] == names
    for file, tokens in zip(writer.files, ([1, 2, 65535, 4], [5, 6, 7, 8], [9]), strict=True):
        written = (tmp_path / file.name).read_bytes()
        assert written == llmc_file(tmp_path / "expected", tokens).read_bytes()
        assert (file.tokens, file.sha256) == (len(tokens), hashlib.sha256(written).hexdigest())


@given(
    tokens=st.lists(st.integers(0, 65535), min_size=1, max_size=60),
    shard_tokens=st.integers(1, 20),
    chunk=st.integers(1, 30),
    data=st.data(),
)
def test_any_range_reads_the_same_across_files(
    tokens: list[int],
    shard_tokens: int,
    chunk: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "val", shard_tokens) as writer:
        for start in range(0, len(tokens), chunk):
            writer.write(tokens[start : start + chunk])
    shards = open_shards(folder, "val")
    assert len(shards) == len(tokens)
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    found = shards.read(start, stop)
    assert found.dtype == np.uint16
    assert found.tolist() == tokens[start:stop]
    for bad in ((-1, 1), (0, len(tokens) + 1), (1, 0)):
        with pytest.raises(ValueError, match="are outside the"):
            shards.read(*bad)


@pytest.mark.parametrize("bad", [[-1], [65536]])
def test_only_sixteen_bit_ids_are_written(bad: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="16 bits"), ShardWriter(tmp_path, "train") as writer:
        writer.write(bad)
    with pytest.raises(UserError, match="a shard has 1 to 2,147,483,647 tokens, not 0"):
        ShardWriter(tmp_path, "train", 0)


def test_an_interrupted_shard_is_refused(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, "train") as writer:
            writer.write([7])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(UserError, match=r"train_000000\.bin is truncated or damaged"):
        open_shards(tmp_path, "train")


def test_shards_of_llmc_and_modded_nanogpt_are_read(tmp_path: Path) -> None:
    llmc_file(tmp_path / "fineweb_train_000002.bin", [3, 4])
    llmc_file(tmp_path / "fineweb_train_000001.bin", [1, 2])
    llmc_file(tmp_path / "fineweb_val_000000.bin", [5])
    assert everything(open_shards(tmp_path, "train")) == [1, 2, 3, 4]
    assert everything(open_shards(tmp_path, "val")) == [5]
    assert everything(open_shards(tmp_path / "fineweb_train_000002.bin", "train")) == [3, 4]


def test_nanogpts_files_without_a_header_are_read(tmp_path: Path) -> None:
    tokens = np.arange(2000, dtype=np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    tokens[:1].tofile(tmp_path / "val.bin")
    assert everything(open_shards(tmp_path, "train")) == tokens.tolist()
    assert everything(open_shards(tmp_path, "val")) == [0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "truncated or damaged: 1,029 bytes.* 1,030 for the 3 tokens",
        ),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), "truncated or damaged"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:1000]),
            "truncated: 1,000 bytes, less than its header",
        ),
        (lambda path: path.write_bytes(b""), "is empty$"),
        (
            lambda path: path.write_bytes(b"\1\2\3\4"),
            r"not a token shard: .* not nanoGPT's train\.bin or val\.bin",
        ),
        (lambda path: path.rename(path.with_name("train.bin")).write_bytes(b"abc"), "truncated: 3 bytes"),
        (
            lambda path: llmc_file(path, [1, 2], version=7),
            "has version 7 of the shard format; only version 1 is supported",
        ),
        (lambda path: llmc_file(path, []), "has no tokens"),
        (lambda path: path.unlink(), r"no train shards in .*: their names match \*train\*\.bin"),
    ],
)
def test_a_damaged_shard_is_named(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    damage(llmc_file(tmp_path / "x_train.bin", [1, 2, 3]))
    with pytest.raises(UserError, match=message) as caught:
        open_shards(tmp_path, "train")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# Meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "val_000000.bin").unlink(), r"cannot read .*val_000000\.bin"),
        (
            lambda folder: llmc_file(folder / "train_000000.bin", [1] * 18),
            r"train_000000\.bin does not match meta\.json",
        ),
        (lambda folder: (folder / "meta.json").unlink(), r"no meta\.json in"),
        (lambda folder: (folder / "meta.json").write_text("{"), r"cannot read .*meta\.json"),
        (
            lambda folder: (folder / "meta.json").write_text('{"a": 1}'),
            r"meta\.json does not describe token shards",
        ),
        (
            lambda folder: (folder / "meta.json").write_text("[]"),
            r"meta\.json does not describe token shards",
        ),
        (
            lambda folder: (folder / "meta.json").write_text('{"version": 2}'),
            "has version 2; only version 1 is supported",
        ),
    ],
)
def test_changed_shards_are_found(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    prepare(corpus("0123456789" * 2), BYTES, folder)
    verify_shards(folder)
    change(folder)
    with pytest.raises(UserError, match=message):
        verify_shards(folder)


def test_meta_json_has_the_documented_fields(tmp_path: Path) -> None:
    meta = prepare(corpus("0123456789"), BYTES, tmp_path / "shards")
    raw = json.loads((tmp_path / "shards" / "meta.json").read_text())
    assert list(raw) == ["version", "source", "tokenizer", "splits"]
    assert (raw["version"], raw["source"]) == (1, "corpus")
    assert raw["tokenizer"] == {"name": "bytes", "vocab_size": 257, "fingerprint": BYTES.fingerprint}
    (file,) = meta.splits["train"].files
    assert raw["splits"]["train"] == {
        "tokens": 9,
        "documents": 1,
        "bytes": 9,
        "files": [{"name": "train_000000.bin", "tokens": 9, "sha256": file.sha256}],
    }


@pytest.mark.parametrize("name", ["meta.json", "x_train_1.bin"])
def test_a_pipe_is_refused_without_blocking(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        open_shards(tmp_path, "train")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "",
        "[]",
        '{"version": 1, "source": "x", "splits": null, "tokenizer": {}}',
        '{"version": 1, "source": "x", "splits": {"train": {"files": [{"name": 5}]}}, "tokenizer": {}}',
    ],
)
def test_an_invalid_meta_json_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(UserError, match=r"meta\.json") as caught:
        open_shards(tmp_path, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\0b", "", ".", "\ud800", "x" * 300])
def test_a_meta_json_with_an_invalid_file_name_is_refused(name: str, tmp_path: Path) -> None:
    meta = prepare(corpus("some text"), BYTES, tmp_path / "made")
    raw = json.loads((tmp_path / "made" / "meta.json").read_text())
    raw["splits"]["train"]["files"][0]["name"] = name
    (tmp_path / "made" / "meta.json").write_text(json.dumps(raw))
    assert meta.splits["train"].tokens == 8
    for use in (lambda: open_shards(tmp_path / "made", "train"), lambda: verify_shards(tmp_path / "made")):
        with pytest.raises(UserError):
            use()
