"""Dynamic loss scaling for float16 ("Mixed Precision Training", Micikevicius et al. 2018).

Gradients below 6e-8 are zero in float16, so the loss is multiplied by a scale before the backward pass, and the
gradients are divided by it. A step whose gradients overflow is not applied and halves the scale; many steps without one
double it. The constants are those of `torch.amp.GradScaler`. The scale follows from the recorded steps, so a resumed
run has the scale of an uninterrupted one.
"""

from collections.abc import Iterable
from typing import Any

import torch

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # steps without an overflow after which the scale is doubled


class LossScale:
    """The scale of the next step: a power of two, 1 if the dtype needs none."""

    def __init__(self, dtype: torch.dtype, records: Iterable[dict[str, Any]] = ()) -> None:
        """records: of all steps done so far, from `read_metrics`."""
        self.is_dynamic = dtype == torch.float16
        self.value = INITIAL_SCALE if self.is_dynamic else 1.0
        self._steps_since_overflow = 0
        for record in records:
            if "loss_scale" in record:
                self.update(overflow=record.get("overflow") is True)

    def update(self, *, overflow: bool) -> None:
        """Adapt the scale after a step."""
        if not self.is_dynamic:
            return
        self._steps_since_overflow = 0 if overflow else self._steps_since_overflow + 1
        if overflow:
            self.value /= 2
        elif self._steps_since_overflow == GROWTH_INTERVAL:
            self.value, self._steps_since_overflow = self.value * 2, 0
