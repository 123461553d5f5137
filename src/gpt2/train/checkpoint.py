"""A checkpoint is whole or it is not there.

`step-N/` holds `model/` (a model folder like any other: `gpt2 sample RUN/checkpoints/step-N` works) or, where adapters
are learned, `adapter/` in PEFT's form; the optimizer's state in safetensors; and `state.json`, which is written last
and knows every file's checksum.
All of it is written to a hidden folder, synced to disk, read back and compared, and renamed into place.

`CheckpointWriter` does so while the training goes on: only the copy of the state into memory of its own holds it up.
Rank 0 writes, for all: the files are the same whatever the number of ranks, and any number of them can go on from them.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from gpt2.distributed.parallel import full_tensor, shard_like
from gpt2.errors import UserError
from gpt2.files import file_sha256
from gpt2.model import GPT
from gpt2.runtime import synchronize
from gpt2.train.artifact import ModelArtifact

log = logging.getLogger("gpt2")

_INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint is made of. The tensors of `optimizer` bear names like `exp_avg.transformer.wte.weight`."""

    step: int
    artifact: ModelArtifact
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    metadata: dict[str, Any]  # what a resumed run is compared with; anything JSON can hold


class CheckpointWriter:
    """Writes a run's checkpoints, and after each the run's `model/` (or `adapter/`), in a thread beside the training.

    with CheckpointWriter(folder, Product(model.config, tokenizer), keep=2, facts=facts) as writer:
        ...
        writer.save(step, model, optimizers)

    `save` returns as soon as the state is copied: weights and optimizer state once more in CPU memory (12 bytes a
    parameter with AdamW, 8 with Muon's matrices), kept for the next save, and while it is written the weights a third
    time. A save that finds the one before still being written waits for it. What goes wrong in the thread is raised
    as a UserError by the next `save` or `check`, or at the end of the block, which waits for the last write. Where
    the block ends with another error the write is finished too, and its own error is only logged.

    stall_seconds: how long the last `save` held up the training.
    write_seconds: how long the last finished write took beside it.
    """

    def __init__(
        self,
        run_folder: Path,
        artifact: ModelArtifact,
        keep: int,
        metadata: dict[str, Any] | None = None,
        *,
        is_writer: bool = True,
    ) -> None:
        """writes: False on the ranks that only give their parts of the state to the one that does."""
        self.stall_seconds = self.write_seconds = 0.0
        self._is_writer = is_writer
        self._folder, self._artifact, self._keep, self._metadata = run_folder, artifact, keep, metadata or {}
        self._buffers: dict[str, Tensor] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending_write: Future[float] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._executor.shutdown()  # waits
        if kind is None:
            self.wait()
        elif self._pending_write is not None and self._pending_write.exception() is not None:
            log.warning("%s", self._pending_write.exception())

    def save(self, step: int, model: GPT, optimizers: Sequence[Optimizer], *, publish: bool = True) -> None:
        """Copy the state after update `step`, and have it written; `publish` makes its weights the run's own.

        Where ranks have parts of it, each of them must call this.
        """
        began = time.perf_counter()
        self.wait()
        samples = self._folder / "samples.txt"
        facts = {**self._metadata, "samples_bytes": samples.stat().st_size if samples.exists() else 0}
        weights = {name: self._copy_to_buffer(f"weight.{name}", w) for name, w in self._artifact.weights(model).items()}
        tensors = {
            name: self._copy_to_buffer(name, value) for name, value in optimizer_tensors(model, optimizers).items()
        }
        synchronize(model.device)
        if self._is_writer:
            state = CheckpointState(step, self._artifact, weights, tensors, facts)
            self._pending_write = self._executor.submit(self._write, state, publish)
        self.stall_seconds = time.perf_counter() - began

    def raise_if_failed(self) -> None:
        """Raise what went wrong in the last write, if it is over. Waits for nothing."""
        if self._pending_write is not None and self._pending_write.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way, and raise what went wrong in it: for who is about to say that all is saved."""
        writing, self._pending_write = self._pending_write, None
        if writing is not None:
            self.write_seconds = writing.result()

    def _copy_to_buffer(self, name: str, value: Tensor) -> Tensor:
        """`value` in memory of our own, the same one at every save; page-locked for a GPU's, which then goes fast."""
        value = full_tensor(value)
        if not self._is_writer:
            return value
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(value, non_blocking=value.is_cuda)

    def _write(self, state: CheckpointState, publish: bool) -> float:
        """In the thread: the checkpoint, then the run's own weights; returns the seconds it took."""
        began = time.perf_counter()
        told = [self._folder / name for name in ("metrics.jsonl", "samples.txt")]
        try:
            fsync_paths(path for path in told if path.exists())  # no checkpoint is ahead of what the run says of itself
            write_checkpoint(self._folder / "checkpoints", state, self._keep)
            if publish:
                state.artifact.save(state.weights, self._folder)
                fsync_paths((self._folder / state.artifact.folder_name).iterdir())
        except OSError as error:
            raise UserError(f"cannot write the run folder {self._folder}: {error.strerror or error}") from error
        return time.perf_counter() - began


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint under `folder` whose files are all as they were written; a broken one is passed over."""
    for step in sorted(_checkpoint_steps(folder), reverse=True):
        path = folder / f"step-{step}"
        broken = _first_corrupt_file(path)
        if broken is None:
            return path
        log.warning("checkpoint %s is broken (%s): looking for an older one", path, broken)
    return None


def load_optimizers(path: Path, model: GPT, optimizers: Sequence[Optimizer]) -> int:
    """Put the state in a checkpoint into the `optimizers` of `model`, which has its weights; returns its step.

    Raises UserError when the checkpoint holds the state of another kind of optimizer.
    """
    parameters = dict(model.named_parameters())
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        kind, name = key.split(".", 1)
        matching = name in parameters and parameters[name].shape == tensor.shape  # its number of steps is no part of it
        state.setdefault(name, {})[kind] = shard_like(tensor, parameters[name]) if matching else tensor
    for optimizer in optimizers:
        names = _parameter_names(model, optimizer)
        own = {index: state.pop(name) for index, name in enumerate(names) if name in state}
        optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
    if state:
        raise UserError(f"{path} has optimizer state for {next(iter(state))}, which this run does not train")
    return int(_read_state(path)["step"])


def checkpoint_metadata(path: Path) -> dict[str, Any]:
    """The facts that a whole checkpoint was saved with."""
    return dict(_read_state(path)["facts"])


def is_published(path: Path, run_folder: Path) -> bool:
    """Are the weights of the checkpoint at `path`, and what goes with them, the run's own?"""
    return all(_matches_checksum(run_folder / name, sum) for name, sum in _published_files(path).items())


