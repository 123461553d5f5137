"""What a run says while it goes, and leaves behind: metrics.jsonl, a progress line, loss.png."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gpt2.errors import missing_extra

log = logging.getLogger("gpt2")

PLAIN_SECONDS = 5.0  # between lines when standard error is no terminal


class Report:
    """Writes one JSON line a step, and keeps a person informed on standard error."""

    def __init__(self, folder: Path, first_step: int, max_steps: int) -> None:
        """A report for the steps after `first_step`; lines that an interrupted run wrote beyond it are dropped."""
        self.max_steps = max_steps
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._file = _reopen(folder / "metrics.jsonl", first_step)
        self._progress = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=max_steps, completed=first_step, line="")
        self._first_step, self._began, self._said = first_step, time.monotonic(), 0.0
        self._smooth_rate: float | None = None
        self._val_loss: float | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
        self._file.close()

    def step(self, record: dict[str, Any]) -> None:
        """Take the record of one step: written at once, shown on the progress line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        rate, old = record["tokens_per_second"], self._smooth_rate
        self._smooth_rate = rate if old is None else 0.9 * old + 0.1 * rate
        self._val_loss = record.get("val_loss", self._val_loss)
        val = "" if self._val_loss is None else f"  val {self._val_loss:.4f}"
        line = f"loss {record['loss']:.4f}{val}  {self._smooth_rate:,.0f} tok/s"
        self._progress.update(self._task, completed=record["step"], line=line)
        now, last = time.monotonic(), record["step"] == self.max_steps
        due = now - self._said >= PLAIN_SECONDS or "val_loss" in record or last
        if not self.console.is_terminal and due:
            self._said = now
            left = (now - self._began) / (record["step"] - self._first_step) * (self.max_steps - record["step"])
            self.say(f"step {record['step']:,}/{self.max_steps:,}  {line}  {left:,.0f} s left")

    def say(self, text: str) -> None:
        """Print a line above the progress line."""
        self.console.print(text, markup=False)


def _reopen(path: Path, last_step: int) -> Any:
    """Open a metrics file for appending, without the lines after `last_step` and without a half-written one."""
    kept = [line for line in read_metrics(path) if line["step"] <= last_step] if path.exists() else []
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
    fresh.replace(path)
    return path.open("a")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file. Lines that a kill or a power cut left broken are passed over, with a warning."""
    records, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            records.append({"step": int(record["step"]), "loss": float(record["loss"]), **record})
        except (ValueError, TypeError, KeyError):
            broken += 1
    if broken:
        log.warning("%s: passed over %d line(s) that cannot be read", path, broken)
    return records


def plot_loss(folder: Path, title: str, vocab_size: int) -> Path:
    """Draw `loss.png` from a run's metrics: training and validation loss, and where a model that knows nothing is.

    Raises UserError when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "loss.png") from error
    records = read_metrics(folder / "metrics.jsonl")
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    measured = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    ignorant = math.log(vocab_size)

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(ignorant, color="0.55", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"knows nothing: ln {vocab_size:,} = {ignorant:.2f}",
        (0.995, ignorant),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color="0.4",
        fontsize=9,
    )
    axes.plot(steps, losses, color="#1f77b4", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smoothed(losses), color="#1f77b4", linewidth=1.6, label=f"training {losses[-1]:.3f}")
    if measured:
        val_steps, val_losses = zip(*measured, strict=True)
        axes.plot(val_steps, val_losses, "o-", color="#d62728", markersize=4, linewidth=1.2)
        axes.lines[-1].set_label(f"validation {val_losses[-1]:.3f}")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)", xlim=(0, steps[-1] * 1.01), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    path = folder / "loss.png"
    figure.savefig(path)
    return path


def _smoothed(values: list[float]) -> list[float]:
    """An exponential average over about a fiftieth of the run, from both sides, so that it does not lag behind."""
    keep = 1 - 1 / max(1.0, len(values) / 50)

    def one_way(values: list[float]) -> list[float]:
        total, weight, smooth = 0.0, 0.0, []
        for value in values:
            total, weight = keep * total + value, keep * weight + 1
            smooth.append(total / weight)
        return smooth

    return [(a + b) / 2 for a, b in zip(one_way(values), one_way(values[::-1])[::-1], strict=True)]
