"""The progress bar of `gpt2 eval`: rows done, the running score, and the time left."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from gpt2.evaluation.measures import Measured
from gpt2.evaluation.report import shown
from gpt2.terminal import single_line

MAX_METRICS, BAR_WIDTH = 2, 10  # so that a line fits into 80 columns


class ProgressBar:
    """A bar on standard error, for terminals alone. Call it as `evaluate.Progress`."""

    def __init__(self, name: str) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(BAR_WIDTH),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[score]}"),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(single_line(name), total=None, score="")

    def __call__(self, done: int, total: int, so_far: Measured) -> None:
        score = "  ".join(f"{k} {shown(k, v)}" for k, v in list(so_far.metrics.items())[:MAX_METRICS])
        self._progress.update(self._task, completed=done, total=total, score=score)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
