"""The training loop, short enough to read aloud."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from gpt2.data.loader import Batch, prefetched
from gpt2.model import GPT
from gpt2.runtime import autocast, random_state, synchronize
from gpt2.tokenizer import Tokenizer
from gpt2.train.checkpoint import CheckpointWriter
from gpt2.train.config import TrainConfig
from gpt2.train.culprit import Attempt
from gpt2.train.folder import RunFolder
from gpt2.train.guard import diagnose, excerpt
from gpt2.train.optim import learning_rate
from gpt2.train.profile import StepProfiler
from gpt2.train.report import Report
from gpt2.train.run import Run, describe, explain, set_up
from gpt2.train.spikes import skipped_line, worst_row
from gpt2.train.trackers import open_trackers

Sampler = Callable[[GPT, Tokenizer, str, int], str]  # (model, tokenizer, prompt, number of tokens) -> text

OVERFITTING = 2  # validations in a row that are no better, after which it is said
OUT_OF_TIME = 75  # the exit code of a run that --max-minutes stopped: EX_TEMPFAIL of sysexits.h, "try again"


class Interrupted(Exception):
    """The run was asked to stop, has saved its state, and can go on later: `folder`, after `step` updates.

    exit_code: 128 + n after signal n, 75 when its time was over.
    """

    def __init__(self, folder: Path, step: int, why: str, exit_code: int) -> None:
        super().__init__(
            f"stopped by {why} after step {step:,}, everything saved; go on with: gpt2 train --resume {folder}"
        )
        self.folder, self.step, self.exit_code = folder, step, exit_code


def train(config: TrainConfig, sampler: Sampler | None = None) -> Path:
    """Train as `config` says, and return the run folder.

    sampler: writes a text with the model as it is; asked at every validation.

    Raises UserError for what the user can mend, and Interrupted when a signal or --max-minutes stopped the run.
    """
    deadline = time.monotonic() + 60 * config.max_minutes if config.max_minutes else None
    with RunFolder(config.check()) as folder, noted_signals() as signals:
        stop = Stop(signals, deadline)
        run = set_up(config, folder.path)
        folder.begin(run.config, run.checkpoint, published=run.publishes)
        train_steps(run, sampler, stop)
        finished = run.step == run.config.max_steps or run.given_up
        run.product.save_merged(run.model, run.folder)
        explain(run, "" if finished else stop.why())
    if not finished:
        raise Interrupted(run.folder, run.step, stop.why(), 128 + signals[0] if signals else OUT_OF_TIME)
    return run.folder


class Stop(NamedTuple):
    """What may end a run before its last step: signals that came, and a time on the monotonic clock."""

    signals: list[int]
    deadline: float | None

    def due(self) -> bool:
        return bool(self.signals) or (self.deadline is not None and time.monotonic() >= self.deadline)

    def why(self) -> str:
        return signal.Signals(self.signals[0]).name if self.signals else "--max-minutes"


def train_steps(run: Run, sampler: Sampler | None, stop: Stop) -> None:
    """From the step a run is at to its last one, or to where `stop` is due; what is left is a saved run."""
    config = run.config
    with ExitStack() as stack:
        report = stack.enter_context(Report(run.folder, run.step, config.max_steps))
        writer = stack.enter_context(CheckpointWriter(run.folder, run.product, config.keep_checkpoints, run.facts))
        profiler = stack.enter_context(
            StepProfiler(run.folder, run.device, config.max_steps - run.step, enabled=config.profile)
        )
        trackers = open_trackers(config, run.folder, run.step)
        for tracker in trackers:
            stack.callback(tracker.close)
        report.say(f"{describe(run)}\nrun folder: {run.folder}")
        end = run.step if run.given_up else config.max_steps
        if run.step == end:
            report.say(f"nothing to do: all {end:,} steps were done")
        stall = 0.0
        began = time.perf_counter()
        for batch in prefetched(run.loader, run.step, end, run.device):
            waited = time.perf_counter() - began - stall
            record: dict[str, Any] = {"step": run.step + 1, "save_seconds": stall, "data_seconds": waited}
            record |= one_step(run, batch, report)
            last = run.step == config.max_steps
            if last or _due(run.step, config.eval_every):
                record |= _look(run, sampler)
            better = run.best.note(record)
            if run.best.since == OVERFITTING and "val_loss" in record:
                report.say(f"validation was best at step {run.best.step:,}: from there on it may be learning by heart")
            writer.check()
            record |= {
                "seconds": time.perf_counter() - began,
                "tokens_per_second": run.tokens_per_step / record["update_seconds"],
            }
            report.step(record)  # before the save: no checkpoint is ahead of its metrics
            for tracker in trackers:
                tracker.log(record)
            profiler.step()
            began, stall = time.perf_counter(), 0.0
            stopping = stop.due() or run.given_up
            if last or stopping or _due(run.step, config.save_every) or (better and config.keep_best):
                writer.save(run.step, run.model, run.optimizers, publish=run.publishes)
                stall = writer.stall_seconds
            if stopping:
                break


def one_step(run: Run, batch: Batch, report: Report) -> dict[str, Any]:
    """The update of one batch, and its part of the step's record; a batch whose loss stands out is left out."""
    began = time.perf_counter()
    run.step += 1
    rate = learning_rate(run.step, run.config)
    loss, norm, score = update(run, batch, rate)
    record: dict[str, Any] = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens": run.step * run.tokens_per_step}
    if score is not None:
        row = worst_row(run.model, batch, run.dtype)
        report.say(skipped_line(run.step, loss, score, row, excerpt(run.data.tokenizer, batch.tokens[row])))
        record["skipped"] = True
    return {**record, "update_seconds": time.perf_counter() - began}


