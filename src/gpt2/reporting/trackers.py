"""The metrics of a run in TensorBoard and Weights & Biases, by flag. The record of a run is its metrics.jsonl."""

import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from gpt2.config import TrainConfig, to_toml
from gpt2.errors import UserError, missing_extra


class Tracker(Protocol):
    """Where the records of the steps go, next to metrics.jsonl."""

    def log(self, record: dict[str, Any]) -> None:
        """Take the record of one step: its `step`, and numbers by name."""
        ...

    def close(self) -> None:
        """All steps are done, or the run stops here."""
        ...


def open_trackers(config: TrainConfig, folder: Path, first_step: int) -> list[Tracker]:
    """The trackers that `config` asks for, for a run in `folder` that has done `first_step` updates.

    What they were told of later steps by a run that was interrupted is not told twice.
    Raises UserError for a package that is not installed, a folder that cannot be written, and what W&B refuses.
    """
    trackers: list[Tracker] = []
    try:
        if config.tensorboard:
            trackers.append(TensorBoard(config, folder, first_step))
        if config.wandb is not None:
            trackers.append(WeightsAndBiases(config, config.wandb, folder))
    except UserError:
        for tracker in trackers:
            tracker.close()
        raise
    return trackers


class TensorBoard:
    """TensorBoard's files, in `RUN/tensorboard`. Each step is on disk when `log` returns."""

    def __init__(self, config: TrainConfig, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("tensorboard", "track", "--tensorboard") from error
        try:  # readers drop what an earlier file holds from purge_step on
            self._writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)
        except OSError as error:
            raise UserError(f"cannot write {folder / 'tensorboard'}: {error.strerror or error}") from error
        if first_step == 0:
            self._writer.add_text("config", "\n".join(f"    {line}" for line in to_toml(config).splitlines()))

    def log(self, record: dict[str, Any]) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases. `RUN/wandb.json` knows its id and the last step it was told of.

    W&B takes every step once and never back. So a run that goes on from a checkpoint is silent up to the last step
    that was told, as they are the same steps; without this, the files of two offline runs would overlap.
    """

    def __init__(self, config: TrainConfig, project: str, folder: Path) -> None:
        try:
            from wandb import Error, Settings, init
        except ImportError as error:
            raise missing_extra("wandb", "track", "--wandb") from error
        notes = folder / "wandb.json"
        self._id, self._last_step = _read_state(notes) if notes.exists() else (secrets.token_hex(4), 0)
        try:
            self._run = init(
                project=project,
                name=config.name,
                id=self._id,
                resume="allow",
                dir=str(folder),
                config=asdict(config),
                settings=Settings(console="off"),  # the progress line is no log
            )
            self._state_file = notes.open("r+b" if notes.exists() else "x+b")
        except Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"--wandb {project}: {reason} (WANDB_MODE=offline keeps it on this machine)") from error
        except OSError as error:
            raise UserError(f"cannot write {notes}: {error.strerror or error}") from error
        self._save_state()

    def log(self, record: dict[str, Any]) -> None:
        if record["step"] > self._last_step:
            self._run.log(_scalars(record), step=record["step"])
            self._last_step = record["step"]
            self._save_state()

    def close(self) -> None:
        self._run.finish()
        self._state_file.close()

    def _save_state(self) -> None:
        """Always of the same length, in one write: a kill leaves the old note or the new one."""
        self._state_file.seek(0)
        self._state_file.write(f'{{"id": {json.dumps(self._id)}, "step": {self._last_step:12d}}}\n'.encode())
        self._state_file.flush()


def _read_state(path: Path) -> tuple[str, int]:
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
        return str(notes["id"]), int(notes["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is broken: without it, --wandb begins another run there ({error!r})") from error


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """What can be drawn over the steps; true and false as 1 and 0."""
    return {name: float(value) for name, value in record.items() if name != "step" and isinstance(value, int | float)}
