"""The training loop, short enough to read aloud."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

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
from gpt2.train.run import Run, describe_run, setup_run, write_report
from gpt2.train.run_folder import RunFolder

Sampler = Callable[[GPT, Tokenizer, str, int], str]  # (model, tokenizer, prompt, number of tokens) -> text

OVERFITTING_EVALS = 2  # validations in a row that are no better, after which it is said
TIME_LIMIT_EXIT_CODE = 75  # the exit code of a run that --max-minutes stopped: EX_TEMPFAIL of sysexits.h, "try again"


class Interrupted(Exception):
    """The run was asked to stop, has saved its state, and can go on later: `folder`, after `step` updates.

    exit_code: 128 + n after signal n, 75 when its time was over.
    """

    def __init__(self, folder: Path, step: int, reason: str, exit_code: int) -> None:
        super().__init__(
            f"stopped by {reason} after step {step:,}, everything saved; go on with: gpt2 train --resume {folder}"
        )
        self.folder, self.step, self.exit_code = folder, step, exit_code


def train(config: TrainConfig, sampler: Sampler | None = None, ranks: ProcessGroup = SINGLE_PROCESS) -> Path:
    """Train as `config` says, and return the run folder.

    sampler: writes a text with the model as it is; asked at every validation.
    ranks:   the processes that do it together, each calling this; the first alone touches the run folder.

    Raises UserError for what the user can mend, and Interrupted when a signal or --max-minutes stopped the run.
    """
    deadline = time.monotonic() + 60 * config.max_minutes if config.max_minutes else None
    with ExitStack() as stack:
        with ranks.raise_on_all_ranks():
            held = stack.enter_context(RunFolder(config.check())) if ranks.is_main_process else None
        stop = StopCondition(stack.enter_context(catch_signals(restore_after_first=ranks.is_single_process)), deadline)
        run = setup_run(config, ranks.broadcast_from_main(lambda: held.path if held else Path()), ranks)
        with ranks.raise_on_all_ranks():
            if held is not None:
                held.initialize(run.config, run.checkpoint, published=run.should_publish)
        train_loop(run, sampler, stop)
        finished = run.step == run.config.max_steps or run.early_stopped
        code, why = (0, "") if finished else max(ranks.all_gather_object((stop.exit_code(), stop.reason())))
        with ranks.raise_on_all_ranks():
            if ranks.is_main_process:
                run.artifact.save_merged(run.model, run.folder)
                write_report(run, why)
    if not finished:
        raise Interrupted(run.folder, run.step, why, code)
    return run.folder


class StopCondition(NamedTuple):
    """What may end a run before its last step: signals that came, and a time on the monotonic clock."""

    signals: list[int]
    deadline: float | None

    def should_stop(self) -> bool:
        return bool(self.signals) or (self.deadline is not None and time.monotonic() >= self.deadline)

    def reason(self) -> str:
        return signal.Signals(self.signals[0]).name if self.signals else "--max-minutes"

    def exit_code(self) -> int:
        return 128 + self.signals[0] if self.signals else TIME_LIMIT_EXIT_CODE


def train_loop(run: Run, sampler: Sampler | None, stop_condition: StopCondition) -> None:
    """From the step a run is at to its last one, or to where `stop` is due; what is left is a saved run."""
    config = run.config
    with ExitStack() as stack:
        main = run.ranks.is_main_process
        report = stack.enter_context(MetricsLogger(run.folder, run.step, config.max_steps, quiet=not main))
        writer = stack.enter_context(
            CheckpointWriter(run.folder, run.artifact, config.keep_checkpoints, run.checkpoint_metadata, is_writer=main)
        )
        profiler = stack.enter_context(
            StepProfiler(run.folder, run.device, config.max_steps - run.step, enabled=config.profile and main)
        )
        trackers = open_trackers(config, run.folder, run.step) if main else []
        for tracker in trackers:
            stack.callback(tracker.close)
        report.log_message(f"{describe_run(run)}\nrun folder: {run.folder}")
        end = run.step if run.early_stopped else config.max_steps
        if run.step == end:
            report.log_message(f"nothing to do: all {end:,} steps were done")
        stall = 0.0
        began = time.perf_counter()
        part = {"part": run.ranks.rank, "parts": run.ranks.world_size}
        for batch in prefetch_batches(run.loader, run.step, end, run.device, **part):
            waited = time.perf_counter() - began - stall
            record: dict[str, Any] = {"step": run.step + 1, "save_seconds": stall, "data_seconds": waited}
            record |= train_step(run, batch, report)
            last = run.step == config.max_steps
            if last or _is_due(run.step, config.eval_every):
                record |= _evaluate_and_sample(run, sampler)
            better = run.best_validation.update(record)
            if run.best_validation.evals_since_best == OVERFITTING_EVALS and "val_loss" in record:
                report.log_message(
                    f"validation was best at step {run.best_validation.step:,}: from there on it may be learning by heart"
                )
            writer.raise_if_failed()
            record |= {
                "seconds": time.perf_counter() - began,
                "tokens_per_second": run.tokens_per_step / record["update_seconds"],
            }
            report.log_step(record)  # before the save: no checkpoint is ahead of its metrics
            for tracker in trackers:
                tracker.log(record)
            profiler.step()
            began, stall = time.perf_counter(), 0.0
            stopping = run.ranks.any_rank(stop_condition.should_stop()) or run.early_stopped
            if last or stopping or _is_due(run.step, config.save_every) or (better and config.keep_best):
                writer.save(run.step, run.model, run.optimizers, publish=run.should_publish)
                stall = writer.stall_seconds
            if stopping:
                break


def train_step(run: Run, batch: Batch, logger: MetricsLogger) -> dict[str, Any]:
    """The update of one batch, and its part of the step's record; a batch whose loss stands out is left out."""
    began = time.perf_counter()
    run.step += 1
    rate = learning_rate(run.step, run.config)
    loss, norm, score = update(run, batch, rate)
    record: dict[str, Any] = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens": run.step * run.tokens_per_step}
    if score is not None:
        model = run.distributed_model.full_model()
        if run.ranks.is_main_process:
            batch = _global_batch(run, batch)
            row = highest_loss_row(model, batch, run.dtype)
            logger.log_message(
                skipped_batch_message(run.step, loss, score, row, excerpt(run.data.tokenizer, batch.tokens[row]))
            )
        record["skipped"] = True
    return {**record, "update_seconds": time.perf_counter() - began}


