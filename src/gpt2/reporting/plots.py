"""`loss.png`: training and validation loss of a run over its steps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2.errors import UserError, missing_extra
from gpt2.reporting.axes import format_ticks
from gpt2.reporting.metrics import read_metrics
from gpt2.reporting.task_metrics import TaskCurve, main_metrics, task_curves
from gpt2.units import format_significant

BAND_MIN_STEPS = 2000  # the losses of longer runs are drawn as a band
BLUE, RED = "#1f77b4", "#d62728"  # training and validation


def plot_loss(
    folder: Path,
    title: str,
    vocab_size: int,
    unigram_entropy: float | None = None,
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Draw `loss.png` (960 x 540) from the metrics of the run in `folder`, and return its path.

    Shows training and validation loss in nats per token, the uniform baseline ln(vocab_size), the unigram baseline
    `unigram_entropy` if given, and skipped steps as crosses. A run with evaluation tasks has another panel of the same
    size for their accuracies, and one for their perplexities, with a line for each published value.
    Raises UserError when matplotlib is not installed, and when there is no step to draw.

    published: by key of an evaluation metric, the values of OpenAI's models by name.
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
    steps, losses = [r["step"] for r in taken], [r["loss"] for r in taken]
    smooth = _smoothed(losses)
    validation = [(r["step"], r["val_loss"]) for r in records if math.isfinite(r.get("val_loss", math.nan))]
    uniform = math.log(vocab_size)
    top = 1.08 * max(uniform, *smooth, *(value for _, value in validation))  # single training losses may exceed it

    panels = main_metrics(task_curves(records))
    figure = Figure(figsize=(8 * (1 + len(panels)), 4.5), dpi=120, layout="constrained")
    axes, *task_axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    labels = {uniform: f"uniform baseline: ln {vocab_size:,} = {uniform:.2f}"}
    if unigram_entropy is not None:
        labels[unigram_entropy] = f"unigram baseline: {format_significant(unigram_entropy)}"
    _draw_baselines(axes, labels, label_height=0.08 * top)
    _draw_training_loss(axes, steps, losses)
    marker = "o" if len(taken) == 1 else None
    axes.plot(steps, smooth, color=BLUE, linewidth=1.6, marker=marker, label=f"training {format_loss(smooth[-1])}")
    if validation:
        _draw_validation(axes, validation)
    skipped = [r["step"] for r in records if r.get("skipped")]
    if skipped:
        label = f"skipped: {len(skipped):,} step{'s' * (len(skipped) > 1)}"
        axes.plot(skipped, [0.02 * top] * len(skipped), "x", color="0.35", markersize=5, label=label)
    title = title if len(title) <= 76 else f"{title[:36]} ... {title[-35:]}"
    axes.set_title(title, pad=24, parse_math=False)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.985), ncols=3)  # above the curves
    axes.set(ylabel="loss (nats per token)", ylim=(-0.015 * top, top))  # so that a loss of almost 0 is visible
    format_ticks(axes.yaxis)
    for panel_axes, (label, curves) in zip(task_axes, panels.items(), strict=True):
        _draw_tasks(panel_axes, label, curves, published or {})
    for panel_axes in (axes, *task_axes):
        panel_axes.set(xlabel="step", xlim=(0, records[-1]["step"] * 1.01))
        panel_axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        panel_axes.xaxis.set_major_formatter("{x:,.0f}")
        panel_axes.spines[["top", "right"]].set_visible(False)
    path = folder / "loss.png"
    figure.savefig(path)
    return path


def format_loss(loss: float) -> str:
    """Three digits after the point, or two significant ones where that would be less; fewer of large numbers."""
    if abs(loss) >= 100:
        return format_significant(loss)
    return f"{loss:.3f}" if abs(loss) >= 0.01 or loss == 0 else f"{loss:.2g}"


def _draw_baselines(axes: Any, labels: dict[float, str], label_height: float) -> None:
    """A dashed line at each value, with its label above it at the right; labels that would overlap are joined."""
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
    """The loss of every step, pale; in a long run the minimum and maximum of groups of steps, as a band."""
    if len(steps) <= BAND_MIN_STEPS:
        axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
        return
    width = math.ceil(len(steps) / (BAND_MIN_STEPS // 4))
    groups = [losses[i : i + width] for i in range(0, len(losses), width)]
    axes.fill_between(
        steps[::width], [min(g) for g in groups], [max(g) for g in groups], color=BLUE, alpha=0.2, linewidth=0
    )


def _draw_validation(axes: Any, validation: list[tuple[int, float]]) -> None:
    """The validation losses as (step, loss), with a ring around the best when it is not the last."""
    steps, losses = zip(*validation, strict=True)
    best = min(range(len(losses)), key=losses.__getitem__)
    label = f"validation {format_loss(losses[-1])}"
    if losses[best] < losses[-1]:
        label += f" (best {format_loss(losses[best])} at step {steps[best]:,})"
    axes.plot(steps, losses, "o-" if len(steps) <= 60 else "-", color=RED, markersize=4, linewidth=1.2, label=label)
    if losses[best] < losses[-1]:
        axes.plot(steps[best], losses[best], "o", color=RED, markersize=9, markerfacecolor="none")


def _draw_tasks(
    axes: Any, label: str, curves: Sequence[TaskCurve], published: Mapping[str, Mapping[str, float]]
) -> None:
    """One curve for each task, with its published values as dashed lines of the same color.

    The labels of each task are in a column of their own, so that those of near values do not overlap.
    """
    for number, curve in enumerate(curves):
        color, name = f"C{number}", f"{curve.task} {curve.metric}"
        marker = "o-" if len(curve.steps) <= 60 else "-"
        last = f"{name} {curve.values[-1]:.5g}"
        axes.plot(curve.steps, curve.values, marker, color=color, markersize=4, linewidth=1.2, label=last)
        for model, value in published.get(curve.key, {}).items():
            axes.axhline(value, color=color, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6)
            axes.annotate(
                f"{model} {value:g}" if len(curves) == 1 else f"{curve.task}: {model} {value:g}",
                (0.995 - number / max(3, len(curves)), value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color=color,
                fontsize=8,
            )
    if label == "perplexity":
        axes.set_yscale("log")
    format_ticks(axes.yaxis)
    axes.set_ylabel(label)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.985), ncols=3)


def _smoothed(values: list[float]) -> list[float]:
    """Exponential moving average in both directions, which does not lag.

    The window is about a fiftieth of the run, and smaller near the beginning, where the loss falls fast.
    """
    windows = [max(1.0, min(len(values) / 50, i / 8)) for i in range(len(values))]

    def one_way(values: list[float], windows: list[float]) -> list[tuple[float, float]]:
        total, weight, sums = 0.0, 0.0, []
        for value, window in zip(values, windows, strict=True):
            keep = 1 - 1 / window
            total, weight = keep * total + value, keep * weight + 1
            sums.append((total, weight))
        return sums

    before, after = one_way(values, windows), one_way(values[::-1], windows[::-1])[::-1]
    return [
        (total + total_after - value) / (weight + weight_after - 1)  # the value itself is in both
        for value, (total, weight), (total_after, weight_after) in zip(values, before, after, strict=True)
    ]
