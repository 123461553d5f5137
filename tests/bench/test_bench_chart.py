"""The chart of the speed ladder shows the measurements."""

import functools
from pathlib import Path
from typing import Any

import pytest

from gpt2.bench import ladder_chart
from gpt2.bench.common import read_result
from gpt2.errors import UserError


def result_of(devices: dict[str, float]) -> dict[str, Any]:
    """A synthetic result: two ladder steps and a comparison on each device, with `ms` for the first step."""
    verdict = {"wrong": False, "reason": None, "mfu": 0.5, "tokens_per_second": 1000.0}
    found = []
    for name, ms in devices.items():
        steps = [
            {"name": "float32", "ms": {"median": ms, "low": 0.9 * ms, "high": 1.1 * ms}, **verdict},
            {"name": "tf32", "reason": "not applicable: no such thing"},
        ]
        record = {"ms": {"median": ms, "low": ms, "high": ms}, "best": "eager", "mfu": 0.5}
        peers = {"contestants": {"gpt2": record, "nanogpt": record | {"speed_ratio": 1.5, "memory_ratio": 0.5}}}
        device = {
            "device": name,
            "name": f"A {name}",
            "rungs": steps,
            "peers": peers,
            "workload": ladder_chart.A40_SHAPE,
        }
        found.append(device)
    about = {"torch": "2.13", "date": "2025-01-01T00:00:00", "commit": None, "workload": ladder_chart.A40_SHAPE}
    return {"kind": "bench train", "devices": found, **about}


def test_the_chart_shows_all_measurements(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    draw = functools.partial(ladder_chart.draw, path=path)
    draw(result_of({"cpu": 4000.0}))
    text = path.read_text()
    assert all(part in text for part in ("4,000 ms", "MFU 50%", "no such thing", "1.50x our time", "2.00x our memory"))
    assert "A40" not in text  # that was a GPU
    draw(result_of({"cpu": 4000.0, "cuda": 100.0}))
    text = path.read_text()
    assert all(part in text for part in ("A cpu", "A cuda", "4,000 ms", "100 ms", "1,250 ms", "on an A40"))
    other = result_of({"cuda": 100.0})
    other["devices"][0]["workload"] = ladder_chart.A40_SHAPE | {"batch_size": 4}
    draw(other)
    assert "A40" not in path.read_text()


def test_an_empty_result_has_no_chart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was measured"):
        ladder_chart.draw({"devices": [{"rungs": [], "peers": None}]}, tmp_path / "a.png")
    (tmp_path / "other.json").write_text('{"kind": "bench generate"}')
    with pytest.raises(UserError, match="is not a result of gpt2 bench train"):
        read_result(tmp_path / "other.json", "bench train")
