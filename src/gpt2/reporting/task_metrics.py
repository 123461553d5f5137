"""Metrics of evaluation tasks in the records of a run: their keys are `eval/TASK/METRIC`.

A standard error has the key of its metric with `_stderr` at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PREFIX = "eval/"
STDERR_SUFFIX = "_stderr"
PANELS = {  # the metrics that share an axis, the preferred one of a task first
    "accuracy": ("acc_norm", "acc"),
    "perplexity": ("word_perplexity", "token_perplexity", "perplexity"),
    "bits per byte or character": ("bits_per_byte", "bits_per_character"),
}


@dataclass(frozen=True)
class TaskCurve:
    """One metric of one task over the steps of a run.

    stderr: the standard error of each value; None where there is none.
    """

    key: str
    steps: list[int]
    values: list[float]
    stderr: list[float | None]

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.key.removeprefix(PREFIX).rsplit("/", 1)[0]

    @property
    def metric(self) -> str:
        """The name of the metric."""
        return self.key.rsplit("/", 1)[1]


def task_key(task: str, metric: str) -> str:
    """The key of a metric in a record."""
    return f"{PREFIX}{task}/{metric}"


def task_curves(records: Sequence[Mapping[str, Any]]) -> list[TaskCurve]:
    """The curve of every metric, in the order of the records."""
    curves: dict[str, TaskCurve] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith(PREFIX) and not key.endswith(STDERR_SUFFIX):
                curve = curves.setdefault(key, TaskCurve(key, [], [], []))
                curve.steps.append(record["step"])
                curve.values.append(value)
                curve.stderr.append(record.get(key + STDERR_SUFFIX))
    return list(curves.values())


def main_metrics(curves: Sequence[TaskCurve]) -> dict[str, list[TaskCurve]]:
    """The curves to draw, by panel: of each task its first metric in PANELS."""
    by_task: dict[str, dict[str, TaskCurve]] = {}
    for curve in curves:
        by_task.setdefault(curve.task, {})[curve.metric] = curve
    panels: dict[str, list[TaskCurve]] = {}
    for metrics in by_task.values():
        chosen = next(((panel, name) for panel, names in PANELS.items() for name in names if name in metrics), None)
        if chosen is not None:
            panels.setdefault(chosen[0], []).append(metrics[chosen[1]])
    return {panel: panels[panel] for panel in PANELS if panel in panels}


def describe_task_metrics(metrics: Mapping[str, float]) -> str:
    """One line: the first metric in PANELS of every task."""
    panels = main_metrics(task_curves([{"step": 0, **metrics}]))
    return "  ".join(f"{c.task} {c.metric} {c.values[-1]:.4f}" for curves in panels.values() for c in curves)


def _shown(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def task_rows(
    records: Sequence[Mapping[str, Any]], published: Mapping[str, Mapping[str, float]]
) -> list[tuple[str, ...]]:
    """Rows of the report: task, metric, last value with its standard error, its step, published values."""
    rows = []
    for curve in task_curves(records):
        stderr = curve.stderr[-1]
        value = _shown(curve.values[-1]) + ("" if stderr is None else f" ± {_shown(stderr)}")
        others = ", ".join(f"{name} {value:g}" for name, value in published.get(curve.key, {}).items())
        rows.append((curve.task, curve.metric, value, f"{curve.steps[-1]:,}", others or "-"))
    return rows
