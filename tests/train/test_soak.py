"""The soak test with a few kills; `make soak` has many. See benchmarks/soak.py."""

import importlib
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("soak")
    monkeypatch.setattr(module, "CONFIG", replace(module.CONFIG, max_steps=45))
    return module


def test_a_run_killed_at_random_moments_equals_an_uninterrupted_one(
    soak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output: list[str] = []
    monkeypatch.setattr(soak, "MOMENTS", ("saving",))
    found = soak.soak(2, 1, tmp_path, output.append)
    assert found["differences"] == []
    assert found["kills"] == 2
    assert len(output) == found["runs"]
    # and what a difference looks like
    whole, other = tmp_path / "uninterrupted" / "runs" / "soak", tmp_path / "other"
    shutil.copytree(whole, other)
    assert soak.differences(whole, other) == []
    weights = bytearray((other / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model" / "model.safetensors").write_bytes(weights)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join([*lines[:20], lines[19], *lines[20:]]))  # a step repeated
    (other / ".step-9.unfinished").mkdir()
    assert soak.differences(whole, other) == [".step-9.unfinished", "model/model.safetensors", "metrics.jsonl"]


@pytest.mark.slow
def test_kills_at_any_moment(soak: Any, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    found = soak.soak(10, seed, tmp_path, print)
    assert found["differences"] == [], f"seed {seed}"
