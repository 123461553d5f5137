"""The training loop: time limits, outlier batches, trackers, automatic batch size, prefetching."""

import math
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2.config import AUTO_BATCH_SIZE, TrainConfig, config_for_resume, read_toml
from gpt2.data.loader import Batch, TokenLoader, prefetch_batches
from gpt2.data.prepare import open_data
from gpt2.errors import UserError
from gpt2.reporting.metrics import read_metrics
from gpt2.train.setup import setup_run
from gpt2.train.stopping import TIME_LIMIT_EXIT_CODE, Interrupted, StopCondition
from gpt2.train.trainer import train
from tests.helpers.cli_helpers import run_cli


@pytest.fixture
def tiny(tiny: TrainConfig) -> TrainConfig:
    """A run of a second, without dropout, and without validation, samples or checkpoints before its end."""
    small = replace(tiny, n_layer=1, n_embd=16, block_size=16, dropout=0.0, batch_size=4)
    return replace(small, max_steps=60, eval_every=0, save_every=0)


def test_a_time_limit_stops_and_saves_the_run(tiny: TrainConfig) -> None:
    config = replace(tiny, max_steps=100_000, max_minutes=0.5 / 60)
    began = time.monotonic()
    with pytest.raises(Interrupted, match=r"stopped by --max-minutes after step .*: gpt2 train --resume") as stopped:
        train(config)
    assert time.monotonic() - began < 30
    assert stopped.value.exit_code == 75
    folder, step = stopped.value.folder, stopped.value.step
    assert (folder / "checkpoints" / f"step-{step}").is_dir()
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(1, step + 1))
    assert "--max-minutes" in (folder / "report.md").read_text()

    whole = train(replace(tiny, name="whole", max_steps=step + 5, schedule="constant", warmup_steps=5))
    other = train(replace(tiny, name="other", max_steps=step + 5, schedule="constant", warmup_steps=5))
    assert (whole / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()


def test_a_signal_takes_precedence_over_the_time_limit() -> None:
    assert not StopCondition([], None).should_stop()
    assert not StopCondition([], time.monotonic() + 60).should_stop()
    assert StopCondition([], time.monotonic() - 1).reason() == "--max-minutes"
    assert StopCondition([signal.SIGTERM], time.monotonic() - 1).reason() == "SIGTERM"


def test_the_exit_code_for_a_time_limit(tiny: TrainConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = [
        "--data",
        tiny.data,
        "--tokenizer",
        "bytes",
        "--n-layer",
        "1",
        "--n-embd",
        "16",
        "--out-dir",
        str(tmp_path),
    ]
    code, out, err = run_cli(capsys, "train", *flags, "--name", "x", "--max-steps", "99999", "--max-minutes", "0.01")
    assert code == 75
    assert out == ""
    assert "everything saved" in err


def test_outlier_batches_are_skipped_also_by_a_resumed_run(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two batches of noise among identical batches."""
    plain = TokenLoader.rows

    def rows(self: TokenLoader, step: int, start: int, stop: int) -> Batch:
        tokens, targets, _ = plain(self, 0, start, stop)
        if step in (45, 52):
            targets = torch.randint(128, 256, targets.shape, generator=torch.Generator().manual_seed(step))
        return Batch(tokens, targets)

    monkeypatch.setattr(TokenLoader, "rows", rows)
    config = replace(tiny, skip_spikes=8.0, save_every=50, lr=1e-3)
    whole = train(config)
    skipped = [line["step"] for line in read_metrics(whole / "metrics.jsonl") if line.get("skipped")]
    assert skipped == [46, 53]
    assert "step 46: batch left out: loss" in capsys.readouterr().err
    assert "skipped as outlier batches" in (whole / "report.md").read_text()

    cut = train(replace(config, name="cut", keep_checkpoints=9))
    (cut / "checkpoints" / "step-60").rename(cut / "gone")
    train(config_for_resume(cut, {}))
    assert (cut / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    learned_from_all = train(replace(config, name="all", skip_spikes=0.0))
    assert (learned_from_all / "model/model.safetensors").read_bytes() != (
        whole / "model/model.safetensors"
    ).read_bytes()


def test_a_diverging_run_names_the_module_and_can_be_replayed(
    tiny: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="origin: ") as blown:
        train(replace(tiny, lr=1e18, warmup_steps=0, optimizer="sgd", grad_clip=0.0))
    (dump,) = (Path(tiny.out_dir) / "tiny" / "dumps").iterdir()
    code, out, _ = run_cli(capsys, "train", "--replay", str(dump))
    assert code == 0
    named = str(blown.value).split("origin: ")[1].split(" is ")[0]
    assert named in out
    code, _, err = run_cli(capsys, "train", "--replay", str(dump.parent))
    assert code == 2
    assert err.count("\n") == 1


def test_tensorboard_and_a_profile_by_flag(tiny: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(replace(tiny, max_steps=8, tensorboard=True, profile=True))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    recorded = [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(recorded)
    assert (folder / "trace.json").stat().st_size > 1000
    assert "aten::" in (folder / "profile.txt").read_text()


def test_a_batch_size_that_fits_is_found_and_kept(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2.planning.plan.MAX_AUTO_BATCH_TOKENS", 512)
    folder = train(replace(tiny, batch_size=AUTO_BATCH_SIZE, max_steps=5))
    found = read_toml(folder / "config.toml").batch_size
    assert found == 512 // tiny.block_size  # there is enough memory for it
    assert read_metrics(folder / "metrics.jsonl")[0]["tokens"] == 512
    train(
        config_for_resume(folder, {"batch_size": AUTO_BATCH_SIZE, "max_steps": 6})
    )  # auto again: the size found is kept
    assert read_toml(folder / "config.toml").batch_size == found


def test_prefetched_batches_equal_the_loader_s(tiny: TrainConfig) -> None:
    data = open_data(tiny.data, "bytes")
    loader = TokenLoader(data.train, 4, 16, seed=3)
    threads: set[int] = set()
    plain = loader.rows

    def watched(step: int, start: int, stop: int) -> Batch:
        threads.add(threading.get_ident())
        return plain(step, start, stop)

    loader.rows = watched
    seen = list(prefetch_batches(loader, 5, 9, torch.device("cpu")))
    assert len(seen) == 4
    for step, batch in enumerate(seen, start=5):
        assert torch.equal(batch.tokens, plain(step, 0, 4).tokens)
        assert torch.equal(batch.targets, plain(step, 0, 4).targets)
    for rank in range(2):
        shared = list(prefetch_batches(loader, 5, 9, torch.device("cpu"), rank=rank, world_size=2))
        assert all(torch.equal(one.tokens, all_.tokens[2 * rank :][:2]) for one, all_ in zip(shared, seen, strict=True))
    assert threads
    assert threading.get_ident() not in threads
    assert list(prefetch_batches(loader, 5, 5, torch.device("cpu"))) == []


def test_an_error_while_prefetching_is_raised_by_the_run(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TokenLoader.rows

    def rows(self: TokenLoader, step: int, start: int, stop: int) -> Any:
        if step == 7:
            raise UserError("train.bin was cut short")
        return plain(self, step, start, stop)

    monkeypatch.setattr(TokenLoader, "rows", rows)
    with pytest.raises(UserError, match="cut short"):
        train(tiny)
    assert len(read_metrics(Path(tiny.out_dir) / "tiny" / "metrics.jsonl")) == 7


def test_activation_checkpointing_gives_the_same_run_byte_for_byte(tiny: TrainConfig) -> None:
    plain = train(replace(tiny, dropout=0.1, max_steps=10))
    again = train(replace(tiny, dropout=0.1, max_steps=10, activation_checkpointing=True, name="recomputed"))
    assert (plain / "model/model.safetensors").read_bytes() == (again / "model/model.safetensors").read_bytes()


def test_muon_is_resumed_bit_for_bit(tiny: TrainConfig) -> None:
    config = replace(tiny, optimizer="muon", lr=1e-2, schedule="wsd", max_steps=20, save_every=10)
    whole = train(config)
    cut = train(replace(config, name="cut"))
    (cut / "checkpoints" / "step-20").rename(cut / "gone")
    train(config_for_resume(cut, {}))
    for name in ("model/model.safetensors", "checkpoints/step-20/optimizer.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(UserError, match="was started with --optimizer muon"):
        train(config_for_resume(cut, {"optimizer": "adamw"}))


def test_invalid_settings_are_one_line_errors(
    tiny: TrainConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = train(replace(tiny, max_steps=5))
    capsys.readouterr()
    for arguments, output in (
        (("train", "gpt2-124m", "--data", ""), "--data is missing"),
        (("train", "--init-from", str(folder), "--n-layer", "3"), "--init-from keeps that model's shape"),
        (("train", "--n-layer", "100000000"), "more than any machine can hold"),
        (("train", "--skip-spikes", "-1"), "--skip-spikes must be at least 0"),
        (("train", "--max-minutes", "inf"), "--max-minutes must be finite"),
        (("train", "--matmul-precision", "hihg"), "(did you mean 'high'?)"),
        (("train", "--schedule", "wsd", "--decay-steps", "100000"), "--decay-steps (100000)"),
    ):
        code, _, err = run_cli(capsys, *arguments, "--out-dir", str(tmp_path / "none"))
        assert (code, err.count("\n")) == (2, 1), err
        assert output in err
    assert not (tmp_path / "none").exists()


def test_the_first_step_s_rate_is_not_zero_and_seconds_add_up(tiny: TrainConfig) -> None:
    folder = train(replace(tiny, save_every=10, eval_every=10))
    lines = read_metrics(folder / "metrics.jsonl")
    assert lines[0]["lr"] == pytest.approx(tiny.lr / tiny.warmup_steps)
    for line in lines:
        parts = [line.get(f"{part}_seconds", 0.0) for part in ("save", "data", "update", "eval", "sample")]
        assert all(part >= 0 for part in parts)
        assert sum(parts) <= line["seconds"] + 1e-6
        assert math.isfinite(line["tokens_per_second"])
    assert sum(line["save_seconds"] > 0 for line in lines) == 5  # the sixth save comes after the last line


def test_setting_up_writes_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    open_data(tiny.data, tiny.tokenizer)  # the data's shards are kept in the cache
    before = sorted(tmp_path.rglob("*"))
    setup_run(tiny, Path(tiny.out_dir) / "tiny")
    assert sorted(tmp_path.rglob("*")) == before
    assert TIME_LIMIT_EXIT_CODE == 75
