"""Ranks, process groups and their collectives."""

from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from gpt2.data.loader import Batch
from gpt2.distributed import process_group as ranks_module
from gpt2.distributed.process_group import (
    SINGLE_PROCESS,
    ProcessGroup,
    _first_sentence,
    _from_environment,
    _lost_ranks_message,
    max_restarts,
    process_group,
)
from gpt2.errors import RankFailure, ReportedByOtherRank, UserError
from gpt2.loss import IGNORE_INDEX
from tests.helpers.distributed_launcher import RankFailed, run_on_ranks

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ({}, ProcessGroup(0, 4, 0, 2)),
        ({"RANK": "3", "LOCAL_RANK": "1"}, ProcessGroup(3, 4, 1, 2)),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, ProcessGroup(0, 1, 0, 1)),
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3", "RANK": "3"}, ProcessGroup(3, 4, 3, 4)),
        ({"OTHER": "7"}, ProcessGroup(0, 4, 0, 2)),
    ],
)
def test_rank_and_world_size_from_the_environment(given: dict[str, str], ranks: ProcessGroup) -> None:
    assert _from_environment(TORCHRUN | given) == ranks


@pytest.mark.parametrize(
    "environment",
    [{}, {"MASTER_ADDR": "x", "MASTER_PORT": "1"}, {"RANK": "", "WORLD_SIZE": ""}, {"OMP_NUM_THREADS": "1"}],
)
def test_without_torchrun_there_is_no_rank(environment: dict[str, str]) -> None:
    assert _from_environment(environment) is None


@pytest.mark.parametrize("missing", [name for name in TORCHRUN if name != "RANK"])
def test_an_incomplete_environment_is_reported_by_rank_0_only(missing: str) -> None:
    left = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UserError) as raised:
        _from_environment(left)
    assert (
        str(raised.value)
        == f"RANK is set and {missing} is not: start with torchrun, which sets all of them, or unset it"
    )
    with pytest.raises(ReportedByOtherRank):
        _from_environment(left | {"RANK": "1"})


