"""What a data reference, the value of ``--data``, stands for: token shards, rows to fine-tune on, or texts."""

import glob
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from operator import not_
from pathlib import Path

from gpt2.data.columns import Columns, parse_text_column
from gpt2.data.corpora import HUB_CORPORA, HUB_PREFIX, HubCorpus, find_corpus
from gpt2.data.encodings import encoding_hint
from gpt2.data.mixture import Mixture, find_mixture
from gpt2.data.rows import BAD_ROWS_CHOICES, ROW_SUFFIXES, BadRows, find_columns
from gpt2.data.shards import contains_shards
from gpt2.data.sources import BUILTIN_SOURCES, Document, Texts, builtin_texts
from gpt2.data.text_cache import cache_texts
from gpt2.errors import ConfigError, DataError, did_you_mean
from gpt2.files import check_regular_file, expand_path, known_folder_kind, read_error

TEXT_SUFFIXES = (".txt", ".md", ".text", ".rst")
UNAMBIGUOUS_ROW_SUFFIXES = (".jsonl", ".ndjson", ".parquet")  # a .json or .csv beside text files may be anything

_DOCUMENTATION_STEMS = ("readme", "license", "licence", "changelog", "citation", "contributing", "notice")
_METADATA_NAMES = ("dataset_info.json", "dataset_infos.json", "state.json")  # of the Hugging Face `datasets` library

_log = logging.getLogger("gpt2")


@dataclass(frozen=True)
class Shards:
    """A folder of token shards, or a single shard file."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's name, or the file's without its suffix."""
        return self.path.resolve().name.removesuffix(".bin")


@dataclass(frozen=True)
class Rows:
    """Files with rows of prompts and answers, or of messages. skip_bad_rows: skip and count those that are bad."""

    name: str
    files: tuple[Path, ...]
    columns: Columns
    skip_bad_rows: bool = False


def resolve_data(
    ref: str, columns: str | None = None, bad_rows: str = "error"
) -> Shards | Rows | Texts | HubCorpus | Mixture:
    """The data that `ref` names; a corpus on the hub and the parts of a mixture are not looked up.

    ref: a corpus on the hub (see `find_corpus`), a built-in corpus (see `BUILTIN_SOURCES`), a file, a folder, or a
        pattern such as ``notes/*.txt``. A name wins over a path of the same spelling (`./shakespeare` is the path). In
        a folder, the text files (.txt, .md, .text, .rst) at any depth count, in the order of their paths, or else the
        row files (see `ROW_SUFFIXES`), beside which a README or license is not text; hidden files, run folders, model
        folders and shard folders do not. A text column of rows gives one document per row.
    columns: which columns of rows to read, such as "text=NAME" or "prompt=NAME,answer=NAME"; None detects them from
        the first 1,000 rows.
    bad_rows: "error", or "skip": rows that cannot be used are skipped, counted and logged; it is an error if most are.

    Raises DataError if there is no such data, if it is empty, or if it is neither text nor rows.
    """
    if (shards := find_shards(ref)) is not None:
        return shards
    if (mixture := find_mixture(ref)) is not None:
        if columns is not None:
            raise DataError(f"--columns '{columns}' is for rows, and {ref} is a mixture", field="columns")
        return mixture
    if (corpus := find_corpus(ref)) is not None:
        if columns is not None:
            return replace(corpus, column=parse_text_column(columns))
        return corpus
    row_files, text_files = ([], []) if ref in BUILTIN_SOURCES else _find_files(ref)
    if row_files:
        return _resolve_rows(ref, row_files, columns, skip_bad_rows=_is_skip(bad_rows))
    if columns is not None:
        raise DataError(f"--columns '{columns}' is for rows, and {ref} has none", field="columns")
    if ref in BUILTIN_SOURCES:
        return builtin_texts(ref)
    for file in text_files:
        _check_is_text(file)
    documents = tuple(Document(str(file), file) for file in text_files if file.stat().st_size)
    if not documents:
        raise DataError(f"every text file in {ref} is empty")
    return Texts(_data_name(ref), documents)


def find_shards(ref: str) -> Shards | None:
    """The token shards that `ref` names; None for any other data, without looking at it."""
    path = expand_path(ref)
    return Shards(path) if ref not in BUILTIN_SOURCES and contains_shards(path) else None


def resolve_texts(ref: str, columns: str | None = None, bad_rows: str = "error") -> Texts:
    """`resolve_data` for data that must be text. Raises DataError for any other, too."""
    data = resolve_data(ref, columns, bad_rows)
    if isinstance(data, Shards):
        kind = "a folder of token shards" if data.path.is_dir() else "a token shard"
        raise DataError(f"{ref} is {kind}, not text to train on")
    if isinstance(data, Mixture):
        raise DataError(f"{ref} is a mixture, to train on: name one of its parts here")
    if isinstance(data, HubCorpus):
        raise DataError(f"{ref} is a corpus on the hub: prepare it first, with gpt2 data prepare {ref} FOLDER")
    if isinstance(data, Rows):
        raise DataError(
            f"the rows of {ref} are prompts and answers, for `gpt2 finetune`: to use one column as plain text, "
            "name it with --columns text=NAME"
        )
    return data


