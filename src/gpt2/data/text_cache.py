"""The texts of rows, in one file in the cache, so that a corpus of any size needs little memory."""

import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt2.data.columns import Columns
from gpt2.data.row_texts import read_texts
from gpt2.data.rows import BadRows
from gpt2.data.text_blocks import CachedTexts
from gpt2.files import cache_home, file_identity, staging_folder, write_error
from gpt2.progress import ProgressBar
from gpt2.vocabulary import replace_surrogates


def cache_texts(name: str, files: Sequence[Path], columns: Columns, bad_rows: BadRows) -> CachedTexts:
    """The texts of rows, without empty ones.

    Written under `cache_home()` unless they are there already: the key is each file's path and contents.
    Raises DataError for a row without text that is not skipped, and if the cache cannot be written.
    """
    digest = hashlib.sha256(f"{columns.text}\n{bad_rows.skip}\n".encode())
    for file in files:
        digest.update(os.fsencode(f"{file.absolute()}\n{file_identity(file)}\n"))
    folder = cache_home() / "texts" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{digest.hexdigest()[:16]}"
    if not folder.exists():
        try:
            _write_texts(folder, _read_and_report(name, files, columns, bad_rows))
        except OSError as error:
            raise write_error(folder, error) from None
    return CachedTexts(name, folder / "texts.txt", array("q", np.load(folder / "ends.npy").tobytes()))


def _read_and_report(name: str, files: Sequence[Path], columns: Columns, bad_rows: BadRows) -> Iterator[list[str]]:
    with ProgressBar(f"reading {name}") as bar:
        for texts in read_texts(files, columns, bad_rows):
            yield texts
            bar.update(status=f"{bad_rows.total:,} rows")
    bad_rows.report(name)


def _write_texts(folder: Path, lists: Iterator[list[str]]) -> None:
    """Write the folder, completely or not at all."""
    lengths = array("q")
    with staging_folder(folder) as partial:
        with (partial / "texts.txt").open("wb") as file:
            for texts in lists:
                try:
                    encoded = [text.encode() for text in texts if text]
                except UnicodeEncodeError:
                    encoded = [replace_surrogates(text).encode() for text in texts if text]
                file.write(b"".join(encoded))
                lengths.extend(map(len, encoded))
        np.save(partial / "ends.npy", np.cumsum(np.frombuffer(lengths, np.int64)))
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # another process may have written it at the same time
                raise
