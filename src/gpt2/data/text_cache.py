"""The texts of rows in one file, kept in the cache, so that a corpus of any size passes through little memory."""

import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2.data.data_files import write_error
from gpt2.data.rows import Columns, Row
from gpt2.files import cache_home, staging_folder
from gpt2.vocabulary import replace_surrogates


class CachedTexts(NamedTuple):
    """Texts one after the other in a file of UTF-8, and where each ends, in bytes, int64."""

    path: Path
    ends: np.ndarray


def cache_texts(name: str, files: Sequence[Path], columns: Columns, rows: Iterator[Row]) -> CachedTexts:
    """The texts of rows, empty ones left out; written under `cache_home()` unless they are there already.

    A file counts as the same while its path, size and time of change are. Raises `UserError` for a row without text,
    and for a cache that cannot be written.
    """
    digest = hashlib.sha256(f"{columns.text}\n".encode())
    for file in files:
        stat = file.stat()
        digest.update(os.fsencode(f"{file.absolute()}\n{stat.st_size} {stat.st_mtime_ns}\n"))
    known = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{digest.hexdigest()[:16]}"
    folder = cache_home() / "texts" / known
    if not folder.exists():
        try:
            _write_texts(folder, (columns.get_text(row) for row in rows))
        except OSError as error:
            raise write_error(folder, error) from None
    return CachedTexts(folder / "texts.txt", np.load(folder / "ends.npy"))


def _write_texts(folder: Path, texts: Iterator[str]) -> None:
    """Make the folder, whole or not at all."""
    ends = array("q")
    with staging_folder(folder) as partial:
        with (partial / "texts.txt").open("wb") as file:
            for text in texts:
                if text:
                    file.write(replace_surrogates(text).encode())
                    ends.append(file.tell())
        np.save(partial / "ends.npy", np.frombuffer(ends, np.int64))
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # nor did another process write it at the same time
                raise
