"""Errors under torchrun: one line, from one rank, that names the cause; and nothing is left behind."""

import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gpt2
from gpt2.config import read_toml
from gpt2.distributed.process_group import ProcessGroup
from gpt2.errors import UserError
from gpt2.model import GPTConfig
from gpt2.reporting.metrics import read_metrics
from gpt2.tokenizer import get_tokenizer
from gpt2.train.run_folder import RunFolder
from tests.helpers.fault_launcher import NO_RANK_ENVIRONMENT, ExitResults, RankForkServer
from tests.helpers.training_helpers import NUMBERS_TEXT
from tests.helpers.transformers_reference import random_model

pytest_plugins = "tests.helpers.fault_fixtures"

RUN = (
    "train --name run --data numbers.txt --tokenizer bytes --batch-size 12 --max-steps 6 --warmup-steps 2 --lr 3e-3 "
    "--device cpu --dtype float32 --optimizer adamw --no-compile --eval-every 0 --save-every 3 --sample-tokens 0"
)
TRAIN = f"{RUN} --n-layer 1 --n-head 2 --n-embd 16 --block-size 16".split()
ALONE = {"environment": NO_RANK_ENVIRONMENT}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working folder of the ranks, with training data."""
    (tmp_path / "numbers.txt").write_text(NUMBERS_TEXT)
    return tmp_path


def environment(**given: Any) -> dict[int, Any]:
    """The same environment for both ranks."""
    return {rank: {"environment": given} for rank in (0, 1)}


def assert_refused(ended: ExitResults, line: str, folder: Path, *, by: int = 0) -> None:
    """Check for exactly one line, which matches `line`, from one rank; and no run folder."""
    assert ended.codes == [2] * len(ended.codes), ended.err
    assert len(ended.messages) == 1, ended.err
    assert re.fullmatch(line, ended.messages[0])
    assert ended.err[by] == f"gpt2: {ended.messages[0]}\n"
    assert "".join(ended.out) == ""
    assert not (folder / "runs").exists() or not list((folder / "runs").iterdir())


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--no-such-flag", "there is no --no-such-flag .*"),
        ("--lr fast", "argument --lr: invalid float value: 'fast' .*"),
        ("--batch-size 13", "--batch-size 13 cannot be shared by 2 ranks: make it a multiple of them"),
        ("--micro-batch-size 4", "each rank has 6 rows of the batch, which --micro-batch-size 4 does not divide"),
        ("--parallel tensor", "--parallel 'tensor' is not one of auto, ddp, fsdp.*"),
        ("--data nowhere.txt", ".*nowhere.txt.*"),
        ("--init-from nowhere", "--init-from keeps that model's shape: leave --n-layer out"),
        ("--resume runs/none", "--resume runs/none: there is no run in that folder"),
    ],
)
def test_a_mistake_on_all_ranks_is_reported_once(
    fork_server: RankForkServer, folder: Path, flags: str, line: str
) -> None:
    assert_refused(fork_server.run([*TRAIN, *flags.split()], folder), line, folder)


def test_lora_is_refused_with_fsdp(fork_server: RankForkServer, folder: Path) -> None:
    config = GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16)
    gpt2.save(random_model(config), get_tokenizer("bytes"), folder / "model")
    flags = "--block-size 16 --init-from model --lora-rank 2 --parallel fsdp"
    line = "LoRA .*, and --parallel fsdp .*: --parallel ddp"
    assert_refused(fork_server.run(f"{RUN} {flags}".split(), folder), line, folder)


def test_max_restarts_requires_resume(fork_server: RankForkServer, folder: Path) -> None:
    ended = fork_server.run(TRAIN, folder, overrides=environment(TORCHELASTIC_MAX_RESTARTS=3))
    assert_refused(ended, "torchrun --max-restarts needs --resume auto, so that a restarted run resumes", folder)


def test_parallel_without_torchrun_says_how_to_start(fork_server: RankForkServer, folder: Path) -> None:
    ended = fork_server.run([*TRAIN, "--parallel", "fsdp"], folder, size=1, overrides={0: ALONE})
    assert_refused(ended, "--parallel fsdp needs several processes: torchrun --nproc-per-node=N .*", folder)


@pytest.fixture
def elsewhere(folder: Path) -> Path:
    """Another working folder for a rank."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    return elsewhere


HERE = re.escape(socket.gethostname())
ODD = "rank 1 on elsewhere has"


def test_a_rank_with_another_flag_is_refused_by_name(fork_server: RankForkServer, folder: Path) -> None:
    odd = {1: {"argv": [*TRAIN, "--lr", "1e-4"], "change": "other_host"}}
    line = rf"{ODD} --lr 0\.0001, rank 0 on {HERE} 0\.003: start every rank with the same command"
    assert_refused(fork_server.run(TRAIN, folder, overrides=odd), line, folder)


