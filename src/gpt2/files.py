"""Files and folders: user-typed paths, the cache, and folders that are written completely or not at all."""

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpt2.errors import DataError, ModelFilesError, UserError

RUN_FOLDER_FILES = ("config.toml", "metrics.jsonl", "checkpoints")  # a run folder has the first and one more

_WHOLE_HASH_BYTES, _SAMPLED_BLOCKS, _SAMPLED_BLOCK_BYTES = 64 * 2**20, 16, 2**16
MAX_HEADER_BYTES = 2**22  # of a safetensors file; the header of GPT-2 XL's has less than 2**17
_PARTIAL_SUFFIX, _LOCK_SUFFIX = ".partial", ".lock"
NO_FOLDER_FSYNC_ERRNOS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of a drive that syncs files alone
NO_LOCKS_ERRNOS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a drive without locks


def expand_path(text: str | Path) -> Path:
    """The path that a user typed, with `~` and `~name` expanded. Raises UserError for an unknown home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text} cannot be found: {str(error)[:1].lower()}{str(error)[1:].rstrip('.')}") from None


def similar_model_folder(ref: str) -> Path | None:
    """The run or model folder that a path which does not exist was probably meant to be, or None.

    A bare name may be one of the hub: it is only looked up in runs/. Beside a path, similar names are too.
    """
    path = expand_path(ref)
    if "/" not in ref:
        return Path("runs") / ref if _has_model(Path("runs") / ref) else None
    try:
        names = [entry.name for entry in path.parent.iterdir() if _has_model(entry)]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return path.parent / close[0] if close else None


def _has_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "model/config.json"))


def cache_home() -> Path:
    """The folder of downloads, prepared data and compiled code: $GPT2_HOME, or ~/.cache/gpt2.

    Raises UserError where there is neither, as in a container whose user has no home folder.
    """
    return expand_path(os.environ["GPT2_HOME"]) if os.environ.get("GPT2_HOME") else home("GPT2_HOME") / ".cache/gpt2"


def home(variable: str) -> Path:
    """The user's home folder. Raises UserError that names an environment variable which can be set instead."""
    try:
        return Path.home()
    except RuntimeError:
        problem = "this user has no home folder (HOME is not set)"
        raise UserError(f"{problem}: set {variable} to a folder for files that are kept") from None


def check_regular_file(path: Path) -> None:
    """Raise UserError for a folder, and for a pipe, socket or device, which could block forever.

    A path without a readable status passes: opening it gives the better message.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file")


def check_inside_folder(path: Path, folder: Path) -> None:
    """Raise UserError for a file of `folder` that is a link to a place outside it.

    The Hugging Face cache's own links, from `snapshots/REVISION` to `blobs`, are accepted. A path that does not exist
    passes.
    """
    root, real = folder.resolve(), path.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if path.exists() and not any(real.is_relative_to(one) for one in allowed):
        raise UserError(f"{path} is a link to a file outside its folder: replace it by a copy of that file")


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, without its metadata: {name: {"dtype", "shape", "data_offsets"}}.

    Raises ModelFilesError for a file that cannot be read, and for a header that is broken or far larger than a GPT-2's:
    the library takes seconds for hundreds of thousands of tensors.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"its header has {size:,} bytes, and at most {MAX_HEADER_BYTES:,} are read")
            header = json.loads(file.read(size))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            if path.stat().st_size != 8 + size + end:
                raise ValueError(f"it has {path.stat().st_size:,} bytes instead of {8 + size + end:,}")
            header.pop("__metadata__", None)
            if not all(type(one) is int and one >= 0 for entry in header.values() for one in entry["shape"]):
                raise ValueError("a shape in its header is none")
    except OSError as error:
        raise ModelFilesError(f"cannot read {path} ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path} is no whole safetensors file: {error}") from None
    except (AttributeError, KeyError, IndexError, TypeError):
        raise ModelFilesError(f"{path} is no whole safetensors file: its header does not describe tensors") from None
    return header


def read_error(path: Path, error: OSError) -> DataError:
    """The error for a file that cannot be read."""
    return DataError(f"cannot read {path} ({error.strerror or error})")


def write_error(path: Path, error: OSError) -> DataError:
    """The error for a path that cannot be written. For a path in the cache it names GPT2_HOME."""
    fix = ": set GPT2_HOME to a writable folder" if path.is_relative_to(cache_home()) else ""
    return DataError(f"cannot write {path} ({error.strerror or error}){fix}")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_identity(path: Path) -> str:
    """A text that changes with the contents of a file: its SHA-256; of more than 64 MiB, a sample and its status.

    The sample is sixteen blocks; the status is the size, the inode, and the times of modification and of change, of
    which no program can set the last.
    """
    status = path.stat()
    if status.st_size <= _WHOLE_HASH_BYTES:
        return file_sha256(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in range(_SAMPLED_BLOCKS):
            file.seek((status.st_size - _SAMPLED_BLOCK_BYTES) * block // (_SAMPLED_BLOCKS - 1))
            digest.update(file.read(_SAMPLED_BLOCK_BYTES))
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{status.st_size} {status.st_ino} {times} {digest.hexdigest()}"


def file_digest(path: Path, like: str) -> str:
    """The digest of a file, in hex, of the kind of `like`: SHA-256, or of 40 digits git's SHA-1 of a file."""
    if len(like) != 40:
        return file_sha256(path)
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def known_folder_kind(names: Collection[str]) -> str | None:
    """The kind of a folder that contains these names, for folders that training programs write; None for any other."""
    if RUN_FOLDER_FILES[0] in names and any(name in names for name in RUN_FOLDER_FILES[1:]):
        return "a run folder"
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return "a model folder"
    if "meta.json" in names and any(re.search(r"(train|val).*\.bin$", name) for name in names):
        return "a folder of token shards"
    return None


def fsync_paths(paths: Iterable[Path]) -> None:
    """Call fsync on files and folders; on a folder only where the drive supports it."""
    for path in paths:
        is_folder = path.is_dir()
        if is_folder and os.name == "nt":  # Windows cannot open a folder
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if not (is_folder and error.errno in NO_FOLDER_FSYNC_ERRNOS):
                raise
        finally:
            os.close(descriptor)


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

    A lock file beside it is held until then. Folders that killed processes left, whose locks are free, are removed
    first. Raises `OSError` when the folder cannot be created.
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


def source_tree() -> Path:
    """The folder that has src/ and benchmarks/, unless the package is installed."""
    return Path(__file__).resolve().parents[2]


def source_commit(tree: Path) -> str | None:
    """The commit of a checkout, with "-dirty" if src/ has changes; None for an installed package."""
    if not (tree / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.check_output(["git", *command], cwd=tree, stderr=subprocess.DEVNULL, text=True).strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "src"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit
