"""Checkpoints: atomic, whatever happens while they are written."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gpt2.formats.huggingface
import gpt2.train.checkpoint
from gpt2.config import TrainConfig
from gpt2.errors import UserError
from gpt2.optimizers import build_optimizers
from gpt2.train.checkpoint import (
    CheckpointWriter,
    checkpoint_metadata,
    is_published,
    latest_checkpoint,
    load_optimizers,
)
from gpt2.train.run_folder import RunFolder, write_config
from tests.helpers.tiny_trainer import SHAPE, TinyTrainer, assert_equal, file_contents, load_state


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_background_writer_equals_plain_save_and_restores_all_state(tmp_path: Path, optimizer: str) -> None:
    learner = TinyTrainer(optimizer)
    with CheckpointWriter(tmp_path / "run", learner.artifact, keep=2, metadata={"data": "x"}) as writer:
        for step in (1, 2, 3):
            learner.step()
            state = learner.state()
            writer.save(step, learner.model, learner.optimizers)
    learner.save(tmp_path / "plain", 3)
    ours, plain = (
        file_contents(tmp_path / "run" / "checkpoints" / "step-3"),
        file_contents(tmp_path / "plain" / "step-3"),
    )
    own_state = json.loads(ours.pop("state.json"))
    assert own_state["sha256"] == json.loads(plain.pop("state.json"))["sha256"]
    assert own_state["facts"] == {"data": "x", "samples_bytes": 0}
    assert ours == plain
    assert_equal(load_state(tmp_path / "run" / "checkpoints" / "step-3", optimizer), state)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-2", "step-3"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", "model"]
    assert is_published(tmp_path / "run" / "checkpoints" / "step-3", tmp_path / "run")
    assert not is_published(tmp_path / "run" / "checkpoints" / "step-2", tmp_path / "run")


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The thread starts writing when this is set."""
    go, write = threading.Event(), gpt2.train.checkpoint.write_checkpoint
    monkeypatch.setattr(gpt2.train.checkpoint, "write_checkpoint", lambda *args: go.wait(20) and write(*args))
    return go


def test_updates_made_while_a_checkpoint_is_written_are_not_in_it(tmp_path: Path, held_up: threading.Event) -> None:
    learner = TinyTrainer()
    learner.step()
    with CheckpointWriter(tmp_path, learner.artifact, keep=2) as writer:
        before = learner.state()
        writer.save(1, learner.model, learner.optimizers)
        for _ in range(3):
            learner.step()
        held_up.set()
        writer.wait()
        assert_equal(load_state(tmp_path / "checkpoints" / "step-1"), before)
        learner.step()  # the next one is copied into the same memory
        before = learner.state()
        writer.save(2, learner.model, learner.optimizers)
    assert_equal(load_state(tmp_path / "checkpoints" / "step-2"), before)


