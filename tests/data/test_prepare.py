"""Preparation of shards: complete or not at all, cached, and bound to the tokenizer that made them."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gpt2.byte_level import ByteLevelTokenizer
from gpt2.data import text_blocks
from gpt2.data.prepare import open_data, prepare
from gpt2.data.resolve import resolve_texts
from gpt2.data.shards import ShardsMeta, open_shards, verify_shards
from gpt2.data.sources import Document, Texts
from gpt2.errors import UserError
from gpt2.tokenizer import ByteTokenizer, get_tokenizer
from tests.helpers.shard_files import corpus, everything

BYTES = ByteTokenizer()
END = BYTES.end_of_text


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
