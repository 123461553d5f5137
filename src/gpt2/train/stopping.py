"""What stops a run before its last step: signals and a time limit. Both take effect at the end of a step."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

TIME_LIMIT_EXIT_CODE = 75  # of a run that --max-minutes stopped: EX_TEMPFAIL of sysexits.h, "try again"


class Interrupted(Exception):
    """The run was stopped and has saved its state; it can be resumed from `folder`, after `step` updates.

    exit_code: 128 + n after signal n, 75 when --max-minutes was reached.
    """

    def __init__(self, folder: Path, step: int, reason: str, exit_code: int) -> None:
        super().__init__(
            f"stopped by {reason} after step {step:,}, everything saved; resume with: gpt2 train --resume {folder}"
        )
        self.folder, self.step, self.exit_code = folder, step, exit_code


class StopCondition(NamedTuple):
    """The signals received so far, and a deadline on the monotonic clock; None for no deadline."""

    signals: list[int]
    deadline: float | None

    def should_stop(self) -> bool:
        return bool(self.signals) or (self.deadline is not None and time.monotonic() >= self.deadline)

    def reason(self) -> str:
        return signal.Signals(self.signals[0]).name if self.signals else "--max-minutes"

    def exit_code(self) -> int:
        return 128 + self.signals[0] if self.signals else TIME_LIMIT_EXIT_CODE


@contextmanager
def catch_signals(*, restore_after_first: bool = True) -> Iterator[list[int]]:
    """Inside the block, SIGINT, SIGTERM and SIGHUP are only appended to the list that it is given.

    restore_after_first: give a second signal its usual effect. Not under torchrun, which passes on a signal that a
        terminal has already sent to all processes, and kills those that do not exit in time.
    """
    received: list[int] = []
    numbers = [int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in numbers}

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if restore_after_first:
            signal.signal(number, previous[number])

    try:
        for number in previous:
            signal.signal(number, handler)
    except ValueError:  # not in the main thread: the caller stops the run
        yield received
        return
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
