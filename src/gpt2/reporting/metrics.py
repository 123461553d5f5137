"""Writing and reading `metrics.jsonl`, and the progress line on standard error."""

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gpt2.files import read_error
from gpt2.progress import shows_progress
from gpt2.terminal import single_line
from gpt2.units import format_duration

log = logging.getLogger("gpt2")

REQUIRED = ("step", "loss", "tokens", "tokens_per_second")  # numbers of every record
MAX_INT = 2**62  # JSON has integers that no float holds
LOG_INTERVAL_SECONDS = 5.0  # between lines when standard error is not a terminal


class MetricsLogger:
    """Writes one JSON line per step, and shows progress on standard error."""

    def __init__(self, folder: Path, first_step: int, max_steps: int, *, quiet: bool = False) -> None:
        """Log the steps after `first_step`; later lines, which an interrupted run wrote, are removed from the file.

        quiet: print and write nothing, as on every rank but the main one.
        """
        self.max_steps = max_steps
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet or not shows_progress())
        self._file = None if quiet else _open_truncated(folder / "metrics.jsonl", first_step)
        self._progress = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            disable=self.console.quiet or not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=max_steps, completed=first_step, line="")
        self._first_step, self._start_time, self._last_line_time = first_step, time.monotonic(), 0.0
        self._smoothed_throughput: float | None = None
        self._val_loss: float | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()

    def log_step(self, record: dict[str, Any]) -> None:
        """Write the record of one step to the file and show it on the progress line."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        step, rate, smoothed = record["step"], record["tokens_per_second"], self._smoothed_throughput
        self._smoothed_throughput = rate if smoothed is None else 0.9 * smoothed + 0.1 * rate
        self._val_loss = record.get("val_loss", self._val_loss)
        val = "" if self._val_loss is None else f"  val {self._val_loss:.4f}"
        now = time.monotonic()
        remaining = (now - self._start_time) / (step - self._first_step) * (self.max_steps - step)
        speed = f"{self._smoothed_throughput:,.0f} tok/s  {format_duration(remaining)} left"
        line = f"loss {record['loss']:.4f}{val}  {speed}"
        self._progress.update(self._task, completed=step, line=line)
        due = now - self._last_line_time >= LOG_INTERVAL_SECONDS or "val_loss" in record or step == self.max_steps
        if not self.console.is_terminal and due:
            self._last_line_time = now
            self.log_message(f"step {step:,}/{self.max_steps:,}  {line}")

    def log_message(self, text: str) -> None:
        """Print a line above the progress line."""
        self.console.print(single_line(text), markup=False)


def _open_truncated(path: Path, last_step: int) -> Any:
    """Open a metrics file for appending, without lines after `last_step` and without an incomplete last line."""
    kept = [line for line in read_metrics(path) if line["step"] <= last_step] if path.exists() else []
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
    fresh.replace(path)
    return path.open("a")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, each with its REQUIRED numbers.

    Broken lines, as a kill, a power cut or a bad disk leaves them, are skipped with a warning. Raises DataError for a
    file that cannot be read.
    """
    records, broken = [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise read_error(path, error) from None
    for line in lines:
        record = _parse_record(line)
        if record is None:
            broken += 1
        else:
            records.append(record)
    if broken:
        log.warning("%s: skipped %d line(s) that cannot be read", path, broken)
    return records


def _parse_record(line: str) -> dict[str, Any] | None:
    """The record in a line; None if it is not an object of numbers, or lacks one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or any(name not in record for name in REQUIRED):
        return None
    numbers = all(isinstance(one, float) or (isinstance(one, int) and abs(one) < MAX_INT) for one in record.values())
    return record if numbers and type(record["step"]) is int and record["step"] > 0 else None


def without_timings(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without times and throughput: all else is equal in two runs of the same config."""
    return [{name: value for name, value in record.items() if "second" not in name} for record in records]
