"""Checkpoints, written atomically and in the background.

`step-N/` holds `model/` (a model folder: `gpt2 sample RUN/checkpoints/step-N` works) or, with LoRA, a PEFT
`adapter/`; the optimizer state in safetensors; and `state.json`, written last, with the checksums of all files.
All of it is written to a hidden folder, synced to disk, read back and compared, and renamed into place.

`CheckpointWriter` writes in a thread: training only waits while the state is copied into buffers. Rank 0 writes for all
ranks. The files do not depend on the number of ranks, and any number of ranks can resume from them.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
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
from gpt2.errors import ModelFilesError, UserError
from gpt2.files import file_sha256, fsync_paths
from gpt2.model import GPT
from gpt2.runtime import synchronize
from gpt2.train.artifact import ModelArtifact

log = logging.getLogger("gpt2")

_INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class CheckpointState:
    """The content of a checkpoint. Names in `optimizer` look like `exp_avg.transformer.wte.weight`."""

    step: int
    artifact: ModelArtifact
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    metadata: dict[str, Any]  # checked when the run resumes; JSON values


class CheckpointWriter:
    """Writes checkpoints, and after each the run's `model/` (or `adapter/`), in a background thread.

        with CheckpointWriter(folder, ModelArtifact(model.config, tokenizer), keep=2, metadata=metadata) as writer:
            ...
            writer.save(step, model, optimizers)

    `save` returns when the state is copied to buffers in CPU memory (12 bytes per parameter with AdamW, 8 for Muon's
    matrices), which are reused; writing needs a third copy of the weights. A save waits until the previous one is
    written. Errors of the thread are raised as UserError by the next `save` or `raise_if_failed`, or at the end of
    the block, which waits for the last write. If the block ends with another error, the thread's is only logged.

    stall_seconds: how long the last `save` blocked the training.
    write_seconds: how long the last finished write took in the background.
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
        """is_writer: False on the ranks that only contribute their shards of the state."""
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
        """Copy the state after update `step` and start writing it; `publish` also writes the run's `model/`.

        With FSDP, all ranks must call this.
        """
        started = time.perf_counter()
        self.wait()
        samples = self._folder / "samples.txt"
        metadata = {**self._metadata, "samples_bytes": samples.stat().st_size if samples.exists() else 0}
        weights = {name: self._copy_to_buffer(f"weight.{name}", w) for name, w in self._artifact.weights(model).items()}
        tensors = {
            name: self._copy_to_buffer(name, value) for name, value in optimizer_tensors(model, optimizers).items()
        }
        synchronize(model.device)
        if self._is_writer:
            state = CheckpointState(step, self._artifact, weights, tensors, metadata)
            self._pending_write = self._executor.submit(self._write, state, publish)
        self.stall_seconds = time.perf_counter() - started

    def raise_if_failed(self) -> None:
        """Raise the error of the last write if it has failed. Does not wait."""
        if self._pending_write is not None and self._pending_write.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the current write is finished, and raise its error."""
        pending, self._pending_write = self._pending_write, None
        if pending is not None:
            self.write_seconds = pending.result()

    def _copy_to_buffer(self, name: str, value: Tensor) -> Tensor:
        """Copy `value` to a buffer that is reused at every save; pinned memory for a fast copy from a GPU."""
        value = full_tensor(value)
        if not self._is_writer:
            return value
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(value, non_blocking=value.is_cuda)

    def _write(self, state: CheckpointState, publish: bool) -> float:
        """In the thread: write the checkpoint, then the run's `model/`; returns the seconds it took."""
        started = time.perf_counter()
        logs = [self._folder / name for name in ("metrics.jsonl", "samples.txt")]
        try:
            fsync_paths(path for path in logs if path.exists())  # no checkpoint is ahead of its metrics
            write_checkpoint(self._folder / "checkpoints", state, self._keep)
            if publish:
                state.artifact.save(state.weights, self._folder)
                fsync_paths((self._folder / state.artifact.folder_name).iterdir())
        except OSError as error:
            raise UserError(f"cannot write the run folder {self._folder}: {error.strerror or error}") from error
        return time.perf_counter() - started


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint under `folder` whose checksums match; corrupt ones are skipped with a warning."""
    for step in sorted(_checkpoint_steps(folder), reverse=True):
        path = folder / f"step-{step}"
        corrupt = _first_corrupt_file(path)
        if corrupt is None:
            return path
        log.warning("checkpoint %s is corrupt (%s): looking for an older one", path, corrupt)
    return None


def load_optimizers(path: Path, model: GPT, optimizers: Sequence[Optimizer]) -> int:
    """Load the optimizer state of a checkpoint into the `optimizers` of `model`; returns the checkpoint's step.

    Raises ModelFilesError when the checkpoint has state of parameters that these optimizers do not train.
    """
    parameters = dict(model.named_parameters())
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        kind, name = key.split(".", 1)
        matching = name in parameters and parameters[name].shape == tensor.shape  # not its step count
        state.setdefault(name, {})[kind] = shard_like(tensor, parameters[name]) if matching else tensor
    for optimizer in optimizers:
        names = _parameter_names(model, optimizer)
        own = {index: state.pop(name) for index, name in enumerate(names) if name in state}
        optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
    if state:
        raise ModelFilesError(f"{path} has optimizer state for {next(iter(state))}, which this run does not train")
    return int(_read_state(path)["step"])


def checkpoint_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a whole checkpoint."""
    return dict(_read_state(path)["facts"])


