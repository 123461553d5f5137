"""Outlier batches: batches whose loss has a high z-score are skipped, and logged.

The decision depends only on the recorded losses of earlier steps, so a resumed run decides as an uninterrupted one.
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

WINDOW = 128  # accepted losses that a new loss is compared with
MIN_LOSSES = 32  # before any batch is skipped
MAX_CONSECUTIVE_OUTLIERS = 8  # more are a new level of the loss: the window is cleared
MIN_DEVIATION = 1e-3  # least standard deviation, relative to the loss


def z_score(recent: Sequence[float], loss: float) -> float | None:
    """Standard deviations of `loss` above the trend of the `recent` losses; None for fewer than `MIN_LOSSES`.

    The trend is a straight line fitted to the losses, so a falling loss does not hide an outlier; the deviations are
    those from the line. A loss that stops falling reaches about 2, so use a threshold of 5 or 6.
    """
    if len(recent) < MIN_LOSSES:
        return None
    y = np.asarray(recent, np.float64)
    x = np.arange(len(y)) - (len(y) - 1) / 2  # centred, so that slope and mean are independent
    slope = (x @ y) / (x @ x)
    deviation = math.sqrt(((y - y.mean() - slope * x) ** 2).sum() / (len(y) - 2))
    expected = y.mean() + slope * (x[-1] + 1)
    return float((loss - expected) / max(deviation, MIN_DEVIATION * abs(y.mean()), 1e-12))


class OutlierFilter:
    """Decides whether the z-score of a batch's loss exceeds `threshold`; 0 for never."""

    def __init__(self, threshold: float, records: Iterable[dict[str, Any]] = ()) -> None:
        """records: of all steps done so far, from `read_metrics`."""
        self.threshold = threshold
        self._recent_losses: deque[float] = deque(maxlen=WINDOW)
        self._consecutive_outliers = 0
        for record in records:
            self.record(record["loss"], skipped=record.get("skipped") is True)

    def outlier_score(self, loss: float) -> float | None:
        """The z-score of a batch that must be skipped; None for any other batch."""
        score = z_score(self._recent_losses, loss) if self.threshold > 0 else None
        return score if score is not None and score > self.threshold else None

    def record(self, loss: float, *, skipped: bool) -> None:
        """Add the loss of a step. Skipped ones are not compared with later losses."""
        self._consecutive_outliers = self._consecutive_outliers + 1 if skipped else 0
        if not skipped:
            self._recent_losses.append(loss)
        elif self._consecutive_outliers == MAX_CONSECUTIVE_OUTLIERS:
            self._recent_losses.clear()


def skipped_batch_message(step: int, loss: float, score: float, row: int, text: str) -> str:
    """The log line for a skipped batch; `text` is an excerpt of the row with the highest loss."""
    return f"step {step:,}: batch left out: loss {loss:.4f} is {score:.1f} standard deviations high (row {row}: {text})"


@torch.no_grad()
def highest_loss_row(model: GPT, batch: Batch, dtype: torch.dtype) -> int:
    """The row with the highest loss, computed row by row in evaluation mode."""
    mode = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"), autocast(model.device, dtype):
            rows = batch.to(model.device).split(1)
            losses = torch.stack([model.loss(row.tokens, row.targets, 1.0, row.documents) for row in rows])
        return int(losses.argmax())
    finally:
        model.train(mode)
