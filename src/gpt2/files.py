"""Files and folders: user-typed paths, the cache, downloads, and folders that are written completely or not at all."""

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gpt2.errors import DataError, ModelFilesError, UserError

RUN_FOLDER_FILES = ("config.toml", "metrics.jsonl", "checkpoints")  # a run folder has the first and one more

_WHOLE_HASH_BYTES, _SAMPLED_BLOCKS, _SAMPLED_BLOCK_BYTES = 64 * 2**20, 16, 2**16
MAX_HEADER_BYTES = 2**22  # of a safetensors file; the header of GPT-2 XL's has less than 2**17
_MAX_FAILURES, _RETRY_SECONDS = 3, 5.0  # of a connection that breaks without a byte; seconds more each time
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


def download(
    url: str,
    path: Path,
    digest: str,
    timeout: float = 30.0,
    *,
    headers: dict[str, str] | None = None,
    by_hand: Path | None = None,
    show_progress: bool = True,
    is_cancelled: Callable[[], bool] | None = None,
) -> Path:
    """Fetch `url` to `path`, unless the file is there already; returns `path`.

    The file is complete and has this digest (see `file_digest`), or is not there. An existing file is never
    overwritten. A connection that breaks is continued where it broke, if the server can.
    timeout:      seconds without a byte from the server.
    headers:      of the request.
    by_hand:      where the error says that the file can be put; None for `path`.
    is_cancelled: whether to give up, which raises KeyboardInterrupt.

    Raises DataError that names the file, the address and where to put the file by hand.
    """
    import requests

    if path.exists():
        _check_digest(path, digest, url)
        return path
    try:
        with staging_folder(path) as folder:
            partial = folder / path.name
            with partial.open("xb") as file:  # never through a link that is there
                _fetch(url, file, timeout, headers or {}, show_progress, is_cancelled or (lambda: False))
            found = file_digest(partial, digest)
            if found != digest:
                reason = f"its {_digest_name(digest)} is {found[:12]}…, not {digest[:12]}…"
                raise _download_error(url, by_hand or path, reason)
            partial.replace(path)
    except requests.RequestException as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # "Connection refused", under three layers of wrappers
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise _download_error(url, by_hand or path, reason) from error
    except OSError as error:
        raise write_error(path, error) from None
    return path


def _fetch(
    url: str,
    out: BinaryIO,
    timeout: float,
    headers: dict[str, str],
    show_progress: bool,
    is_cancelled: Callable[[], bool],
) -> None:
    """Stream `url` into `out`, with a progress bar on a terminal."""
    import requests
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not (show_progress and console.is_terminal)
    ) as progress:
        task = progress.add_task(_url_filename(url), total=None)
        failures = 0
        while True:
            start, can_continue = out.tell(), False
            resumed = {"Range": f"bytes={start}-"} if start else {}
            request = {"Accept-Encoding": "identity", **headers, **resumed}
            try:
                with requests.get(url, stream=True, timeout=timeout, headers=request) as response:
                    if not response.ok or (start and response.status_code != 206):
                        raise requests.HTTPError(f"HTTP {response.status_code} {response.reason}")
                    can_continue = response.headers.get("Accept-Ranges") == "bytes" or response.status_code == 206
                    length = int(response.headers.get("Content-Length") or 0)
                    progress.update(task, total=start + length or None)
                    for block in response.iter_content(1 << 16):
                        out.write(block)
                        progress.update(task, advance=len(block))
                        if is_cancelled():
                            raise KeyboardInterrupt
                return
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                failures = 1 if out.tell() > start else failures + 1
                if not can_continue or failures > _MAX_FAILURES:
                    raise
                time.sleep(_RETRY_SECONDS * (failures - 1))


def _url_filename(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _download_error(url: str, path: Path, reason: str) -> DataError:
    return DataError(f"cannot download {_url_filename(url)} from {url} ({reason}): put it at {path} by hand")


def _digest_name(digest: str) -> str:
    return "git hash" if len(digest) == 40 else "sha256"


def _check_digest(path: Path, digest: str, url: str) -> None:
    check_regular_file(path)
    try:
        found = file_digest(path, digest)
    except OSError as error:
        raise read_error(path, error) from None
    if found != digest:
        difference = f"its {_digest_name(digest)} is {found[:12]}…, not {digest[:12]}…"
        raise DataError(f"{path} is not the file from {url} ({difference}): remove it to download that file")


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
