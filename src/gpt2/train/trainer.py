"""The training loop: `train` sets up a run, `train_loop` iterates over batches, `update` is one optimizer step."""

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from gpt2.config import TrainConfig
from gpt2.data.loader import Batch, prefetch_batches
from gpt2.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from gpt2.model import GPT
from gpt2.optimizers import learning_rate
from gpt2.reporting.metrics import MetricsLogger
from gpt2.reporting.profiler import StepProfiler
from gpt2.reporting.trackers import open_trackers
from gpt2.runtime import autocast, get_rng_state, seed_step, synchronize
from gpt2.tokenizer import Tokenizer
from gpt2.train.checkpoint import CheckpointWriter
from gpt2.train.non_finite import diagnose_non_finite, excerpt
from gpt2.train.non_finite_origin import StepInputs
from gpt2.train.outlier_batches import highest_loss_row, skipped_batch_message
from gpt2.train.run_folder import RunFolder
from gpt2.train.run_report import describe_run, write_report
from gpt2.train.setup import Run, setup_run
from gpt2.train.stopping import Interrupted, StopCondition, catch_signals
from gpt2.train.task_evaluation import TaskEvaluator, evaluate_on_tasks

Sampler = Callable[[GPT, Tokenizer, str, int], str]  # (model, tokenizer, prompt, max_new_tokens) -> text

OVERFITTING_EVALS = 2  # validations in a row without improvement, after which overfitting is reported


def train(
    config: TrainConfig,
    sampler: Sampler | None = None,
    ranks: ProcessGroup = SINGLE_PROCESS,
    evaluator: TaskEvaluator | None = None,
) -> Path:
    """Train as `config` says, and return the run folder.

    sampler:   generates a text with the current model, after every validation.
    ranks:     the processes that train together, each of which calls this; only the main process writes the run folder.
    evaluator: evaluates the current model on the tasks of the config, every `eval_tasks_every` steps and at the last.

    Raises UserError for mistakes that the user can fix, and Interrupted when a signal or --max-minutes stopped the run.
    """
    deadline = time.monotonic() + 60 * config.max_minutes if config.max_minutes else None
    with ExitStack() as stack:
        with ranks.raise_on_all_ranks():
            locked = stack.enter_context(RunFolder(config.check())) if ranks.is_main_process else None
        run = setup_run(config, ranks.broadcast_from_main(lambda: locked.path if locked else Path()), ranks)
        with ranks.raise_on_all_ranks():
            if evaluator is not None:
                evaluator.prepare(run.model, run.data.tokenizer)
            if locked is not None:
                locked.initialize(run.config, run.checkpoint, published=run.should_publish)
        signals = stack.enter_context(catch_signals(run.describe_loss, second_stops=ranks.is_single_process))
        stop = StopCondition(signals, deadline)
        train_loop(run, sampler, stop, evaluator)
        finished = run.step == run.config.max_steps or run.early_stopped
        code, reason = (0, "") if finished else max(ranks.all_gather_object((stop.exit_code(), stop.reason())))
        with ranks.raise_on_all_ranks():
            if ranks.is_main_process:
                run.artifact.save_merged(run.model, run.folder)
                write_report(run, reason, evaluator.published if evaluator else None)
    if not finished:
        raise Interrupted(run.folder, run.step, reason, code)
    return run.folder


