"""Evaluation on tasks during training. The evaluator comes from the command layer, as the sampler does."""

import time
from collections.abc import Mapping
from typing import Protocol

import torch

from gpt2.distributed.process_group import ProcessGroup
from gpt2.model import GPT
from gpt2.reporting.metrics import MetricsLogger
from gpt2.reporting.task_metrics import describe_task_metrics
from gpt2.runtime import autocast
from gpt2.tokenizer import Tokenizer
from gpt2.train.setup import Run


class TaskEvaluator(Protocol):
    """Evaluates a model on tasks: `gpt2.evaluation.training.TrainingEvaluator`, which this layer does not import."""

    @property
    def published(self) -> Mapping[str, Mapping[str, float]]:
        """By key of the metrics, such as `eval/hellaswag/acc_norm`: published values by the name of OpenAI's model."""
        ...

    def prepare(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Tokenize the tasks' rows. Raises UserError for a row that is invalid or does not fit the model's context."""
        ...

    def evaluate(self, model: GPT, ranks: ProcessGroup) -> dict[str, float]:
        """The metrics by key, the same on every rank; the ranks share the rows. Draws no random numbers."""
        ...


def evaluate_on_tasks(run: Run, evaluator: TaskEvaluator, logger: MetricsLogger) -> dict[str, float]:
    """Evaluate the current model, log the result, and return the step's record of it. All ranks must call this.

    With FSDP every rank gathers a whole copy of the model: the ranks score batches of different number and shape, so
    they could not gather the parameters layer by layer together.
    """
    started = time.perf_counter()
    model = run.distributed_model.full_model(on_all_ranks=True)
    # Without force_eager, every shape of a batch would be compiled.
    with run.ranks.raise_on_all_ranks(), autocast(run.device, run.dtype), torch.compiler.set_stance("force_eager"):
        metrics = evaluator.evaluate(model, run.ranks)
    logger.log_message(f"step {run.step:,}  {describe_task_metrics(metrics)}")
    return {**metrics, "eval_tasks_seconds": time.perf_counter() - started}
