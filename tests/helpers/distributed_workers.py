"""The functions that `distributed_launcher.run_on_ranks` runs on each rank."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2.commands.finetune import main as finetune
from gpt2.config import TrainConfig, config_for_resume
from gpt2.data.loader import Batch
from gpt2.distributed.parallel import DistributedModel, full_tensor
from gpt2.distributed.process_group import ProcessGroup
from gpt2.model import GPT
from gpt2.train import trainer
from gpt2.train.checkpoint import CheckpointWriter
from gpt2.train.setup import Run, setup_run
from gpt2.train.trainer import UpdateResult, train, update
from tests.helpers.training_helpers import fixed_seed_sampler

WRITE_EVENTS = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.symlink",
    "os.link",
)  # audit events


@dataclass
class TrainingRecord:
    """A training run on one rank.

    folder:  the run folder.
    kind:    the kind of parallelism.
    batches: the tokens and targets of each update, int64 (steps, 2, rows of this rank, block_size).
    """

    folder: Path
    kind: str = ""
    batches: list[np.ndarray] = field(default_factory=list)


def run_trainings(ranks: ProcessGroup, configs: Sequence[TrainConfig], local_size: int = 0) -> list[TrainingRecord]:
    """Train with each of the configs, one after the other; `local_size` is the number of ranks per host."""
    trainer.write_report = lambda run, stop_reason: None  # the plot takes longer than the training
    return [_run_training(_with_local_world_size(local_size, ranks), config) for config in configs]


def _run_training(ranks: ProcessGroup, config: TrainConfig) -> TrainingRecord:
    record = TrainingRecord(Path())

    def recorded(run: Run, batch: Batch, rate: float) -> UpdateResult:
        record.kind = run.distributed_model.kind
        record.batches.append(torch.stack((batch.tokens, batch.targets)).numpy().copy())
        return update(run, batch, rate)

    trainer.update = recorded
    record.folder = train(config, fixed_seed_sampler, ranks)
    return record


def resume_trainings(ranks: ProcessGroup, folders: Mapping[Path, dict[str, Any]], local_size: int = 0) -> None:
    """Resume the runs in these folders, each with the given values."""
    run_trainings(ranks, [config_for_resume(folder, given) for folder, given in folders.items()], local_size)


def initial_weights(ranks: ProcessGroup, config: TrainConfig, parallel: str) -> dict[str, np.ndarray]:
    """The whole weights of a rank, by name, after every rank has initialized its model with another seed."""
    torch.manual_seed(ranks.rank)
    distributed_model = DistributedModel(
        parallel, GPT(config.model_config(257)), ranks.with_timeout(60.0), torch.device("cpu")
    )
    return {name: full_tensor(p.detach()).numpy().copy() for name, p in distributed_model.model.named_parameters()}


def run_finetune(ranks: ProcessGroup, arguments: Sequence[str]) -> None:
    """Run `gpt2 finetune` with these arguments."""
    assert ranks.is_single_process
    assert finetune(list(arguments)) == 0


def record_writes(ranks: ProcessGroup, config: TrainConfig, folders: Sequence[str]) -> list[str]:
    """Train; returns the paths that this process wrote, created, renamed or removed in these folders."""
    seen: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in WRITE_EVENTS or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITE_FLAGS
        )
        path = arguments[0] if arguments else None
        if writes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(tuple(folders)):
            seen.append(f"{event} {path}")

    sys.addaudithook(note)
    run_trainings(ranks, [config])
    return seen


_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class UpdateRecord(NamedTuple):
    """The results of some updates on one rank.

    updates:            loss and gradient norm of each.
    part_losses:        the losses of this rank's micro-batches, for each update.
    collectives:        for each update, its collective operations by name, with the number of elements of each.
    weights:            the whole weights after the last update, by name.
    tied:               whether output head and embedding share a matrix, in the model and in its exported copy.
    sharding:           the number of DTensor parameters, and the number of elements of all parameters on this rank.
    optimizer_elements: the number of elements of optimizer state on this rank.
    """

    updates: list[tuple[float, float]]
    part_losses: list[list[float]]
    collectives: list[list[tuple[str, int]]]
    weights: dict[str, np.ndarray]
    tied: bool
    sharding: tuple[int, int]
    optimizer_elements: int


def run_updates(
    ranks: ProcessGroup, config: TrainConfig, batches: Sequence[Batch], local_size: int = 0
) -> UpdateRecord:
    """Update with each of these global batches, of which each rank takes its share, as the loader does."""
    run = setup_run(config, Path(config.out_dir) / "none", _with_local_world_size(local_size, ranks))
    share = config.batch_size // ranks.world_size
    found, part_losses, sent = [], [], []
    for batch in batches:
        part = batch.split(share)[ranks.rank]
        run.step += 1
        with _recorded_losses(run) as losses, CollectiveRecorder() as sending:
            done = update(run, part, config.lr)
        found.append((done.loss, done.grad_norm))
        part_losses.append(losses)
        sent.append(sending.collectives)
    own = [p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in run.model.parameters()]
    exported = run.distributed_model.full_model()
    return UpdateRecord(
        updates=found,
        part_losses=part_losses,
        collectives=sent,
        weights={name: full_tensor(p.detach()).numpy().copy() for name, p in run.model.named_parameters()},
        tied=all(m.lm_head.weight is m.transformer.wte.weight for m in (run.model, exported)),
        sharding=(sum(isinstance(p, DTensor) for p in run.model.parameters()), sum(own)),
        optimizer_elements=sum(
            _local_tensor(value).numel() for o in run.optimizers for s in o.state.values() for value in s.values()
        ),
    )


def _local_tensor(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _recorded_losses(run: Run) -> Iterator[list[float]]:
    """Record the losses of this rank's micro-batches, before the all-reduce."""
    losses: list[float] = []
    loss = run.distributed_model.loss

    def noted(tokens: Tensor, targets: Tensor, divisor: float, documents: Tensor | None) -> Tensor:
        value = loss(tokens, targets, divisor, documents)
        losses.append(value.item())
        return value

    run.distributed_model.loss = noted
    yield losses
    run.distributed_model.loss = loss


class CollectiveRecorder(TorchDispatchMode):
    """Records every collective operation: its name, and the number of elements that this rank sends."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            given = args[1] if "gather" in name or "scatter" in name else args[0]  # their first argument is the output
            self.collectives.append((name, _numel(given)))
        return func(*args, **(kwargs or {}))


def _numel(given: Any) -> int:
    return given.numel() if isinstance(given, Tensor) else sum(_numel(each) for each in given)


def rewrite_checkpoint(ranks: ProcessGroup, folder: Path, out: Path, parallel: str, local_size: int = 0) -> None:
    """Resume the run in `folder` from its newest checkpoint, and write its state as a checkpoint under `out`."""
    ranks = _with_local_world_size(local_size, ranks)
    run = setup_run(config_for_resume(folder, {"parallel": parallel}), folder, ranks)
    with CheckpointWriter(
        out, run.artifact, keep=1, metadata=run.checkpoint_metadata, is_writer=ranks.is_main_process
    ) as writer:
        writer.save(run.step, run.model, run.optimizers)


def _with_local_world_size(local_size: int, ranks: ProcessGroup) -> ProcessGroup:
    """The same ranks with this many on each host."""
    if not local_size:
        return ranks
    return replace(ranks, local_rank=ranks.rank % local_size, local_world_size=local_size)
