"""Results as JSON, and as a table with the values published for OpenAI's models."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt2.evaluation.evaluate import TaskResult
from gpt2.evaluation.published import Check, published_scores
from gpt2.evaluation.tasks import SETS, TASKS
from gpt2.terminal import single_line
from gpt2.units import align_columns, format_bytes

FRACTIONS = ("acc", "acc_norm", "acc_last_token")


@dataclass
class ModelReport:
    """All results of one model.

    size: the name of OpenAI's model of the same shape; None if there is none.
    """

    model: str
    size: str | None
    results: dict[str, TaskResult] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The JSON of one model; infinite values become null."""
        found: dict[str, Any] = {
            "model": self.model,
            "results": {name: _finite(result.to_json()) for name, result in self.results.items()},
        }
        if self.checks:
            found["published"] = [vars(check) for check in self.checks]
        return found


def to_json(reports: Sequence[ModelReport]) -> dict[str, Any]:
    """One model's JSON, or {"models": [...]} for several."""
    return reports[0].to_json() if len(reports) == 1 else {"models": [report.to_json() for report in reports]}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(reports: Sequence[ModelReport]) -> str:
    """All results: a line for each task and metric, a column for each model, then the published values."""
    sizes = list(dict.fromkeys(report.size for report in reports if report.size))
    head = [
        "task",
        "metric",
        *(single_line(report.model) for report in reports),
        *(["rows"] if len(reports) == 1 else []),
    ]
    if sizes:
        head.append("published")
    lines = [head]
    for task, metric in _metrics(reports):
        cells = [_cell(report.results.get(task), metric) for report in reports]
        line = [single_line(task), metric, *cells]
        if len(reports) == 1:
            line.append(_rows(reports[0].results[task]))
        if sizes:
            line.append(_published(reports, sizes, task, metric))
        lines.append(line)
    return "\n".join(align_columns(lines))


def _metrics(reports: Sequence[ModelReport]) -> Iterator[tuple[str, str]]:
    """Tasks and their metrics, in the order in which they were measured."""
    seen: dict[tuple[str, str], None] = {}
    for report in reports:
        for task, result in report.results.items():
            seen |= {(task, metric): None for metric in result.metrics}
    order = list(dict.fromkeys(task for task, _ in seen))
    yield from sorted(seen, key=lambda pair: order.index(pair[0]))


def _cell(result: TaskResult | None, metric: str) -> str:
    if result is None or metric not in result.metrics:
        return "-"
    value, stderr = result.metrics[metric], result.stderr.get(metric)
    return shown(metric, value) + ("" if stderr is None else f" ± {shown(metric, stderr)}")


def shown(metric: str, value: float) -> str:
    """The value of a metric, rounded for display."""
    if metric in FRACTIONS:
        return f"{value:.4f}"
    return f"{value:.4g}" if abs(value) >= 1e5 else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _rows(result: TaskResult) -> str:
    return f"{result.rows:,}" if result.complete else f"{result.rows:,} (interrupted)"


def _published(reports: Sequence[ModelReport], sizes: list[str], task: str, metric: str) -> str:
    stride = next((r.results[task].settings.get("stride") for r in reports if task in r.results), None)
    found = []
    for size in sizes:
        prefix = f"{size}: " if len(sizes) > 1 else ""
        found += [f"{prefix}{v:g} ({protocol})" for v, protocol in published_scores(size, task, metric, stride)]
    return "; ".join(found) or "-"


def checks_table(report: ModelReport) -> str:
    """Each published value: expected, got, difference, pass."""
    lines = [["value", "expected", "got", "difference", "", "source"]]
    for check in report.checks:
        difference = "-" if check.difference is None else f"{check.difference:.2g}"
        verdict = "pass" if check.passed else "FAIL"
        lines.append([check.name, _short(check.expected), _short(check.got), difference, verdict, check.source])
    passed = sum(check.passed for check in report.checks)
    total = f"{single_line(report.model)}: {passed} of {len(report.checks)} published values agree"
    return "\n".join([*align_columns(lines), total])


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        text = " ".join(f"{one:.6g}" if isinstance(one, float) else str(one) for one in value)
    else:
        text = f"{value:.7g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 36 else f"{text[:33]}..."


def listing() -> str:
    """All tasks with rows, size of the download, and protocol; then the sets."""
    lines = [["task", "rows", "download", "protocol"]]
    for task in TASKS.values():
        size = "?" if task.size is None else format_bytes(task.size)
        lines.append([task.name, f"{task.rows:,}", size, task.protocol])
    lines.append(["published", "-", "-", "values that other projects published for OpenAI's four models"])
    sets = [f"{name}: {', '.join(tasks)}" for name, tasks in SETS.items()]
    return "\n".join([*align_columns(lines), "", "sets of tasks:", *sets])
