"""Progress on standard error, and long calls of native libraries that Ctrl-C can end."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from gpt2.terminal import single_line
from gpt2.units import format_duration

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

SHOWN_AFTER_SECONDS = 2.0  # what takes less has no bar
_LOG_SECONDS = 60.0  # between lines when standard error is not a terminal
_POLL_SECONDS = 0.25  # between drawings of a bar
_STOP_SECONDS = 0.3  # for a thread to notice that it was cancelled

_log = logging.getLogger("gpt2.progress")


def shows_progress() -> bool:
    """Whether progress is shown: not with --quiet, and not on ranks other than the first."""
    return logging.getLogger("gpt2").isEnabledFor(logging.WARNING)


def print_status(message: object) -> None:
    """Print a line on standard error that is neither a result nor an error; nothing with --quiet."""
    if shows_progress() and sys.stderr is not None:
        print(f"gpt2: {single_line(message)}", file=sys.stderr, flush=True)


class ProgressBar:
    """A bar with the time left on a terminal, once the work has taken two seconds; elsewhere a log line every minute.

    with ProgressBar("tokenizing notes.txt") as bar:
        bar.update(0.25, "1,000 documents")
    """

    def __init__(self, description: str) -> None:
        self._description = single_line(description)
        self._logged = time.monotonic()
        self._next_drawing = self._logged + SHOWN_AFTER_SECONDS
        self._start: tuple[float, float] | None = None  # time and fraction at the first update
        self._fraction: float | None = None
        self._status = ""
        self._progress: Progress | None = None

    def update(self, fraction: float | None = None, status: str | None = None) -> None:
        """fraction: how much of the work is done, 0 to 1; None if that is not known. Arguments left out stay."""
        now = time.monotonic()
        if fraction is not None:
            self._start = self._start or (now, fraction)
            self._fraction = fraction
        self._status = self._status if status is None else status
        if now >= self._next_drawing and shows_progress():
            self._next_drawing = now + _POLL_SECONDS
            self._show(now)

    def seconds_left(self, now: float) -> float | None:
        """Seconds until the work is done at the rate since the first update; None before there is a rate."""
        if self._start is None or self._fraction is None:
            return None
        begun, first = self._start
        done = self._fraction - first
        return (now - begun) * (1 - self._fraction) / done if done > 0 else None

    def _show(self, now: float) -> None:
        self._progress = self._progress or _make_bar(self._description)
        left = self.seconds_left(now)
        line = "  ".join(filter(None, ["" if left is None else f"{format_duration(left)} left", self._status]))
        if not self._progress.disable:
            total, completed = (None, 0.0) if self._fraction is None else (1.0, self._fraction)
            self._progress.update(self._progress.task_ids[0], total=total, completed=completed, line=line)
            self._progress.start()
            self._progress.refresh()
        elif now - self._logged > _LOG_SECONDS:
            self._logged = now
            done = "" if self._fraction is None else f"{self._fraction:.1%}, "
            _log.info("%s: %s%s", self._description, done, line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


def _make_bar(description: str) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(12),
        TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True)),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, auto_refresh=False)
    bar.add_task(description, total=None, line="")
    return bar


class Cancelled(Exception):
    """Raised in the thread of `run_cancellable` by `check` after Ctrl-C."""


def run_cancellable(function: Callable[[Callable[[], None]], T], while_waiting: Callable[[], None]) -> T:
    """The result of ``function(check)``, computed in a thread, so that Ctrl-C need not wait for a native library.

    check:         called by the function from time to time; raises Cancelled after Ctrl-C.
    while_waiting: called four times a second in the thread of the caller.

    A call that does not check is left to itself after Ctrl-C; the process can exit meanwhile.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Cancelled

    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function(check))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=work, daemon=True, name="cancellable")
    thread.start()
    try:
        while not wait_for([future], timeout=_POLL_SECONDS).done:
            while_waiting()
    except BaseException:
        stop.set()
        thread.join(_STOP_SECONDS)
        raise
    return future.result()
