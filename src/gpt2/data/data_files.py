"""Which files of a folder are meant, and which patterns name files."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from gpt2.errors import UserError
from gpt2.files import cache_home, expand_path, known_folder_kind

TEXT_SUFFIXES = (".txt", ".md", ".text", ".rst")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
UNAMBIGUOUS_ROW_SUFFIXES = (".jsonl", ".ndjson", ".parquet")  # a .json or .csv beside texts may be anything


def read_error(path: Path, error: OSError) -> UserError:
    """The error for a file that cannot be read."""
    return UserError(f"cannot read {path} ({error.strerror or error})")


def write_error(path: Path, error: OSError) -> UserError:
    """The error for a folder that cannot be written; in the cache, it says how to move the cache."""
    mend = ": set GPT2_HOME to a folder that can be" if path.is_relative_to(cache_home()) else ""
    return UserError(f"cannot write {path} ({error.strerror or error}){mend}")


def is_glob(ref: str) -> bool:
    """Whether `ref` is a pattern such as ``notes/*.txt``, and not the name of something that is there."""
    return glob.has_magic(ref) and not expand_path(ref).exists()


def glob_files(pattern: str) -> list[Path]:
    """The regular files that a pattern names, in the order of their paths; ``**`` stands for folders at any depth."""
    found = [Path(name) for name in glob.glob(str(expand_path(pattern)), recursive=True)]  # noqa: PTH207
    return sorted((path for path in found if path.is_file()), key=Path.as_posix)


def data_name(ref: str) -> str:
    """What data is called in a few letters: a file by its name, a folder or a pattern by the folder's."""
    path = expand_path(ref)
    if is_glob(ref):
        fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        return fixed.resolve().name or "files"
    return (path.resolve().name or "folder") if path.is_dir() else path.stem


def list_files(root: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files with one of these endings, at any depth, in the order of their paths; and what was passed over.

    Hidden files do not count, and neither does what lies in a run folder, a model folder or a folder of shards. Raises
    `UserError` for a folder that cannot be read, or is one of those itself.
    """

    def refuse(error: OSError) -> None:
        raise read_error(Path(error.filename), error) from None

    files: list[Path] = []
    passed_over: list[str] = []
    for parent, subfolders, names in os.walk(root, onerror=refuse):
        kind = known_folder_kind({*subfolders, *names})
        if kind is not None and Path(parent) == root:
            raise UserError(f"{root} is {kind}, and no text to train on")
        if kind is not None:
            passed_over.append(f"{parent} ({kind})")
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found = [Path(parent, name) for name in names if not name.startswith(".")]
        found = [file for file in found if file.suffix.lower() in suffixes]
        files += [file for file in found if file.is_file()]
        passed_over += [f"{file} (not a regular file)" for file in found if not file.is_file()]
    return sorted(files, key=Path.as_posix), passed_over
