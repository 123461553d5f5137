"""What all that reads or writes files has to know: paths as people type them, and folders that appear whole."""

import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpt2.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where leftovers of a killed process stay until someone removes them
    fcntl = None

RUN_FOLDER_FILES = ("config.toml", "metrics.jsonl", "checkpoints")  # by the first and one more a run folder is known

_PARTIAL_SUFFIX = ".partial"


def expand_path(text: str | Path) -> Path:
    """The path that a person typed, `~` and `~name` written out. Raises `UserError` when there is no such home."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text} cannot be found: {str(error)[:1].lower()}{str(error)[1:].rstrip('.')}") from None


def cache_home() -> Path:
    """Where downloads, prepared data and compiled code are kept: $GPT2_HOME, or ~/.cache/gpt2."""
    return expand_path(os.environ.get("GPT2_HOME") or "~/.cache/gpt2")


def check_regular_file(path: Path) -> None:
    """Raise `UserError` for a pipe, socket or device, which could be waited for without end, and for a folder.

    A path that cannot be looked at passes: opening it gives the better message.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file")


def file_sha256(path: Path) -> str:
    """The checksum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_folder_kind(names: Collection[str]) -> str | None:
    """What a folder with files of these names is, if this program (or its like) made it; else None."""
    if RUN_FOLDER_FILES[0] in names and any(name in names for name in RUN_FOLDER_FILES[1:]):
        return "a run folder"
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return "a model folder"
    if "meta.json" in names and any(re.search(r"(train|val).*\.bin$", name) for name in names):
        return "a folder of token shards"
    return None


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write in, gone when the block ends unless it was moved away.

    Its owner holds a lock on it, which the system takes back when the owner dies. So what killed processes left
    behind beside the same target is told from what others are writing at this moment, and is removed first.
    Raises `OSError` when it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{_glob_escape(target.name)}.{'[0-9a-f]' * 8}{_PARTIAL_SUFFIX}"):
        _remove_abandoned(leftover)
    folder, lock = _create_locked_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _create_locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new folder, and the descriptor that holds its lock."""
    while True:
        folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}{_PARTIAL_SUFFIX}"
        folder.mkdir()
        with suppress(FileNotFoundError, BlockingIOError):  # swept away by another process before it was locked
            lock = _try_lock(folder)
            if folder.exists():
                return folder, lock


def _remove_abandoned(folder: Path) -> None:
    """Remove a work folder whose owner is no more. Where that cannot be told, it stays."""
    with suppress(OSError):
        lock = _try_lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """Lock a folder: the descriptor to close at the end, None on systems and drives without locks.

    Raises `BlockingIOError` when someone else holds the lock, `FileNotFoundError` when there is no such folder.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _glob_escape(name: str) -> str:
    """`name` as a glob pattern that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
