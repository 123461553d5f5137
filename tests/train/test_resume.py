"""A run that was stopped, killed or damaged resumes as if it had not been interrupted."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2.config import TrainConfig, config_for_resume, to_toml
from gpt2.errors import UserError
from gpt2.reporting.metrics import read_metrics, without_timings
from gpt2.train.checkpoint import latest_checkpoint
from gpt2.train.trainer import train
from tests.helpers.tiny_trainer import file_contents
from tests.helpers.training_helpers import fixed_seed_sampler


def assert_same_run(one: Path, other: Path) -> None:
    metrics = [without_timings(read_metrics(p / "metrics.jsonl")) for p in (one, other)]
    assert metrics[0] == metrics[1]
    assert [(p / "samples.txt").exists() for p in (one, other)] in ([True, True], [False, False])
    if (one / "samples.txt").exists():
        assert (one / "samples.txt").read_text() == (other / "samples.txt").read_text()
    for name in ("model/model.safetensors", "model/config.json", "checkpoints/step-30/optimizer.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_resumed_is_never_stopped_bit_for_bit(tiny: TrainConfig) -> None:
    tiny = replace(tiny, sample_tokens=20)
    whole = train(tiny, fixed_seed_sampler)
    folder = train(replace(tiny, name="parts", keep_checkpoints=9), fixed_seed_sampler)
    for later in ("step-30", "step-20"):  # as if killed after step 20 was recorded and before it was saved
        (folder / "checkpoints" / later).rename(folder / later)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": 1.')  # half a line
    train(config_for_resume(folder, {"keep_checkpoints": 2}), fixed_seed_sampler)
    assert_same_run(whole, folder)


def test_a_broken_newest_checkpoint_is_passed_over(tiny: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    whole = train(tiny)
    folder = train(replace(tiny, name="broken"))
    checkpoints = folder / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-20", "step-30"]  # the newest two are kept
    os.truncate(checkpoints / "step-30" / "optimizer.safetensors", 100)
    (checkpoints / ".step-40.unfinished").mkdir()
    newest = latest_checkpoint(checkpoints)
    assert newest is not None
    assert newest.name == "step-20"
    assert "step-30 is corrupt (optimizer.safetensors)" in caplog.text
    train(config_for_resume(folder, {}))
    assert_same_run(whole, folder)


@pytest.mark.parametrize(
    "state", ["[]", "null", '{"step": 30, "sha256": []}', '{"sha256": {}}', '{"step": "x", "sha256": {"a": "b"}}', "{"]
)
def test_a_state_file_of_any_kind_makes_a_broken_checkpoint_and_no_more(tiny: TrainConfig, state: str) -> None:
    folder = train(replace(tiny, max_steps=20))
    (folder / "checkpoints" / "step-20" / "state.json").write_text(state)
    (folder / "checkpoints" / "step-²").mkdir()
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.name == "step-10"


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_over_its_model(tiny: TrainConfig) -> None:
    folder = train(replace(tiny, max_steps=10))
    (folder / "checkpoints" / "step-10" / "state.json").unlink()
    before = file_contents(folder)
    with pytest.raises(UserError, match="has no whole checkpoint to resume: --init-from"):
        train(config_for_resume(folder, {"max_steps": 30}))
    assert file_contents(folder) == before


def test_fewer_steps_than_are_done_and_folders_that_are_no_run(tiny: TrainConfig, tmp_path: Path) -> None:
    folder = train(replace(tiny, max_steps=10))
    stored = (folder / "config.toml").read_text()
    with pytest.raises(UserError, match=r"has done 10 steps, more than --max-steps \(6\)"):
        train(config_for_resume(folder, {"max_steps": 6}))
    assert (folder / "config.toml").read_text() == stored
    (tmp_path / "runs" / "mine").mkdir()
    (tmp_path / "runs" / "mine" / "metrics.jsonl").write_text("my own")
    with pytest.raises(UserError, match="is not a run folder: choose another --name"):
        train(replace(tiny, name="mine", resume="auto"))
    with pytest.raises(UserError, match="--name must be a valid folder name"):
        train(replace(tiny, name="..", resume="auto"))
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text() == "my own"


def test_retention_drops_broken_later_checkpoints_and_never_the_newest_good_one(tiny: TrainConfig) -> None:
    folder = train(replace(tiny, max_steps=20))
    (folder / "checkpoints" / "step-20" / "optimizer.safetensors").write_text("x")
    train(config_for_resume(folder, {"max_steps": 15, "keep_checkpoints": 1}))
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-15"]


def test_broken_metrics_and_samples_do_not_stop_a_resumed_run(
    tiny: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train(replace(tiny, max_steps=20))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\0\xff\n[1]\n{"step": "x"}\n')
    (folder / "samples.txt").write_bytes(b"\xff garbage\n--- step 10\nkept\n\n--- step 90\ndropped\n\n")
    train(config_for_resume(folder, {"max_steps": 30}))
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(1, 31))
    assert "passed over 3 line(s)" in caplog.text
    text = (folder / "samples.txt").read_text()
    assert "kept" in text
    assert "dropped" not in text


def test_ctrl_c_saves_and_says_how_to_go_on(tiny: TrainConfig, tmp_path: Path) -> None:
    """With the real command and signal, in another process."""
    whole = train(replace(tiny, name="whole", max_steps=30))
    config = replace(tiny, name="cut")
    toml = tmp_path / "cut.toml"
    toml.write_text(to_toml(config))
    command = [sys.executable, "-m", "gpt2", "train"]
    process = subprocess.Popen([*command, str(toml)], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    metrics = Path(config.out_dir) / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"resume with: gpt2 train --resume {config.out_dir}/cut" in output
    assert "Traceback" not in output
    done = len(read_metrics(metrics))
    assert 3 <= done < 30
    again = subprocess.run([*command, "--resume", f"{config.out_dir}/cut"], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == f"{config.out_dir}/cut"
    assert_same_run(whole, Path(config.out_dir) / "cut")


def test_a_finished_or_foreign_folder_is_not_written_over(tiny: TrainConfig) -> None:
    folder = train(replace(tiny, max_steps=5))
    before = file_contents(folder)
    with pytest.raises(UserError, match="exists: --resume auto resumes it"):
        train(tiny)
    with pytest.raises(UserError, match="was started with --n-embd 32: it cannot be resumed with 64"):
        train(config_for_resume(folder, {"n_embd": 64}))
    assert file_contents(folder) == before
    longer = train(config_for_resume(folder, {"max_steps": 8}))
    assert [line["step"] for line in read_metrics(longer / "metrics.jsonl")] == list(range(1, 9))