def is_published(path: Path, run_folder: Path) -> bool:
    """Return whether the run's `model/` or `adapter/` equals that of the checkpoint at `path`."""
    return all(_matches_checksum(run_folder / name, sum) for name, sum in _published_files(path).items())


def publish(path: Path, run_folder: Path) -> None:
    """Copy the checkpoint's `model/` or `adapter/` to the run folder."""
    for name, sum in _published_files(path).items():
        target = run_folder / name
        if not _matches_checksum(target, sum):
            target.parent.mkdir(exist_ok=True)
            partial = run_folder / f".{target.name}.partial"
            shutil.copyfile(path / name, partial)
            partial.replace(target)


def _published_files(path: Path) -> dict[str, str]:
    """The files of a checkpoint that are copied to the run folder, and their checksums."""
    sums = dict(_read_state(path)["sha256"])
    return {name: sum for name, sum in sums.items() if name.startswith(("model/", "adapter/"))}


def _matches_checksum(path: Path, expected_sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == expected_sha256


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove checkpoints whose writing or removal was interrupted."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(folder: Path, state: CheckpointState, keep: int) -> Path:
    """Write `folder/step-N` and remove all but the newest `keep`; returns its path.

    Raises UserError when it cannot be written; earlier checkpoints are then unchanged.
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
    steps = sorted(_checkpoint_steps(folder))
    later = [step for step in steps if step > state.step]  # corrupt, as the run did not resume from them
    for step in later + [step for step in steps if step <= state.step][:-keep]:
        _remove_checkpoint(folder / f"step-{step}")
    return final


def _remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; if the process is killed on the way, it is whole or hidden."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    if path.exists():
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def optimizer_tensors(model: GPT, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state by names like `exp_avg.transformer.wte.weight`; not copied."""
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
    """The bytes of `state.json`, with a checksum of itself in the last line."""
    state = {"step": step, "facts": metadata, "sha256": checksums}
    seal = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    return (json.dumps({**state, "seal": seal}, indent=2) + "\n").encode()


def _read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`. Raises ValueError unless it is, byte for byte, as it was written."""
    try:
        text = (path / "state.json").read_bytes()
        state = json.loads(text)
        written = _state_json(state["step"], dict(state["facts"]), dict(state["sha256"]))
    except (OSError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if text != written or path.name != f"step-{state['step']}":
        raise ValueError("it is corrupt, or another checkpoint's")
    return state


def _first_corrupt_file(path: Path) -> str | None:
    """The first file of a checkpoint that is missing or changed; None when all are intact."""
    try:
        sums = _read_state(path)["sha256"]
    except ValueError:
        return "state.json"
    for name, expected in sums.items():
        if not _matches_checksum(path / name, expected):
            return name
    return None


def _verify_written(folder: Path, state: CheckpointState) -> None:
    """Read the tensors back from the disk. Raises OSError unless they are bitwise equal to the state."""
    for pattern, expected in (
        state.artifact.saved_tensors(state.weights),
        ("optimizer.safetensors", state.optimizer),
    ):
        left = dict(expected)
        for path in folder.glob(pattern):
            _drop_page_cache(path)
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    if name not in left or not _bitwise_equal(file.get_tensor(name), left.pop(name)):
                        raise OSError(f"{name} in {path} differs from what was written")
        if left:
            raise OSError(f"{next(iter(left))} is missing in {folder / pattern}")


def _bitwise_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether all bits are equal: a NaN equals itself, and 0.0 is not -0.0."""
    bits = _INTEGER_DTYPES[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.view(bits), other.view(bits))


def _drop_page_cache(path: Path) -> None:
    """Drop a synced file from the page cache where the system supports it, so that it is read from the disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
