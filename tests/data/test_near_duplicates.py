"""Near-duplicates are counted by MinHash: rates by similarity, in any blocks, and after a resume."""

from pathlib import Path

import numpy as np
import pytest

from gpt2.data.near_duplicates import NearDuplicates, near_duplicate_keys
from gpt2.data.prepare_corpus import CorpusOptions, prepare_corpus
from gpt2.tokenizer import ByteTokenizer
from tests.data.test_corpus import corpus_of
from tests.helpers.dataset_hub import DatasetHub, parquet


def keys_of(documents: list[np.ndarray]) -> np.ndarray:
    return near_duplicate_keys(np.concatenate(documents), np.array([len(document) for document in documents]))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    first, second = ({tuple(one[i : i + 5]) for i in range(len(one) - 4)} for one in (a, b))
    return len(first & second) / len(first | second)


def changed_pairs(rng: np.random.Generator, changes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """400 documents of 500 tokens, and copies with some tokens replaced."""
    originals = [rng.integers(0, 50_000, 500) for _ in range(400)]
    copies = []
    for original in originals:
        copies.append(original.copy())
        copies[-1][rng.choice(500, changes, replace=False)] = rng.integers(0, 50_000, changes)
    return originals, copies


@pytest.mark.parametrize("changes", [0, 2, 5, 10, 40])
def test_the_rate_by_similarity_is_as_documented(changes: int) -> None:
    originals, copies = changed_pairs(np.random.default_rng(changes), changes)
    s = float(np.mean([jaccard(a, b) for a, b in zip(originals[:50], copies[:50], strict=True)]))
    found = (keys_of(originals) == keys_of(copies)).any(axis=1).mean()
    assert abs(found - (1 - (1 - s**8) ** 4)) < 0.12
    assert len(np.unique(keys_of(originals))) == 4 * 400


def test_keys_do_not_depend_on_the_neighbours_and_short_documents_have_none() -> None:
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 50_000, size) for size in (67, 68, 1, 900, 4, 300)]
    keys = keys_of(documents)
    assert [bool(one.any()) for one in keys] == [False, True, False, True, False, True]
    for document, expected in zip(documents, keys, strict=True):
        assert np.array_equal(keys_of([document])[0], expected)
    assert near_duplicate_keys(np.empty(0, np.uint32), np.empty(0, np.int64)).shape == (0, 4)


def test_the_count_is_the_same_in_any_blocks_and_after_a_resume(tmp_path: Path) -> None:
    originals, copies = changed_pairs(np.random.default_rng(3), 1)
    keys = keys_of([*originals, *copies[:100], *originals[:50]])
    whole = NearDuplicates(tmp_path / "whole")
    total = whole.add(keys)
    assert 148 <= total <= 150
    pieces, count = NearDuplicates(tmp_path / "pieces"), 0
    for start in range(0, 480, 7):
        count += pieces.add(keys[start : min(start + 7, 480)])
    saved = pieces.sync()
    pieces.add(keys[480:500])
    pieces.sync()
    resumed = NearDuplicates(tmp_path / "pieces")  # the last 20 are after the checkpoint
    resumed.resume(saved)
    assert count + resumed.add(keys[480:]) == total
    assert resumed.sync() == len(keys)


def test_near_duplicates_are_counted_and_kept(
    hub: DatasetHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [" ".join(f"{i * 7919 % 104729}-{j * i}" for j in range(60)) for i in range(1, 41)]
    near = [text.replace("-60 ", "-61 ", 1) for text in texts[:5]]
    hub.add("me/rows", {"train.parquet": parquet([*texts, *texts[:3], *near, "short"])})
    with caplog.at_level("INFO"):
        meta = prepare_corpus(corpus_of("hf://me/rows"), ByteTokenizer(), tmp_path / "out", CorpusOptions(dedup=True))
    different = sum(text not in texts for text in near)
    assert f"{3 + 5 - different} duplicate documents were dropped; {different} near-duplicates were kept" in caplog.text
    assert sum(split.documents for split in meta.splits.values()) == 41 + different
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir() if path.suffix not in (".bin", ".json")) == [
        ".txt"
    ]
