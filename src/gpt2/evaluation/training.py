"""Evaluation on tasks during training: the evaluator that the command layer passes to `gpt2.train.trainer.train`."""

from collections.abc import Mapping

from gpt2.config import TrainConfig
from gpt2.distributed.process_group import ProcessGroup
from gpt2.errors import ConfigError
from gpt2.evaluation.evaluate import Interrupted, prepare_task, run_passes, task_names
from gpt2.evaluation.fetch import open_task_file
from gpt2.evaluation.prepare import ScoringPass
from gpt2.evaluation.published import reference_scores
from gpt2.evaluation.tasks import TASKS
from gpt2.model import GPT
from gpt2.reporting.task_metrics import STDERR_SUFFIX, task_key
from gpt2.tokenizer import Tokenizer


class TrainingEvaluator:
    """Implements `gpt2.train.task_evaluation.TaskEvaluator` for the tasks of a config."""

    def __init__(self, config: TrainConfig) -> None:
        """Find or download the data of every task of `config.eval_tasks`.

        Raises ConfigError for an unknown task or an invalid setting, UserError for missing data.
        """
        self.tasks = task_names(_names(config.eval_tasks))
        self.limit = config.eval_tasks_limit or None
        self._files = _parse_task_data(_names(config.eval_tasks_data), self.tasks)
        self._passes: dict[str, list[ScoringPass]] = {}
        for name in self.tasks:
            open_task_file(TASKS[name].data_file, self._files.get(name))

    @property
    def published(self) -> Mapping[str, Mapping[str, float]]:
        """By key of the metrics: values of OpenAI's models, measured by the protocol of the task."""
        return {task_key(task, metric): values for (task, metric), values in reference_scores(self.tasks).items()}

    def prepare(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Tokenize the rows. Raises UserError for a row that is invalid or does not fit the model's context."""
        self._passes = {
            name: prepare_task(TASKS[name], tokenizer, model, self.limit, self._files) for name in self.tasks
        }

    def evaluate(self, model: GPT, ranks: ProcessGroup) -> dict[str, float]:
        """The metrics and standard errors by key, the same on every rank. `prepare` must have been called."""
        found: dict[str, float] = {}
        for task, passes in self._passes.items():
            try:
                result = run_passes(passes, model, TASKS[task].protocol, ranks=ranks)
            except Interrupted:
                raise KeyboardInterrupt from None
            for metric, value in result.metrics.items():
                found[task_key(task, metric)] = value
                stderr = result.stderr.get(metric)
                if stderr is not None:
                    found[task_key(task, metric) + STDERR_SUFFIX] = stderr
        return found


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _parse_task_data(entries: list[str], tasks: list[str]) -> dict[str, str]:
    """TASK=FILE entries of --eval-tasks-data as a dictionary. Raises ConfigError for a task that is not in `tasks`."""
    files: dict[str, str] = {}
    for entry in entries:
        name, _, file = entry.partition("=")
        if not file:
            raise ConfigError(f"--eval-tasks-data must be TASK=FILE, not {entry}", field="eval_tasks_data")
        if name not in tasks:
            raise ConfigError(
                f"--eval-tasks-data {name}: --eval-tasks has no such task ({', '.join(tasks)})", field="eval_tasks_data"
            )
        files[name] = file
    return files
