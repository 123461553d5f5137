"""Training in float16: the loss is scaled, a step whose gradients overflow is not applied, and a resume is exact."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2.config import TrainConfig, config_for_resume
from gpt2.errors import UserError
from gpt2.reporting.metrics import read_metrics, without_timings
from gpt2.train import loss_scale
from gpt2.train.loss_scale import LossScale
from gpt2.train.trainer import train


def test_the_scale_equals_that_of_torchs_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 5)
    theirs = torch.amp.GradScaler("cpu", growth_interval=5)  # pyright: ignore[reportPrivateImportUsage]
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight])
    ours, records = LossScale(torch.float16), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        overflow = torch.rand(1, generator=generator).item() < 0.15
        scaled = theirs.scale(weight.sum())
        assert ours.value == theirs.get_scale()
        scaled.backward()
        assert weight.grad is not None
        if overflow:
            weight.grad.fill_(torch.inf)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        records.append({"loss_scale": ours.value} | ({"overflow": True} if overflow else {}))
        ours.update(overflow=overflow)
        assert LossScale(torch.float16, records).value == ours.value
    assert len({record["loss_scale"] for record in records}) >= 3


def test_other_dtypes_have_no_scale() -> None:
    scale = LossScale(torch.bfloat16)
    scale.update(overflow=False)
    assert (scale.value, scale.is_dynamic) == (1, False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_are_those_of_float32(tiny: TrainConfig, optimizer: str) -> None:
    tiny = replace(tiny, optimizer=optimizer, dropout=0.0)
    found = {}
    for dtype in ("float32", "float16"):
        records = read_metrics(train(replace(tiny, dtype=dtype, name=dtype)) / "metrics.jsonl")
        found[dtype] = [record["loss"] for record in records]
        assert all("overflow" not in record for record in records)
        assert [record.get("loss_scale") for record in records] == [None if dtype == "float32" else 2.0**16] * 30
    assert found["float16"] == pytest.approx(found["float32"], abs=0.02)
    assert found["float16"] != found["float32"]


def test_an_overflow_skips_the_update_and_a_resumed_run_has_the_same_scale(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**30)  # too large: several halvings
    tiny = replace(tiny, dtype="float16", keep_checkpoints=9)
    whole = train(tiny)
    records = read_metrics(whole / "metrics.jsonl")
    overflows = [record["step"] for record in records if record.get("overflow")]
    assert overflows == list(range(1, len(overflows) + 1))
    assert 3 < len(overflows) < 20
    assert all(math.isfinite(record["loss"]) for record in records)
    assert all(("grad_norm" in record) == ("overflow" not in record) for record in records)
    assert records[-1]["loss_scale"] == 2.0 ** (30 - len(overflows))
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    parts = train(replace(tiny, name="parts"))
    for later in ("step-30", "step-20"):
        (parts / "checkpoints" / later).rename(parts / later)
    train(config_for_resume(parts, {}))
    assert without_timings(read_metrics(parts / "metrics.jsonl")) == without_timings(records)
    assert (parts / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_gradients_that_overflow_without_a_scale_are_diagnosed(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At a scale of 1 they are too large whatever the scale."""
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 4.0)
    monkeypatch.setattr(
        "gpt2.distributed.parallel.DistributedModel.clip_grad_norm", lambda *_, **__: torch.tensor(torch.inf)
    )
    with pytest.raises(UserError, match=r"^step 3: the norm of the gradient is inf"):
        train(replace(tiny, dtype="float16"))
    assert [record.get("overflow") for record in read_metrics(tmp_path / "runs/tiny/metrics.jsonl")] == [True, True]
