"""Corpora on the test hub, and the texts of what was prepared from them."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np

from gpt2.data.corpora import HubCorpus, find_corpus
from gpt2.data.shards import open_shards
from gpt2.tokenizer import ByteTokenizer
from tests.helpers.dataset_hub import DatasetHub, parquet


def make_texts(count: int, seed: int = 1) -> list[str | None]:
    rng = random.Random(seed)
    words = ["the", "cat", "naïve", "\n", "3.14", "don't", "<|endoftext|>", "数", "end"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 120))) for _ in range(count)]
    return [*texts[:5], "", *texts[5:]]


def add_fineweb(hub: DatasetHub, texts: list[str | None], name: str = "sample/10BT") -> None:
    """Two files of a sample, a file of another one, and the card that names the folders, as in FineWeb-Edu."""
    half = len(texts) // 2
    files = {f"{name}/000_00000.parquet": parquet(texts[:half]), f"{name}/001_00000.parquet": parquet(texts[half:])}
    hub.add(
        "HuggingFaceFW/fineweb-edu",
        {**files, "data/CC-MAIN-2013-20/000_00000.parquet": parquet(["another crawl"]), "README.md": b"# card"},
        [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
            {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
        ],
    )


def corpus_of(ref: str, column: str | None = None) -> HubCorpus:
    corpus = find_corpus(ref)
    assert corpus is not None
    return replace(corpus, column=column)


def documents(folder: Path, split: str = "train") -> list[str]:
    """The texts of a split, of shards in which end-of-text is before or after each document."""
    shards = open_shards(folder, split)
    tokens = shards.read(0, len(shards))
    tokenizer = ByteTokenizer()
    end = tokenizer.end_of_text
    parts = np.split(tokens, np.flatnonzero(tokens == end) + (1 if tokens[-1] == end else 0))
    return [tokenizer.decode(part[part != end].tolist()) for part in parts if len(part)]