def test_a_rank_with_another_toml_is_refused_by_name(
    fork_server: RankForkServer, folder: Path, elsewhere: Path
) -> None:
    (folder / "my.toml").write_text("weight_decay = 0.1\n")
    (elsewhere / "my.toml").write_text("weight_decay = 0.2\n")
    ended = fork_server.run(["train", "my.toml", *TRAIN[1:]], folder, overrides={1: {"folder": str(elsewhere)}})
    line = f"rank 1 on {HERE} has --weight-decay 0.2, rank 0 on {HERE} 0.1: start every rank with the same command"
    assert_refused(ended, line, folder)


def test_a_rank_with_another_torch_is_refused_by_name(fork_server: RankForkServer, folder: Path) -> None:
    version = re.escape(torch.__version__)
    ended = fork_server.run(TRAIN, folder, overrides={1: {"change": "other_torch"}})
    line = f"rank 1 on {HERE} has torch 1.0, rank 0 on {HERE} {version}: start every rank with the same command"
    assert_refused(ended, line, folder)


def test_a_rank_with_other_data_is_refused_by_name(fork_server: RankForkServer, folder: Path, elsewhere: Path) -> None:
    (elsewhere / "numbers.txt").write_text(NUMBERS_TEXT.replace("everybody", "somebody"))
    odd = {1: {"folder": str(elsewhere), "change": "other_host"}}
    ended = fork_server.run(TRAIN, folder, overrides=odd)
    assert_refused(ended, rf"{ODD} data \S+, rank 0 on {HERE} \S+: .*all ranks.*", folder)


def test_a_rank_without_the_data_says_so_itself(fork_server: RankForkServer, folder: Path, elsewhere: Path) -> None:
    odd = {1: {"folder": str(elsewhere), "change": "other_host"}}
    ended = fork_server.run(TRAIN, folder, overrides=odd)
    assert_refused(ended, r"rank 1 on elsewhere: .*numbers\.txt.*", folder, by=1)


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_PORT"])
def test_an_environment_that_lacks_something_is_refused(
    fork_server: RankForkServer, folder: Path, missing: str
) -> None:
    ended = fork_server.run(TRAIN, folder, overrides=environment(**{missing: ""}))
    assert_refused(ended, f"RANK is set and {missing} is not: start with torchrun, .*", folder)


def test_a_port_in_use_is_named(fork_server: RankForkServer, folder: Path) -> None:
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        ours.listen()
        port = ours.getsockname()[1]
        alone = {0: {"environment": {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}}}
        ended = fork_server.run(TRAIN, folder, size=1, port=port, overrides=alone)
    line = rf".*the port of 127\.0\.0\.1:{port}.* another .*"
    assert_refused(ended, line, folder)


def test_missing_ranks_time_out(fork_server: RankForkServer, folder: Path) -> None:
    alone = {"change": "impatient", "environment": {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}}
    ended = fork_server.run(TRAIN, folder, size=1, overrides={0: alone})
    assert_refused(ended, rf"rank 0 on {HERE} cannot reach the other ranks at 127\.0\.0\.1:\d+: .+", folder)


