"""The run folder: whose it is, how it begins, and what of it a resumed run keeps.

A fresh folder appears whole, with its config and its lock in it, or not at all; one process holds it to the end.
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Self

from gpt2.config import FIXED_ON_RESUME, TrainConfig, check_same_run, to_toml
from gpt2.data.dataset import Dataset
from gpt2.errors import UserError
from gpt2.files import expand_path, staging_folder
from gpt2.train.checkpoint import checkpoint_metadata, fsync_paths, publish, remove_partial_checkpoints

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps a second process away
    fcntl = None

log = logging.getLogger("gpt2")

LOCK_NAME, CONFIG_NAME = ".lock", "config.toml"
PARTIAL_CONFIG_NAME = f".{CONFIG_NAME}.partial"
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAMPLE_HEADER = b"--- step "  # what a sample in samples.txt begins with


class RunFolder:
    """The folder of one run, held by this process until the `with` block ends.

        with RunFolder(config) as folder:  # refused where it is another run's, or another process works in it
            ...                            # whatever can fail before the first step
            folder.begin(config, checkpoint)
            ...                            # train

    A fresh run's folder appears at `begin`. Where the block ends with an error before anything was learned, it goes
    away again, and its name is free. A disk that is full, wherever in the block, becomes one line that names it.
    Raises UserError for all that.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = run_folder_path(config)
        self._is_new = not self.path.exists()
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        if not self._is_new:
            with _user_error_on_os_error(self.path):
                self._lock = _acquire_lock(self.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        if self._lock is not None:
            with suppress(OSError):
                if error is not None and self._is_new and _is_unused(self.path):
                    shutil.rmtree(self.path)
                elif _is_open_file(self.path / LOCK_NAME, self._lock):
                    (self.path / LOCK_NAME).unlink()  # while it is held: see _lock
            self._lock.close()
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            why = f"{error.strerror}: make room, and go on with --resume {self.path}"
            raise UserError(f"cannot write the run folder {self.path}: {why}") from error

    def initialize(self, config: TrainConfig, checkpoint: Path | None, *, published: bool = True) -> None:
        """The run is about to take its next step: write its config, and put right what a kill left behind.

        checkpoint: the one that the run goes on from; None for step 0.
        published:  are its weights the run's own?
        """
        with _user_error_on_os_error(self.path):
            if self._lock is None:
                self._lock = _create_run_folder(self.path, config)
                return
            write_config(self.path, config)
            _remove_partial_files(self.path)
            samples = self.path / "samples.txt"
            if checkpoint is None:
                truncate_samples(samples, 0, saved_bytes=0)
                return
            step = int(checkpoint.name.removeprefix("step-"))
            truncate_samples(samples, step, checkpoint_metadata(checkpoint).get("samples_bytes"))
            if published:
                publish(checkpoint, self.path)


def run_folder_path(config: TrainConfig) -> Path:
    """Where the run lives. Raises UserError for a folder that holds another run, or not the one to resume."""
    name = config.name or ""
    if name in ("", ".", "..") or Path(name).name != name or len(name.encode()) > 200:
        raise UserError(f"a run needs a --name that can be a folder's, not '{name}'")
    folder = expand_path(config.out_dir) / name
    if config.resume == "never" and folder.exists():
        raise UserError(_exists_message(folder))
    if (folder / CONFIG_NAME).is_file():
        check_same_run(folder, config)
    elif folder.exists() and any(path.name not in (LOCK_NAME, PARTIAL_CONFIG_NAME) for path in folder.iterdir()):
        raise UserError(f"{folder} has something else in it: no run can be gone on with there")
    return folder


def write_config(folder: Path, config: TrainConfig) -> None:
    """Make the run folder if it is not there, and write the config with all that was chosen for it, whole."""
    with _user_error_on_os_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / PARTIAL_CONFIG_NAME
        partial.write_bytes(to_toml(replace(config, resume="never")).encode())
        fsync_paths([partial])
        partial.replace(folder / CONFIG_NAME)
        fsync_paths([folder])


def truncate_samples(path: Path, step: int, saved_bytes: int | None = None) -> None:
    """Take away what an interrupted run wrote after the checkpoint of `step`: it will be written again.

    kept: the length of the file in bytes when the checkpoint was saved. What comes after it goes, if it begins as a
    sample does. Else, as where the length is not known, it is somebody's own words up to the first later sample.
    """
    if not path.exists():
        return
    text = path.read_bytes()
    added = text[saved_bytes or 0 :]
    if saved_bytes is not None and added[: len(_SAMPLE_HEADER)] == _SAMPLE_HEADER[: len(added)]:
        os.truncate(path, min(saved_bytes, len(text)))
        return
    for header in re.finditer(rb"^--- step ([0-9]+)\r?$", added, re.MULTILINE):
        if int(header[1]) > step:
            path.write_bytes(
                text[: (saved_bytes or 0) + header.start()].decode(errors="replace").encode()
            )  # text again
            return


def run_metadata(config: TrainConfig, data: Dataset) -> dict[str, Any]:
    """What every checkpoint of a run carries, so that a resumed run can be seen to be the same one."""
    return {"data": data.fingerprint, "config": {name: getattr(config, name) for name in FIXED_ON_RESUME}}


def check_run_metadata(checkpoint: Path, metadata: dict[str, Any]) -> None:
    """Raises UserError when the facts of the run that is to go on from `checkpoint` are not those it was saved with."""
    saved, folder = checkpoint_metadata(checkpoint), checkpoint.parents[1]
    if saved.get("data", metadata["data"]) != metadata["data"]:
        raise UserError(
            f"the data changed since {folder} was begun ({metadata['config']['data']}): "
            f"--init-from {folder}, with another --name, starts a new run from its weights"
        )
    for name, value in metadata["config"].items():
        was = saved.get("config", {}).get(name, value)
        if was != value:
            raise UserError(
                f"{checkpoint} was saved with {name} {was}: {folder / CONFIG_NAME}, with {value}, was changed"
            )


def _exists_message(folder: Path) -> str:
    return f"{folder} exists: --resume auto goes on with it, another --name starts beside it"


def _create_run_folder(folder: Path, config: TrainConfig) -> IO[bytes]:
    """Make a fresh run folder, of which there is nothing to be seen before it is whole; returns its lock, held."""
    with staging_folder(folder) as partial:
        write_config(partial, config)
        lock = _acquire_lock(partial)
        try:
            partial.rename(folder)  # fails where there is a folder with anything in it
        except OSError as error:
            lock.close()
            raise (UserError(_exists_message(folder)) if folder.exists() else error) from error
    return lock


def _remove_partial_files(folder: Path) -> None:
    """Take away what kills left of files that were being written."""
    remove_partial_checkpoints(folder / "checkpoints")
    for left in [*folder.glob(".*.partial"), folder / "metrics.tmp"]:  # the first: see gpt2.files.work_folder
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _is_unused(folder: Path) -> bool:
    """Is there nothing in a run folder but what it began with?"""
    for path in folder.iterdir():
        empty = not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0
        if path.name not in (LOCK_NAME, CONFIG_NAME) and not (path.name in ("metrics.jsonl", "checkpoints") and empty):
            return False
    return True


def _acquire_lock(folder: Path) -> IO[bytes]:
    """The folder's lock file, held by this process while it is open. Raises UserError when another one holds it.

    Whoever holds it takes the file away before letting go. So a lock counts only on the file that still bears the
    name: one that was got on a file just taken away is no lock, and is tried again.
    """
    path = folder / LOCK_NAME
    while True:
        file = path.open("ab+")
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                who = file.read(20).decode(errors="replace") or "another process"
                file.close()
                raise UserError(f"{folder} is in use by {who}: wait until it has ended, or stop it") from error
            except OSError as error:
                log.warning("%s cannot be locked (%s): see to it that no other process works in it", path, error)
        if _is_open_file(path, file):
            break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()}".encode())
    file.flush()
    return file


def _is_open_file(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def _user_error_on_os_error(folder: Path) -> Iterator[None]:
    """What the system has against writing in the run folder becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error.strerror or error}") from error
