"""The texts of rows, in one file in the cache, so that a corpus of any size needs little memory."""

import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt2.data.rows import Columns, Row
from gpt2.files import cache_home, staging_folder, write_error
from gpt2.vocabulary import replace_surrogates


def cache_texts(name: str, files: Sequence[Path], columns: Columns, rows: Iterator[Row]) -> tuple[Path, np.ndarray]:
    """The UTF-8 file of all texts of rows, without empty ones, and the byte offset at which each ends, int64 (count,).

    Written under `cache_home()` unless it is there already: the key is each file's path, size and modification time.
    Raises DataError for a row without text, and if the cache cannot be written.
    """
    digest = hashlib.sha256(f"{columns.text}\n".encode())
    for file in files:
        stat = file.stat()
        digest.update(os.fsencode(f"{file.absolute()}\n{stat.st_size} {stat.st_mtime_ns}\n"))
    folder = cache_home() / "texts" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{digest.hexdigest()[:16]}"
    if not folder.exists():
        try:
            _write_texts(folder, (columns.get_text(row) for row in rows))
        except OSError as error:
            raise write_error(folder, error) from None
    return folder / "texts.txt", np.load(folder / "ends.npy")


def _write_texts(folder: Path, texts: Iterator[str]) -> None:
    """Write the folder, completely or not at all."""
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
            if not folder.exists():  # another process may have written it at the same time
                raise
