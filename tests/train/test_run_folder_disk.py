"""Full disks and unwritable folders: one-line errors, and nothing is lost."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2.config import TrainConfig, config_for_resume
from gpt2.errors import UserError
from gpt2.train.checkpoint import CheckpointWriter, is_published, latest_checkpoint
from gpt2.train.run_folder import RunFolder
from gpt2.train.trainer import train
from tests.helpers.tiny_trainer import TinyTrainer
from tests.helpers.training_helpers import with_frequent_saves


@pytest.fixture
def tiny(tiny: TrainConfig) -> TrainConfig:
    return with_frequent_saves(tiny)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_a_one_line_error_and_loses_nothing(tiny: TrainConfig, small_disk: Path) -> None:
    def sampler(*args: object) -> str:
        return "a sample"

    def filling(*args: object) -> str:
        end = time.monotonic() + 20
        while not (small_disk / "full" / "model" / "config.json").exists():  # step 2 is saved beside the training
            assert time.monotonic() < end
            time.sleep(0.005)
        free = shutil.disk_usage(small_disk).free
        (small_disk / "ballast").write_bytes(b"x" * (free - 32 * 1024))  # room for words, not for weights
        return "a sample"

    tiny = replace(tiny, eval_every=3)
    whole = train(replace(tiny, name="whole"), sampler)
    with pytest.raises(UserError) as error:
        train(replace(tiny, name="full", out_dir=str(small_disk)), filling)
    assert "step-4: " in str(error.value)
    assert "No space left on device" in str(error.value)
    assert "\n" not in str(error.value)
    run = small_disk / "full"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-2"]
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert is_published(newest, run)
    (small_disk / "ballast").unlink()
    train(config_for_resume(run, {}), sampler)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-4", "step-6"]
    for name in ("model/model.safetensors", "checkpoints/step-6/optimizer.safetensors", "samples.txt"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_disk_full_for_other_files_is_a_one_line_error(tiny: TrainConfig, small_disk: Path) -> None:
    config = replace(tiny, out_dir=str(small_disk))

    def too_many_metrics() -> None:
        with RunFolder(config) as folder:
            folder.initialize(config, None)
            (folder.path / "metrics.jsonl").write_bytes(b"x" * 2**23)

    with pytest.raises(UserError) as error:
        too_many_metrics()
    run = small_disk / "tiny"
    assert str(error.value) == (
        f"cannot write the run folder {run}: No space left on device: free some space, and continue with --resume {run}"
    )
    with pytest.raises(FileNotFoundError), RunFolder(replace(config, name="other")):
        (small_disk / "none").read_text()  # is no such thing


def test_a_file_where_a_folder_should_be_is_one_line(tiny: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write the run folder"), RunFolder(tiny) as folder:
        folder.initialize(tiny, None)
    (tmp_path / "runs").unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("not a folder")
    learner = TinyTrainer()
    with (
        pytest.raises(UserError, match=r"cannot write the checkpoint .*step-1"),
        CheckpointWriter(tmp_path / "run", learner.artifact, keep=1) as writer,
    ):
        writer.save(1, learner.model, learner.optimizers)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoints"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is unwritable for root")
def test_an_unwritable_folder_is_one_line(tiny: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"), RunFolder(tiny) as folder:
        folder.initialize(tiny, None)
    run, learner = tmp_path / "run", TinyTrainer()
    learner.save(run / "checkpoints", 1)
    (run / "checkpoints").chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"), CheckpointWriter(run, learner.artifact, keep=1) as writer:
        writer.save(2, learner.model, learner.optimizers)
    assert latest_checkpoint(run / "checkpoints") == run / "checkpoints" / "step-1"
    (run / "checkpoints").chmod(0o700)


# All of it together, in a training.
