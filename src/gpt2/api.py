"""`gpt2.train`, `gpt2.finetune` and `gpt2.evaluate`: the commands of the same names as functions."""

import logging
import signal
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from gpt2.checks import check_path, check_texts
from gpt2.commands.eval_run import Selection, load_for_evaluation, run_selection
from gpt2.commands.finetune import append_comparison, finetune_config, finetune_settings
from gpt2.commands.train import resolve_config
from gpt2.commands.training import broadcast_config, make_evaluator, make_sampler
from gpt2.config import TrainConfig, with_overrides
from gpt2.distributed.process_group import process_group
from gpt2.errors import ConfigError
from gpt2.evaluation.evaluate import TaskResult
from gpt2.evaluation.published import openai_size
from gpt2.evaluation.report import ModelReport
from gpt2.evaluation.scorer import LanguageModel
from gpt2.generation.engine import eval_mode
from gpt2.generation.text import require_tokenizer
from gpt2.reporting.metrics import read_metrics
from gpt2.tokenizer import Tokenizer
from gpt2.train import trainer
from gpt2.train.recipes import RECIPES, load_recipe
from gpt2.train.stopping import TIME_LIMIT_EXIT_CODE, Interrupted

_log = logging.getLogger("gpt2")


@dataclass(frozen=True)
class RunResult:
    """The result of `train` and `finetune`.

    folder:     the run folder; `gpt2.load(folder)` loads its model.
    steps:      optimizer steps done.
    metrics:    the last value of each metric in `metrics.jsonl`, by name: `loss` and `val_loss` (nats per token), `lr`,
                `grad_norm`, `tokens`, `tokens_per_second`, `seconds` (of the last step), `eval/TASK/METRIC`, ...
    finished:   False if `max_minutes` ended the run before its last step; `resume=folder` continues it.
    comparison: of `finetune`: the base and the fine-tuned model, as Markdown; it is also in `folder/report.md`.
    """

    folder: Path
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    finished: bool = True
    comparison: str = ""


def train(recipe: str | Path = "quickstart", **settings: Any) -> RunResult:
    """Train a model, as `gpt2 train` does: a recipe or a TOML file, with settings over its values.

        result = gpt2.train("quickstart", max_steps=100, name="short")
        result.metrics["val_loss"]

    settings: the fields of `gpt2.config.TrainConfig`, which are the flags of `gpt2 train` with underscores. Paths may
              be `Path` objects, and settings that are names separated by commas may be lists. `resume` is a run folder.

    Progress is shown on standard error. Under torchrun all ranks call this. After Ctrl-C the state is saved, and
    KeyboardInterrupt is raised; after SIGTERM or SIGHUP it is SystemExit. Raises UserError for mistakes, with the name
    of the setting in `field`.
    """
    check_path("recipe", recipe)
    base, given = str(recipe), _plain_values(settings)
    requested = with_overrides(load_recipe(base), given, "gpt2.train")
    return _run(requested, lambda: resolve_config(base, given), finetuning=False)


def finetune(model: str | Path | None = None, data: str | Path | None = None, **settings: Any) -> RunResult:
    """Fine-tune a model on text, or on rows of prompts and answers, as `gpt2 finetune` does.

        result = gpt2.finetune("gpt2", "questions.jsonl", lora_rank=8)
        print(result.comparison)

    model: a run folder, a model folder, or a hub name; None with `resume`.
    data:  text, or a file with rows, as `--data`.

    The settings, and what is raised, are those of `train`.
    """
    for name, value in (("model", model), ("data", data)):
        if value is not None:
            check_path(name, value)
    given = _plain_values(settings if data is None else {"data": data, **settings})
    given = finetune_settings(None if model is None else str(model), given)
    requested = with_overrides(RECIPES["finetune"], given, "gpt2.finetune")
    return _run(requested, lambda: finetune_config(given), finetuning=True)


