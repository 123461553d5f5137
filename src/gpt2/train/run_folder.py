"""The run folder: how it is created, locked by one process, and cleaned up when a run resumes.

A new folder appears whole, with its config and its lock file in it, or not at all.
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
from typing import Any, Self

from gpt2.config import FIXED_ON_RESUME, MOVABLE, TrainConfig, check_same_run, to_toml
from gpt2.data.dataset import Dataset
from gpt2.errors import ConfigError, DataError, UserError
from gpt2.files import LockFile, expand_path, fsync_paths, staging_folder
from gpt2.train.checkpoint import checkpoint_metadata, publish, remove_partial_checkpoints

log = logging.getLogger("gpt2")

LOCK_NAME, CONFIG_NAME = ".lock", "config.toml"
PARTIAL_CONFIG_NAME = f".{CONFIG_NAME}.partial"
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAMPLE_HEADER = b"--- step "  # the first bytes of each sample in samples.txt


class RunFolder:
    """The folder of one run, locked by this process until the `with` block ends.

        with RunFolder(config) as folder:  # raises if it is another run's, or another process uses it
            ...                            # whatever can fail before the first step
            folder.initialize(config, checkpoint)
            ...                            # train

    The folder of a new run is created by `initialize`. If the block ends with an error before the first step, it is
    removed again. A full disk, anywhere in the block, becomes a one-line error. Raises UserError for all of these.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = run_folder_path(config)
        self._is_new = not self.path.exists()
        self._lock: LockFile | None = None

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
            self._lock.release(self.path / LOCK_NAME)
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            why = f"{error.strerror}: free some space, and continue with --resume {self.path}"
            raise UserError(f"cannot write the run folder {self.path}: {why}") from error

    def initialize(self, config: TrainConfig, checkpoint: Path | None, *, published: bool = True) -> None:
        """Prepare the folder for the next step: write the config, and repair what a killed process left.

        checkpoint: the one the run resumes from; None at step 0.
        published:  whether the weights of the checkpoint are those of the run's `model/`.
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
    """The folder of the run. Raises ConfigError if it holds another run, or not the run to resume."""
    name = config.name or ""
    if name in ("", ".", "..") or Path(name).name != name or len(name.encode()) > 200:
        raise ConfigError(f"--name must be a valid folder name, not '{name}'", field="name")
    folder = expand_path(config.out_dir) / name
    if config.resume == "never" and folder.exists():
        raise _exists_error(folder)
    if (folder / CONFIG_NAME).is_file():
        check_same_run(folder, config)
    elif folder.exists() and any(path.name not in (LOCK_NAME, PARTIAL_CONFIG_NAME) for path in folder.iterdir()):
        raise ConfigError(f"{folder} is not a run folder: choose another --name", field="name")
    return folder


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the resolved config atomically; the folder is created if it does not exist."""
    with _user_error_on_os_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / PARTIAL_CONFIG_NAME
        partial.write_bytes(to_toml(replace(config, resume="never")).encode())
        fsync_paths([partial])
        partial.replace(folder / CONFIG_NAME)
        fsync_paths([folder])


def truncate_samples(path: Path, step: int, saved_bytes: int | None = None) -> None:
    """Remove the samples that an interrupted run wrote after the checkpoint of `step`; they are written again.

    saved_bytes: size of the file when the checkpoint was saved. The bytes after it are removed if they begin as a
    sample does. If not, or if the size is unknown, the user has edited the file: it is cut at the first later sample.
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
            kept = text[: (saved_bytes or 0) + header.start()]
            path.write_bytes(kept.decode(errors="replace").encode())  # valid UTF-8 again
            return


def run_metadata(config: TrainConfig, data: Dataset) -> dict[str, Any]:
    """The metadata of every checkpoint of a run: a resumed run must have the same."""
    settings = {name: getattr(config, name) for name in FIXED_ON_RESUME if name not in MOVABLE}
    return {"data": data.fingerprint, "config": settings}


def check_run_metadata(checkpoint: Path, metadata: dict[str, Any], data_ref: str) -> None:
    """Raises DataError or ConfigError when a run that resumes from `checkpoint` has other metadata than it.

    data_ref: what the run calls its data.
    """
    saved, folder = checkpoint_metadata(checkpoint), checkpoint.parents[1]
    if saved.get("data", metadata["data"]) != metadata["data"]:
        raise DataError(
            f"the data changed since {folder} was started ({data_ref}): "
            f"--init-from {folder}, with another --name, starts a new run from its weights"
        )
    for name, value in metadata["config"].items():
        was = saved.get("config", {}).get(name, value)
        if was != value:
            raise ConfigError(
                f"{checkpoint} was saved with {name} {was}: {folder / CONFIG_NAME}, with {value}, was changed",
                field=name,
            )


def _exists_error(folder: Path) -> ConfigError:
    return ConfigError(f"{folder} exists: --resume auto resumes it, another --name starts a new run", field="name")


def _create_run_folder(folder: Path, config: TrainConfig) -> LockFile:
    """Create a new run folder atomically; returns its lock, held."""
    with staging_folder(folder) as partial:
        write_config(partial, config)
        lock = _acquire_lock(partial)
        try:
            partial.rename(folder)  # fails if the folder exists and is not empty
        except OSError as error:
            lock.release(partial / LOCK_NAME)
            raise (_exists_error(folder) if folder.exists() else error) from error
    return lock


def _remove_partial_files(folder: Path) -> None:
    """Remove partially written files that killed processes left, those of `files.staging_folder` among them."""
    remove_partial_checkpoints(folder / "checkpoints")
    for path in [*folder.glob(".*.partial"), *folder.glob(".*.partial.lock"), folder / "metrics.tmp"]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_unused(folder: Path) -> bool:
    """Return whether a run folder is as `initialize` created it, without any results."""
    for path in folder.iterdir():
        empty = not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0
        if path.name not in (LOCK_NAME, CONFIG_NAME) and not (path.name in ("metrics.jsonl", "checkpoints") and empty):
            return False
    return True


def _acquire_lock(folder: Path) -> LockFile:
    """Lock a run folder for this process. Raises UserError when another process holds the lock."""
    path = folder / LOCK_NAME
    try:
        lock = LockFile(path)
    except BlockingIOError as error:
        owner = path.read_text(errors="replace")[:20] if path.exists() else ""
        raise UserError(
            f"{folder} is in use by {owner or 'another process'}: wait until it has ended, or stop it"
        ) from error
    if not lock.is_held:
        log.warning("%s cannot be locked on this drive: make sure that no other process uses it", folder)
    path.write_text(f"process {os.getpid()}")
    return lock


@contextmanager
def _user_error_on_os_error(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names the run folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error.strerror or error}") from error
