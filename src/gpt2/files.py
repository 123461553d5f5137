"""What all that reads or writes files has to know: paths as people type them, and folders that appear whole."""

import errno
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

RUN_FOLDER_FILES = ("config.toml", "metrics.jsonl", "checkpoints")  # by the first and one more a run folder is known

_PARTIAL_SUFFIX, _LOCK_SUFFIX = ".partial", ".lock"
NO_LOCKS_ERRNOS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a drive without locks


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


class LockFile:
    """An exclusive lock that is a file; the system releases it when this process dies. Whoever releases it removes it.

    On a drive without locks, `is_held` is False and nothing is locked.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock, without waiting. Raises `BlockingIOError` when another holds it, `OSError` without access."""
        from filelock import FileLock, Timeout  # takes a fifth of a second to import

        self._lock = FileLock(path, thread_local=False, fallback_to_soft=False)
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise BlockingIOError(errno.EWOULDBLOCK, "it is locked", str(path)) from error
        except OSError as error:
            if error.errno not in NO_LOCKS_ERRNOS:
                raise
        self.is_held = self._lock.is_locked
        self._stat = path.stat()

    def release(self, path: Path) -> None:
        """Remove the file, which is now at `path`, unless another file has replaced it; then release the lock."""
        with suppress(OSError):
            if os.path.samestat(self._stat, path.stat()):
                path.unlink()
        self._lock.release()


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write in, removed when the block ends unless it was moved away.

    A lock file beside it is held until then. So leftovers of killed processes, whose locks are free, can be told from
    folders that are in use; they are removed first. Raises `OSError` when the folder cannot be created.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{_glob_escape(target.name)}.{'[0-9a-f]' * 8}{_PARTIAL_SUFFIX}*"):
        _remove_abandoned(leftover.with_name(leftover.name.removesuffix(_LOCK_SUFFIX)))
    folder, lock = _new_staging_path(target)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release(_lock_path(folder))


def _new_staging_path(target: Path) -> tuple[Path, LockFile]:
    """An unused path, and the lock for it."""
    while True:
        folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}{_PARTIAL_SUFFIX}"
        with suppress(BlockingIOError):  # another process took the new lock file for a leftover
            return folder, LockFile(_lock_path(folder))


def _remove_abandoned(folder: Path) -> None:
    """Remove a staging folder and its lock file, unless the lock is held or there are no locks."""
    with suppress(OSError):
        lock = LockFile(_lock_path(folder))
        if lock.is_held:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release(_lock_path(folder))


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK_SUFFIX)


def _glob_escape(name: str) -> str:
    """`name` as a glob pattern that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
