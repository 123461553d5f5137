"""Shards and corpora for tests of data."""

from pathlib import Path

import numpy as np

from gpt2.data.shards import TokenShards
from gpt2.data.sources import Document, Texts


def llmc_file(path: Path, tokens: list[int], version: int = 1) -> Path:
    """Write a shard in the layout of llm.c's dev/data/data_common.py."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, version, len(tokens)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype=np.uint16).tobytes())
    return path


def corpus(*texts: str) -> Texts:
    return Texts("corpus", tuple(Document(str(i), text.encode()) for i, text in enumerate(texts)))


def everything(shards: TokenShards | None) -> list[int]:
    assert shards is not None
    return shards.read(0, len(shards)).tolist()


# Files
