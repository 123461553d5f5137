"""Preparation of shards: complete or not at all, cached, and bound to the tokenizer that made them."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gpt2.data.prepare as preparing
from gpt2.byte_level import ByteLevelTokenizer
from gpt2.data import text_blocks
from gpt2.data.loader import TokenLoader
from gpt2.data.prepare import describe_shards, open_data, prepare
from gpt2.data.resolve import resolve_texts
from gpt2.data.shards import ShardsMeta, TokenShards, open_shards, verify_shards
from gpt2.data.sources import Document, Texts
from gpt2.errors import UserError
from gpt2.tokenizer import ByteTokenizer, get_tokenizer

BYTES = ByteTokenizer()
END = BYTES.end_of_text


def llmc_file(path: Path, tokens: list[int]) -> Path:
    """Write a shard in the layout of llm.c's dev/data/data_common.py."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype=np.uint16).tobytes())
    return path


def corpus(*texts: str) -> Texts:
    return Texts("corpus", tuple(Document(str(i), text.encode()) for i, text in enumerate(texts)))


def everything(shards: TokenShards | None) -> list[int]:
    assert shards is not None
    return shards.read(0, len(shards)).tolist()


# Preparing


def test_documents_end_in_end_of_text_and_the_folder_describes_itself(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(12)]
    folder = tmp_path / "new" / "folder"
    meta = prepare(corpus(*texts), BYTES, folder, shard_tokens=50)
    data = open_data(str(folder))
    train = b"".join(t.encode() + b"|" for i, t in enumerate(texts) if i != 9)
    assert everything(data.train) == [END if byte == ord("|") else byte for byte in train]
    assert everything(data.val) == [*b"text 9", END]
    assert data.tokenizer.fingerprint == BYTES.fingerprint
    assert (data.name, data.meta) == ("folder", meta)
    assert meta == ShardsMeta.load(folder) == verify_shards(folder)
    assert (meta.source, meta.tokenizer.name, meta.tokenizer.vocab_size) == ("corpus", "bytes", 257)
    split = meta.splits["train"]
    assert (split.tokens, split.documents, split.bytes, len(split.files)) == (
        len(train),
        11,
        len(train) - 11,
        2,
    )
    assert not list(folder.parent.glob("*.partial"))


def test_a_document_in_both_splits_ends_in_the_validation_split_only(tmp_path: Path) -> None:
    prepare(corpus("0123456789", "ABCDEFGHIJ"), BYTES, tmp_path / "two")
    two = open_data(str(tmp_path / "two"))
    assert everything(two.train) == [*b"012345678ABCDEFGHI"]
    assert everything(two.val) == [*b"9", END, *b"J", END]
    prepare(corpus("0123456789" * 2), BYTES, tmp_path / "one", val_fraction=0)
    one = open_data(str(tmp_path / "one"))
    assert everything(one.train) == [*b"0123456789" * 2]
    assert one.val is None


def test_shakespeare_has_the_official_splits(shakespeare_file: Path, gpt2_home: Path) -> None:
    (gpt2_home / "tinyshakespeare").mkdir(parents=True)
    (gpt2_home / "tinyshakespeare" / "input.txt").write_bytes(shakespeare_file.read_bytes())
    data = open_data("shakespeare", "bytes")
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (1_003_854, 111_540)
    assert bytes(everything(data.train) + everything(data.val)) == shakespeare_file.read_bytes()


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_shakespeare_has_the_official_gpt2_tokens(shakespeare_file: Path, tmp_path: Path) -> None:
    prepare(resolve_texts(str(shakespeare_file)), get_tokenizer("gpt2"), tmp_path / "shards")
    data = open_data(str(tmp_path / "shards"))
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (
        301_966,
        36_059,
    )  # the counts of nanoGPT's data/shakespeare/prepare.py


def test_the_batch_size_of_tokenization_does_not_change_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_texts("python-docs")
    large = prepare(source, BYTES, tmp_path / "large")
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", 1000)
    assert prepare(source, BYTES, tmp_path / "small") == large


def test_an_error_leaves_no_files(tmp_path: Path) -> None:
    bad = Texts("bad", (Document("good", b"good " * 100), Document("latin", b"caf\xe9 " * 100)))
    with pytest.raises(UserError, match="latin is not UTF-8"):
        prepare(bad, BYTES, tmp_path / "shards")
    assert not list(tmp_path.glob("shards*"))


KILLED = """
import sys, time
from pathlib import Path
import gpt2.data.text_blocks as text_blocks
from gpt2.data.prepare import prepare
from gpt2.data.sources import Document, Texts
from gpt2.tokenizer import ByteTokenizer

class Stuck(ByteTokenizer):
    calls = 0
    def encode_pieces(self, pieces):
        self.calls += 1
        if self.calls == 3:
            print("half way", flush=True)
            time.sleep(60)
        return super().encode_pieces(pieces)

text_blocks.BLOCK_BYTES = 100
documents = tuple(Document(str(i), b"some text " * 30) for i in range(20))
prepare(Texts("many", documents), Stuck(), Path(sys.argv[1]), shard_tokens=100)
"""