def _find_files(ref: str) -> tuple[list[Path], list[Path]]:
    """The row files and the text files that a path or pattern names: exactly one of the two lists is empty."""
    path = expand_path(ref)
    if path.is_dir():
        return _find_folder_files(path)
    files = [path] if path.exists() else _glob_files(path)
    if not files:
        known = (*BUILTIN_SOURCES, *HUB_CORPORA)
        hint, names = did_you_mean(ref, known), ", ".join(known)
        raise DataError(f"no file, folder or corpus '{ref}'{hint}: the corpora are {names}, {HUB_PREFIX}owner/name")
    row_files, others = _partition(files, ROW_SUFFIXES)
    if row_files and others:
        raise DataError(f"{ref} matches both rows ({row_files[0]}) and other files ({others[0]}): name one kind")
    return row_files, others


def _find_folder_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """`_find_files` for a folder; files that are skipped are logged."""
    found, skipped = _walk(folder, (*TEXT_SUFFIXES, *ROW_SUFFIXES))
    row_files, text_files = _partition(found, ROW_SUFFIXES)
    if row_files and all(file.stem.lower() in _DOCUMENTATION_STEMS for file in text_files):
        return [file for file in row_files if file.name not in _METADATA_NAMES] or row_files, []
    if rows := _partition(row_files, UNAMBIGUOUS_ROW_SUFFIXES)[0]:
        raise DataError(f"{folder} has both rows ({rows[0]}) and text ({text_files[0]}): name one kind, as a pattern")
    skipped += [f"{file} (rows, not text)" for file in row_files]
    if skipped:
        others = f" and {len(skipped) - 1:,} more" if len(skipped) > 1 else ""
        _log.warning("%s: skipped %s%s", folder, min(skipped), others)
    if not text_files:
        raise DataError(f"no text files in {folder}: files ending in {', '.join(TEXT_SUFFIXES)} count")
    return [], text_files


def _walk(root: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files with one of these suffixes, at any depth, sorted by path; and what was skipped, with the reason.

    Raises DataError for a folder that cannot be read, and if `root` is a run folder, a model folder or the like.
    """

    def refuse(error: OSError) -> None:
        raise read_error(Path(error.filename), error) from None

    files: list[Path] = []
    skipped: list[str] = []
    for parent, subfolders, names in os.walk(root, onerror=refuse):
        kind = known_folder_kind({*subfolders, *names})
        if kind is not None and Path(parent) == root:
            raise DataError(f"{root} is {kind}, not text to train on")
        if kind is not None:
            skipped.append(f"{parent} ({kind})")
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found = [Path(parent, name) for name in names if not name.startswith(".")]
        found = [file for file in found if file.suffix.lower() in suffixes]
        files += [file for file in found if file.is_file()]
        skipped += [f"{file} (not a regular file)" for file in found if not file.is_file()]
    return sorted(files, key=Path.as_posix), skipped


def _glob_files(pattern: Path) -> list[Path]:
    """The regular files that match a pattern, sorted by path.

    ``**`` matches folders at any depth, but follows no symbolic links, which may be loops. Hidden files and folders
    match only a pattern that starts with a dot.
    """
    base = next((parent for parent in pattern.parents if not glob.has_magic(str(parent))), Path())
    parts = pattern.relative_to(base).parts
    if parts[-1] == "**":
        parts = (*parts, "*")
    try:
        found = [path for path in base.glob("/".join(parts)) if path.is_file()]
    except (OSError, ValueError):  # a name that cannot exist, or an invalid pattern such as a**
        return []
    if not any(part.startswith(".") for part in parts):
        found = [path for path in found if not any(p.startswith(".") for p in path.relative_to(base).parts)]
    return sorted(set(found), key=Path.as_posix)


def _partition(files: list[Path], suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The files with one of these suffixes, and the others."""
    matching = [file.suffix.lower() in suffixes for file in files]
    return list(compress(files, matching)), list(compress(files, map(not_, matching)))


def _data_name(ref: str) -> str:
    """A short name for data: a file's name without its suffix; of a folder or a pattern, the folder's."""
    path = expand_path(ref)
    if path.is_dir():
        return path.resolve().name or "folder"
    if path.exists():
        return path.stem
    fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    return fixed.resolve().name or "files"


def _is_skip(bad_rows: str) -> bool:
    if bad_rows not in BAD_ROWS_CHOICES:
        raise ConfigError(f"--bad-rows is error or skip, not '{bad_rows}'", field="bad_rows")
    return bad_rows == "skip"


def _resolve_rows(ref: str, files: list[Path], spec: str | None, *, skip_bad_rows: bool) -> Rows | Texts:
    columns = find_columns(ref, files, spec)
    name = _data_name(ref)
    if columns.text is None:
        return Rows(name, tuple(files), columns, skip_bad_rows)
    documents = cache_texts(name, files, columns, BadRows(skip_bad_rows))
    if not documents:
        raise DataError(f"every text in {ref} is empty")
    return Texts(name, documents)


def _check_is_text(path: Path) -> None:
    """Refuse a binary file early; other encoding errors show when the text is decoded."""
    check_regular_file(path)
    try:
        with path.open("rb") as handle:
            head = handle.read(8192)
    except OSError as error:
        raise read_error(path, error) from None
    if b"\0" in head:
        hint = encoding_hint(path, head.index(0))
        raise DataError(f"{path} is not a text file: it has a zero byte at offset {head.index(0):,}{hint}")
