"""Outlier batches are skipped; the end of a decline or a new level of the loss is not."""

import math
import random
from typing import Any

import pytest
import torch

from gpt2.data.loader import Batch
from gpt2.model import GPT, GPTConfig
from gpt2.train.outlier_batches import (
    MAX_CONSECUTIVE_OUTLIERS,
    MIN_LOSSES,
    OutlierFilter,
    highest_loss_row,
    skipped_batch_message,
    z_score,
)


def falling(count: int, noise: float = 0.05) -> list[float]:
    """A typical loss curve: steep at first, with noise."""
    generator = random.Random(5)
    return [3 + 4 * math.exp(-i / 100) + generator.gauss(0, noise) for i in range(count)]


def left_out(losses: list[float], threshold: float) -> list[int]:
    guard, steps = OutlierFilter(threshold), []
    for step, loss in enumerate(losses):
        score = guard.outlier_score(loss)
        steps += [step] if score is not None else []
        guard.record(loss, skipped=score is not None)
    return steps


def test_the_z_score_is_that_of_a_line_through_the_losses() -> None:
    zigzag = [2.0 - 0.01 * i + (0.1 if i % 2 else -0.1) for i in range(128)]
    assert z_score(zigzag, 2.0 - 1.28) == pytest.approx(0, abs=0.05)
    assert z_score(zigzag, 2.0 - 1.28 + 0.5) == pytest.approx(5, abs=0.1)
    assert z_score(zigzag[: MIN_LOSSES - 1], 99.0) is None
    assert z_score([2.0] * 128, 2.001) == pytest.approx(0.5)  # where nothing varies, a thousandth of the loss counts
    assert z_score([0.0] * 128, 0.0) == 0


def test_spikes_are_left_out_and_nothing_else() -> None:
    losses = falling(1500)
    assert left_out(losses, 5) == []
    for step in (40, 300, 301, 1499):
        losses[step] += 1.5
    assert left_out(losses, 5) == [40, 300, 301, 1499]
    assert left_out(losses, 0) == []


@pytest.mark.parametrize("shape", [lambda x: math.exp(-20 * x), lambda x: float(x < 0.5), lambda x: 1 / (1 + 50 * x)])
def test_a_fall_that_ends_is_no_spike(shape: Any) -> None:
    losses = [2 + 5 * shape(i / 400) for i in range(400)]
    assert left_out(losses, 5) == []


def test_a_new_level_is_not_left_out_for_ever() -> None:
    losses = falling(300) + [loss + 3 for loss in falling(600)[300:]]
    assert left_out(losses, 5) == list(range(300, 300 + MAX_CONSECUTIVE_OUTLIERS))


def test_a_resumed_run_leaves_out_what_the_whole_one_did() -> None:
    losses = falling(400)
    for step in (100, 250, 251, 390):
        losses[step] += 1.5
    whole, records = OutlierFilter(5), []
    for step, loss in enumerate(losses):
        resumed = OutlierFilter(5, records)
        score = whole.outlier_score(loss)
        assert resumed.outlier_score(loss) == score, step
        whole.record(loss, skipped=score is not None)
        records.append({"step": step, "loss": loss, **({"skipped": True} if score is not None else {})})
    assert [record["step"] for record in records if "skipped" in record] == [100, 250, 251, 390]


def test_the_worst_row_is_the_one_that_surprises() -> None:
    """Equal to the losses row by row, without dropout; the random state is unchanged."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.5)).train()
    tokens, targets = torch.randint(257, (2, 8, 16)).unbind(0)
    model.transformer.wpe.weight.data.normal_()
    state = torch.get_rng_state()
    row = highest_loss_row(model, Batch(tokens, targets), torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    model.eval()
    sums = [model.loss(tokens[i : i + 1], targets[i : i + 1], 1.0).item() for i in range(8)]
    assert row == sums.index(max(sums))
    assert skipped_batch_message(1200, 9.5, 6.04, row, "'a b'") == (
        f"step 1,200: batch left out: loss 9.5000 is 6.0 standard deviations high (row {row}: 'a b')"
    )
