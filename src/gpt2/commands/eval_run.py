"""Run `gpt2 eval` once its flags are parsed. It imports torch."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gpt2.commands.generation_args import (
    load_inference_model,
    load_model,
    resolve_from_args,
)
from gpt2.commands.json_output import prints_json, write_json
from gpt2.distributed.process_group import ProcessGroup, process_group
from gpt2.errors import ConfigError, ModelFilesError, UserError
from gpt2.evaluation.evaluate import Interrupted, Progress, TaskResult, prepare_task, run_passes, task_names
from gpt2.evaluation.local_texts import BUILT_IN, prepare_texts, rolling_protocol, texts_of_source, validation_texts
from gpt2.evaluation.measures import Measured
from gpt2.evaluation.prepare import ScoringPass, prepare_task_file
from gpt2.evaluation.published import openai_size, run_checks
from gpt2.evaluation.records import read_bytes
from gpt2.evaluation.report import ModelReport, checks_table, listing, shown, table, to_json
from gpt2.evaluation.tasks import TASKS
from gpt2.files import expand_path
from gpt2.generation.engine import LanguageModel
from gpt2.progress import ProgressBar, print_status
from gpt2.runtime import configure_malloc, pick_device
from gpt2.tokenizer import Tokenizer

MAX_METRICS = 2  # on the progress line
THROUGH_TORCH = ("float32", "bfloat16", "float16")  # the other precisions run through the CPU kernel


def run(args: Namespace) -> int:
    """Evaluate as the flags say. Returns 130 if it was interrupted, 1 if a check against published values failed."""
    if args.list:
        print(listing())
        return 0
    if not args.models:
        raise ConfigError("gpt2 eval needs a MODEL: a run folder, a model folder, or a hub name")
    selection = Selection(args)
    with process_group() as ranks:
        reports, complete = _evaluate(args, selection, ranks)
        if ranks.is_main_process:
            _show(args, reports)
    failed = any(not check.passed for report in reports for check in report.checks)
    return 130 if not complete else 1 if failed else 0


class Selection:
    """The tasks and files that the flags name, checked before a model is loaded: see `api.evaluate` for the flags."""

    def __init__(self, args: Namespace) -> None:
        names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
        if args.tasks is not None and not names:
            raise ConfigError("--tasks names no task: see gpt2 eval --list", field="tasks")
        self.published = "published" in names
        self.tasks = task_names([name for name in names if name != "published"])
        self.by_default = not (names or args.data or args.task_file or args.lm_eval)
        if self.by_default:
            self.tasks = task_names(["default"])
        self.task_data = dict(map(_task_and_file, args.task_data))
        unused = next((name for name in self.task_data if name not in self.tasks), None)
        if unused is not None:
            tasks = ", ".join(self.tasks)
            raise ConfigError(f"--task-data {unused}: --tasks has no such task ({tasks})", field="task_data")
        self.harness = [name for name in (args.lm_eval or "").split(",") if name]


def _task_and_file(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not equals or not file:
        raise ConfigError(f"--task-data must be TASK=FILE, as hellaswag=rows.jsonl, not {text}", field="task_data")
    if name not in TASKS:
        task_names([name])  # for its error
    return name, file


def _evaluate(args: Namespace, selection: Selection, ranks: ProcessGroup) -> tuple[list[ModelReport], bool]:
    """A report for each model, and whether the evaluation is complete (False after Ctrl-C)."""
    reports: list[ModelReport] = []
    for name in args.models:
        model, tokenizer = load_for_evaluation(args, name, ranks)
        report = ModelReport(name, openai_size(model.config))
        reports.append(report)
        try:
            done = run_selection(args, selection, ranks, model, tokenizer, report, run_folder=name)
        except KeyboardInterrupt:  # between two tasks, or while reading data: the results so far are shown
            if not ranks.is_single_process:
                raise
            done = False
        if not done:
            return reports, False
    return reports, True


def load_for_evaluation(args: Namespace, name: str, ranks: ProcessGroup) -> tuple[LanguageModel, Tokenizer]:
    """The model called `name` on --device in --dtype, and its tokenizer. All ranks must call this."""
    with ranks.raise_on_all_ranks():
        device = pick_device(args.device)
    ranks.set_device(device)
    if device.type == "cpu":
        configure_malloc(keep_freed=True)
    with ranks.raise_on_all_ranks():
        load = load_model if args.dtype in THROUGH_TORCH else load_inference_model
        model, tokenizer = load(args, resolve_from_args(args, name))
        if tokenizer is None:
            raise ModelFilesError(f"{name} has no tokenizer, which an evaluation requires")
    return model, tokenizer


def run_selection(
    args: Namespace,
    selection: Selection,
    ranks: ProcessGroup,
    model: LanguageModel,
    tokenizer: Tokenizer,
    report: ModelReport,
    *,
    run_folder: str | None,
) -> bool:
    """Evaluate one model on all tasks and texts; returns False if Ctrl-C interrupted it.

    run_folder: where the validation data of the model is named, if it is a run folder; None for a model in memory.
    """
    if selection.published:
        with ranks.raise_on_all_ranks():
            report.checks = list(run_checks(model, tokenizer)) if ranks.is_main_process else []
    settings = {"limit": args.limit, "stride": args.stride, "dtype": args.dtype}
    for name, protocol, prepare in _jobs(args, selection, model, tokenizer, run_folder):
        try:
            passes = ranks.main_process_first(prepare)
        except UserError as error:
            if not selection.by_default:
                raise
            if ranks.is_main_process:
                print_status(f"skipped {name}: {error}")
            continue
        if not passes:
            continue
        try:
            with _progress(name, ranks) as progress:
                report.results[name] = run_passes(passes, model, protocol, settings, ranks, progress)
        except Interrupted as stop:
            if stop.result is not None:
                report.results[name] = stop.result
            return False
    if selection.harness:
        with ranks.raise_on_all_ranks():
            if not ranks.is_single_process:
                raise ConfigError("--lm-eval runs in one process: leave torchrun out", field="lm_eval")
            report.results |= _harness(selection.harness, model, tokenizer, args)
    return True


@contextmanager
def _progress(name: str, ranks: ProcessGroup) -> Iterator[Progress | None]:
    """A bar with the rows done, the running score and the time left; None on ranks other than the first."""
    if not ranks.is_main_process:
        yield None
        return
    with ProgressBar(name) as bar:
        yield lambda done, total, so_far: bar.update(done / max(1, total), score_line(done, total, so_far))


def score_line(done: int, total: int, so_far: Measured) -> str:
    """Rows done and the first metrics, short enough for 80 columns with a bar and the time left."""
    metrics = list(so_far.metrics.items())[:MAX_METRICS]
    return "  ".join([f"{done}/{total}", *(f"{name} {shown(name, value)}" for name, value in metrics)])


Job = tuple[str, str, Callable[[], list[ScoringPass]]]
"""A name in the results, a protocol, and a function that prepares the data."""


def _jobs(
    args: Namespace, selection: Selection, model: LanguageModel, tokenizer: Tokenizer, name: str | None
) -> Sequence[Job]:
    config, limit, stride = model.config, args.limit, args.stride
    jobs: list[Job] = []
    for task in (TASKS[task] for task in selection.tasks):
        jobs.append(
            (
                task.name,
                task.protocol,
                lambda task=task: prepare_task(task, tokenizer, model, limit, selection.task_data, stride),
            )
        )
    rolling = rolling_protocol(stride, config)
    for ref in args.data:
        jobs.append(
            (ref, rolling, lambda ref=ref: prepare_texts(texts_of_source(ref), tokenizer, config, stride, limit))
        )
    for ref in args.task_file:
        jobs.append(
            (
                ref,
                "rows of a file: the most likely choice, prompts as in lm-evaluation-harness",
                lambda ref=ref: prepare_task_file(read_bytes(expand_path(ref)), ref, tokenizer, config, limit),
            )
        )
    if selection.by_default:

        def own() -> list[ScoringPass]:
            texts = None if name is None else validation_texts(name, tokenizer)
            return [] if texts is None else prepare_texts(texts, tokenizer, config, stride, limit)

        jobs.append(("validation", f"the run's validation data; {rolling}", own))
        jobs.append(
            (BUILT_IN, rolling, lambda: prepare_texts(texts_of_source(BUILT_IN), tokenizer, config, stride, limit))
        )
    return jobs


def _harness(names: list[str], model: LanguageModel, tokenizer: Tokenizer, args: Namespace) -> dict[str, TaskResult]:
    from gpt2.evaluation.harness import run_harness

    return run_harness(names, model, tokenizer, args.limit)


def _show(args: Namespace, reports: list[ModelReport]) -> None:
    for report in reports:
        if report.checks and not prints_json(args.json):
            print(checks_table(report))
    if any(report.results for report in reports) and not prints_json(args.json):
        print(table(reports))
    write_json(args.json, to_json(reports))
