"""`sweep.png`: the validation loss of each trial of a sweep over the values of its settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt2.errors import missing_extra
from gpt2.reporting.axes import format_ticks
from gpt2.reporting.plots import format_loss


def plot_sweep(
    path: Path, title: str, points: Sequence[tuple[Mapping[str, float], float | None]], log_scale: Mapping[str, bool]
) -> None:
    """Draw one panel for each setting; a diverged trial is a cross at the top, the best trial has a ring.

    points:    of each trial the values of the settings by name, and its loss in nats per token, None if it diverged.
    log_scale: for each setting whether its axis is logarithmic.
    Raises UserError when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", path.name) from error
    finite = [(values, loss) for values, loss in points if loss is not None]
    best_values, best_loss = min(finite, key=lambda point: point[1])
    worst = max(loss for _, loss in finite)
    figure = Figure(figsize=(1 + 4.5 * len(log_scale), 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(log_scale), sharey=True, squeeze=False)[0]
    for axes, (name, is_log) in zip(panels, log_scale.items(), strict=True):
        axes.plot([values[name] for values, _ in finite], [loss for _, loss in finite], "o", color="#1f77b4")
        diverged = [values[name] for values, loss in points if loss is None]
        axes.plot(diverged, [worst] * len(diverged), "x", color="#d62728", label="diverged")
        label = f"best: {best_values[name]:g}, loss {format_loss(best_loss)}"
        axes.plot(best_values[name], best_loss, "o", markersize=12, markerfacecolor="none", color="0.2", label=label)
        axes.set(xlabel=name.replace("_", "-"), xscale="log" if is_log else "linear")
        format_ticks(axes.xaxis)
        handles, labels = axes.get_legend_handles_labels()
        first = 0 if diverged else 1
        axes.legend(handles[first:], labels[first:], frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    format_ticks(panels[0].yaxis)
    panels[0].set_ylabel("validation loss (nats per token)")
    figure.suptitle(title, parse_math=False)
    figure.savefig(path)
