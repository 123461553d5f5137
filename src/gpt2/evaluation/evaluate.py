"""Run tasks on a model: the one function behind `gpt2 eval`, and behind evaluation while training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gpt2.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from gpt2.errors import ConfigError, UserError, did_you_mean
from gpt2.evaluation.fetch import open_task_file
from gpt2.evaluation.measures import Measured, Record
from gpt2.evaluation.prepare import ScoringPass, fingerprint_of, prepare
from gpt2.evaluation.scorer import score
from gpt2.evaluation.tasks import SETS, TASKS, Task
from gpt2.generation.engine import LanguageModel
from gpt2.tokenizer import Tokenizer

Progress = Callable[[int, int, Measured], None]
"""Called after each batch with the groups done on this rank, its groups in all, and the metrics so far."""


@dataclass(frozen=True)
class TaskResult:
    """The result of one task.

    metrics, stderr: by name; a standard error is None if there is only one value.
    rows:            number of rows that were scored.
    protocol:        the reference whose results are comparable.
    data:            fingerprint of what was scored.
    complete:        False if Ctrl-C interrupted the task.
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
    """Ctrl-C during a task; `result` is the result of the rows scored so far, None if there are none."""

    def __init__(self, result: TaskResult | None) -> None:
        super().__init__("interrupted")
        self.result = result


def task_names(names_and_sets: Sequence[str]) -> list[str]:
    """Task names, with sets replaced by their tasks, without duplicates. Raises ConfigError for an unknown name."""
    names: list[str] = []
    for name in names_and_sets:
        if name in SETS:
            names += SETS[name]
        elif name in TASKS:
            names.append(name)
        else:
            known = [*TASKS, *SETS, "published"]
            hint = did_you_mean(name, known)
            raise ConfigError(f"there is no task '{name}'{hint}: see gpt2 eval --list", field="tasks")
    return list(dict.fromkeys(names))


def evaluate_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    task_data: Mapping[str, str] | None = None,
    stride: int | None = None,
    ranks: ProcessGroup = SINGLE_PROCESS,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, TaskResult]:
    """Run tasks by name: name -> result, the same on every rank and for any number of ranks.

    limit:     number of rows of each, the first ones; None for all.
    task_data: by task, a local file to read instead of the download.
    stride:    of the perplexity windows; None for the whole context.
    ranks:     the processes that share the rows; on each host one must have fetched the data before.
    progress:  returns, for the name of a task, the function to call after each batch.

    Raises UserError for an unknown task, missing data, and rows that are invalid or do not fit the model's context.
    """
    results: dict[str, TaskResult] = {}
    for name in task_names(tasks):
        task = TASKS[name]
        passes = prepare_task(task, tokenizer, model, limit, task_data, stride)
        results[name] = run_passes(
            passes, model, task.protocol, {"limit": limit, "stride": stride}, ranks, progress and progress(name)
        )
    return results


def prepare_task(
    task: Task,
    tokenizer: Tokenizer,
    model: LanguageModel,
    limit: int | None = None,
    task_data: Mapping[str, str] | None = None,
    stride: int | None = None,
) -> list[ScoringPass]:
    """The scoring passes of a task for this model; its file is downloaded if it is missing."""
    file = open_task_file(task.data_file, (task_data or {}).get(task.name))
    return prepare(task, file, tokenizer, model.config, limit, stride)


def run_passes(
    passes: Sequence[ScoringPass],
    model: LanguageModel,
    protocol: str,
    settings: dict[str, Any] | None = None,
    ranks: ProcessGroup = SINGLE_PROCESS,
    progress: Progress | None = None,
) -> TaskResult:
    """Score the passes of a task and merge their metrics. Raises `Interrupted` on Ctrl-C."""
    data = fingerprint_of([one_pass.prepared.content for one_pass in passes])
    settings = {name: value for name, value in (settings or {}).items() if value is not None}
    metrics: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    rows = 0
    for one_pass in passes:
        records: dict[int, Record] = {}
        stopped, error = False, None
        try:
            _score_pass(one_pass, model, ranks, records, progress)
        except KeyboardInterrupt:
            if ranks.world_size > 1:
                raise
            stopped = True
        except UserError as raised:  # of one rank, perhaps: the others wait for its records
            error = raised
        gathered = _gather(records, error, ranks)
        ordered = {i: gathered[i] for i in sorted(gathered)}
        if ordered:
            found = one_pass.select(one_pass.prepared.summarize(ordered))
            metrics |= found.metrics
            stderr |= found.stderr
        done = len(ordered) == len(one_pass.prepared.groups)
        rows = one_pass.prepared.rows if done else min(len(ordered), one_pass.prepared.rows)
        if stopped:
            result = TaskResult(metrics, stderr, rows, protocol, data, False, settings) if metrics else None
            raise Interrupted(result)
    return TaskResult(metrics, stderr, rows, protocol, data, True, settings)


def _gather(records: dict[int, Record], error: UserError | None, ranks: ProcessGroup) -> dict[int, Record]:
    """The records of all ranks. Raises UserError on every rank where one of them has an error."""
    if error is not None and ranks.world_size == 1:
        raise error
    gathered = ranks.all_gather_object((records, None if error is None else str(error)))
    message = next((message for _, message in gathered if message is not None), None)
    if message is not None:
        raise UserError(message) from error
    return {i: record for some, _ in gathered for i, record in some.items()}


def _score_pass(
    one_pass: ScoringPass,
    model: LanguageModel,
    ranks: ProcessGroup,
    records: dict[int, Record],
    progress: Progress | None,
) -> None:
    """Score one pass; each batch is added to `records`."""
    prepared = one_pass.prepared
    total = -(-len(prepared.groups) // ranks.world_size)
    for batch in score(model, prepared.groups, ranks):
        for index, scored in batch:
            records[index] = prepared.record(index, scored)
        if progress is not None:
            progress(len(records), total, one_pass.select(prepared.summarize(records)))