def test_a_killed_process_leaves_no_data(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    remains, lock = sorted(tmp_path.iterdir())
    assert list(remains.glob("train_*.bin"))
    assert remains.suffix == ".partial"
    assert lock.name == f"{remains.name}.lock"
    with pytest.raises(UserError, match="no file, folder or corpus"):
        open_data(str(folder))
    prepare(corpus("some text"), BYTES, folder)
    assert verify_shards(folder)
    assert list(tmp_path.iterdir()) == [folder], "the leftovers of the killed process are removed"


def test_a_folder_with_other_files_is_not_changed(tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="used contains other files: name a new folder"):
        prepare(corpus("some text"), BYTES, used)
    meta = prepare(corpus("some text"), BYTES, tmp_path / "made")
    assert prepare(corpus("some text"), BYTES, tmp_path / "made") == meta
    with pytest.raises(UserError, match="made contains other shards: name a new folder"):
        prepare(corpus("another text"), BYTES, tmp_path / "made")
    assert ShardsMeta.load(tmp_path / "made") == meta
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "used"]


class LargeTokenizer(ByteTokenizer):
    """Bytes whose ids are 100,000 larger."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.end_of_text = 100_257, 100_256

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[100_000 + byte for byte in text.encode()] for text in texts]

    def encode_pieces(self, pieces: Sequence[str | None]) -> np.ndarray:
        return ByteLevelTokenizer.encode_pieces(self, pieces)


def test_a_vocabulary_over_65536_is_stored_in_32_bits(tmp_path: Path) -> None:
    prepare(corpus("some text", "more"), LargeTokenizer(), tmp_path / "shards", val_fraction=0, shard_tokens=8)
    shards = open_shards(tmp_path / "shards", "train")
    expected = [*(100_000 + byte for byte in b"some text"), 100_256, *(100_000 + byte for byte in b"more"), 100_256]
    assert everything(shards) == expected
    assert shards.read(5, 11).dtype == np.uint32
    content = (tmp_path / "shards" / "train_000000.bin").read_bytes()
    assert np.frombuffer(content[:12], np.int32).tolist() == [20240801, 7, 8], "the header of llm.c for Llama 3"
    assert len(content) == 1024 + 4 * 8
    (tmp_path / "shards" / "train_000000.bin").write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"train_000000\.bin is truncated or damaged: 1,054 bytes instead of 1,056"):
        open_shards(tmp_path / "shards", "train")


def test_tiny_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus is too short to train on: 1 token\(s\)"):
        prepare(corpus("ab"), BYTES, tmp_path / "shards")
    prepare(corpus("abc"), BYTES, tmp_path / "shards")
    data = open_data(str(tmp_path / "shards"))
    assert everything(data.train) == [*b"ab"]
    assert data.val is None  # a single token has no target


# Opening


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


# <|endoftext|> in a text


def tokens_of(folder: Path, *texts: str, val_fraction: float = 0.0) -> tuple[list[int], ShardsMeta]:
    meta = prepare(corpus(*texts), BYTES, folder, val_fraction=val_fraction)
    return everything(open_data(str(folder)).train), meta


def test_end_of_text_in_a_text_separates_documents_as_one_token(tmp_path: Path) -> None:
    mark = "<|endoftext|>"
    tokens, meta = tokens_of(tmp_path / "a", f"{mark}one\n{mark}\ntwo{mark}{mark} \n{mark}three")
    assert tokens == [*b"one\n", END, *b"\ntwo", END, *b"three"], "a corpus of one document has no end at its end"
    assert meta.splits["train"].documents == 3
    tokens, meta = tokens_of(tmp_path / "b", f"one{mark}two{mark}\n", "three")
    assert tokens == [*b"one", END, *b"two", END, *b"three", END], "one end where a file ends with the mark"
    assert meta.splits["train"].documents == 3
    text = "a few words\n" * 50_000
    tokens, meta = tokens_of(tmp_path / "c", mark.join([text] * 3) + mark)
    assert tokens == [*text.encode(), END] * 3, "in a file of several chunks, too"
    assert "<|endoftext|" not in "".join(BYTES.decode(tokens).split("<|endoftext|>"))


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_the_split_is_never_within_an_end_of_text(tmp_path: Path, fraction: float) -> None:
    meta = prepare(corpus("ab<|endoftext|>" * 30), BYTES, tmp_path / "s", val_fraction=fraction)
    data = open_data(str(tmp_path / "s"))
    assert everything(data.train) + everything(data.val) == [*b"ab", END] * 30
    assert sum(split.documents for split in meta.splits.values()) in (30, 31)


def test_a_trained_vocabulary_does_not_learn_the_letters_of_end_of_text(tmp_path: Path) -> None:
    data = open_data(Texts("t", (Document("t", b"ab cd<|endoftext|>" * 500),)), "bpe:300")
    tokens = {data.tokenizer.decode([i]) for i in range(data.tokenizer.vocab_size - 1)}
    assert {"ab", " cd"} <= tokens
    assert "endoftext" not in tokens


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
