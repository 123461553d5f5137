"""The progress bar of a long preparation, on a terminal; elsewhere a line in the log every minute."""

import logging
import time
from types import TracebackType
from typing import Self

from gpt2.units import format_duration

_LOG_SECONDS = 60.0

_log = logging.getLogger("gpt2.data")


class ProgressBar:
    """Documents, tokens, tokens per second and time left. A context manager."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=4)
        self._task = self._progress.add_task(name, total=1.0, status="")
        self._name, self._is_terminal = name, console.is_terminal
        self._start: tuple[float, float, int] | None = None  # time, fraction and tokens at the first update
        self._logged = time.monotonic()

    def update(self, fraction: float, documents: int, tokens: int) -> None:
        """fraction: how much of the work is done; tokens: in all, with those of earlier runs."""
        now = time.monotonic()
        if self._start is None:
            self._start = now, fraction, tokens
        begun, first_fraction, first_tokens = self._start
        elapsed = max(now - begun, 1e-9)
        left = elapsed * (1 - fraction) / (fraction - first_fraction) if fraction > first_fraction else None
        rate = (tokens - first_tokens) / elapsed
        ends = f"{format_duration(left)} left" if left is not None else "estimating"
        status = f"{documents:,} documents, {tokens:,} tokens, {rate / 1e6:.1f}M tokens/s, {ends}"
        self._progress.update(self._task, completed=fraction, status=status)
        if not self._is_terminal and now - self._logged > _LOG_SECONDS:
            self._logged = now
            _log.info("%s: %.1f%%, %s", self._name, 100 * fraction, status)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