def test_a_run_that_exists_or_is_locked_is_not_changed(fork_server: RankForkServer, folder: Path) -> None:
    assert fork_server.run(TRAIN, folder).codes == [0, 0]
    run = folder / "runs" / "run"
    before = sorted(run.rglob("*"))
    assert not (run / ".lock").exists()
    again = fork_server.run(TRAIN, folder)
    assert (again.codes, len(again.messages)) == ([2, 2], 1)
    assert again.messages[0] == "runs/run exists: --resume auto resumes it, another --name starts a new run"
    config = replace(read_toml(run / "config.toml"), out_dir=str(folder / "runs"), resume="auto")
    with RunFolder(config):
        held = fork_server.run([*TRAIN, "--resume", "auto"], folder)
    assert (held.codes, len(held.messages)) == ([2, 2], 1)
    assert re.fullmatch(r"runs/run is in use by process \d+: wait until it has ended, or stop it", held.messages[0])
    assert sorted(run.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_bug_on_one_rank_has_one_traceback_and_ends_all(
    fork_server: RankForkServer, folder: Path, which: int
) -> None:
    ended = fork_server.run(TRAIN, folder, overrides={which: {"change": "clumsy"}})
    other = 1 - which
    assert (ended.codes[which], ended.codes[other]) == (1, 75)
    assert "KeyError: 'a bug'" in ended.err[which]
    assert "Traceback" not in ended.err[other]
    (line,) = ended.messages
    assert line.startswith(
        f"rank {other} on {socket.gethostname()} lost the other ranks, or waited too long for them ("
    )
    assert line.endswith("): with --resume auto the run continues from its last checkpoint")
    assert f"gpt2: {line}" in ended.err[other]
    assert not (folder / "runs" / "run" / ".lock").exists()
    resumed = fork_server.run([*TRAIN, "--resume", "auto"], folder)
    assert resumed.codes == [0, 0], resumed.err
    assert [record["step"] for record in read_metrics(folder / "runs" / "run" / "metrics.jsonl")] == list(range(1, 7))


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_non_finite_loss_is_diagnosed_by_rank_0_only(fork_server: RankForkServer, folder: Path, kind: str) -> None:
    """The line, the batch and the numbers in the dump equal those of one process."""
    one = fork_server.run([*TRAIN, "--name", "alone"], folder, size=1, overrides={0: {"change": "spoilt", **ALONE}})
    both = {rank: {"change": "spoilt"} for rank in (0, 1)}
    two = fork_server.run([*TRAIN, "--parallel", kind, "--micro-batch-size", "3"], folder, overrides=both)
    assert (one.codes, two.codes) == ([2], [2, 2])
    (expected,), (line,) = one.messages, two.messages
    assert line == expected.replace("runs/alone", "runs/run")
    assert "step 4: the loss is inf; origin: " in line
    dumps = [folder / "runs" / name / "dumps" / "step-4" for name in ("alone", "run")]
    assert dumps[0].joinpath("batch.safetensors").read_bytes() == dumps[1].joinpath("batch.safetensors").read_bytes()
    numbers = [json.loads((dump / "dump.json").read_text()) for dump in dumps]
    assert numbers[0]["divisor"] == numbers[1]["divisor"] == 12 * 16
    replayed = fork_server.run(["train", "--replay", "runs/run/dumps/step-4"], folder, size=1, overrides={0: ALONE})
    assert replayed.codes == [0]
    assert "the loss is inf, as before\nthe norm of the gradient is nan, as before\n" in replayed.out[0]


@pytest.mark.slow
def test_outlier_batches_are_skipped_as_by_one_process(fork_server: RankForkServer, folder: Path) -> None:
    argv = [*TRAIN, "--skip-spikes", "1.2", "--max-steps", "50"]
    one = fork_server.run([*argv, "--name", "alone"], folder, size=1, overrides={0: ALONE})
    two = fork_server.run(argv, folder)
    assert (one.codes, two.codes) == ([0], [0, 0])
    records = [read_metrics(folder / "runs" / name / "metrics.jsonl") for name in ("alone", "run")]
    left_out = [[record["step"] for record in each if record.get("skipped")] for each in records]
    assert left_out[0] == left_out[1]
    assert len(left_out[0]) > 2
    result = [[line for line in err.splitlines() if "left out" in line] for err in (one.err[0], *two.err)]
    assert result[0] == result[1]
    assert result[2] == []


def a_rank(**given: int) -> ProcessGroup:
    """Rank 1 of two on this host, without a real process group."""
    return ProcessGroup(rank=1, world_size=2, local_rank=1, local_world_size=2, control_group=object(), **given)  # pyright: ignore[reportArgumentType]


def test_missing_gpus_and_missing_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    with pytest.raises(UserError, match=rf"^there are 1 GPUs on {HERE}: --nproc-per-node=1$"):
        a_rank().set_device(torch.device("cuda"))
    for device in ("mps", "cuda:1", "cuda:0"):
        with pytest.raises(UserError, match=f"^--device {device} is one device: under torchrun use cuda or cpu"):
            a_rank().set_device(torch.device(device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert taken == []
    a_rank().set_device(torch.device("cuda"))
    a_rank().set_device(torch.device("cpu"))
    assert taken == [1]
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match=r"^this torch has no NCCL, which GPUs need to communicate: --device cpu, or "):
        a_rank().set_device(torch.device("cuda"))
    assert taken == [1]


def test_missing_nccl_is_reported_once(fork_server: RankForkServer, folder: Path) -> None:
    odd = {rank: {"change": "no_nccl"} for rank in (0, 1)}
    ended = fork_server.run([*TRAIN, "--device", "cuda"], folder, overrides=odd)
    assert_refused(ended, "this torch has no NCCL, .*", folder)


@pytest.mark.parametrize("wrong", [{"LOCAL_WORLD_SIZE": 3}, {"MASTER_PORT": "x"}])
def test_an_invalid_environment_is_shown(fork_server: RankForkServer, folder: Path, wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    ended = fork_server.run(TRAIN, folder, overrides=environment(**wrong))
    assert_refused(ended, rf".*\b{name}\b.* (are|is) .*\b{value}\b.* torchrun.*", folder)


def test_a_single_process_with_a_rank_reports_the_environment(fork_server: RankForkServer, folder: Path) -> None:
    ended = fork_server.run(TRAIN, folder, size=1, overrides={0: {"environment": {**NO_RANK_ENVIRONMENT, "RANK": 3}}})
    assert_refused(ended, "RANK is set and WORLD_SIZE is not: .*, or unset it", folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_device_is_reported_once(fork_server: RankForkServer, folder: Path) -> None:
    ended = fork_server.run([*TRAIN, "--device", "cuda", "--max-steps", "2"], folder)
    assert_refused(ended, "there is no cuda device on this machine: use --device cpu", folder)
