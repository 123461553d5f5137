"""gpt2 sweep: seeded values, one run for each trial, resumable, one table, one picture, and best.toml."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.errors import ConfigError, UserError
from gpt2.train.sweep import Trial, best_trial, draw_values, format_table, parse_range, read_trials
from tests.helpers.cli_helpers import run_cli

TINY_SETTINGS = """
--tokenizer bytes --n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --batch-size 2 --max-steps 3 --warmup-steps 1
--eval-every 0 --eval-tokens 64 --sample-tokens 0 --dtype float32 --device cpu
"""
TINY = TINY_SETTINGS.split()


@given(st.integers(0, 2**32), st.integers(1, 1000))
def test_values_are_in_their_range_and_a_function_of_seed_and_trial(seed: int, number: int) -> None:
    ranges = {"lr": (1e-4, 1e-1), "weight_decay": (0.0, 0.5), "n_layer": (1.0, 12.0)}
    values = draw_values(ranges, seed, number)
    assert all(low <= values[name] <= high for name, (low, high) in ranges.items())
    assert isinstance(values["n_layer"], int)
    assert draw_values({"lr": (1e-4, 1e-1)}, seed, number) == {"lr": values["lr"]}  # independent of other settings


def test_values_of_a_positive_range_are_log_uniform() -> None:
    values = [draw_values({"lr": (1e-4, 1e-1)}, 0, number)["lr"] for number in range(3000)]
    for low, high in ((1e-4, 1e-3), (1e-3, 1e-2), (1e-2, 1e-1)):
        assert 900 < sum(low <= value < high for value in values) < 1100  # 1,000 with a standard deviation of 26
    linear = [draw_values({"weight_decay": (0.0, 0.3)}, 0, number)["weight_decay"] for number in range(3000)]
    assert 900 < sum(value < 0.1 for value in linear) < 1100


@pytest.mark.parametrize("text", ["..", "1e-3..", "a..b", "2..1", "1..1", "0..inf", "nan..1", "1..2..3"])
def test_a_range_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--weight-decay"):
        parse_range("weight_decay", text)


def test_the_best_trial_is_the_lowest_loss_and_diverged_trials_are_last() -> None:
    trials = [Trial(1, {"lr": 0.1}, None), Trial(2, {"lr": 0.01}, 2.5), Trial(3, {"lr": 0.001}, 2.25)]
    assert best_trial(trials).number == 3
    table = format_table(trials).splitlines()
    assert table[2:] == ["| 3 | 0.001 | 2.2500 |", "| 2 | 0.01 | 2.5000 |", "| 1 | 0.1 | diverged |"]
    with pytest.raises(UserError, match="all 1 trials diverged"):
        best_trial(trials[:1])


def test_the_same_command_goes_on_with_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials that are finished are not run again; an interrupted trial resumes; the numbers are those of one sweep."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    command = ["sweep", "quickstart", "--data", str(tmp_path / "text.txt"), *TINY, "--lr=1e-3..1e-1"]
    whole = ["--out-dir", str(tmp_path / "whole"), "--trials", "3"]
    code, out, err = run_cli(capsys, *command, *whole)
    assert code == 0, err
    expected = read_trials(tmp_path / "whole" / "quickstart-sweep")
    assert [trial.number for trial in expected] == [1, 2, 3]

    parts = ["--out-dir", str(tmp_path / "parts")]
    with monkeypatch.context() as patch:
        patch.setattr("gpt2.train.stopping.StopCondition.should_stop", lambda self: True)  # as after a signal
        patch.setattr("gpt2.train.stopping.StopCondition.exit_code", lambda self: 130)
        code, _, err = run_cli(capsys, *command, *parts, "--trials", "2")
    assert code == 130
    assert "the same command resumes" in err
    sweep = tmp_path / "parts" / "quickstart-sweep"
    assert read_trials(sweep) == []
    assert run_cli(capsys, *command, *parts, "--trials", "2")[0] == 0
    first = (sweep / "trial-01" / "metrics.jsonl").stat().st_mtime_ns
    assert run_cli(capsys, *command, *parts, "--trials", "3")[1] == out.replace("/whole/", "/parts/")
    assert read_trials(sweep) == expected
    assert (sweep / "trial-01" / "metrics.jsonl").stat().st_mtime_ns == first

    (sweep / ".trials.jsonl.partial").write_text('{"number": 3, "val')  # of a process that was killed while it wrote
    assert run_cli(capsys, *command, *parts, "--trials", "3")[0] == 0
    assert read_trials(sweep) == expected

    assert (sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")
    recipe = tomllib.loads((sweep / "best.toml").read_text())
    best = min(expected, key=lambda trial: trial.val_loss or 0)
    assert (recipe["lr"], recipe["resume"], "name" in recipe) == (best.values["lr"], "never", False)
    losses = [json.loads(line) for line in (sweep / f"trial-0{best.number}" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["val_loss"] == best.val_loss

    other = run_cli(capsys, *command, *parts, "--trials", "3", "--weight-decay", "0.05")
    assert other[0] == 2
    assert "has a sweep with --weight-decay 0.1, not 0.05: choose another --name" in other[2]


def test_a_trial_that_diverges_is_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    paths = ["--data", str(tmp_path / "text.txt"), "--out-dir", str(tmp_path), "--optimizer", "sgd"]
    code, out, err = run_cli(capsys, "sweep", *paths, *TINY, "--grad-clip", "0", "--lr", "1e-3..1e38", "--trials", "4")
    assert code == 0, err
    losses = [trial.val_loss for trial in read_trials(tmp_path / "quickstart-sweep")]
    assert None in losses
    assert any(losses)
    assert "diverged" in out


def test_a_sweep_without_a_range_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_cli(capsys, "sweep", "quickstart", "--lr", "1e-3", "--out-dir", str(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert "needs a range to search" in err


def test_a_sweep_that_was_killed_before_its_first_trial_starts_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "quickstart-sweep"
    sweep.mkdir()
    (sweep / ".sweep.json.partial").write_text('{"ranges"')
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    command = ["sweep", "--data", str(tmp_path / "text.txt"), *TINY, "--lr", "1e-3..1e-1", "--trials", "1"]
    assert run_cli(capsys, *command, "--out-dir", str(tmp_path))[0] == 0
    (sweep / "sweep.json").unlink()
    code, _, err = run_cli(capsys, *command, "--out-dir", str(tmp_path))
    assert code == 2
    assert "is not a sweep: choose another --name" in err