def train_loop(
    run: Run, sampler: Sampler | None, stop_condition: StopCondition, evaluator: TaskEvaluator | None = None
) -> None:
    """Train from the run's current step to its last one, or until `stop_condition` holds. The end state is saved."""
    config, ranks, is_main = run.config, run.ranks, run.ranks.is_main_process
    last_step = run.step if run.early_stopped else config.max_steps
    with ExitStack() as stack:
        logger = stack.enter_context(MetricsLogger(run.folder, run.step, config.max_steps, quiet=not is_main))
        writer = CheckpointWriter(
            run.folder, run.artifact, config.keep_checkpoints, run.checkpoint_metadata, is_writer=is_main
        )
        stack.enter_context(writer)
        profiler = StepProfiler(run.folder, run.device, config.max_steps - run.step, enabled=config.profile and is_main)
        stack.enter_context(profiler)
        trackers = open_trackers(config, run.folder, run.step) if is_main else []
        for tracker in trackers:
            stack.callback(tracker.close)
        for line in (*describe_run(run), f"run folder: {run.folder}"):
            logger.log_message(line)
        if run.step == last_step:
            logger.log_message(f"nothing to do: all {last_step:,} steps are done")
        started, save_seconds = time.perf_counter(), 0.0
        batches = prefetch_batches(
            run.loader, run.step, last_step, run.device, rank=ranks.rank, world_size=ranks.world_size
        )
        for batch in batches:
            data_seconds = time.perf_counter() - started - save_seconds
            run.step += 1
            is_last = run.step == config.max_steps
            record: dict[str, Any] = {"step": run.step, "save_seconds": save_seconds, "data_seconds": data_seconds}
            record |= _timed_update(run, batch, logger)
            if is_last or _is_due(run.step, config.eval_every):
                record |= _evaluate_and_sample(run, sampler)
            improved = run.best_validation.update(record)
            _report_overfitting(run, record, logger)
            if evaluator and (is_last or run.early_stopped or _is_due(run.step, config.eval_tasks_every)):
                record |= evaluate_on_tasks(run, evaluator, logger)
            writer.raise_if_failed()
            record["seconds"] = time.perf_counter() - started
            record["tokens_per_second"] = run.tokens_per_step / record["update_seconds"]
            logger.log_step(record)  # before the save: no checkpoint is ahead of its metrics
            for tracker in trackers:
                tracker.log(record)
            profiler.step()
            started, save_seconds = time.perf_counter(), 0.0
            stopping = ranks.any_rank(stop_condition.should_stop()) or run.early_stopped
            if is_last or stopping or _is_due(run.step, config.save_every) or (improved and config.keep_best):
                writer.save(run.step, run.model, run.optimizers, publish=run.should_publish)
                run.saved_step = run.step
                save_seconds = writer.stall_seconds
            if stopping:
                break


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _timed_update(run: Run, batch: Batch, logger: MetricsLogger) -> dict[str, Any]:
    """The update of one batch, and its part of the step's record; a skipped outlier batch is logged."""
    started = time.perf_counter()
    lr = learning_rate(run.step, run.config)
    scale = run.loss_scale.value
    loss, norm, outlier_score, overflow = update(run, batch, lr)
    record: dict[str, Any] = {"loss": loss, "lr": lr, "tokens": run.step * run.tokens_per_step}
    if run.loss_scale.is_dynamic:
        record["loss_scale"] = scale
    if overflow:
        logger.log_message(f"step {run.step:,}: no update: gradients overflow at a loss scale of {scale:,g}")
        record["overflow"] = True
    else:
        record["grad_norm"] = norm
    if outlier_score is not None:
        model = run.distributed_model.full_model()
        if run.ranks.is_main_process:
            batch = _global_batch(run, batch)
            row = highest_loss_row(model, batch, run.dtype)
            text = excerpt(run.data.tokenizer, batch.tokens[row])
            logger.log_message(skipped_batch_message(run.step, loss, outlier_score, row, text))
        record["skipped"] = True
    return {**record, "update_seconds": time.perf_counter() - started}


class UpdateResult(NamedTuple):
    """The result of one update.

    loss:          mean loss of the global batch in nats per token.
    grad_norm:     norm of its gradient before clipping.
    outlier_score: z-score of the loss if the batch was skipped as an outlier, else None.
    overflow:      whether the gradients overflowed in float16, so that the weights were not updated.
    """

    loss: float
    grad_norm: float
    outlier_score: float | None
    overflow: bool


