"""The training loop, short enough to read aloud."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from gpt2.data.loader import evaluation_batches
from gpt2.data.shards import TokenShards
from gpt2.errors import UserError
from gpt2.loss import IGNORE
from gpt2.model import GPT
from gpt2.runtime import autocast, synchronize
from gpt2.tokenizer import Tokenizer
from gpt2.train.config import TrainConfig
from gpt2.train.optim import learning_rate
from gpt2.train.report import Report, plot_loss
from gpt2.train.run import Run, describe, save_run, set_up

log = logging.getLogger("gpt2")

Sampler = Callable[[GPT, Tokenizer, str, int], str]  # (model, tokenizer, prompt, number of tokens) -> text


class Interrupted(Exception):
    """The run was asked to stop, has saved its state, and can go on later. `folder` is the run's."""

    def __init__(self, folder: Path, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step:,}, everything saved; go on with: gpt2 train --resume {folder}")
        self.folder, self.step, self.signal_number = folder, step, signal_number


def train(config: TrainConfig, sampler: Sampler | None = None) -> Path:
    """Train as `config` says, and return the run folder.

    sampler: writes a text with the model as it is; asked at every validation.

    Raises UserError for what the user can mend, and Interrupted after a SIGINT or SIGTERM was obeyed.
    """
    run = set_up(config)
    config = run.config
    tokens_per_step = config.batch_size * config.block_size
    with Report(run.folder, run.step, config.max_steps) as report, noted_signals() as signals:
        report.say(f"{describe(run)}\nrun folder: {run.folder}")
        if run.step == config.max_steps:
            report.say(f"nothing to do: all {config.max_steps:,} steps were done")
        while run.step < config.max_steps:
            began = time.perf_counter()
            tokens, targets = run.loader.batch(run.step)
            run.step += 1
            rate = learning_rate(run.step, config)
            loss, grad_norm = update(run, tokens, targets, rate)
            seconds = time.perf_counter() - began
            record = {
                "step": run.step,
                "loss": loss,
                "lr": rate,
                "grad_norm": grad_norm,
                "tokens": run.step * tokens_per_step,
                "seconds": round(seconds, 6),
                "tokens_per_second": round(tokens_per_step / seconds, 1),
            }
            last, stop = run.step == config.max_steps, bool(signals)
            if last or _due(run.step, config.eval_every):
                if run.data.val is not None:
                    record["val_loss"] = validate(run, run.data.val)
                _write_sample(run, sampler)
            report.step(record)
            if last or stop or _due(run.step, config.save_every):
                save_run(run)
            if stop and not last:
                raise Interrupted(run.folder, run.step, signals[0])
    _plot(run)
    return run.folder


def update(run: Run, tokens: Tensor, targets: Tensor, rate: float) -> tuple[float, float]:
    """One optimizer step on a global batch, (B, T) each; returns its mean loss and the norm of its gradient.

    The micro-batches' losses are sums divided by the whole batch's number of targets, so their gradients add up to
    the gradient of the whole, however it is cut.
    """
    run.model.train()
    config = run.config
    divisor = float((targets != IGNORE).sum())
    rows = config.micro_batch_size or config.batch_size
    loss = torch.zeros((), device=run.device)
    for part, part_targets in zip(tokens.split(rows), targets.split(rows), strict=True):
        part, part_targets = part.to(run.device), part_targets.to(run.device)
        with autocast(run.device, run.dtype):
            part_loss = run.model.loss(part, part_targets, divisor)
        part_loss.backward()
        loss += part_loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or torch.inf)
    if not (loss.isfinite() and norm.isfinite()):
        raise UserError(
            f"the loss or its gradient is not finite at step {run.step:,}: lower --lr, or lengthen --warmup-steps"
        )
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(run.device)
    return loss.item(), norm.item()


@torch.no_grad()
def validate(run: Run, tokens: TokenShards) -> float:
    """Mean loss over the validation tokens in nats, every one of them a target once (up to `eval_tokens`)."""
    run.model.eval()
    config = run.config
    rows = config.micro_batch_size or config.batch_size
    total, count = 0.0, 0
    for inputs, targets in evaluation_batches(tokens, rows, config.block_size, config.eval_tokens or None):
        with autocast(run.device, run.dtype):
            total += run.model.loss(inputs.to(run.device), targets.to(run.device), divisor=1.0).item()
        count += int((targets != IGNORE).sum())
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


def _write_sample(run: Run, sampler: Sampler | None) -> None:
    config, tokenizer = run.config, run.data.tokenizer
    if sampler is None or config.sample_tokens == 0:
        return
    run.model.eval()
    with torch.compiler.set_stance("force_eager"):  # a prompt of every length would be compiled anew
        text = sampler(run.model, tokenizer, config.sample_prompt, config.sample_tokens)
    with (run.folder / "samples.txt").open("a", encoding="utf-8") as file:
        file.write(f"--- step {run.step}\n{text}\n\n")


def _plot(run: Run) -> None:
    config = run.config
    title = f"{config.name}: {run.model.num_parameters() / 1e6:.1f}M parameters on {run.data.name}"
    try:
        plot_loss(run.folder, title, run.model.config.vocab_size)
    except UserError as error:  # matplotlib is optional, and the run is worth as much without the picture
        log.warning("%s", error)
