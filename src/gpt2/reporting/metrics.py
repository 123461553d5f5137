"""What a run says while it goes, and leaves behind: metrics.jsonl, a progress line, loss.png."""

import json
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gpt2.errors import UserError, missing_extra

log = logging.getLogger("gpt2")

LOG_INTERVAL_SECONDS = 5.0  # between lines when standard error is no terminal
BAND_MIN_STEPS = 2000  # runs of more steps than this are drawn as a band
BLUE, RED = "#1f77b4", "#d62728"  # training and validation


class MetricsLogger:
    """Writes one JSON line a step, and keeps a person informed on standard error."""

    def __init__(self, folder: Path, first_step: int, max_steps: int, *, quiet: bool = False) -> None:
        """A report for the steps after `first_step`; lines that an interrupted run wrote beyond it are dropped.

        silent: say and write nothing, as on every rank but the first.
        """
        self.max_steps = max_steps
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self._file = None if quiet else _open_truncated(folder / "metrics.jsonl", first_step)
        self._progress = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
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
        """Take the record of one step: written at once, shown on the progress line."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        rate, old = record["tokens_per_second"], self._smoothed_throughput
        self._smoothed_throughput = rate if old is None else 0.9 * old + 0.1 * rate
        self._val_loss = record.get("val_loss", self._val_loss)
        val = "" if self._val_loss is None else f"  val {self._val_loss:.4f}"
        line = f"loss {record['loss']:.4f}{val}  {self._smoothed_throughput:,.0f} tok/s"
        self._progress.update(self._task, completed=record["step"], line=line)
        now, last = time.monotonic(), record["step"] == self.max_steps
        due = now - self._last_line_time >= LOG_INTERVAL_SECONDS or "val_loss" in record or last
        if not self.console.is_terminal and due:
            self._last_line_time = now
            left = (now - self._start_time) / (record["step"] - self._first_step) * (self.max_steps - record["step"])
            self.log_message(f"step {record['step']:,}/{self.max_steps:,}  {line}  {left:,.0f} s left")

    def log_message(self, text: str) -> None:
        """Print a line above the progress line."""
        self.console.print(text, markup=False)


def _open_truncated(path: Path, last_step: int) -> Any:
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


def without_timings(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without what the clock says, which is all that two runs of the same config may differ in."""
    return [{name: value for name, value in record.items() if "second" not in name} for record in records]


def plot_loss(folder: Path, title: str, vocab_size: int, unigram_entropy: float | None = None) -> Path:
    """Draw `loss.png` (960 x 540) from a run's metrics: training and validation loss in nats per token, and as
    lines of reference the loss of a model that knows nothing, ln(vocab_size), and of one that knows only how
    frequent every token is, `unigram_entropy`, where that is given.

    Steps that were left out as spikes are crosses, and no part of the curve. A long run's single steps are drawn
    as the band they lie in.

    Raises UserError when matplotlib is not installed, and when there is no step to draw.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "loss.png") from error
    records = [r for r in read_metrics(folder / "metrics.jsonl") if math.isfinite(r["loss"])]
    taken = [r for r in records if not r.get("skipped")]
    if not taken:
        raise UserError(f"{folder / 'metrics.jsonl'} has no step to draw")
    smooth = _smoothed([r["loss"] for r in taken])
    measured = [(r["step"], r["val_loss"]) for r in records if math.isfinite(r.get("val_loss", math.nan))]
    ignorant = math.log(vocab_size)
    shown = [ignorant, *smooth, *(value for _, value in measured)]  # a spike may stick out, these may not
    top = 1.08 * max(shown)

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    texts = {ignorant: f"knows nothing: ln {vocab_size:,} = {ignorant:.2f}"}
    if unigram_entropy is not None:
        texts[unigram_entropy] = f"knows only how frequent each token is: {unigram_entropy:.2f}"
    _draw_baselines(axes, texts, label_height=0.08 * top)
    _draw_training_loss(axes, [r["step"] for r in taken], [r["loss"] for r in taken])
    axes.plot([r["step"] for r in taken], smooth, color=BLUE, linewidth=1.6, label=f"training {smooth[-1]:.3f}")
    if len(taken) == 1:
        axes.lines[-1].set_marker("o")
    if measured:
        _draw_validation(axes, measured)
    skipped = [r["step"] for r in records if r.get("skipped")]
    if skipped:
        label = f"left out: {len(skipped):,} step{'s' * (len(skipped) > 1)}"
        axes.plot(skipped, [0.02 * top] * len(skipped), "x", color="0.35", markersize=5, label=label)
    title = title if len(title) <= 76 else f"{title[:36]} ... {title[-35:]}"
    axes.set_title(title, pad=24, parse_math=False)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.985), ncols=3)  # where no curve can be
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, top), xlim=(0, records[-1]["step"] * 1.01))
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    path = folder / "loss.png"
    figure.savefig(path)
    return path


def _draw_baselines(axes: Any, labels: dict[float, str], label_height: float) -> None:
    """A dashed line at each value with its text above it, at the right; texts that would overlap share one place."""
    for value in labels:
        axes.axhline(value, color="0.55", linewidth=1, linestyle=(0, (4, 3)))
    if max(labels) - min(labels) < label_height:
        labels = {max(labels): "; ".join(labels.values())}
    for value, text in labels.items():
        axes.annotate(
            text,
            (0.995, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color="0.4",
            fontsize=9,
        )


def _draw_training_loss(axes: Any, steps: list[int], losses: list[float]) -> None:
    """The loss of every step, pale; from `BAND_STEPS` on as the lowest and highest of as many neighbours as need be."""
    if len(steps) <= BAND_MIN_STEPS:
        axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
        return
    width = math.ceil(len(steps) / (BAND_MIN_STEPS // 4))
    groups = [losses[i : i + width] for i in range(0, len(losses), width)]
    axes.fill_between(
        steps[::width], [min(g) for g in groups], [max(g) for g in groups], color=BLUE, alpha=0.2, linewidth=0
    )


def _draw_validation(axes: Any, measured: list[tuple[int, float]]) -> None:
    """The validation losses as (step, loss), with a ring around the best when it is not the last."""
    steps, losses = zip(*measured, strict=True)
    best = min(range(len(losses)), key=losses.__getitem__)
    label = f"validation {losses[-1]:.3f}"
    if losses[best] < losses[-1]:
        label += f" (best {losses[best]:.3f} at step {steps[best]:,})"
    axes.plot(steps, losses, "o-" if len(steps) <= 60 else "-", color=RED, markersize=4, linewidth=1.2, label=label)
    if losses[best] < losses[-1]:
        axes.plot(steps[best], losses[best], "o", color=RED, markersize=9, markerfacecolor="none")


def _smoothed(values: list[float]) -> list[float]:
    """An exponential average from both sides, so that it does not lag behind.

    It reaches over about a fiftieth of the run, and over less near the beginning, where the loss falls fast.
    """
    reach = [max(1.0, min(len(values) / 50, i / 8)) for i in range(len(values))]

    def one_way(values: list[float], reach: list[float]) -> list[tuple[float, float]]:
        total, weight, sums = 0.0, 0.0, []
        for value, near in zip(values, reach, strict=True):
            keep = 1 - 1 / near
            total, weight = keep * total + value, keep * weight + 1
            sums.append((total, weight))
        return sums

    before, after = one_way(values, reach), one_way(values[::-1], reach[::-1])[::-1]
    return [
        (total + total_after - value) / (weight + weight_after - 1)  # the value itself is in both
        for value, (total, weight), (total_after, weight_after) in zip(values, before, after, strict=True)
    ]