def publish(path: Path, run_folder: Path) -> None:
    """Make the weights of the checkpoint at `path` the run's own."""
    for name, sum in _published_files(path).items():
        target = run_folder / name
        if not _matches_checksum(target, sum):
            target.parent.mkdir(exist_ok=True)
            partial = run_folder / f".{target.name}.partial"
            shutil.copyfile(path / name, partial)
            partial.replace(target)


def _published_files(path: Path) -> dict[str, str]:
    """The files of a checkpoint that are the run's, too, and their checksums."""
    sums = dict(_read_state(path)["sha256"])
    return {name: sum for name, sum in sums.items() if name.startswith(("model/", "adapter/"))}


def _matches_checksum(path: Path, expected_sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == expected_sha256


def remove_partial_checkpoints(folder: Path) -> None:
    """Take away what kills left of checkpoints that were being written or removed."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(folder: Path, state: CheckpointState, keep: int) -> Path:
    """Write `folder/step-N` and drop all but the newest `keep`; returns its path.

    Raises UserError when it cannot be written; what was there before is still there then, and no half of this one.
    """
    final, unfinished = folder / f"step-{state.step}", folder / f".step-{state.step}.unfinished"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        state.artifact.save(state.weights, unfinished)
        save_file(state.optimizer, unfinished / "optimizer.safetensors")
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        fsync_paths(files)
        _verify_written(unfinished, state)
        sums = {path.relative_to(unfinished).as_posix(): file_sha256(path) for path in files}
        (unfinished / "state.json").write_bytes(_state_json(state.step, state.metadata, sums))
        fsync_paths([unfinished / "state.json", unfinished / state.artifact.folder_name, unfinished])
        _remove_checkpoint(final)
        unfinished.rename(final)
        fsync_paths([folder, folder.parent])
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {final}: {error}") from error
    later = [
        other for other in _checkpoint_steps(folder) if other > state.step
    ]  # broken, or this run would have begun there
    for old in later + sorted(other for other in _checkpoint_steps(folder) if other <= state.step)[:-keep]:
        _remove_checkpoint(folder / f"step-{old}")
    return final


def _remove_checkpoint(path: Path) -> None:
    """Take a checkpoint away; a kill on the way leaves it whole under its name, or hidden."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    if path.exists():
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def optimizer_tensors(model: GPT, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state, where it is, under names like `exp_avg.transformer.wte.weight`."""
    tensors: dict[str, Tensor] = {}
    for optimizer in optimizers:
        state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
        for index, name in enumerate(_parameter_names(model, optimizer)):
            for kind, value in state.get(index, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{kind}.{name}"] = value.detach()
    return tensors


def _parameter_names(model: GPT, optimizer: Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in the order of its state."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _checkpoint_steps(folder: Path) -> list[int]:
    names = (re.fullmatch(r"step-([0-9]+)", path.name) for path in folder.glob("step-*"))
    return [int(match[1]) for match in names if match]


def _state_json(step: int, metadata: dict[str, Any], checksums: dict[str, str]) -> bytes:
    """`state.json`, with a checksum of its own in its last line."""
    state = {"step": step, "facts": metadata, "sha256": checksums}
    seal = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    return (json.dumps({**state, "seal": seal}, indent=2) + "\n").encode()


def _read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`; a ValueError unless it is, byte for byte, as it was written."""
    try:
        text = (path / "state.json").read_bytes()
        state = json.loads(text)
        written = _state_json(state["step"], dict(state["facts"]), dict(state["sha256"]))
    except (OSError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if text != written or path.name != f"step-{state['step']}":
        raise ValueError("it is damaged, or another checkpoint's")
    return state


def _first_corrupt_file(path: Path) -> str | None:
    """The first file of a checkpoint that is missing or changed, None when it is whole."""
    try:
        sums = _read_state(path)["sha256"]
    except ValueError:
        return "state.json"
    for name, expected in sums.items():
        if not _matches_checksum(path / name, expected):
            return name
    return None


def _verify_written(folder: Path, state: CheckpointState) -> None:
    """Read the tensors back from the disk; an OSError when they are not, bit for bit, what was to be written."""
    for pattern, meant in (
        state.artifact.saved_tensors(state.weights),
        ("optimizer.safetensors", state.optimizer),
    ):
        left = dict(meant)
        for path in folder.glob(pattern):
            _drop_page_cache(path)
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name not in left or not _bitwise_equal(file.get_tensor(name), left.pop(name)):
                        raise OSError(f"{name} reads back from {path} otherwise than it was written")
        if left:
            raise OSError(f"{next(iter(left))} is missing in {folder / pattern}")


def _bitwise_equal(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, so that a NaN equals itself and 0.0 is not -0.0."""
    bits = _INTEGER_DTYPES[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.view(bits), other.view(bits))


def _drop_page_cache(path: Path) -> None:
    """Ask the system to drop what it remembers of a synced file, where it can, so that a read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fsync_paths(paths: Iterable[Path]) -> None:
    """Ask the disk to keep what was written to these files and folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
