"""Metrics with their standard errors, from what was scored row by row."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt2.evaluation.scorer import Scored
from gpt2.evaluation.tree import Query

Record = tuple[float, ...]
"""What is kept of one group of queries: a few numbers."""


@dataclass(frozen=True)
class Measured:
    """Metrics by name, and the standard errors of those that have one."""

    metrics: dict[str, float] = field(default_factory=dict)
    stderr: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A task, ready to be scored.

    groups:    the queries, those with a common context together.
    record:    what to keep of a scored group: a few numbers.
    summarize: metrics from the records by the index of their group; some may be missing when it was interrupted.
    rows:      how many rows of the data the groups are.
    content:   what was scored, as text: its hash is the data's fingerprint.
    """

    groups: list[list[Query]]
    record: Callable[[int, list[Scored]], Record]
    summarize: Callable[[Mapping[int, Record]], Measured]
    rows: int
    content: Any


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error with Bessel's correction, as lm-evaluation-harness; None for one value."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array.mean()), None
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array)))


def means(columns: Mapping[str, Sequence[float]]) -> Measured:
    """The mean of each column."""
    found = {name: mean_and_stderr(values) for name, values in columns.items()}
    return Measured({k: v[0] for k, v in found.items()}, {k: v[1] for k, v in found.items()})


def exp_of(mean: float, stderr: float | None) -> tuple[float, float | None]:
    """exp of a mean, and its standard error by the delta method; inf beyond what a float holds."""
    value = math.exp(mean) if mean < 709 else math.inf
    return value, None if stderr is None else value * stderr


def ratio_and_stderr(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """sum(sums) / sum(counts), and the standard error of this ratio over the parts; None for one part."""
    a, n = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    ratio = float(a.sum() / n.sum())
    if len(a) < 2:
        return ratio, None
    spread = ((a - ratio * n) ** 2).sum() * len(a) / (len(a) - 1)
    return ratio, float(math.sqrt(spread) / n.sum())
