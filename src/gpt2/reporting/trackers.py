"""Trackers: the metrics of a run in TensorBoard and Weights & Biases, in addition to its metrics.jsonl."""

import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from gpt2.config import TrainConfig, to_toml
from gpt2.errors import UserError, missing_extra


class Tracker(Protocol):
    """A destination for the records of the steps besides metrics.jsonl."""

    def log(self, record: dict[str, Any]) -> None:
        """Log the record of one step: its `step`, and numbers by name."""
        ...

    def close(self) -> None:
        """Finish logging: the run ends or stops."""
        ...


def open_trackers(config: TrainConfig, folder: Path, first_step: int) -> list[Tracker]:
    """Open the trackers of `config` for the run in `folder` after `first_step` updates.

    Later steps, which an interrupted run logged already, are not logged twice. Raises UserError for a package that is
    not installed, a folder that cannot be written, and errors from W&B.
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
    """TensorBoard event files in `RUN/tensorboard`. Each step is on disk when `log` returns."""

    def __init__(self, config: TrainConfig, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("tensorboard", "track", "--tensorboard") from error
        try:  # readers drop steps from purge_step on of earlier files
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
    """A run at Weights & Biases. `RUN/wandb.json` holds its id and the last logged step.

    W&B takes each step once. So a resumed run does not log the steps up to the last logged one again, which are the
    same; otherwise the files of two offline runs would overlap.
    """

    def __init__(self, config: TrainConfig, project: str, folder: Path) -> None:
        try:
            from wandb import Error, Settings, init
        except ImportError as error:
            raise missing_extra("wandb", "track", "--wandb") from error
        state = folder / "wandb.json"
        self._id, self._last_step = _read_state(state) if state.exists() else (secrets.token_hex(4), 0)
        try:
            self._run = init(
                project=project,
                name=config.name,
                id=self._id,
                resume="allow",
                dir=str(folder),
                config=asdict(config),
                settings=Settings(console="off"),  # do not record the progress line
            )
            self._state_file = state.open("r+b" if state.exists() else "x+b")
        except Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"--wandb {project}: {reason} (WANDB_MODE=offline keeps it on this machine)") from error
        except OSError as error:
            raise UserError(f"cannot write {state}: {error.strerror or error}") from error
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
        """Write the state with a fixed length in one write, so that a kill leaves the old or the new one."""
        self._state_file.seek(0)
        self._state_file.write(f'{{"id": {json.dumps(self._id)}, "step": {self._last_step:12d}}}\n'.encode())
        self._state_file.flush()


def _read_state(path: Path) -> tuple[str, int]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return str(state["id"]), int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is broken: remove it, and --wandb starts a new W&B run ({error!r})") from error


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by name; true and false as 1 and 0."""
    return {name: float(value) for name, value in record.items() if name != "step" and isinstance(value, int | float)}
