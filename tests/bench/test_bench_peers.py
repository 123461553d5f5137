"""Peers in training: they start from our weights, have our loss, and are compared in their best modes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.train_peers import build_model, compare_with_peers, compute_metrics

from gpt2.bench.common import InProcessRunner, no_progress
from gpt2.planning.costs import flops_per_token
from tests.helpers.bench_helpers import TINY_CONFIG, TINY_WORKLOAD

pytestmark = pytest.mark.usefixtures("matmul_precision", "quick_matmul")


def test_peers_start_from_our_weights_and_have_our_loss(nanogpt: str) -> None:
    tokens, targets = TINY_WORKLOAD.batches()[0]
    expected = build_model("gpt2", None, TINY_WORKLOAD, compiled=False).modes["eager"](tokens, targets)
    for name, path in (("nanogpt", nanogpt), ("transformers", None)):
        contestant = build_model(name, path, TINY_WORKLOAD, compiled=False)
        assert contestant.version
        loss = contestant.modes["eager"](tokens, targets)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        loss.backward()
        assert all(p.grad is not None for p in contestant.model.parameters())


def test_all_contestants_are_timed_in_turns(
    nanogpt: str, no_compiler: None, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = {"nanogpt": nanogpt, "transformers": None}
    result = compare_with_peers(TINY_WORKLOAD, peers, runner_class=InProcessRunner, progress=no_progress)
    found = result["contestants"]
    assert list(found) == ["gpt2", "nanogpt", "transformers"]
    for one in found.values():
        assert list(one["modes"]) == ["eager"]
        assert one["best"] == "eager"
        assert len(one["modes"]["eager"]["seconds"]) == TINY_WORKLOAD.steps
        assert one["peak_memory"] > 2**20
        assert one["first_loss"] == pytest.approx(found["gpt2"]["first_loss"], abs=3e-2)
    for name in peers:
        assert not found[name]["wrong"]
        ratio = found[name]["ms"]["median"] / found["gpt2"]["ms"]["median"]
        assert found[name]["speed_ratio"] == pytest.approx(ratio)
        ratio = found["gpt2"]["peak_memory"] / found[name]["peak_memory"]
        assert found[name]["memory_ratio"] == pytest.approx(ratio)
    assert capsys.readouterr().out == ""  # what peers print is not part of our output


def test_ratios_compare_the_best_modes() -> None:
    def contestant(eager: list[float], compiled: list[float], loss: float | None, peak: int) -> dict[str, Any]:
        modes: dict[str, Any] = {"eager": {"seconds": eager}, "compiled": {"seconds": compiled}}
        return {"reason": None, "modes": modes, "first_loss": loss, "peak_memory": peak}

    slow = contestant([0.5, 0.6, 0.7], [], 5.5, 2000)
    slow["modes"]["compiled"] = {"reason": "no compiler"}
    result = compute_metrics(
        {
            "matmul": 1e9,
            "contestants": {
                "gpt2": contestant([0.4, 0.4, 0.4], [0.1, 0.2, 0.3], 5.5, 700),
                "nanogpt": contestant([0.3, 0.3, 0.3], [0.8, 0.9, 1.0], 5.6, 1000),
                "transformers": slow,
                "other": contestant([0.3], [0.4], None, 1000),
            },
        },
        TINY_WORKLOAD,
    )["contestants"]
    assert (result["gpt2"]["best"], result["nanogpt"]["best"]) == ("compiled", "eager")
    assert "speed_ratio" not in result["gpt2"]
    assert result["nanogpt"]["speed_ratio"] == pytest.approx(1.5)
    assert result["nanogpt"]["memory_ratio"] == pytest.approx(0.7)
    assert result["transformers"]["speed_ratio"] == pytest.approx(3)
    assert result["gpt2"]["mfu"] == pytest.approx(32 / 0.2 * flops_per_token(TINY_CONFIG, 16) / 1e9)
    assert [result[name]["wrong"] for name in ("nanogpt", "transformers", "other")] == [True, False, True]


def test_a_peer_that_cannot_run_is_listed(tmp_path: Path, no_compiler: None) -> None:
    (tmp_path / "model.py").write_text("GPTConfig = dict\nclass GPT:\n    pass\n".replace("class GPT", "class Other"))
    result = compare_with_peers(TINY_WORKLOAD, {"nanogpt": str(tmp_path)}, runner_class=InProcessRunner)
    assert "is not nanoGPT's" in result["contestants"]["nanogpt"]["reason"]
    assert result["contestants"]["gpt2"]["ms"]["median"] > 0
