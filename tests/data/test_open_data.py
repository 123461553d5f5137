"""Data as tokens: text that is tokenized once and cached, and shards with the tokenizer that made them."""

import os
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gpt2.data.prepare as preparing
from gpt2.data.loader import TokenLoader
from gpt2.data.prepare import describe_shards, open_data, prepare
from gpt2.data.shards import verify_shards
from gpt2.errors import UserError
from gpt2.tokenizer import ByteTokenizer
from tests.helpers.shard_files import corpus, everything, llmc_file

BYTES = ByteTokenizer()


def test_text_is_tokenized_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("some notes, " * 100)
    first = open_data(str(path), "bytes")

    def never(*arguments: object) -> None:
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode_batch", never)
        again = open_data(str(path), "bytes")
    assert (again.folder, everything(again.train)) == (first.folder, everything(first.train))
    other = open_data(str(path), "bpe:300")
    assert (other.tokenizer.name, other.folder == first.folder) == ("bpe", False)
    path.write_text("other notes, " * 100)
    changed = open_data(str(path), "bytes")
    assert bytes(everything(changed.train)).startswith(b"other notes, other")
    os.utime(path, ns=(0, 0))
    assert open_data(str(path), "bytes").folder == changed.folder  # touched, not changed
    path.write_text("later notes, " * 100)  # as long, and with the same time
    os.utime(path, ns=(0, 0))
    assert bytes(everything(open_data(str(path), "bytes").train)).startswith(b"later notes, later")


def test_a_trained_tokenizer_is_cached_and_can_be_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = open_data("python-docs", "bpe:400")
    assert trained.tokenizer.vocab_size == 400
    assert "statement" in trained.tokenizer.decode(trained.train.read(0, 100).tolist())
    monkeypatch.setattr(preparing, "train_bpe", None)
    assert open_data("python-docs", "bpe:400").tokenizer.fingerprint == trained.tokenizer.fingerprint
    (tmp_path / "notes.txt").write_text("The same words in another statement.")
    elsewhere = open_data(str(tmp_path / "notes.txt"), str(trained.folder))
    assert elsewhere.tokenizer.fingerprint == trained.tokenizer.fingerprint


def test_concurrent_preparation_gives_one_result(gpt2_home: Path) -> None:
    found: list[list[int]] = []
    start = threading.Barrier(4)

    def run() -> None:
        start.wait()
        found.append(everything(open_data("python-docs", "bytes").train))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 4
    (folder,) = (gpt2_home / "shards").iterdir()
    verify_shards(folder)


def test_another_tokenizer_than_that_of_the_shards_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    meta = prepare(corpus("some text"), BYTES, folder)
    assert open_data(str(folder), "bytes").tokenizer.name == "bytes"
    with pytest.raises(UserError, match=r"made with tokenizer bytes \(257 tokens\), not bpe:300: leave the tokenizer"):
        open_data(str(folder), "bpe:300")
    replace(meta, tokenizer=replace(meta.tokenizer, fingerprint="other")).save(folder)
    with pytest.raises(UserError, match="lacks the tokenizer that made its shards"):
        open_data(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="lacks the tokenizer that made its shards"):
        open_data(str(folder))


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_shards_of_other_programs_default_to_the_gpt2_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "fineweb10B"
    train = llmc_file(folder / "fineweb_train_000001.bin", [50256, 15496, 11])
    data = open_data(str(folder))
    assert (data.name, data.tokenizer.name, data.meta, data.val) == ("fineweb10B", "gpt2", None, None)
    assert open_data(str(train)).name == "fineweb_train_000001"
    prepare(corpus("some text"), BYTES, tmp_path / "made")
    with pytest.raises(UserError, match=r"made with tokenizer bytes .* not gpt2"):
        open_data(str(tmp_path / "made"), "gpt2")


