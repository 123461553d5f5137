"""Checkpoints of any number of ranks, resumed by any other number, equal an uninterrupted run.

The files are byte-identical to those of one process.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from gpt2.commands.export import main as export
from gpt2.config import TrainConfig
from gpt2.reporting.metrics import read_metrics, without_timings
from gpt2.train.checkpoint import latest_checkpoint
from tests.helpers.distributed_cases import VARIANTS, assert_equal_training, max_difference, small_config, workspace
from tests.helpers.distributed_launcher import run_on_ranks
from tests.helpers.distributed_workers import record_writes, resume_trainings, rewrite_checkpoint, run_trainings
from tests.helpers.tiny_trainer import file_contents

LEG = 3  # steps between checkpoints
KEPT: dict[str, Any] = {"schedule": "constant", "eval_every": LEG, "save_every": LEG, "keep_checkpoints": 9}


@dataclass(frozen=True)
class Leg:
    """Some steps of a run by a number of ranks (0: one process without torchrun), `local_size` per host."""

    size: int
    parallel: str = "auto"
    local_size: int = 0

    def __str__(self) -> str:
        hosts = f"{self.size // self.local_size}x{self.local_size}" if self.local_size else str(self.size)
        return f"{hosts}-{self.parallel}" if self.size else "alone"


ALONE = Leg(0)
JOURNEYS: dict[str, list[tuple[Leg, Leg, Leg]]] = {
    "plain": [
        (Leg(4, "ddp"), Leg(1, "ddp"), Leg(4, "fsdp")),
        (Leg(4, "fsdp"), ALONE, Leg(4, "ddp")),
        (Leg(4, "ddp"), Leg(2, "fsdp"), Leg(3, "ddp")),
        (Leg(4, "fsdp"), Leg(3, "ddp"), Leg(4, "fsdp", local_size=2)),
        (ALONE, Leg(4, "fsdp"), Leg(2, "ddp")),
        (Leg(2, "ddp"), Leg(4, "fsdp", local_size=2), ALONE),
        (Leg(1, "fsdp"), Leg(3, "fsdp"), Leg(4, "ddp")),
    ],
    "answers": [(Leg(2, "fsdp"), ALONE, Leg(2, "ddp"))],
    "sgd": [(Leg(2, "fsdp"), Leg(4, "fsdp"), ALONE)],
    "muon": [(Leg(2, "ddp"), ALONE, Leg(4, "fsdp"))],
    "lora": [(Leg(2, "ddp"), ALONE, Leg(4, "ddp"))],
}
ALL = [(way, journey) for way, journeys in JOURNEYS.items() for journey in journeys]


def name_of(way: str, journey: tuple[Leg, ...]) -> str:
    return "_".join((way, *map(str, journey)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[Path]:
    with workspace(tmp_path_factory.mktemp("moving"), compiled) as folder:
        yield folder


@pytest.fixture(autouse=True)
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("GPT2_HOME", str(place / "home"))


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    """The folder with the runs of all journeys by name, and `undisturbed-WAY`, by one process without interruption."""
    run_on_ranks(0, run_trainings, [config_for(way, f"undisturbed-{way}", 3 * LEG) for way in JOURNEYS])
    for number in range(3):
        for where in sorted({(journey[number].size, journey[number].local_size) for _, journey in ALL}):
            there = [(way, j) for way, j in ALL if (j[number].size, j[number].local_size) == where]
            size, local_size = where
            if number == 0:
                begun = [config_for(way, name_of(way, j), LEG, parallel=j[0].parallel) for way, j in there]
                run_on_ranks(size, run_trainings, begun, local_size)
            else:
                steps = (number + 1) * LEG
                later = {
                    Path("runs", name_of(way, j)): {"max_steps": steps, "parallel": j[number].parallel}
                    for way, j in there
                }
                run_on_ranks(size, resume_trainings, later, local_size)
    return place / "runs"


def config_for(way: str, name: str, steps: int, **given: Any) -> TrainConfig:
    return small_config(name, **{**VARIANTS[way], **KEPT, "max_steps": steps, "sample_tokens": 0, **given})


@pytest.mark.parametrize(
    ("way", "journey"), ALL, ids=lambda value: value if isinstance(value, str) else name_of("", value)
)
def test_a_run_resumed_with_other_ranks_equals_an_uninterrupted_one(
    way: str, journey: tuple[Leg, ...], runs: Path
) -> None:
    stayed, moved = runs / f"undisturbed-{way}", runs / name_of(way, journey)
    assert_equal_training(stayed, moved, way)
    for step in (LEG, 2 * LEG, 3 * LEG):
        file = f"checkpoints/step-{step}/optimizer.safetensors"
        one, other = load_file(stayed / file), load_file(moved / file)
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert (value.shape, value.dtype) == (other[name].shape, other[name].dtype)
        assert max_difference(one, other) < 1e-5
    names = [sorted(path.relative_to(each) for path in each.rglob("*")) for each in (stayed, moved)]
    assert names[0] == names[1]


SHARED = [Leg(1, "ddp"), Leg(2, "ddp"), Leg(2, "fsdp"), Leg(3, "fsdp"), Leg(4, "fsdp"), Leg(4, "fsdp", local_size=2)]


@pytest.mark.parametrize("way", ["plain", "sgd"])
@pytest.mark.parametrize("leg", SHARED, ids=str)
def test_checkpoints_are_byte_identical_for_any_number_of_ranks(way: str, leg: Leg, runs: Path) -> None:
    stayed, out = runs / f"undisturbed-{way}", runs / f"rewritten-{way}-{leg}"
    run_on_ranks(leg.size, rewrite_checkpoint, stayed, out, leg.parallel, leg.local_size)
    for part in ("model", f"checkpoints/step-{3 * LEG}"):
        assert file_contents(out / part) == file_contents(stayed / part)


@pytest.mark.parametrize("journey", [journey for journey in JOURNEYS["plain"] if journey[2].size > 1], ids=str)
def test_the_run_folder_of_ranks_equals_that_of_one_process(journey: tuple[Leg, ...], runs: Path) -> None:
    """The run's model, its last checkpoint, and its exported model."""
    left = runs / name_of("plain", journey)
    out = runs / f"alone-{left.name}"
    run_on_ranks(0, rewrite_checkpoint, left, out, "auto")
    for part in ("model", f"checkpoints/step-{3 * LEG}"):
        assert file_contents(out / part) == file_contents(left / part)
    for source in (left, out / "model"):
        export([str(source), str(out / f"exported-{source.name}")])
    exported = file_contents(out / f"exported-{left.name}")
    assert exported == file_contents(out / "exported-model")
    assert exported["model.safetensors"] == (left / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("leg", [Leg(2, "ddp"), Leg(3, "fsdp"), Leg(4, "fsdp", local_size=2)], ids=str)
def test_the_same_ranks_resume_bitwise_also_with_dropout(leg: Leg, place: Path) -> None:
    given = config_for("plain", f"whole-{leg}", 2 * LEG, parallel=leg.parallel, dropout=0.2, sample_tokens=5)
    run_on_ranks(leg.size, run_trainings, [given], leg.local_size)
    whole, parts = Path("runs") / f"whole-{leg}", Path("runs") / f"parts-{leg}"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / f"step-{2 * LEG}")  # as if killed before it was saved
    run_on_ranks(leg.size, resume_trainings, {parts: {}}, leg.local_size)
    assert latest_checkpoint(parts / "checkpoints") == parts / "checkpoints" / f"step-{2 * LEG}"
    one, other = (without_timings(read_metrics(folder / "metrics.jsonl")) for folder in (whole, parts))
    assert one == other
    names = {"metrics.jsonl", "config.toml"}  # with times, and with the name of the run
    left, again = ({n: b for n, b in file_contents(folder).items() if n not in names} for folder in (whole, parts))
    assert left == again


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_only_rank_0_writes(parallel: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks write neither in the run folder nor in the token cache of their host."""
    monkeypatch.setenv("GPT2_HOME", str(place / f"home-{parallel}"))
    given = config_for("plain", "written", LEG, parallel=parallel, out_dir=str(place / f"written-{parallel}"))
    written = run_on_ranks(3, record_writes, given, [given.out_dir, str(place / f"home-{parallel}")])
    assert written[1:] == [[], []]
    for what in ("written/metrics.jsonl", f"step-{LEG}", "config.toml", "shards", "model"):
        assert any(what in line for line in written[0]), what