class Update(NamedTuple):
    """What came of a batch: its mean loss, the norm of its gradient, and how far it stood out if it was left out."""

    loss: float
    grad_norm: float
    spike: float | None


def update(run: Run, batch: Batch, rate: float) -> Update:
    """One optimizer step on a global batch, on the CPU.

    The micro-batches' losses are sums divided by the whole batch's number of targets, so their gradients add up to
    the gradient of the whole, however it is cut. Raises UserError, with all there is to know, before a loss or a
    gradient that is not finite could reach the weights.
    """
    run.model.train()
    config, random = run.config, random_state(run.device)
    divisor = float(batch.num_targets)
    rows = config.micro_batch_size or config.batch_size
    total = torch.zeros((), device=run.device)
    for part in batch.split(rows):
        part = part.to(run.device)
        with autocast(run.device, run.dtype):
            part_loss = run.model.loss(part.tokens, part.targets, divisor, part.documents)
        part_loss.backward()
        total += part_loss.detach()
        del part_loss  # with it goes what the backward pass has kept
    total_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or torch.inf)
    loss, norm = torch.stack((total, total_norm)).tolist()
    if not (abs(loss) < torch.inf and norm < torch.inf):
        attempt = Attempt(run.step, batch, rows, divisor, run.dtype, rate, random, loss, norm, config.recompute)
        raise diagnose(run.folder, run.model, run.data.tokenizer, attempt)
    spike = run.spikes.spike(loss)
    run.spikes.note(loss, skipped=spike is not None)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        if spike is None:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(run.device)
    return Update(loss, norm, spike)


def validate(run: Run) -> float:
    """Mean loss over the validation tokens in nats, every one of them a target once (up to `eval_tokens`)."""
    config = run.config
    rows = config.micro_batch_size or config.batch_size
    batches = run.data.validation(rows, config.block_size, config.eval_tokens or None)
    return mean_loss(run.model, batches, run.dtype)


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[Batch], dtype: torch.dtype) -> float:
    """The mean loss in nats over every target of the batches, which are read in evaluation mode."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        part = batch.to(model.device)
        with autocast(model.device, dtype):
            total += model.loss(part.tokens, part.targets, 1.0, part.documents).item()
        count += batch.num_targets
    return total / count


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP only leave a note, read at the end of a step; a second one does what it always did."""
    noted: list[int] = []
    numbers = [int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _look(run: Run, sampler: Sampler | None) -> dict[str, float]:
    """Validate and let the model talk; what both say of this step."""
    record, began = {}, time.perf_counter()
    if run.data.val_tokens:
        record["val_loss"] = validate(run)
        record["eval_seconds"] = time.perf_counter() - began
        began = time.perf_counter()
    config, tokenizer = run.config, run.data.tokenizer
    if sampler is not None and config.sample_tokens:
        run.model.eval()
        with torch.compiler.set_stance("force_eager"):  # a prompt of every length would be compiled anew
            text = sampler(run.model, tokenizer, config.sample_prompt, config.sample_tokens)
        with (run.folder / "samples.txt").open("a", encoding="utf-8", newline="") as file:
            file.write(f"--- step {run.step}\n{text}\n\n")
        record["sample_seconds"] = time.perf_counter() - began
    return record