def update(run: Run, batch: Batch, lr: float) -> UpdateResult:
    """One optimizer step on a global batch, of which `batch` is this rank's part, on the CPU.

    The loss of each micro-batch is a sum, divided by the number of targets in the global batch. So the accumulated
    gradients equal the gradient of the whole batch, however it is divided. Raises UserError, with a diagnosis, before
    a loss or gradient that is not finite changes the weights. In float16 the loss is scaled (`LossScale`).
    """
    model, ranks, optimizers, scale = run.distributed_model, run.ranks, run.optimizers, run.loss_scale.value
    run.model.train()
    seed_step(run.config.seed, run.step, ranks.rank)
    rng_state = get_rng_state(run.device)
    (divisor,) = ranks.all_reduce_scalars(float(batch.num_targets))

    # Forward and backward, with gradient accumulation over the micro-batches.
    total_loss = torch.zeros((), device=run.device)
    micro_batches = batch.split(run.micro_batch_size)
    grad_accum_steps = len(micro_batches)
    for number, micro_batch in enumerate(micro_batches, 1):
        micro_batch = micro_batch.to(run.device)
        with model.gradient_accumulation(last=number == grad_accum_steps):
            with autocast(run.device, run.dtype):
                loss = model.loss(micro_batch.tokens, micro_batch.targets, divisor / scale, micro_batch.documents)
            loss.backward()
        total_loss += loss.detach()
        del loss  # frees the autograd graph before the next forward pass

    # All-reduce the loss, clip the gradients, and check that both are finite.
    grad_norm = model.clip_grad_norm(run.config.grad_clip or torch.inf, loss_scale=scale)
    loss, norm = torch.stack((ranks.all_reduce_sum(total_loss) / scale, grad_norm)).tolist()
    overflow = abs(loss) < torch.inf and not norm < torch.inf and scale > 1
    if not (abs(loss) < torch.inf and (norm < torch.inf or overflow)):
        _raise_non_finite(run, batch, rng_state=rng_state, divisor=divisor, lr=lr, loss=loss, grad_norm=norm)

    # Update the weights, unless the batch is an outlier.
    outlier_score = run.outlier_filter.outlier_score(loss)
    run.outlier_filter.record(loss, skipped=outlier_score is not None)
    run.loss_scale.update(overflow=overflow)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if outlier_score is None and not overflow:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(run.device)
    return UpdateResult(loss, norm, outlier_score, overflow)


def _raise_non_finite(run: Run, batch: Batch, **computed: Any) -> NoReturn:
    """Raise the diagnosis of a step whose loss or gradient is not finite: the main process computes it again.

    computed: the fields of StepInputs that the update has computed.
    """
    model = run.distributed_model.full_model()
    with run.ranks.raise_on_all_ranks():
        if run.ranks.is_main_process:
            inputs = StepInputs(
                step=run.step,
                batch=_global_batch(run, batch),
                micro_batch_size=run.micro_batch_size,
                dtype=run.dtype,
                activation_checkpointing=run.config.activation_checkpointing,
                **computed,
            )
            raise diagnose_non_finite(run.folder, model, run.data.tokenizer, inputs)
    raise AssertionError("the main process raises on all ranks")


def _global_batch(run: Run, part: Batch) -> Batch:
    """The global batch of the current step, of which this rank has `part`."""
    return part if run.ranks.world_size == 1 else run.loader.batch(run.step - 1)


def _evaluate_and_sample(run: Run, sampler: Sampler | None) -> dict[str, float]:
    """Validate, append a sample to samples.txt, and return the step's record of both."""
    record, started = {}, time.perf_counter()
    if run.data.val_tokens:
        record["val_loss"] = validate(run)
        record["eval_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
    config, tokenizer = run.config, run.data.tokenizer
    if sampler is None or not config.sample_tokens:
        return record
    model = run.distributed_model.full_model()
    if run.ranks.is_main_process:
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # otherwise each prompt length would be compiled
            text = sampler(model, tokenizer, config.sample_prompt, config.sample_tokens)
        with (run.folder / "samples.txt").open("a", encoding="utf-8", newline="") as file:
            file.write(f"--- step {run.step}\n{text}\n\n")
        record["sample_seconds"] = time.perf_counter() - started
    return record


def _report_overfitting(run: Run, record: dict[str, Any], logger: MetricsLogger) -> None:
    """Log once that the validation loss no longer improves."""
    best = run.best_validation
    if best.evals_since_best == OVERFITTING_EVALS and "val_loss" in record:
        logger.log_message(f"validation loss was lowest at step {best.step:,}: the model may be overfitting since then")


def validate(run: Run) -> float:
    """Mean validation loss in nats per token, over at most `eval_tokens` tokens; each is a target once."""
    config = run.config
    batches = run.data.validation_batches(run.micro_batch_size, config.block_size, config.eval_tokens or None)
    loss = mean_loss(run.model, batches, run.dtype, run.ranks)
    run.distributed_model.reshard()
    return loss


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[Batch], dtype: torch.dtype, ranks: ProcessGroup = SINGLE_PROCESS) -> float:
    """The mean loss in nats per target over all batches, which are sharded over the ranks; in evaluation mode."""
    model.eval()
    total, count, device = 0.0, 0, model.device
    for batch in ranks.shard(batches):
        part = batch.to(device)
        with autocast(device, dtype):
            total += model.loss(part.tokens, part.targets, 1.0, part.documents).item()
        count += batch.num_targets
    total, count = ranks.all_reduce_scalars(total, count)
    return total / count
