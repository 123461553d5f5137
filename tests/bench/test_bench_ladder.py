"""The speed ladder: all steps have the same loss, and one that does not is flagged."""

from typing import Any

import pytest
import torch
from benchmarks.train_peers import TrainVariant, time_interleaved
from torch import Tensor
from torch.nn import functional as F

from gpt2.bench.common import BenchmarkError, InProcessRunner, Workload, no_progress, run_in_process
from gpt2.bench.ladder import (
    LADDER_STEPS,
    LOSS_TOLERANCE,
    LadderStep,
    chunked_loss,
    compute_metrics,
    full_logits_loss,
    matmul_rate_variation,
    padded_vocab_loss,
    run_ladder,
    run_step,
)
from gpt2.model import GPT, GPTConfig
from gpt2.planning.costs import flops_per_token
from tests.helpers.bench_helpers import TINY_CONFIG, TINY_WORKLOAD, nan_loss, scaled_loss

pytestmark = pytest.mark.usefixtures("matmul_precision", "quick_matmul")

EAGER_STEPS = tuple(step for step in LADDER_STEPS if step.name != "compile")


def by_name(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in records}


def raw(seconds: list[float], losses: list[float | None], matmul: float = 1e9) -> dict[str, Any]:
    return {"seconds": seconds, "losses": losses, "peak_memory": 1000, "matmul": matmul}