def test_saving_draws_no_random_numbers(tmp_path: Path) -> None:
    learner = TinyTrainer("muon")
    learner.step()
    before = torch.get_rng_state()
    with CheckpointWriter(tmp_path, learner.artifact, keep=2) as writer:
        for step in (1, 2):
            writer.save(step, learner.model, learner.optimizers)
    learner.save(tmp_path / "plain", 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_save_blocks_training_for_less_than_the_write_takes(tmp_path: Path) -> None:
    learner = TinyTrainer(shape=replace(SHAPE, n_layer=4, n_embd=256))  # 3 million parameters, 40 MB with AdamW's state
    learner.step()
    with CheckpointWriter(tmp_path, learner.artifact, keep=1) as writer:
        writer.save(1, learner.model, learner.optimizers)
        writer.wait()
        writer.save(2, learner.model, learner.optimizers)
        assert writer.stall_seconds < writer.write_seconds / 2
        writer.save(3, learner.model, learner.optimizers)  # waits for the one before, and says so
        assert writer.stall_seconds > writer.write_seconds / 4


def save_and_ask(run: Path, learner: TinyTrainer, asked_by: str) -> None:
    """Save step 2, and call what should raise the error."""
    with CheckpointWriter(run, learner.artifact, keep=1) as writer:
        writer.save(2, learner.model, learner.optimizers)
        end = time.monotonic() + 20
        if asked_by == "save":
            writer.save(3, learner.model, learner.optimizers)
        elif asked_by == "wait":
            writer.wait()
        while asked_by == "check" and time.monotonic() < end:
            writer.raise_if_failed()
            time.sleep(0.001)
        if asked_by == "nobody":
            raise ZeroDivisionError
        assert asked_by == "exit"


@pytest.mark.parametrize("asked_by", ["save", "check", "wait", "exit"])
def test_errors_of_the_writer_thread_are_raised_in_the_training_thread(tmp_path: Path, asked_by: str) -> None:
    learner = TinyTrainer()
    learner.step()
    state = learner.state()
    learner.save(tmp_path / "checkpoints", 1)
    (tmp_path / "checkpoints" / ".step-2.unfinished").write_text("a file in the way")
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*step-2: .*File exists") as error:
        save_and_ask(tmp_path, learner, asked_by)
    assert "\n" not in str(error.value)
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-1"
    assert_equal(load_state(tmp_path / "checkpoints" / "step-1"), state)


def test_a_write_error_does_not_hide_another_error(
    tmp_path: Path, held_up: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "blocked" / "checkpoints").mkdir(parents=True)
    (tmp_path / "blocked" / "checkpoints" / ".step-2.unfinished").write_text("a file in the way")
    for way in ("clear", "blocked"):
        threading.Timer(0.1, held_up.set).start()
        with pytest.raises(ZeroDivisionError):
            save_and_ask(tmp_path / way, TinyTrainer(), "nobody")
    assert latest_checkpoint(tmp_path / "clear" / "checkpoints") is not None
    assert "step-2: " in caplog.text
    assert "File exists" in caplog.text


@pytest.mark.parametrize("where", ["checkpoint", "weights"])
def test_data_that_reads_back_differently_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    learner = TinyTrainer()
    learner.step()
    learner.save(tmp_path, 1)
    module = gpt2.train.checkpoint if where == "checkpoint" else gpt2.formats.huggingface
    write = module.save_file

    def careless(tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
        name = max(tensors)
        write({**tensors, name: tensors[name] ^ 1 if name == "cpu" else tensors[name] * -1.0}, path, **kwargs)

    monkeypatch.setattr(module, "save_file", careless)
    with pytest.raises(UserError, match=r"step-2: .* in .*\.safetensors differs from what was written"):
        learner.save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_one_bit_flipped_in_any_file_makes_a_broken_checkpoint(tmp_path: Path) -> None:
    learner = TinyTrainer()
    learner.step()
    older, newer = learner.save(tmp_path, 1), learner.save(tmp_path, 2)
    names = file_contents(newer)
    assert {"state.json", "optimizer.safetensors", "model/model.safetensors"} <= names.keys()
    for name, whole in names.items():
        places = range(0, len(whole), 7) if name == "state.json" else (0, len(whole) // 2, len(whole) - 1)
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            (newer / name).write_bytes(damaged)
            assert latest_checkpoint(tmp_path) == older, (name, place)
        (newer / name).write_bytes(whole)
    assert latest_checkpoint(tmp_path) == newer


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    learner = TinyTrainer("adamw")
    learner.step()
    path = learner.save(tmp_path, 1)
    with pytest.raises(UserError, match="has optimizer state for"):
        load_optimizers(path, learner.model, build_optimizers(learner.model, TrainConfig(optimizer="muon"))[:1])


def test_metadata_has_the_size_of_samples_at_the_save(tmp_path: Path, held_up: threading.Event) -> None:
    learner = TinyTrainer()
    (tmp_path / "samples.txt").write_bytes(b"--- step 1\nabc\n\n")
    with CheckpointWriter(tmp_path, learner.artifact, keep=1) as writer:
        writer.save(1, learner.model, learner.optimizers)
        with (tmp_path / "samples.txt").open("ab") as file:
            file.write(b"--- step 2\nlater\n\n")
        held_up.set()
    assert checkpoint_metadata(tmp_path / "checkpoints" / "step-1")["samples_bytes"] == 16


# Kills. A process that is killed does nothing any more: from the k-th operation on files on, every one of them fails,
# also those that would clean up. For each k there is one such kill.

OPERATIONS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")


class Killed(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Inside, file operation `number`, counted from 1, and all later ones fail. Yields the count of calls."""
    calls = 0

    def deadly(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= number:
                raise Killed
            return operation(*args, **kwargs)

        return call

    def half_written(write: Callable[..., None]) -> Callable[..., None]:
        def call(tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
            nonlocal calls
            write(tensors, path, **kwargs)
            calls += 1
            if calls >= number:
                os.truncate(path, path.stat().st_size // 2)
                raise Killed

        return call

    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, deadly(getattr(os, name)))
        for module in (gpt2.train.checkpoint, gpt2.formats.huggingface):
            patch.setattr(module, "save_file", half_written(module.save_file))
        yield lambda: calls


def test_a_kill_between_any_two_operations_of_a_save_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill is no power cut, and the disk is slow
    learner, number, ended = TinyTrainer(), 0, False
    states = {}
    for step in (1, 2):
        learner.step()
        states[step] = learner.state()
        with CheckpointWriter(tmp_path / "made", learner.artifact, keep=1) as writer:
            writer.save(step, learner.model, learner.optimizers)
        if step == 1:
            shutil.copytree(tmp_path / "made", tmp_path / "one")
    seen: dict[str, dict[str, bytes]] = {}
    config = TrainConfig(out_dir=str(tmp_path), resume="auto")
    while not ended:
        number += 1
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "one", run)
        write_config(run, replace(config, name=run.name))
        with killed_at(number, monkeypatch) as calls:
            try:
                with CheckpointWriter(run, learner.artifact, keep=1) as writer:
                    writer.save(2, learner.model, learner.optimizers)
            except Killed:
                pass
            ended = calls() < number
        newest = latest_checkpoint(run / "checkpoints")
        assert newest is not None, number
        if newest.name not in seen:
            seen[newest.name] = file_contents(newest)
            assert_equal(load_state(newest), states[int(newest.name[-1])])
        assert file_contents(newest) == seen[newest.name]
        with RunFolder(replace(config, name=run.name)) as folder:
            folder.initialize(replace(config, name=run.name), newest)
        assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.toml", "model"]
        assert not [p for p in run.rglob(".*") if p.exists()], number
        assert is_published(newest, run), number
        shutil.rmtree(run)
    assert list(seen) == ["step-1", "step-2"]
    assert number > 50