def evaluate(
    model: str | Path | LanguageModel,
    tokenizer: Tokenizer | None = None,
    *,
    tasks: str | Sequence[str] | None = None,
    data: str | Path | Sequence[str | Path] = (),
    limit: int | None = None,
    stride: int | None = None,
    task_file: str | Path | Sequence[str | Path] = (),
    task_data: Mapping[str, str | Path] | None = None,
    lm_eval: str | Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "float32",
    adapter: str | Path | None = None,
) -> dict[str, TaskResult]:
    """Evaluate a model on tasks and texts, as `gpt2 eval` does. Returns the results by name of task or text.

        results = gpt2.evaluate("runs/quickstart", tasks=["wikitext2"], data="notes.txt")
        results["notes.txt"].metrics["bits_per_byte"]

    model:     a run folder, a model folder, a hub name, or a model in memory with its `tokenizer`; `device`, `dtype`
               and `adapter` are for the first three.
    tasks:     names of tasks and sets of tasks (`gpt2 eval --list`); without tasks, texts and `lm_eval`, what
               `gpt2 eval MODEL` runs.
    data:      texts: loss, perplexity and bits per byte of each.
    limit:     only the first rows of each task.
    stride:    tokens that each window over a long text scores after the first window; None for the model's context.
    task_file: files with rows of your own; see docs/evaluation.md.
    task_data: by task, a local file with its data, instead of the download.
    lm_eval:   tasks of lm-evaluation-harness.

    Raises UserError for unknown tasks, data that is missing and rows that do not fit; KeyboardInterrupt on Ctrl-C.
    """
    args = Namespace(
        models=[model],
        tasks=_comma_separated("tasks", tasks),
        data=_as_list("data", data),
        task_file=_as_list("task_file", task_file),
        task_data=[f"{name}={file}" for name, file in (task_data or {}).items()],
        lm_eval=_comma_separated("lm_eval", lm_eval),
        limit=limit,
        stride=stride,
        device=device,
        dtype=dtype,
        adapter=adapter,
    )
    for name, count in (("limit", limit), ("stride", stride)):
        if count is not None and (type(count) is not int or count < 1):
            raise ConfigError(f"{name} must be an integer of at least 1, not {count!r:.80}", field=name)
    selection = Selection(args)
    if selection.published:
        raise ConfigError("published is a comparison of its own: gpt2 eval MODEL --tasks published", field="tasks")
    with process_group() as ranks:
        if isinstance(model, str | Path):
            name = str(model)
            loaded, found = load_for_evaluation(args, name, ranks)
        else:
            name, loaded, found = None, model, require_tokenizer(tokenizer)
        report = ModelReport(name or type(model).__name__, openai_size(loaded.config))
        with eval_mode(loaded):
            complete = run_selection(args, selection, ranks, loaded, found, report, run_folder=name)
    if not complete:
        raise KeyboardInterrupt
    return report.results


def _run(requested: TrainConfig, make_config: Callable[[], TrainConfig], *, finetuning: bool) -> RunResult:
    """Train, as the commands do once their flags are parsed."""
    finished, comparison = True, ""
    with process_group() as ranks:
        config = broadcast_config(ranks, requested, make_config)
        sampler = make_sampler(config)
        try:
            folder = trainer.train(config, sampler, ranks, make_evaluator(config, ranks))
        except Interrupted as stop:
            if stop.exit_code != TIME_LIMIT_EXIT_CODE:
                _log.warning("%s", stop)
                raise _exit_for(stop) from None
            folder, finished = stop.folder, False
        with ranks.raise_on_all_ranks():
            if finetuning and finished and ranks.is_main_process:
                comparison = append_comparison(folder, sampler)
    metrics: dict[str, Any] = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        metrics |= {name: value for name, value in record.items() if isinstance(value, int | float)}
    steps = int(metrics.pop("step", 0))
    return RunResult(folder, steps, metrics, finished, comparison)


def _exit_for(stop: Interrupted) -> BaseException:
    """What Python raises by itself after Ctrl-C, and what a signal that ends the process amounts to."""
    return KeyboardInterrupt() if stop.exit_code == 128 + signal.SIGINT else SystemExit(stop.exit_code)


def _plain_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the types of TrainConfig: paths and lists as text, integers of other libraries as int."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Path):
            plain[name] = str(value)
        elif isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            plain[name] = ",".join(value)
        elif isinstance(value, Integral) and not isinstance(value, bool):
            plain[name] = int(value)
        else:
            plain[name] = value
    return plain


def _comma_separated(name: str, value: str | Sequence[str] | None) -> str | None:
    if value is None:
        return None
    check_texts(name, value)
    return value if isinstance(value, str) else ",".join(value)


def _as_list(name: str, value: str | Path | Sequence[str | Path]) -> list[str]:
    values = [value] if isinstance(value, str | Path) else value
    check_texts(name, [str(one) if isinstance(one, Path) else one for one in values])
    return [str(one) for one in values]