@pytest.mark.parametrize("loss", [padded_vocab_loss, chunked_loss])
def test_all_losses_and_gradients_equal_the_plain_loss(loss: Any) -> None:
    torch.manual_seed(0)
    model = GPT(TINY_CONFIG).double()
    tokens, targets = TINY_WORKLOAD.batches()[0]
    found = []
    for one in (full_logits_loss, loss):
        model.zero_grad()
        value = one(model, tokens, targets)
        value.backward()
        found.append((value.item(), [p.grad for p in model.parameters()]))
    (expected, gradients), (value, others) = found
    assert value == pytest.approx(expected, rel=1e-6)  # full_loss ends in float32
    for a, b in zip(gradients, others, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_all_steps_have_the_same_loss() -> None:
    records = run_ladder(TINY_WORKLOAD, steps=EAGER_STEPS, run=run_in_process)
    found = by_name(records)
    assert list(found) == [step.name for step in EAGER_STEPS]
    assert found["tf32"]["reason"].startswith("not applicable")
    assert found["tf32"]["runs"] == []
    ran = [record for record in records if record["runs"]]
    assert len(ran) == 7
    for record in ran:
        assert record["reason"] is None
        assert not record["wrong"]
        assert record["drift"] < (1e-3 if record["arithmetic"] == "float32" else 3e-2)
        assert record["loss"] < 5.68 < record["runs"][0]["losses"][0] < 5.75  # ln 301 = 5.707, and it learns
        assert record["peak_memory"] > 2**20
        assert record["matmul"] > 0
    assert [record["arithmetic"] for record in ran] == ["float32"] + 6 * ["bfloat16"]


def test_the_first_step_is_plain_training() -> None:
    """Compared with a loop written here: torch's AdamW and clipping, plain attention."""
    found = run_ladder(TINY_WORKLOAD, ["float32"], run=run_in_process)[0]
    torch.manual_seed(TINY_WORKLOAD.seed)
    model = GPT(GPTConfig(**{**TINY_CONFIG.__dict__, "attention": "plain"}))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for tokens, targets in TINY_WORKLOAD.batches():
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert found["runs"][0]["losses"] == pytest.approx(losses, abs=1e-5)


def wrong_gradient(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(model.hidden_states(tokens), model.lm_head.weight.detach())  # the head gets no gradient
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def no_memory(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB.\nmore lines")


def no_kernel(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("loss", [scaled_loss, wrong_gradient, nan_loss])
def test_a_step_that_changes_the_loss_is_flagged(loss: Any) -> None:
    steps = (LADDER_STEPS[0], LadderStep("wrong", "", {"loss": loss}), LadderStep("right", "", {"loss": chunked_loss}))
    found = by_name(run_ladder(TINY_WORKLOAD, steps=steps, run=run_in_process))
    assert not found["float32"]["wrong"]
    assert found["wrong"]["wrong"]
    assert found["wrong"]["drift"] is None or found["wrong"]["drift"] > LOSS_TOLERANCE["float32"]
    assert not found["right"]["wrong"]


def test_a_step_that_cannot_run_is_listed_and_the_others_run() -> None:
    steps = (
        LadderStep("too big", "", {"loss": no_memory}),
        LadderStep("still too big", "", {"attention": "sdpa"}),  # on top of the step that ran out of memory
        LadderStep("broken", "", {"loss": no_kernel}),
        LadderStep("small", "", {"loss": full_logits_loss}),
    )
    found = by_name(run_ladder(TINY_WORKLOAD, steps=steps, run=run_in_process))
    assert found["too big"]["reason"] == "out of memory: CUDA out of memory. Tried to allocate 3.07 GiB."
    assert found["still too big"]["reason"].startswith("out of memory")
    assert found["broken"]["reason"] == "no kernel image is available"
    assert found["small"]["reason"] is None
    steps = (
        LADDER_STEPS[0],
        LadderStep("broken", "", {"loss": no_kernel}),
        LadderStep("after", "", {"attention": "sdpa"}),
    )
    found = by_name(run_ladder(TINY_WORKLOAD, steps=steps, run=run_in_process))
    assert found["after"]["reason"] is None  # measured without the broken step
    assert not found["after"]["wrong"]


def test_the_compile_step_needs_a_compiler(no_compiler: None) -> None:
    found = by_name(run_ladder(TINY_WORKLOAD, ["float32", "compile", "chunked-loss"], run=run_in_process))
    assert "needs a C++ compiler" in found["compile"]["reason"]
    assert not found["chunked-loss"]["wrong"]


def test_chosen_steps_include_all_before_them(no_compiler: None) -> None:
    seen = []

    def watch(work: Any, settings: Any, workload: Workload) -> Any:
        seen.append(settings)
        return work(settings, workload)

    (record,) = run_ladder(TINY_WORKLOAD, ["fused-adamw"], rounds=2, run=watch)
    assert len(record["runs"]) == 2
    assert seen[0] == seen[1]
    assert (seen[0].dtype, seen[0].attention, seen[0].loss) == (torch.bfloat16, "sdpa", padded_vocab_loss)
    assert seen[0].kernels == {"fused": True}
    assert not seen[0].compiled
    assert record["compared_with"] == "fused-adamw"


def test_metrics_follow_from_raw_times() -> None:
    records: list[dict[str, Any]] = [
        {"name": "a", "arithmetic": "float32", "runs": [raw([0.2, 0.4], [5.0, 4.0], 1e9), raw([0.3], [5.0, 4.0], 3e9)]},
        {"name": "b", "arithmetic": "bfloat16", "runs": [raw([0.1, 0.1], [5.01, 4.02], 4e9)]},
        {"name": "c", "arithmetic": "float32", "runs": []},
        {"name": "d", "arithmetic": "float32", "runs": [raw([0.1], [5.0, 4.0011], 2e9)]},
    ]
    a, b, c, d = compute_metrics(records, TINY_WORKLOAD)
    assert a["ms"]["median"] == pytest.approx(300)
    assert a["tokens_per_second"] == pytest.approx(32 / 0.3)
    assert a["matmul"] == 2e9  # the median of 1, 3 and d's 2
    assert a["mfu"] == pytest.approx(32 / 0.3 * flops_per_token(TINY_CONFIG, 16) / 2e9)
    assert a["mfu_datasheet"] is None
    assert (a["drift"], a["wrong"]) == (0, False)
    assert b["drift"] == pytest.approx(0.02)
    assert not b["wrong"]
    assert "ms" not in c
    assert d["wrong"]
    assert matmul_rate_variation(records) == pytest.approx(2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_ladder_on_a_gpu() -> None:
    config = GPTConfig(n_layer=2, n_head=4, n_embd=256)
    work = Workload("cuda", config, batch_size=4, block_size=256, steps=5)
    for record in run_ladder(work):
        assert record["runs"] or record["reason"].startswith("not applicable")
        assert not record.get("wrong", False), record
        assert 0 < record.get("mfu", 0.5) < 1
    peaks = [run_step(settings, work)["peak_memory"] for settings in _first_and_last(work)]
    assert peaks[1] < peaks[0]
    found = time_interleaved(work, {}, InProcessRunner, no_progress)["gpt2"]["modes"]
    assert len(found["eager"]["seconds"]) == 5
    assert TrainVariant("gpt2", None, work).measure_peak_memory("eager") > 2**20


def _first_and_last(work: Workload) -> list[Any]:
    seen: list[Any] = []

    def note(work: Any, settings: Any, workload: Workload) -> Any:
        seen.append(settings)
        raise BenchmarkError("only looked at", out_of_memory=True)

    run_ladder(work, ["float32", "chunked-loss"], run=note)
    return seen
