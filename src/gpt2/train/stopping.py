"""What stops a run before its last step: signals and a time limit. Both take effect at the end of a step."""

import _thread
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from gpt2.progress import print_status

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
def catch_signals(what_is_lost: Callable[[], str], *, second_stops: bool = True) -> Iterator[list[int]]:
    """Inside the block, SIGINT, SIGTERM and SIGHUP are appended to the list that it is given, and acknowledged at once.

    Python's handlers run between two operations, and one backward pass of torch can take many seconds. So a thread
    receives the signals, through the file descriptor to which they are written when they arrive.

    what_is_lost: what is saved and what is lost, for the line after a second signal.
    second_stops: give a second signal its usual effect. Not under torchrun, which passes on a signal that a terminal
        has already sent to all processes, and kills those that do not exit in time.

    Outside the main thread nothing is caught. A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    receiver = _SignalReceiver(what_is_lost, second_stops)
    if threading.current_thread() is not threading.main_thread():
        yield receiver.received
        return
    output, source = socket.socketpair()
    source.setblocking(False)
    thread = threading.Thread(target=receiver.run, args=(output,), daemon=True, name="signals")
    thread.start()
    before = signal.set_wakeup_fd(source.fileno(), warn_on_full_buffer=False)
    for number in receiver.previous:
        signal.signal(number, receiver.handle)
    try:
        yield receiver.received
    finally:
        for number, old in receiver.previous.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(before)
        source.close()  # ends the thread
        thread.join()
        output.close()


class _SignalReceiver:
    """Receives signals in a thread; after a second one, the main thread handles it as before the block.

    previous: the handlers before the block, of the signals that are caught.
    """

    def __init__(self, what_is_lost: Callable[[], str], second_stops: bool) -> None:
        self.received: list[int] = []
        self._what_is_lost, self._second_stops = what_is_lost, second_stops
        self._stop_now = threading.Event()
        numbers = [int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        self.previous = {number: signal.getsignal(number) for number in numbers}
        if hasattr(signal, "SIGHUP") and self.previous[signal.SIGHUP] is signal.SIG_IGN:
            del self.previous[signal.SIGHUP]

    def run(self, numbers: socket.socket) -> None:
        """Receive signals until the other end of the socket is closed."""
        while data := numbers.recv(64):
            for number in data:
                if number in self.previous:
                    self.received.append(number)
                    self._acknowledge(number)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread."""
        if self._stop_now.is_set():
            ignored = self.previous[number] is signal.SIG_IGN
            signal.signal(number, signal.SIG_DFL if ignored else self.previous[number])
            signal.raise_signal(number)

    def _acknowledge(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self._second_stops:  # under torchrun, where every rank receives it
            return
        if len(self.received) == 1:
            print_status(f"{name}: saving and stopping after this step. Again: stop at once, without saving")
        elif len(self.received) == 2:
            print_status(f"{name} again: stopping at once; {self._what_is_lost()}")
            self._stop_now.set()
            _interrupt_main(number)  # whose handler ran too early, or has not run yet


def _interrupt_main(number: int) -> None:
    """Let the main thread run its handler of a signal, also if it waits for something."""
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, number)
    else:
        _thread.interrupt_main(signal.Signals(number))
