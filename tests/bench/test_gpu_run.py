"""A rehearsal of the script for a GPU: the same commands on a CPU, at toy sizes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def rehearse(part: str, out: Path) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/gpu_run.py", "--part", part, "--out", str(out), "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    logs = "\n".join(path.read_text()[-2000:] for path in out.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{logs}"
    return json.loads((out / f"gpu_run_{part}.json").read_text())


@pytest.mark.slow
def test_part_a_runs_tests(tmp_path: Path) -> None:
    assert [step["status"] for step in rehearse("a", tmp_path)["steps"]] == ["ok"]
    assert "passed" in (tmp_path / "tests.log").read_text()


@pytest.mark.slow
def test_part_b_measures_training_and_decoding(tmp_path: Path) -> None:
    result = rehearse("b", tmp_path)
    assert result["rehearsal"] is True
    assert len(result["steps"]) == 5
    for step in result["steps"]:
        assert json.loads((tmp_path / f"{step['name']}.json").read_text())
        assert (tmp_path / f"{step['name']}.png").stat().st_size > 1000


@pytest.mark.slow
def test_part_c_trains_twice_and_evaluates(tmp_path: Path) -> None:
    rehearse("c", tmp_path)
    for name in ("train_adamw", "train_muon"):
        assert (tmp_path / name / "model" / "config.json").is_file()
        assert (tmp_path / name / "loss.png").is_file()
    assert json.loads((tmp_path / "evaluation.json").read_text())["results"]


def test_a_step_that_fails_is_listed_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_run  # pyright: ignore[reportMissingImports]

    steps = [gpu_run.Step("bad", ("-c", "raise SystemExit(3)"), 60), gpu_run.Step("good", ("-c", "print(1)"), 60)]
    monkeypatch.setattr(gpu_run, "steps_of", lambda part, setup: steps)
    assert gpu_run.main(["--part", "a", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu_run_a.json").read_text())["steps"]
    assert [step["status"] for step in found] == ["exit code 3", "ok"]
    assert gpu_run.run_step(steps[0], tmp_path, 5)["status"] == "skipped: no time left"
