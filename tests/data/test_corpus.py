"""Corpora on the hub: found by name, prepared in bounded memory, resumable, in llm.c's layout."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2.data.corpora import HUB_CORPORA, HubRef, find_corpus
from gpt2.data.prepare import open_data
from gpt2.data.prepare_corpus import CorpusOptions, prepare_corpus
from gpt2.data.shards import ShardsMeta, verify_shards
from gpt2.errors import UserError
from gpt2.tokenizer import ByteTokenizer, Tokenizer, get_tokenizer
from tests.helpers.dataset_hub import DatasetHub, parquet
from tests.helpers.hub_corpora import add_fineweb, corpus_of, documents, make_texts

BYTES = ByteTokenizer()
END = BYTES.end_of_text
EDU = HUB_CORPORA["fineweb-edu-10B"]


def llmc_shards(texts: list[str | None], tokenizer: Tokenizer, shard_tokens: int) -> list[bytes]:
    """What llm.c's FineWeb script writes, by its description: each document is end-of-text and its ordinary tokens;
    the stream is cut into shards; the header is 256 int32 with magic, version and count, and tokens are uint16."""
    stream: list[int] = []
    for text in texts:
        stream += [tokenizer.end_of_text, *tokenizer.encode(text or "")]
    shards = []
    for start in range(0, len(stream), shard_tokens):
        tokens = stream[start : start + shard_tokens]
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(tokens)
        shards.append(header.tobytes() + np.array(tokens, np.uint16).tobytes())
    return shards


@pytest.mark.parametrize("shard_tokens", [1000, 4096])
@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_fineweb_is_byte_for_byte_what_llmc_writes(
    hub: DatasetHub, tmp_path: Path, shard_tokens: int, name: str, gpt2_vocabulary: None
) -> None:
    texts = make_texts(300)
    add_fineweb(hub, texts)
    tokenizer = get_tokenizer(name)
    meta = prepare_corpus(EDU, tokenizer, tmp_path / "out", CorpusOptions(shard_tokens=shard_tokens))
    expected = llmc_shards(texts, tokenizer, shard_tokens)
    names = [f"{'val' if i == 0 else 'train'}_{i:06d}.bin" for i in range(len(expected))]
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == expected
    assert sorted(path.name for path in (tmp_path / "out").glob("*.bin")) == sorted(names)
    assert meta == verify_shards(tmp_path / "out")
    assert sum(split.documents for split in meta.splits.values()) == len(texts)
    assert sum(split.bytes for split in meta.splits.values()) == sum(len((text or "").encode()) for text in texts)
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
    data = open_data(str(tmp_path / "out"))
    assert (len(data.train), data.tokenizer.name) == (meta.splits["train"].tokens, name)


KILLED = """
import os, signal, sys
import gpt2.data.stream as stream
from pathlib import Path
from gpt2.data.corpora import HUB_CORPORA
from gpt2.data.prepare_corpus import CorpusOptions, prepare_corpus
from gpt2.tokenizer import ByteTokenizer
import gpt2.data.corpus_files as corpus_files

corpus_files.BLOCK_CHARACTERS = 500
stream.CHECKPOINT_SECONDS = 0.01
options = CorpusOptions(shuffle=int(sys.argv[2]) if sys.argv[2] else None, dedup=sys.argv[3] == "1", shard_tokens=1000)
calls, limit = 0, int(sys.argv[4])

for owner, name in ((stream.SplitOutput, "write"), (stream.Spool, "add")):
    def wrapped(self, *arguments, real=getattr(owner, name)):
        global calls
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments)
    setattr(owner, name, wrapped)