class UpdateResult(NamedTuple):
    """What came of a batch: its mean loss, the norm of its gradient, and how far it stood out if it was left out."""

    loss: float
    grad_norm: float
    outlier_score: float | None


def update(run: Run, batch: Batch, lr: float) -> UpdateResult:
    """One optimizer step on a global batch, of which `batch` is this rank's part, on the CPU.

    The micro-batches' losses are sums divided by the whole batch's number of targets, so their gradients add up to
    the gradient of the whole, however it is cut. Raises UserError, with all there is to know, before a loss or a
    gradient that is not finite could reach the weights.
    """
    run.model.train()
    seed_step(run.config.seed, run.step, run.ranks.rank)
    random = get_rng_state(run.device)
    (divisor,) = run.ranks.all_reduce_scalars(float(batch.num_targets))
    total = torch.zeros((), device=run.device)
    parts = batch.split(run.micro_batch_size)
    for number, part in enumerate(parts, 1):
        part = part.to(run.device)
        with run.distributed_model.gradient_accumulation(last=number == len(parts)):
            with autocast(run.device, run.dtype):
                part_loss = run.distributed_model.loss(part.tokens, part.targets, divisor, part.documents)
            part_loss.backward()
        total += part_loss.detach()
        del part_loss  # with it goes what the backward pass has kept
    total_norm = run.distributed_model.clip_grad_norm(run.config.grad_clip or torch.inf)
    loss, norm = torch.stack((run.ranks.all_reduce_sum(total), total_norm)).tolist()
    if not (abs(loss) < torch.inf and norm < torch.inf):
        _raise_non_finite(
            run, batch, partial(StepInputs, rng_state=random, divisor=divisor, lr=lr, loss=loss, grad_norm=norm)
        )
    spike = run.outlier_filter.outlier_score(loss)
    run.outlier_filter.record(loss, skipped=spike is not None)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if spike is None:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(run.device)
    return UpdateResult(loss, norm, spike)


def _raise_non_finite(run: Run, batch: Batch, make_inputs: Callable[..., StepInputs]) -> None:
    """Raise what there is to know of a step whose loss or gradient is not finite: rank 0 computes it all again."""
    model = run.distributed_model.full_model()
    with run.ranks.raise_on_all_ranks():
        if run.ranks.is_main_process:
            made = make_inputs(
                run.step,
                _global_batch(run, batch),
                run.micro_batch_size,
                dtype=run.dtype,
                recompute=run.config.recompute,
            )
            raise diagnose_non_finite(run.folder, model, run.data.tokenizer, made)


def _global_batch(run: Run, part: Batch) -> Batch:
    """The global batch of the step under way, of which this rank has a part."""
    return part if run.ranks.world_size == 1 else run.loader.batch(run.step - 1)


def validate(run: Run) -> float:
    """Mean loss over the validation tokens in nats, every one of them a target once (up to `eval_tokens`)."""
    config = run.config
    batches = run.data.validation_batches(run.micro_batch_size, config.block_size, config.eval_tokens or None)
    loss = mean_loss(run.model, batches, run.dtype, run.ranks)
    run.distributed_model.reshard()
    return loss


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[Batch], dtype: torch.dtype, ranks: ProcessGroup = SINGLE_PROCESS) -> float:
    """The mean loss in nats over every target of the batches, which the ranks share, read in evaluation mode."""
    model.eval()
    total, count, device = 0.0, 0, model.device
    for batch in ranks.shard(batches):
        part = batch.to(device)
        with autocast(device, dtype):
            total += model.loss(part.tokens, part.targets, 1.0, part.documents).item()
        count += batch.num_targets
    total, count = ranks.all_reduce_scalars(total, count)
    return total / count


@contextmanager
def catch_signals(*, restore_after_first: bool = True) -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP only leave a note, read at the end of a step.

    insist: let a second one do what it always did. Under torchrun it would be the same once more: torchrun passes on
        what a terminal has sent to all already, and ends by itself who does not end in time.
    """
    noted: list[int] = []
    numbers = [int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if restore_after_first:
            signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, note)
    except ValueError:  # not in the main thread: there a run is stopped by whoever started the thread
        yield noted
        return
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate_and_sample(run: Run, sampler: Sampler | None) -> dict[str, float]:
    """Validate and let the model talk; what both say of this step."""
    record, began = {}, time.perf_counter()
    if run.data.val_tokens:
        record["val_loss"] = validate(run)
        record["eval_seconds"] = time.perf_counter() - began
        began = time.perf_counter()
    config, tokenizer = run.config, run.data.tokenizer
    if sampler is None or not config.sample_tokens:
        return record
    model = run.distributed_model.full_model()
    if run.ranks.is_main_process:
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # a prompt of every length would be compiled anew
            text = sampler(model, tokenizer, config.sample_prompt, config.sample_tokens)
        with (run.folder / "samples.txt").open("a", encoding="utf-8", newline="") as file:
            file.write(f"--- step {run.step}\n{text}\n\n")
        record["sample_seconds"] = time.perf_counter() - began
    return record