def test_a_missing_rank_variable_is_reported() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE is set and RANK is not: start with torchrun"):
        _from_environment({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("given", "result"),
    [
        ({"RANK": "-1"}, "are -1, 4, 0, 2: each must be a number"),
        ({"WORLD_SIZE": "four"}, "are 0, four, 0, 2: each must be a number"),
        ({"RANK": "4"}, "are 4, 4, 0, 2, which is not valid: start with torchrun"),
        ({"LOCAL_RANK": "2"}, "are 0, 4, 2, 2, which is not valid"),
        ({"LOCAL_WORLD_SIZE": "5"}, "are 0, 4, 0, 5, which is not valid"),
        ({"WORLD_SIZE": "0", "LOCAL_WORLD_SIZE": "0"}, "are 0, 0, 0, 0, which is not valid"),
    ],
)
def test_invalid_ranks_are_reported(given: dict[str, str], result: str) -> None:
    with pytest.raises(UserError) as raised:
        _from_environment(TORCHRUN | given)
    assert str(raised.value).startswith(f"RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE {result}")


def test_process_group_without_torchrun_is_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with process_group() as ranks:
        assert ranks is SINGLE_PROCESS
    assert not dist.is_initialized()


def test_max_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    assert max_restarts() == 0
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert max_restarts() == 3


def test_collectives_of_a_single_process() -> None:
    assert (
        SINGLE_PROCESS.is_main_process,
        SINGLE_PROCESS.is_single_process,
        SINGLE_PROCESS.rank,
        SINGLE_PROCESS.world_size,
    ) == (True, True, 0, 1)
    assert SINGLE_PROCESS.with_timeout(5.0) is SINGLE_PROCESS
    assert SINGLE_PROCESS.broadcast_from_main(lambda: 3) == SINGLE_PROCESS.main_process_first(lambda: 3) == 3
    assert SINGLE_PROCESS.all_gather_object("x") == ["x"]
    assert SINGLE_PROCESS.all_reduce_scalars(1.5, 2.0) == [1.5, 2.0]
    assert (SINGLE_PROCESS.any_rank(True), SINGLE_PROCESS.any_rank(False)) == (True, False)
    tensor = torch.ones(2)
    assert SINGLE_PROCESS.all_reduce_sum(tensor) is tensor
    SINGLE_PROCESS.assert_same_on_all_ranks({"data": "x"}, "mend")
    SINGLE_PROCESS.barrier()
    for device in ("cpu", "mps", "cuda:1"):
        SINGLE_PROCESS.set_device(torch.device(device))
    with pytest.raises(UserError, match="no such thing"), SINGLE_PROCESS.raise_on_all_ranks():
        raise UserError("no such thing")


def batches(count: int) -> list[Batch]:
    return [Batch(torch.full((2, 3), i), torch.full((2, 3), i), torch.zeros(2, 3)) for i in range(count)]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_batches_are_sharded_round_robin(count: int, size: int) -> None:
    hands = [list(ProcessGroup(rank, size).shard(batches(count))) for rank in range(size)]
    assert {len(hand) for hand in hands} == {-(-count // size)}  # each as many, or some would wait for the others
    in_order = [batch for turn in zip(*hands, strict=True) for batch in turn]
    assert [int(batch.tokens[0, 0]) for batch in in_order[:count]] == list(range(count))
    assert all(batch.num_targets == 6 for batch in in_order[:count])
    for blank in in_order[count:]:
        assert blank.num_targets == 0
        assert blank.tokens.shape == blank.targets.shape == (2, 3)
        assert bool((blank.targets == IGNORE_INDEX).all())


def test_sharding_reads_only_one_round_ahead() -> None:
    read = []

    def source() -> Any:
        for number, batch in enumerate(batches(6)):
            read.append(number)
            yield batch

    hand = ProcessGroup(1, 2).shard(source())
    assert int(next(hand).tokens[0, 0]) == 1
    assert read == [0, 1]


SOMEONE = ProcessGroup(1, 4, 1, 2, control_group=cast(Any, object()), timeout=timedelta(seconds=5))


@pytest.mark.parametrize("device", ["mps", "cuda:1", "cpu:0"])
def test_a_device_index_is_refused_under_torchrun(device: str) -> None:
    with pytest.raises(UserError, match=f"--device {device} is one device: under torchrun use cuda or cpu"):
        SOMEONE.set_device(torch.device(device))


def test_gpus_need_nccl_and_one_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ranks_module.dist, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="this torch has no NCCL, which GPUs need to communicate: --device cpu"):
        SOMEONE.set_device(torch.device("cuda"))
    monkeypatch.setattr(ranks_module.dist, "is_nccl_available", lambda: True)
    with pytest.raises(UserError, match=r"there are 1 GPUs on .*: --nproc-per-node=1"):
        SOMEONE.set_device(torch.device("cuda"))
    replace(SOMEONE, rank=2, local_rank=0).set_device(torch.device("cuda"))
    assert taken == [0]
    SOMEONE.set_device(torch.device("cpu"))


def test_torch_errors_become_one_line() -> None:
    long = RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed by\n peer [10.0.0.1]:12. ")
    assert _first_sentence(long) == "Connection closed by peer [10.0.0.1]:12"
    assert len(_first_sentence(RuntimeError("word " * 100))) <= 160
    result = _lost_ranks_message(SOMEONE, long)
    assert result.startswith("rank 1 on ")
    assert "lost the other ranks, or waited too long for them (Connection closed by peer [10.0.0.1]:12)" in result
    assert result.endswith("with --resume auto the run continues from its last checkpoint")
    assert RankFailure(result).exit_code == 75


def talk(ranks: ProcessGroup) -> dict[str, Any]:
    """On each rank: call all collectives."""
    made: list[int] = []
    found: dict[str, Any] = {
        "who": (ranks.rank, ranks.is_main_process, ranks.is_single_process),
        "gathered": ranks.all_gather_object({"rank": ranks.rank}),
        "first": ranks.broadcast_from_main(lambda: made.append(1) or f"made by {ranks.rank}"),
        "made": len(made),
    }
    ranks.assert_same_on_all_ranks({"data": "x", "seed": 1}, "mend")
    ranks = ranks.with_timeout(60.0)
    found["sum"] = ranks.all_reduce_scalars(0.1 * ranks.rank, 1.0)
    found["any"] = [ranks.any_rank(False), ranks.any_rank(ranks.rank == 1), ranks.any_rank(True)]
    found["tensor"] = ranks.all_reduce_sum(torch.tensor([1.0, float(ranks.rank)])).tolist()
    found["errors"] = [
        raised_in(ranks, ranks.rank == 1),
        raised_in(ranks, ranks.rank != 1),
        raised_in(ranks, True),
        differing(ranks, {"seed": 1, "data": f"text {ranks.rank == 2}"}),
        differing(ranks, {"seed": 1} if ranks.is_main_process else {"seed": 1, "more": "x" * 90}),
    ]
    return found


def raised_in(ranks: ProcessGroup, fails: bool) -> str:
    try:
        with ranks.raise_on_all_ranks():
            if fails:
                raise UserError(f"it fails on {ranks.rank}")
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def differing(ranks: ProcessGroup, facts: dict[str, Any]) -> str:
    try:
        ranks.assert_same_on_all_ranks(facts, "start every rank with the same command")
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def test_collectives_of_three_ranks() -> None:
    """Three real processes with gloo."""
    result = run_on_ranks(3, talk)
    for rank, each in enumerate(result):
        assert each["who"] == (rank, rank == 0, False)
        assert each["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert (each["first"], each["made"]) == ("made by 0", int(rank == 0))
        assert each["sum"] == pytest.approx([0.3, 3.0])
        assert each["any"] == [False, True, True]
        assert each["tensor"] == [3.0, 3.0]
    errors = [each["errors"] for each in result]
    for number, teller in ((0, 1), (1, 0), (2, 0), (3, 0), (4, 0)):
        assert [each[number].split(":")[0] for each in errors] == [
            "UserError" if rank == teller else "ReportedByOtherRank" for rank in range(3)
        ]
    assert errors[1][0].startswith("UserError: rank 1 on ")
    assert errors[1][0].endswith(": it fails on 1")
    assert errors[0][1] == errors[0][2] == "UserError: it fails on 0"
    assert errors[0][3].startswith("UserError: rank 2 on ")
    assert "has data text True, rank 0 on " in errors[0][3]
    assert errors[0][3].endswith(" text False: start every rank with the same command")
    assert f"has more {'x' * 37}..., rank 0 on" in errors[0][4]


def fail(ranks: ProcessGroup) -> None:
    """On each rank: one raises."""
    if ranks.rank == 1:
        raise ZeroDivisionError("one of us")
    ranks.barrier()


def test_run_on_ranks_ends_when_a_rank_fails() -> None:
    with pytest.raises(RankFailed, match=r"ZeroDivisionError: one of us|lost the other ranks"):
        run_on_ranks(3, fail)
