"""The best validation of a run, and how long ago it was."""

import math
from collections.abc import Iterable
from typing import Any


class BestValidation:
    """The best validation loss so far, the first of equals.

    step, loss: when it was, and what; None before there was any.
    since:      how many validations came after it.

    It follows from the records of the steps alone, so a resumed run knows what one that never stopped would.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self.step: int | None = None
        self.loss: float | None = None
        self.evals_since_best = 0
        for record in records:
            self.update(record)

    def update(self, record: dict[str, Any]) -> bool:
        """A step is done; is its validation the best? A step without one changes nothing."""
        loss = record.get("val_loss")
        if loss is None:
            return False
        if not loss < (math.inf if self.loss is None else self.loss):  # nor is a NaN
            self.evals_since_best += 1
            return False
        self.step, self.loss, self.evals_since_best = record["step"], loss, 0
        return True
