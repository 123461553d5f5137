"""The files of a corpus on the hub: which of a data set's files belong to a config and a split."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from gpt2.data.corpora import HubRef
from gpt2.errors import DataError, did_you_mean
from gpt2.hub import LOCAL_COMMIT, HubDataset, HubFile, get_dataset

SUFFIXES = (".parquet", ".jsonl")
CONVERTED_REVISION = "refs/convert/parquet"  # where the hub keeps its own conversion to Parquet
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")

Splits = dict[str, list[HubFile]]


def get_corpus_files(ref: HubRef) -> tuple[HubDataset, Splits]:
    """A data set, and the files of its splits: "train", and "val" if it has a validation split.

    With a split in `ref`, that is the train split, and there is no other. Raises DataError for what does not exist.
    """
    data = get_dataset(ref.repo, ref.revision)
    splits = _find_splits(data, ref)
    if splits is None and ref.revision is None and data.commit != LOCAL_COMMIT:
        data = get_dataset(ref.repo, CONVERTED_REVISION)
        splits = _find_splits(data, ref)
    if splits is None:
        raise DataError(f"the data set {ref.repo} has no {' or '.join(SUFFIXES)} files: see its page on the hub")
    if ref.split is not None:
        if ref.split not in splits:
            names = ", ".join(splits)
            raise DataError(f"{ref.repo} has no split '{ref.split}'{did_you_mean(ref.split, splits)}: it has {names}")
        return data, {"train": splits[ref.split]}
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"{ref.repo} has no train split but {', '.join(splits)}: name one, as in {ref}:{min(splits)}")
    train = splits.get("train") or next(iter(splits.values()))
    val = next((splits[name] for name in VALIDATION_NAMES if name in splits), None)
    return data, {"train": train, **({"val": val} if val and val is not train else {})}


def get_token_files(ref: HubRef) -> tuple[HubDataset, Splits]:
    """A data set of token shards, and the files of its splits in order. Raises DataError if it has none."""
    data = get_dataset(ref.repo, ref.revision)
    shards = sorted((file for file in data.files if file.path.endswith(".bin")), key=lambda file: file.path)
    splits = {split: [file for file in shards if split in PurePosixPath(file.path).name] for split in ("train", "val")}
    if not splits["train"]:
        raise DataError(f"the data set {ref.repo} has no train shards: their names match *train*.bin")
    return data, splits


def _find_splits(data: HubDataset, ref: HubRef) -> Splits | None:
    """The files of each split of the config; None if the data set has no files that can be read."""
    files = sorted((file for file in data.files if file.path.endswith(SUFFIXES)), key=lambda file: file.path)
    parquet = [file for file in files if file.path.endswith(".parquet")]
    if not (files := parquet or files):
        return None
    configs = {str(one["config_name"]): one for one in data.configs if isinstance(one, dict) and "config_name" in one}
    if configs and (ref.config in configs or ref.config is None):
        default = next((name for name, one in configs.items() if one.get("default")), None)
        name = ref.config or default or ("default" if "default" in configs else next(iter(configs)))
        return _splits_of_card(configs[name].get("data_files"), files) or _splits_of_paths(files)
    if ref.config is not None:
        within = [file for file in files if file.path.startswith(f"{ref.config}/") or f"/{ref.config}/" in file.path]
        if not within:
            folders = configs or {file.path.split("/")[0] for file in files if "/" in file.path}
            known = ", ".join(sorted(folders)[:10]) or "none"
            hint = did_you_mean(ref.config, folders)
            raise DataError(f"{data.repo} has no config or folder '{ref.config}'{hint}: it has {known}")
        files = within
    return _splits_of_paths(files)


def _splits_of_card(data_files: Any, files: Sequence[HubFile]) -> Splits:
    """The splits that a card lists: a pattern, a list of them, or a list of splits with patterns."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    splits: Splits = {}
    for entry in entries:
        split, patterns = ("train", entry) if not isinstance(entry, dict) else (entry.get("split"), entry.get("path"))
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            found = [file for file in files if fnmatchcase(file.path, str(pattern))]
            splits.setdefault(str(split), []).extend(found)
    return {split: found for split, found in splits.items() if found}


def _splits_of_paths(files: Sequence[HubFile]) -> Splits:
    """Splits by the names of files and folders, as in ``train-00000-of-00004.parquet``; all others are "train"."""
    splits: Splits = {}
    for file in files:
        words = file.path.lower().replace("/", "-").replace("_", "-").replace(".", "-").split("-")
        split = next((name for name in VALIDATION_NAMES if name in words), "train")
        splits.setdefault(split, []).append(file)
    return dict(sorted(splits.items()))