def test_shards_of_other_programs_must_fit_the_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    llmc_file(folder / "x_train_1.bin", [1, 2, 256])
    assert everything(open_data(str(folder), "bytes").train) == [1, 2, 256]
    llmc_file(folder / "x_val_1.bin", [1, 257])
    with pytest.raises(UserError, match=r"x_val_1\.bin has token 257 at position 1, and its tokenizer has only 257"):
        open_data(str(folder), "bytes")
    llmc_file(folder / "x_train_1.bin", [1])
    with pytest.raises(UserError, match="foreign is too short to train on"):
        open_data(str(folder), "bytes")
    (folder / "x_train_1.bin").unlink()
    with pytest.raises(UserError, match="no train shards in"):
        open_data(str(folder), "bytes")


def test_an_id_outside_the_vocabulary_is_named_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "_CHECKED_TOKENS", 10)
    llmc_file(tmp_path / "x_train_1.bin", [1] * 40)
    llmc_file(tmp_path / "x_train_2.bin", [2] * 50 + [300] + [3] * 49)
    data = open_data(str(tmp_path), "bytes")
    assert len(data.train) == 140
    with pytest.raises(UserError, match=r"x_train_2\.bin has token 300 at position 50, and its tokenizer has only 257"):
        TokenLoader(data.train, 1, 130, seed=0).batch(0)


def test_shards_truncated_while_in_use_are_named(tmp_path: Path) -> None:
    path = llmc_file(tmp_path / "x_train_1.bin", [1] * 4000)
    data = open_data(str(tmp_path), "bytes")
    assert data.train.read(3990, 4000).tolist() == [1] * 10
    os.truncate(path, 2000)  # reading the memory map there would be a bus error
    with pytest.raises(UserError, match=r"was changed while in use: it has 2,000 bytes and had 9,024"):
        data.train.read(3990, 4000)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*x_train_1\.bin \(No such file"):
        data.train.read(0, 10)


def test_a_file_name_that_is_not_utf8_is_cached(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("some notes, " * 10)
    first = open_data(str(folder), "bytes")
    assert bytes(everything(first.train)).startswith(b"some notes")
    assert open_data(str(folder), "bytes").folder == first.folder


def test_a_single_shard_can_be_described(tmp_path: Path) -> None:
    prepare(corpus("some text, long enough"), BYTES, tmp_path / "made")
    shard = tmp_path / "made" / "train_000000.bin"
    description = describe_shards(shard)
    assert "bytes, 257 ids" in description
    assert "checksums match" in description
    assert "begins 'some text" in description
    shard.rename(shard.with_name("other_train.bin"))
    with pytest.raises(UserError, match=r"other_train\.bin is not among the shards that .*meta\.json lists"):
        describe_shards(shard.with_name("other_train.bin"))


def test_a_folder_of_shards_may_have_the_name_of_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(corpus("some text, long enough"), BYTES, Path("python-docs"))
    assert "source:    corpus" in describe_shards(Path("python-docs"))


def test_a_cache_that_cannot_be_written_is_named(gpt2_home: Path) -> None:
    (gpt2_home / "shards").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write .*shards/python-docs-.*: set GPT2_HOME to a writable folder"):
        open_data("python-docs", "bytes")


def test_shards_with_a_meta_pkl_have_its_characters(tmp_path: Path) -> None:
    """As nanoGPT's data/shakespeare_char/prepare.py writes them."""
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
    characters = sorted(set(text))
    itos = dict(enumerate(characters))
    stoi = {character: i for i, character in itos.items()}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi}))
    for split, part in (("train", text[:1000]), ("val", text[1000:])):
        (tmp_path / f"{split}.bin").write_bytes(np.array([stoi[c] for c in part], np.uint16).tobytes())
    data = open_data(str(tmp_path))
    assert data.tokenizer.vocab_size == len(characters)
    assert data.tokenizer.decode(everything(data.train)) == text[:1000]
    with pytest.raises(UserError, match="were made with tokenizer characters"):
        open_data(str(tmp_path), "bytes")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": itos, "x": print}))
    with pytest.raises(UserError, match=r"cannot use .*meta\.pkl: .*no vocabulary of characters needs"):
        open_data(str(tmp_path))
