"""DDP and FSDP on any number of ranks equal one process.

The ranks are real processes with gloo. They read the same rows as one process; their results differ from it only by the
rounding of float32 sums.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from gpt2.data.loader import Batch, BatchLoader, TokenLoader, prefetch_batches
from gpt2.distributed.parallel import pick_parallel_kind
from gpt2.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from gpt2.errors import UserError
from gpt2.loss import IGNORE_INDEX
from gpt2.model import GPT
from gpt2.reporting.metrics import read_metrics
from gpt2.train.setup import load_model_and_data
from tests.helpers.distributed_cases import (
    BATCH_SIZE,
    BLOCK_SIZE,
    INSTRUCT_VALUES,
    VARIANTS,
    assert_equal_training,
    max_difference,
    small_config,
    weights,
    workspace,
)
from tests.helpers.distributed_launcher import run_on_ranks
from tests.helpers.distributed_workers import (
    TrainingRecord,
    UpdateRecord,
    initial_weights,
    run_finetune,
    run_trainings,
    run_updates,
)
from tests.helpers.task_files import write_hellaswag

WEIGHTS = 34_720  # of the model below
FEW = ("micro", "plain", "answers")
WHOLE_ONLY = ("lora",)  # what FSDP does not do


@dataclass(frozen=True)
class Case:
    """A number of ranks, `local_size` per host if given, a kind of parallelism, and a variant of the training."""

    size: int
    parallel: str
    way: str
    local_size: int = 0

    def __str__(self) -> str:
        hosts = f"{self.size // self.local_size}x{self.local_size}" if self.local_size else str(self.size)
        return f"{hosts}-{self.parallel}-{self.way}"


def cases() -> list[Case]:
    found = [Case(1, parallel, "plain") for parallel in ("ddp", "fsdp")]
    usual = [way for way in VARIANTS if way != "compile"]
    found += [Case(2, "ddp", way) for way in usual] + [Case(2, "fsdp", way) for way in usual if way not in WHOLE_ONLY]
    found += [Case(size, parallel, way) for size in (3, 4) for parallel in ("ddp", "fsdp") for way in FEW[size < 4 :]]
    found += [Case(3, parallel, "muon") for parallel in ("ddp", "fsdp")]  # 32 rows of a matrix, and two matrices
    return found + [Case(4, "fsdp", way, local_size=2) for way in (*FEW[1:], "muon")]


Runs = Callable[[Case | str], list[TrainingRecord]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[Path]:
    with workspace(tmp_path_factory.mktemp("parallel"), compiled) as folder:
        yield folder


@pytest.fixture(autouse=True)
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("GPT2_HOME", str(place / "home"))


@pytest.fixture(scope="module")
def runs(place: Path) -> Runs:
    """The training runs of a case by rank, or of one process; runs with the same ranks are done together."""
    done: dict[Case | str, list[TrainingRecord]] = {}

    def fill(size: int, local_size: int, found: list[Case | str]) -> None:
        configs = [
            small_config(f"alone-{case}", **VARIANTS[case])
            if isinstance(case, str)
            else small_config(str(case), parallel=case.parallel, **VARIANTS[case.way])
            for case in found
        ]
        by_rank = run_on_ranks(size, run_trainings, configs, local_size)
        done.update(zip(found, map(list, zip(*by_rank, strict=True)), strict=True))

    def of(case: Case | str) -> list[TrainingRecord]:
        if case not in done and isinstance(case, str):
            fill(0, 0, [way for way in VARIANTS if way != "compile"])
        elif case not in done:
            assert isinstance(case, Case)
            like = (case.size, case.local_size)
            fill(*like, [other for other in cases() if (other.size, other.local_size) == like])
        return done[case]

    return of


@pytest.mark.parametrize("case", cases(), ids=str)
def test_any_number_of_ranks_equals_one_process(case: Case, runs: Runs) -> None:
    alone, shared = runs(case.way)[0], runs(case)
    assert {each.kind for each in shared} == {case.parallel}
    assert alone.kind == "none"
    assert_equal_training(alone.folder, shared[0].folder, case.way)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_with_compiled_blocks_equal_one_process(parallel: str, place: Path) -> None:
    (alone,) = run_on_ranks(0, run_trainings, [small_config(f"compile-alone-{parallel}", **VARIANTS["compile"])])
    shared = run_on_ranks(
        2, run_trainings, [small_config(f"compile-{parallel}", parallel=parallel, **VARIANTS["compile"])]
    )
    assert_equal_training(alone[0].folder, shared[0][0].folder, "compile")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_on_gpus_equal_one_process(parallel: str, place: Path) -> None:
    given, size = {"device": "cuda", "matmul_precision": "highest"}, min(4, torch.cuda.device_count())
    (alone,) = run_on_ranks(0, run_trainings, [small_config(f"one-gpu-{parallel}", **given)])
    shared = run_on_ranks(size, run_trainings, [small_config(f"gpus-{parallel}", parallel=parallel, **given)])
    assert_equal_training(alone[0].folder, shared[0][0].folder)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_ranks_read_the_same_rows_as_one_process(case: Case, runs: Runs) -> None:
    alone, shared = runs(case.way)[0], runs(case)
    for step, batch in enumerate(alone.batches):
        assert np.array_equal(np.concatenate([each.batches[step] for each in shared], axis=1), batch)
    assert len(alone.batches) == small_config("none").max_steps
    first_rows = {batch[0, row].tobytes() for batch in alone.batches for row in range(BATCH_SIZE)}
    assert (
        len(first_rows) < len(alone.batches) * BATCH_SIZE or case.way not in FEW
    )  # some came twice: an epoch ended on the way


def test_the_cases_are_uneven_where_they_are_meant_to_be(runs: Runs, place: Path) -> None:
    by_rank = runs(Case(4, "ddp", "answers"))
    counts = [[int((batch[1] != IGNORE_INDEX).sum()) for batch in each.batches] for each in by_rank]
    assert all(len(set(step)) > 1 for step in zip(*counts, strict=True))
    data = load_model_and_data(small_config("none"), None).data
    batches = {size: len(list(data.validation_batches(BATCH_SIZE // size, BLOCK_SIZE, None))) for size in (2, 3, 4)}
    assert all(count % size for size, count in batches.items()), batches  # at the end a rank or more has none


def test_one_rank_equals_one_process_bitwise(place: Path) -> None:
    given = small_config("dropping", dropout=0.2)
    (alone,) = run_on_ranks(0, run_trainings, [given])
    (one,) = run_on_ranks(1, run_trainings, [replace(given, name="dropping-1", parallel="ddp")])
    name = "model/model.safetensors"
    assert (one[0].folder / name).read_bytes() == (alone[0].folder / name).read_bytes()


def test_evaluation_tasks_give_the_same_on_any_number_of_ranks(place: Path) -> None:
    file = write_hellaswag(place / "rows.jsonl", rows=101)
    given = {"eval_tasks": "hellaswag", "eval_tasks_every": 3, "eval_tasks_data": f"hellaswag={file}"}
    ((alone,),) = run_on_ranks(0, run_trainings, [small_config("tasks", **given)])
    expected = _task_metrics(alone.folder)
    assert list(expected) == [3, 5]
    both = [small_config(f"tasks-{parallel}", parallel=parallel, **given) for parallel in ("ddp", "fsdp")]
    for one in run_on_ranks(3, run_trainings, both)[0]:
        assert _task_metrics(one.folder) == expected


def _task_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """The metrics of evaluation tasks by step."""
    records = read_metrics(folder / "metrics.jsonl")
    found = {r["step"]: {name: value for name, value in r.items() if name.startswith("eval/")} for r in records}
    return {step: metrics for step, metrics in found.items() if metrics}


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_shards_of_every_batch_are_the_batch(parts: int, place: Path) -> None:
    text, rows = small_config("none"), small_config("none", **INSTRUCT_VALUES)
    plain, packed = (
        load_model_and_data(each, None).data.loader(BATCH_SIZE, each.block_size, 7) for each in (text, rows)
    )
    tokens = np.arange(3_000, dtype=np.uint16) % 250
    apart = TokenLoader(
        _Tokens(tokens), BATCH_SIZE, BLOCK_SIZE, 7, document_start_token=100
    )  # documents in a row that do not see each other
    loader: BatchLoader
    for loader in (plain, packed, apart):
        steps = 2 * loader.windows_per_epoch // BATCH_SIZE + 2  # over two borders of epochs
        shared = [
            list(prefetch_batches(loader, 1, steps, torch.device("cpu"), rank=i, world_size=parts))
            for i in range(parts)
        ]
        assert {len(each) for each in shared} == {steps - 1}
        for step, some in enumerate(zip(*shared, strict=True), 1):
            for field, whole in zip(zip(*some, strict=True), loader.batch(step), strict=True):
                assert (whole is None) == (field[0] is None)
                assert whole is None or torch.equal(torch.cat(field), whole)


class _Tokens:
    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


def random_batches(count: int, *, without: slice = slice(0)) -> list[Batch]:
    """Batches of random tokens; the rows `without` have no targets, the others have some."""
    own = torch.Generator().manual_seed(5)
    tokens = torch.randint(257, (count, 2, BATCH_SIZE, BLOCK_SIZE), generator=own)
    lengths = torch.randint(1, BLOCK_SIZE, (BATCH_SIZE, 1), generator=own)
    tokens[:, 1] = tokens[:, 1].where(torch.arange(BLOCK_SIZE) < lengths, IGNORE_INDEX)
    tokens[:, 1, without] = IGNORE_INDEX
    return [Batch(each[0], each[1]) for each in tokens]


def assert_same_updates(alone: UpdateRecord, shared: list[UpdateRecord]) -> None:
    for result in shared:
        np.testing.assert_allclose(result.updates, alone.updates, rtol=3e-6)
        assert max_difference(result.weights, alone.weights) < 1e-5
        assert result.tied


@pytest.mark.parametrize(("size", "parallel"), [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_a_rank_without_targets_does_not_change_the_mean(size: int, parallel: str, place: Path) -> None:
    given = small_config("none", micro_batch_size=3)
    batches = random_batches(3, without=slice(BATCH_SIZE - BATCH_SIZE // size, BATCH_SIZE))  # the last rank's share
    (alone,) = run_on_ranks(0, run_updates, given, batches)
    shared = run_on_ranks(size, run_updates, replace(given, parallel=parallel), batches)
    assert set(shared[-1].part_losses[0]) == {0.0}
    assert_same_updates(alone, shared)
    summed = np.sum([np.sum(result.part_losses, axis=1) for result in shared], axis=0)
    np.testing.assert_allclose(summed, [loss for loss, _ in alone.updates], rtol=3e-6)


def elements(result: UpdateRecord, name: str) -> list[int]:
    """Elements of a collective in the third update, without scalars; DDP has its final buckets by then."""
    return [count for operation, count in result.collectives[2] if operation == name and count > 1]


@pytest.mark.parametrize("micro", [1, 6])
def test_gradients_are_all_reduced_once_per_step(micro: int, place: Path) -> None:
    batches, parts = random_batches(3), 6 // micro
    ddp, fsdp = (
        run_on_ranks(2, run_updates, small_config("none", micro_batch_size=micro, parallel=parallel), batches)
        for parallel in ("ddp", "fsdp")
    )
    for result in ddp:
        assert sum(elements(result, "allreduce_")) == WEIGHTS
        assert {name for name, _ in result.collectives[2]} == {"allreduce_"}
    for result in fsdp:
        sent = elements(result, "_reduce_scatter_base_")
        assert len(sent) == 3  # two blocks, and what is outside them
        assert WEIGHTS <= sum(sent) < WEIGHTS + 64  # where it does not divide, it is filled up
        assert elements(result, "allreduce_") == []
        assert len(elements(result, "_allgather_base_")) == parts * (2 * 2 + 1)  # a block twice for each micro-batch


def test_fsdp_shards_within_a_host_and_replicates_over_hosts(place: Path) -> None:
    given, batches = small_config("none", parallel="fsdp", micro_batch_size=1), random_batches(3)
    (alone,) = run_on_ranks(0, run_updates, replace(given, parallel="auto"), batches)
    assert (alone.sharding, alone.optimizer_elements) == (
        (0, WEIGHTS),
        2 * WEIGHTS + 28,
    )  # two moments, and a count for each parameter
    for size, local_size, parts in ((2, 0, 2), (3, 0, 3), (4, 0, 4), (4, 2, 2)):
        shared = run_on_ranks(size, run_updates, given, batches, local_size)
        assert_same_updates(alone, shared)
        hosts = size // parts
        assert {result.sharding[0] for result in shared} == {
            28
        }  # the head's matrix is the embedding's, and no parameter more
        assert sum(result.sharding[1] for result in shared) == hosts * WEIGHTS
        for result in shared:
            assert result.sharding[1] < 1.1 * WEIGHTS / parts
            assert result.optimizer_elements == 2 * result.sharding[1] + 28
            assert (elements(result, "allreduce_") != []) == (hosts > 1)  # of shards, from host to host
            assert sum(elements(result, "allreduce_")) < 1.1 * WEIGHTS / parts


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_ranks_start_with_the_weights_of_rank_0(parallel: str, place: Path) -> None:
    one, other, third = run_on_ranks(3, initial_weights, small_config("none"), parallel)
    assert max_difference(one, other) == max_difference(one, third) == 0.0
    torch.manual_seed(0)
    meant = GPT(small_config("none").model_config(257)).transformer.wte.weight.detach().numpy()
    assert np.array_equal(one["transformer.wte.weight"], meant)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_rank_has_its_own_dropout(parallel: str, place: Path) -> None:
    (batch,) = random_batches(1)
    same = Batch(batch.tokens[:1].expand(BATCH_SIZE, -1), batch.targets[:1].expand(BATCH_SIZE, -1))
    for dropout in (0.0, 0.5):
        given = small_config("none", dropout=dropout, parallel=parallel)
        one, other = run_on_ranks(2, run_updates, given, [same, same])
        assert (one.part_losses == other.part_losses) == (dropout == 0.0)
        assert one.updates == other.updates


def test_a_finetuning_under_torchrun_as_it_is_typed(place: Path) -> None:
    """With real torchrun and the real command; each line is logged once."""
    flags = ["--data", "doubles.jsonl", "--epochs", "2", "--batch-size", "4", "--lora-rank", "2", "--lr", "0.003"]
    flags += ["--dropout", "0", "--lora-dropout", "0"]  # which each rank would draw for itself
    flags += ["--device", "cpu", "--dtype", "float32", "--eval-every", "3", "--sample-tokens", "8"]
    run_on_ranks(0, run_finetune, ["base/model", "--name", "typed-alone", *flags])
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gpt2", "finetune"]
    command = [sys.executable, "-m", *torchrun, "base/model", "--name", "typed-shared", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert output.returncode == 0, output.stderr
    assert output.stdout == "runs/typed-shared\n"
    assert "on 2 ranks (ddp) of cpu" in output.stderr
    for text in ("model: ", "data: ", "run folder: ", "## Before and after", "documents are longer"):
        assert output.stderr.count(text) == 1, text
    alone, shared = Path("runs/typed-alone"), Path("runs/typed-shared")
    one, other = (read_metrics(folder / "metrics.jsonl") for folder in (alone, shared))
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=3e-6)
    assert max_difference(weights(alone), weights(shared)) < 1e-5
    names = [sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (alone, shared)]
    assert names[0] == names[1]


OF_TWO = ProcessGroup(1, 2, 1, 2, control_group=cast(Any, object()))


def test_pick_parallel_kind() -> None:
    given = small_config("none")
    sharded = replace(given, parallel="fsdp")
    adapters = replace(given, init_from="x", lora_rank=2)
    assert pick_parallel_kind(given, SINGLE_PROCESS, fits=True) == "none"
    for fits, kind in ((True, "ddp"), (False, "fsdp")):
        assert pick_parallel_kind(given, OF_TWO, fits=fits) == kind
        assert pick_parallel_kind(replace(given, parallel="ddp"), OF_TWO, fits=fits) == "ddp"
        assert pick_parallel_kind(sharded, OF_TWO, fits=fits) == "fsdp"
        assert pick_parallel_kind(adapters, OF_TWO, fits=fits) == "ddp"
    assert pick_parallel_kind(given, replace(OF_TWO, rank=0, world_size=1), fits=False) == "ddp"


def test_fsdp_refuses_lora_which_needs_whole_matrices() -> None:
    given: dict[str, Any] = {"init_from": "x", "lora_rank": 2}
    with pytest.raises(UserError) as raised:
        small_config("none", parallel="fsdp", **given).check()
    assert str(raised.value) == "LoRA needs whole matrices, and --parallel fsdp shards them: --parallel ddp"
    small_config("none", parallel="ddp", **given).check()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_parallel_needs_several_processes(parallel: str) -> None:
    with pytest.raises(UserError, match=f"--parallel {parallel} needs several processes: torchrun"):
        pick_parallel_kind(small_config("none", parallel=parallel), SINGLE_PROCESS, fits=True)
