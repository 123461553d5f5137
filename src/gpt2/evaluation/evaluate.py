"""Run tasks on a model: the one function behind `gpt2 eval`, and behind evaluation while training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gpt2.errors import UserError, did_you_mean
from gpt2.evaluation.fetch import open_task_file
from gpt2.evaluation.measures import Measured, Record
from gpt2.evaluation.prepare import Part, fingerprint_of, prepare
from gpt2.evaluation.scorer import LanguageModel, score
from gpt2.evaluation.share import Share
from gpt2.evaluation.tasks import SETS, TASKS, Task
from gpt2.tokenizer import Tokenizer

Progress = Callable[[int, int, Measured], None]
"""Called after each batch with the groups done on this rank, its groups in all, and the metrics so far."""


@dataclass(frozen=True)
class TaskResult:
    """What one task gave.

    metrics, stderr: by name; a standard error is None where there is but one part to compute it from.
    rows:            how many were scored. complete: whether these are all that were asked for.
    protocol:        what the numbers may be compared with.
    data:            fingerprint of what was scored.
    """

    metrics: dict[str, float]
    stderr: dict[str, float | None]
    rows: int
    protocol: str
    data: str
    complete: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return asdict(self)


class Interrupted(Exception):
    """Ctrl-C during a task; `result` is what its rows so far give, None when there are none."""

    def __init__(self, result: TaskResult | None) -> None:
        super().__init__("interrupted")
        self.result = result


def task_names(wanted: Sequence[str]) -> list[str]:
    """Task names with the sets written out, each once. Raises UserError for an unknown one."""
    names: list[str] = []
    for name in wanted:
        if name in SETS:
            names += SETS[name]
        elif name in TASKS:
            names.append(name)
        else:
            known = [*TASKS, *SETS, "published"]
            raise UserError(f"there is no task '{name}'{did_you_mean(name, known)}: see gpt2 eval --list")
    return list(dict.fromkeys(names))


def evaluate_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    task_data: Mapping[str, str] | None = None,
    stride: int | None = None,
    share: Share | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, TaskResult]:
    """Run tasks by name: name -> result, the same on every rank and for any number of ranks.

    limit:     the first so many rows of each; None for all.
    task_data: by task, a file to take instead of the cache's or a download.
    stride:    of the perplexity windows; None for the whole context.
    share:     this rank's place among those that evaluate together; rank 0 must find or fetch the data first.
    progress:  by the task's name, what to call after each batch.

    Raises UserError for an unknown task, missing data, and rows that are wrong or do not fit the model.
    """
    results: dict[str, TaskResult] = {}
    for name in task_names(tasks):
        task = TASKS[name]
        parts = prepare_task(task, tokenizer, model, limit, task_data, stride)
        results[name] = run_parts(
            parts, model, task.protocol, {"limit": limit, "stride": stride}, share, progress and progress(name)
        )
    return results


def prepare_task(
    task: Task,
    tokenizer: Tokenizer,
    model: LanguageModel,
    limit: int | None = None,
    task_data: Mapping[str, str] | None = None,
    stride: int | None = None,
) -> list[Part]:
    """The passes of a task for this model, its file found or fetched."""
    file = open_task_file(task.origin, (task_data or {}).get(task.name))
    return prepare(task, file, tokenizer, model.config, limit, stride)


def run_parts(
    parts: Sequence[Part],
    model: LanguageModel,
    protocol: str,
    settings: dict[str, Any] | None = None,
    share: Share | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Score the passes of a task and put their metrics together. Raises `Interrupted` on Ctrl-C."""
    share = share or Share()
    data = fingerprint_of([part.prepared.content for part in parts])
    settings = {name: value for name, value in (settings or {}).items() if value is not None}
    metrics: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    rows = 0
    for part in parts:
        records: dict[int, Record] = {}
        stopped = False
        try:
            _score_part(part, model, share, records, progress)
        except KeyboardInterrupt:
            if share.size > 1:
                raise
            stopped = True
        gathered = {i: record for some in share.all_gather(records) for i, record in some.items()}
        ordered = {i: gathered[i] for i in sorted(gathered)}
        if ordered:
            found = part.chosen(part.prepared.summarize(ordered))
            metrics |= found.metrics
            stderr |= found.stderr
        done = len(ordered) == len(part.prepared.groups)
        rows = part.prepared.rows if done else min(len(ordered), part.prepared.rows)
        if stopped:
            result = TaskResult(metrics, stderr, rows, protocol, data, False, settings) if metrics else None
            raise Interrupted(result)
    return TaskResult(metrics, stderr, rows, protocol, data, True, settings)


def _score_part(
    part: Part, model: LanguageModel, share: Share, records: dict[int, Record], progress: Progress | None
) -> None:
    """Score one pass, filling `records` as batches are done."""
    prepared = part.prepared
    total = -(-len(prepared.groups) // share.size)
    for batch in score(model, prepared.groups, share):
        for index, scored in batch:
            records[index] = prepared.record(index, scored)
        if progress is not None:
            progress(len(records), total, part.chosen(prepared.summarize(records)))
