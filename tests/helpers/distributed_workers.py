"""What the ranks of the tests do: `ranks_world.world` runs these on each, and collects what they return."""

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
    """What one rank can say of a training.

    folder: of the run.
    kind:   how the ranks shared the model.
    stream: the tokens and targets of each update, int64 (steps, 2, rows of this rank, block_size).
    """

    folder: Path
    kind: str = ""
    batches: list[np.ndarray] = field(default_factory=list)


def run_trainings(ranks: ProcessGroup, configs: Sequence[TrainConfig], local_size: int = 0) -> list[TrainingRecord]:
    """Train as each of the configs says, one after the other; `local_size` says how many ranks there are on a host."""
    trainer.write_report = lambda run, why_stopped: None  # the picture takes longer than the training
    return [_run_training(_with_local_world_size(local_size, ranks), config) for config in configs]


def _run_training(ranks: ProcessGroup, config: TrainConfig) -> TrainingRecord:
    told = TrainingRecord(Path())

    def recorded(run: Run, batch: Batch, rate: float) -> UpdateResult:
        told.kind = run.distributed_model.kind
        told.batches.append(torch.stack((batch.tokens, batch.targets)).numpy().copy())
        return update(run, batch, rate)

    trainer.update = recorded
    told.folder = train(config, fixed_seed_sampler, ranks)
    return told


def resume_trainings(ranks: ProcessGroup, folders: Mapping[Path, dict[str, Any]], local_size: int = 0) -> None:
    """Go on with the runs in these folders, each under the values given."""
    run_trainings(ranks, [config_for_resume(folder, given) for folder, given in folders.items()], local_size)


def initial_weights(ranks: ProcessGroup, config: TrainConfig, parallel: str) -> dict[str, np.ndarray]:
    """What a rank begins with, by name, all of each, when every rank has drawn weights of its own."""
    torch.manual_seed(ranks.rank)
    spread = DistributedModel(parallel, GPT(config.model_config(257)), ranks.with_timeout(60.0), torch.device("cpu"))
    return {name: full_tensor(p.detach()).numpy().copy() for name, p in spread.model.named_parameters()}


def run_finetune(ranks: ProcessGroup, arguments: Sequence[str]) -> None:
    """`gpt2 finetune` with these arguments."""
    assert ranks.is_single_process
    assert finetune(list(arguments)) == 0


def record_writes(ranks: ProcessGroup, config: TrainConfig, folders: Sequence[str]) -> list[str]:
    """Train as the config says; what this process wrote, made, renamed or removed under these folders."""
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
    """What came of some updates on one rank.

    updates:     loss and norm of the gradient of each.
    part_losses: what this rank's micro-batches had of each update's loss.
    sent:        for each update, the collective operations in it, by name, and how many elements went into each.
    weights:     after the last, by name, all of each.
    tied:        is the head's matrix still the embedding's, in the model and in what is exported of it?
    cut:         how many of the model's parameters are DTensors, and how many elements this rank has of all of them.
    kept:        how many elements of optimizer state this rank keeps.
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
    """Do an update with each of these global batches, of which each rank takes its share, as the loader would."""
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
    """Note what this rank's micro-batches give, before it is summed over the ranks."""
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
    """Notes every collective operation: its name, and how many elements this rank gives to it."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            given = args[1] if "gather" in name or "scatter" in name else args[0]  # those name the output first
            self.collectives.append((name, _numel(given)))
        return func(*args, **(kwargs or {}))


def _numel(given: Any) -> int:
    return given.numel() if isinstance(given, Tensor) else sum(_numel(each) for each in given)


def rewrite_checkpoint(ranks: ProcessGroup, folder: Path, out: Path, parallel: str, local_size: int = 0) -> None:
    """Take up the run in `folder` at its newest checkpoint, and at once write what was read as a run's under `out`."""
    ranks = _with_local_world_size(local_size, ranks)
    run = setup_run(config_for_resume(folder, {"parallel": parallel}), folder, ranks)
    with CheckpointWriter(
        out, run.artifact, keep=1, metadata=run.checkpoint_metadata, is_writer=ranks.is_main_process
    ) as writer:
        writer.save(run.step, run.model, run.optimizers)


def _with_local_world_size(local_size: int, ranks: ProcessGroup) -> ProcessGroup:
    """The same ranks, so many of them on each host."""
    if not local_size:
        return ranks
    return replace(ranks, local_rank=ranks.rank % local_size, local_world_size=local_size)
