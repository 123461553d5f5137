"""The profiler: a trace and a table of the recorded steps."""

import gzip
import json
from pathlib import Path

import pytest
import torch

import gpt2.reporting.profiler
from gpt2.model import GPT, GPTConfig
from gpt2.reporting.profiler import StepProfiler


def run_profiler(folder: Path, steps: int, *, planned: int | None = None, enabled: bool = True) -> StepProfiler:
    model = GPT(GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with StepProfiler(folder, torch.device("cpu"), planned or steps, enabled=enabled) as profiler:
        for _ in range(steps):
            model.loss(tokens, tokens).backward()
            profiler.step()
    return profiler


@pytest.mark.parametrize(("steps", "recorded"), [(8, {3, 4, 5}), (4, {3}), (2, {1})])
def test_profile_shows_the_operators_of_the_recorded_steps(tmp_path: Path, steps: int, recorded: set[int]) -> None:
    run_profiler(tmp_path, steps)
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"aten::addmm", "aten::mm"} <= names
    assert {name for name in names if name.startswith("ProfilerStep#")} == {f"ProfilerStep#{i}" for i in recorded}
    table = (tmp_path / "profile.txt").read_text()
    assert table.startswith(f"{len(recorded)} step")
    assert "aten::mm" in table


def test_profile_of_a_run_of_one_step(tmp_path: Path) -> None:
    run_profiler(tmp_path, 1)
    assert "aten::addmm" in (tmp_path / "trace.json").read_text()


def test_run_that_stops_early_writes_a_partial_profile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_profiler(tmp_path, 5, planned=100)
    assert (tmp_path / "profile.txt").read_text().startswith("2 steps after the first 3, on cpu")
    run_profiler(tmp_path / "none", 2, planned=100)
    assert not (tmp_path / "none").exists()
    assert "ended before" in caplog.text


def test_no_profile_unless_enabled(tmp_path: Path) -> None:
    run_profiler(tmp_path, 8, enabled=False)
    assert not list(tmp_path.iterdir())


def test_large_trace_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt2.reporting.profiler, "COMPRESS_MIN_BYTES", 1000)
    run_profiler(tmp_path, 8)
    assert {path.name for path in tmp_path.iterdir()} == {"trace.json.gz", "profile.txt"}
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        assert any(event["name"] == "aten::addmm" for event in json.load(file)["traceEvents"])


def test_unwritable_profile_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile.txt").mkdir()
    run_profiler(tmp_path, 8)
    assert "cannot write the profile" in caplog.text
