"""Batches whose loss stands out: found by z-score, left out, and said so.

Whether a batch is left out follows from the losses recorded before it and nothing else, so a run that was resumed
decides as one that never stopped.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from gpt2.data.loader import Batch
from gpt2.model import GPT
from gpt2.runtime import autocast

WINDOW = 128  # accepted losses that a new one is compared with
MIN_LOSSES = 32  # of them, before anything is left out
MAX_CONSECUTIVE_OUTLIERS = 8  # so many are no spike but a new level: the window begins anew
MIN_DEVIATION = 1e-3  # of the loss: where the losses hardly differ, nothing stands out by less


def z_score(recent: Sequence[float], loss: float) -> float | None:
    """How many standard deviations `loss` lies above where the `recent` ones point; None for fewer than `AT_LEAST`.

    A straight line is fitted to the losses, so that neither a fall hides a spike nor the end of a fall looks like
    one: where a loss that flattens out meets the line is about two deviations above it, so a threshold wants to be
    well over that; 5 or 6 is customary. The deviations are those from the line.
    """
    if len(recent) < MIN_LOSSES:
        return None
    y = np.asarray(recent, np.float64)
    x = np.arange(len(y)) - (len(y) - 1) / 2  # centred, so that the line's two numbers are independent
    slope = (x @ y) / (x @ x)
    deviation = math.sqrt(((y - y.mean() - slope * x) ** 2).sum() / (len(y) - 2))
    expected = y.mean() + slope * (x[-1] + 1)
    return float((loss - expected) / max(deviation, MIN_DEVIATION * abs(y.mean()), 1e-12))


class OutlierFilter:
    """Decides, batch by batch, whether a loss stands out by more than `threshold` deviations; 0 is for never."""

    def __init__(self, threshold: float, records: Iterable[dict[str, Any]] = ()) -> None:
        """`records` are those of the steps done so far, as `read_metrics` gives them."""
        self.threshold = threshold
        self._recent_losses: deque[float] = deque(maxlen=WINDOW)
        self._consecutive_outliers = 0
        for record in records:
            self.record(record["loss"], skipped=record.get("skipped") is True)

    def outlier_score(self, loss: float) -> float | None:
        """The z-score of a batch to be left out; None for one to learn from."""
        score = z_score(self._recent_losses, loss) if self.threshold > 0 else None
        return score if score is not None and score > self.threshold else None

    def record(self, loss: float, *, skipped: bool) -> None:
        """A step is done. What was left out does not count for the next ones, unless it keeps coming."""
        self._consecutive_outliers = self._consecutive_outliers + 1 if skipped else 0
        if not skipped:
            self._recent_losses.append(loss)
        elif self._consecutive_outliers == MAX_CONSECUTIVE_OUTLIERS:
            self._recent_losses.clear()


def skipped_batch_message(step: int, loss: float, score: float, row: int, text: str) -> str:
    """What a person is told about a batch that was left out; `text` is an excerpt of its worst row."""
    return f"step {step:,}: left out, for its loss of {loss:.4f} is {score:.1f} deviations too high (row {row}: {text})"


@torch.no_grad()
def highest_loss_row(model: GPT, batch: Batch, dtype: torch.dtype) -> int:
    """The row of a batch whose loss is the highest, without dropout: a forward pass, row by row."""
    mode = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"), autocast(model.device, dtype):
            rows = batch.to(model.device).split(1)
            losses = torch.stack([model.loss(row.tokens, row.targets, 1.0, row.documents) for row in rows])
        return int(losses.argmax())
    finally:
        model.train(mode)
