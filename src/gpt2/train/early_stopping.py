"""Early stopping: the best validation of a run, and the number of validations since then."""

import math
from collections.abc import Iterable
from typing import Any


class BestValidation:
    """The lowest validation loss so far; of equal ones the first.

    step, loss:       its step and value; None before the first validation.
    evals_since_best: number of validations after it.

    It is computed from the metrics alone, so a resumed run has the same state as an uninterrupted one.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self.step: int | None = None
        self.loss: float | None = None
        self.evals_since_best = 0
        for record in records:
            self.update(record)

    def update(self, record: dict[str, Any]) -> bool:
        """Add the record of a step, and return whether its validation loss is the best so far."""
        loss = record.get("val_loss")
        if loss is None:
            return False
        if not loss < (math.inf if self.loss is None else self.loss):  # or NaN
            self.evals_since_best += 1
            return False
        self.step, self.loss, self.evals_since_best = record["step"], loss, 0
        return True
