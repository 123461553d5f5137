"""The files of a corpus: converted by the hub, put there by hand, damaged on the way or on this disk."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2.data.prepare_corpus import prepare_corpus
from gpt2.data.shards import ShardsMeta
from gpt2.errors import UserError
from gpt2.tokenizer import ByteTokenizer
from tests.helpers.dataset_hub import DatasetHub, parquet
from tests.helpers.hub_corpora import corpus_of, documents, make_texts

BYTES = ByteTokenizer()


def test_the_hubs_own_conversion_is_used_for_a_data_set_without_parquet(hub: DatasetHub, tmp_path: Path) -> None:
    hub.add("me/old", {"load.py": b"a script"})
    converted = {"default/train/0000.parquet": parquet(["one", "two"]), "default/test/0000.parquet": parquet(["t"])}
    hub.add("me/old", converted, revision="refs/convert/parquet")
    prepare_corpus(corpus_of("hf://me/old"), BYTES, tmp_path / "out")
    assert (documents(tmp_path / "out"), documents(tmp_path / "out", "val")) == (["one", "two"], ["t"])


def test_without_network_the_files_can_be_put_there_by_hand(
    hub: DatasetHub, tmp_path: Path, gpt2_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = gpt2_home / "datasets" / "me/rows"
    with pytest.raises(UserError, match=rf"HF_HUB_OFFLINE is set\): download the files by hand, .* below {place}"):
        prepare_corpus(corpus_of("hf://me/rows"), BYTES, tmp_path / "out")
    (place / "data").mkdir(parents=True)
    (place / "data/train.parquet").write_bytes(parquet(["by hand"] * 20))
    prepare_corpus(corpus_of("hf://me/rows"), BYTES, tmp_path / "out")
    assert documents(tmp_path / "out") == ["by hand"] * 18
    assert (place / "data/train.parquet").is_file()
    assert hub.fetched == []


def test_a_hub_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"cannot list the files of .*/datasets/me/rows \(.*\): download the files"):
        prepare_corpus(corpus_of("hf://me/rows"), BYTES, tmp_path / "out")


def test_a_damaged_download_is_named_and_a_connection_that_breaks_is_continued(
    hub: DatasetHub, tmp_path: Path, gpt2_home: Path
) -> None:
    texts = make_texts(40)
    hub.add("me/rows", {"train.parquet": parquet(texts)})
    hub.damaged.add("train.parquet")
    by_hand = gpt2_home / "datasets/me/rows/train.parquet"
    with pytest.raises(UserError, match=rf"cannot download train\.parquet .*sha256 is .*: put it at {by_hand} by hand"):
        prepare_corpus(corpus_of("hf://me/rows"), BYTES, tmp_path / "out")
    hub.broken.add("train.parquet")
    prepare_corpus(corpus_of("hf://me/rows"), BYTES, tmp_path / "out")
    assert hub.fetched == ["train.parquet"] * 3  # damaged, broken, and the rest of it


def test_a_file_that_was_damaged_on_this_disk_is_fetched_again(
    hub: DatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from gpt2.data import corpus_files

    hub.add("me/rows", {"train.parquet": parquet(make_texts(40))})
    prepare_corpus(corpus_of("hf://me/rows"), BYTES, tmp_path / "good")
    real, calls = corpus_files.read_parquet_texts, []

    def damage_first(path: Path, column: str, start_row: int) -> Iterator[list[str]]:
        calls.append(start_row)
        if len(calls) == 1:
            yield next(real(path, column, start_row))[:7]
            os.truncate(path, 100)
            yield from real(path, column, 7)
        else:
            yield from real(path, column, start_row)

    monkeypatch.setattr(corpus_files, "read_parquet_texts", damage_first)
    prepare_corpus(corpus_of("hf://me/rows"), BYTES, tmp_path / "out")
    assert calls == [0, 7]
    assert "train.parquet is damaged, and is downloaded again" in caplog.text
    assert ShardsMeta.load(tmp_path / "out") == ShardsMeta.load(tmp_path / "good")