prepare_corpus(HUB_CORPORA["fineweb-edu-10B"], ByteTokenizer(), Path(sys.argv[1]), options)
"""


@pytest.mark.parametrize(("shuffle", "dedup"), [("", "0"), ("7", "1")])
def test_a_killed_preparation_goes_on_and_gives_the_same_bytes(
    hub: DatasetHub, tmp_path: Path, shuffle: str, dedup: str
) -> None:
    texts = make_texts(400)
    add_fineweb(hub, texts + texts[:50])
    options = CorpusOptions(shuffle=int(shuffle) if shuffle else None, dedup=dedup == "1", shard_tokens=1000)
    whole = prepare_corpus(EDU, BYTES, tmp_path / "whole", options)
    codes = []
    for limit in (3, 40, 10**9):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), shuffle, dedup, str(limit)]
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "no_proxy": "*"}
        codes.append(subprocess.run(command, env=environment, check=False).returncode)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert ShardsMeta.load(tmp_path / "killed") == whole
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_shuffling_is_a_permutation_by_the_seed_and_dedup_drops_later_copies(hub: DatasetHub, tmp_path: Path) -> None:
    texts = [f"document {i} " * (i % 7 + 1) for i in range(300)]
    hub.add("me/rows", {"train.parquet": parquet([*texts, *texts[:40]]), "validation.parquet": parquet(["held out"])})
    corpus = find_corpus("hf://me/rows")
    assert corpus is not None
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_corpus(corpus, BYTES, tmp_path / name, CorpusOptions(shuffle=seed, dedup=True, shard_tokens=500))
    prepare_corpus(corpus, BYTES, tmp_path / "plain", CorpusOptions(dedup=True))
    found = {name: documents(tmp_path / name) for name in ("a", "b", "c", "plain")}
    assert found["plain"] == texts
    assert sorted(found["a"]) == sorted(texts)
    assert found["a"] == found["b"]
    assert found["a"] != found["c"]
    assert found["a"] != texts
    assert documents(tmp_path / "a", "val") == ["held out"]
    moved = np.argsort([texts.index(text) for text in found["a"]])
    assert abs(np.corrcoef(moved, np.arange(300))[0, 1]) < 0.2  # no trace of the order


def test_a_corpus_without_its_own_split_holds_out_every_tenth_document(hub: DatasetHub, tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(25)]
    hub.add("me/rows", {"data/a.jsonl": "".join(f'{{"text": "{text}"}}\n' for text in texts).encode()})
    corpus = find_corpus("hf://me/rows")
    assert corpus is not None
    meta = prepare_corpus(corpus, BYTES, tmp_path / "out")
    assert documents(tmp_path / "out", "val") == texts[9::10]
    assert documents(tmp_path / "out") == [text for i, text in enumerate(texts) if i % 10 != 9]
    assert "end-of-text after each document, every 10th document is validation" in meta.source


def test_wikitext_lines_become_articles(hub: DatasetHub, tmp_path: Path) -> None:
    lines = ["", " = One = \n", "", " First . \n", " = = Part = = \n", " more \n", " = Two = \n", " Second . \n"]
    folder = "wikitext-103-raw-v1"
    hub.add(
        "Salesforce/wikitext",
        {
            f"{folder}/train-00000-of-00002.parquet": parquet(lines[:5]),
            f"{folder}/train-00001-of-00002.parquet": parquet(lines[5:]),
            f"{folder}/validation-00000-of-00001.parquet": parquet([" = V = \n", " held out "]),
            f"{folder}/test-00000-of-00001.parquet": parquet([" = T = \n"]),
            "wikitext-2-raw-v1/train-00000-of-00001.parquet": parquet([" = Small = \n"]),
        },
    )
    prepare_corpus(HUB_CORPORA["wikitext-103"], BYTES, tmp_path / "out")
    assert documents(tmp_path / "out") == ["".join(lines[:6]), "".join(lines[6:])]
    assert documents(tmp_path / "out", "val") == [" = V = \n held out "]


def test_end_of_text_in_a_row_separates_documents_unless_the_layout_is_llmcs(hub: DatasetHub, tmp_path: Path) -> None:
    rows = ["one<|endoftext|> \n<|endoftext|>two", "three"]
    hub.add(
        "roneneldan/TinyStories", {"data/train-0.parquet": parquet(rows), "data/validation-0.parquet": parquet(["v"])}
    )
    prepare_corpus(HUB_CORPORA["tinystories"], BYTES, tmp_path / "out")
    assert documents(tmp_path / "out") == ["one", "two", "three"]


def test_the_first_tokens_of_a_corpus_are_enough(hub: DatasetHub, tmp_path: Path) -> None:
    texts = make_texts(300)
    add_fineweb(hub, texts)
    meta = prepare_corpus(EDU, BYTES, tmp_path / "out", CorpusOptions(max_tokens=5000, shard_tokens=2000))
    assert meta.splits["train"].tokens == 5000
    expected = llmc_shards(texts, BYTES, 2000)
    assert (tmp_path / "out" / "train_000002.bin").read_bytes() == expected[2]
    assert (tmp_path / "out" / "train_000003.bin").read_bytes()[1024:] == expected[3][1024 : 1024 + 2 * 1000]


def test_token_shards_are_downloaded_as_many_as_are_asked_for(
    hub: DatasetHub, tmp_path: Path, gpt2_vocabulary: None
) -> None:
    shards = llmc_shards(["some text"] * 500, get_tokenizer("gpt2"), 300)
    names = [f"fineweb_{'val' if i == 0 else 'train'}_{i:06d}.bin" for i in range(len(shards))]
    hub.add("kjj0/fineweb10B-gpt2", {**dict(zip(names, shards, strict=True)), "README.md": b"tokens"})
    corpus = HUB_CORPORA["fineweb-10B-tokens"]
    gpt2 = get_tokenizer("gpt2")
    meta = prepare_corpus(corpus, gpt2, tmp_path / "out", CorpusOptions(max_tokens=500))
    assert hub.fetched == names[:3]
    assert [(tmp_path / "out" / name).read_bytes() for name in names[:3]] == shards[:3]
    assert meta == verify_shards(tmp_path / "out")
    data = open_data(str(tmp_path / "out"))
    assert (len(data.train), data.bytes_per_token) == (600, None)
    with pytest.raises(UserError, match="has tokens of gpt2, not of bytes"):
        prepare_corpus(corpus, BYTES, tmp_path / "other")


def test_a_corpus_is_data_to_train_on_and_prepared_once(hub: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/rows", {"train.parquet": parquet(["some text", "more text"] * 10)})
    first = open_data("hf://me/rows", "bytes")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = open_data("hf://me/rows", "bytes")
    assert (first.folder, first.name, len(first.train)) == (again.folder, "rows", 9 * len("some textmore text") + 18)
    with pytest.raises(UserError, match=r"--tokenizer bpe:300 is not trained on rows"):
        open_data("hf://me/rows", "bpe:300")


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("hf://a/b", HubRef("a/b")),
        ("hf://a/b/c.d/e:train", HubRef("a/b", "c.d/e", None, "train")),
        ("hf://a/b@refs/pr/1", HubRef("a/b", None, "refs/pr/1")),
        ("hf://a/b/c@1f:test", HubRef("a/b", "c", "1f", "test")),
    ],
)
def test_references(ref: str, expected: HubRef) -> None:
    corpus = find_corpus(ref)
    assert corpus is not None
    assert corpus.ref == expected
    assert str(expected) == ref
    known = find_corpus("hf://HuggingFaceFW/fineweb-edu/sample-10BT@abc")
    assert known is not None
    assert (known.name, known.ref.revision, known.layout) == ("fineweb-edu-10B", "abc", EDU.layout)
    assert find_corpus("notes.txt") is None
    with pytest.raises(UserError, match=r"'hf://b' is not of the form hf://owner/name"):
        find_corpus("hf://b")


@pytest.mark.parametrize(
    ("ref", "column", "message"),
    [
        ("hf://me/none", None, r"there is no data set me/none at http.*, or it is private: check the name"),
        ("hf://me/gated", None, r"me/gated is gated: accept its terms at http.*/datasets/me/gated, then run `hf auth"),
        ("hf://me/rows@v9", None, r"me/rows has no revision 'v9'"),
        ("hf://me/rows:tset", None, r"me/rows has no split 'tset' \(did you mean 'test'\?\): it has test, train"),
        ("hf://me/rows/englsh", None, r"has no config or folder 'englsh' \(did you mean 'english'\?\): it has english"),
        ("hf://me/rows", "body", r"train\.parquet has no column 'body': it has id, text"),
        ("hf://me/rows", "id", r"the column 'id' of .*train\.parquet is int64, not text"),
        (
            "hf://me/odd",
            None,
            r"no known column among those of .*train\.parquet \(id, prose\): give --columns text=NAME",
        ),
        ("hf://me/pictures", None, r"me/pictures has no \.parquet or \.jsonl files"),
        ("hf://me/damaged", None, r"damaged.*train\.parquet is not a readable Parquet file"),
    ],
)
def test_what_cannot_be_prepared_is_one_line(
    hub: DatasetHub, tmp_path: Path, ref: str, column: str | None, message: str
) -> None:
    hub.add("me/rows", {"english/train.parquet": parquet(["a"] * 20), "english/test.parquet": parquet(["b"])})
    hub.add("me/odd", {"train.parquet": parquet(["a"], "prose")})
    hub.add("me/pictures", {"cat.png": b"png"})
    hub.add("me/pictures", {"README.md": b""}, revision="refs/convert/parquet")
    hub.add("me/damaged", {"damaged/train.parquet": parquet(["a"] * 20)[:-20] + b"0" * 20})
    hub.add("me/gated", {"train.parquet": b""})
    hub.repositories["me/gated"].gated = True
    with pytest.raises(UserError, match=message) as caught:
        prepare_corpus(corpus_of(ref, column), BYTES, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_full_disk_keeps_what_is_done(hub: DatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2.data import stream

    texts = make_texts(300)
    add_fineweb(hub, texts)
    options = CorpusOptions(shard_tokens=1000)
    whole = prepare_corpus(EDU, BYTES, tmp_path / "whole", options)
    real = stream.SplitOutput.write
    with monkeypatch.context() as patch:

        def write(self: stream.SplitOutput, split: str, encoded: stream.Encoded) -> None:
            if self.closed_shards:
                raise OSError(28, "No space left on device")
            real(self, split, encoded)

        patch.setattr(stream.SplitOutput, "write", write)
        patch.setattr("gpt2.data.corpus_files.BLOCK_CHARACTERS", 500)
        with pytest.raises(UserError, match=r"\(No space left on device\): finished work is kept in .*out\.partial"):
            prepare_corpus(EDU, BYTES, tmp_path / "out", options)
    with pytest.raises(UserError, match=r"out\.partial has an unfinished preparation with another max_tokens: remove"):
        prepare_corpus(EDU, BYTES, tmp_path / "out", CorpusOptions(shard_tokens=1000, max_tokens=10))
    with pytest.raises(UserError, match=r"unfinished preparation with another corpus"):
        prepare_corpus(corpus_of("hf://HuggingFaceFW/fineweb-edu/sample-10BT@v2"), BYTES, tmp_path / "out", options)
    shutil.rmtree(tmp_path / "out.partial" / "source")
    add_fineweb(hub, make_texts(300, seed=2))  # main moves on: the commit is kept
    with pytest.raises(UserError, match=r"cannot download 00._00000\.parquet from .* \(HTTP 404"):
        prepare_corpus(EDU, BYTES, tmp_path / "out", options)
    add_fineweb(hub, texts)
    assert prepare_corpus(EDU, BYTES, tmp_path / "out", options) == whole


def test_a_disk_that_is_too_small_is_found_before_the_download(
    hub: DatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_fineweb(hub, make_texts(20))
    monkeypatch.setattr("gpt2.data.prepare_corpus.shutil.disk_usage", lambda path: type("U", (), {"free": 10}))
    with pytest.raises(UserError, match=r"fineweb-edu-10B needs about .* KiB at .*, and 10 B are free: name a folder"):
        prepare_corpus(EDU, BYTES, tmp_path / "out")
    assert hub.fetched == []
