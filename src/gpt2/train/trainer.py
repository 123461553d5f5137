"""The training loop, short enough to read aloud."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from gpt2.data.loader import Loader, evaluation_batches
from gpt2.data.prepare import TokenData, open_data
from gpt2.data.shards import TokenShards
from gpt2.errors import UserError
from gpt2.loss import IGNORE
from gpt2.model import GPT, GPTConfig
from gpt2.runtime import (
    DTYPE_NAMES,
    autocast,
    compile_blocks,
    pick_compile,
    pick_device,
    pick_training_dtype,
    seed_everything,
    synchronize,
)
from gpt2.tokenizer import Tokenizer, load_tokenizer
from gpt2.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from gpt2.train.config import TrainConfig, to_toml
from gpt2.train.optim import build_optimizer, learning_rate
from gpt2.train.report import Report, plot_loss
from gpt2.weights import find_model, load, save

log = logging.getLogger("gpt2")

Sampler = Callable[[GPT, Tokenizer, str, int], str]  # (model, tokenizer, prompt, number of tokens) -> text


class Interrupted(Exception):
    """The run was asked to stop, has saved its state, and can go on later. `folder` is the run's."""

    def __init__(self, folder: Path, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step:,}, everything saved; go on with: gpt2 train --resume {folder}")
        self.folder, self.step, self.signal_number = folder, step, signal_number


@dataclass
class Run:
    """Everything a step needs."""

    folder: Path
    config: TrainConfig
    data: TokenData
    model: GPT
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype
    step: int = 0  # updates done


def train(config: TrainConfig, sampler: Sampler | None = None) -> Path:
    """Train as `config` says, and return the run folder.

    sampler: writes a text with the model as it is; asked at every validation.

    Raises UserError for what the user can mend, and Interrupted after a SIGINT or SIGTERM was obeyed.
    """
    run = set_up(config)
    config, loader = run.config, Loader(run.data.train, run.config.batch_size, run.config.block_size, run.config.seed)
    tokens_per_step = config.batch_size * config.block_size
    with Report(run.folder, run.step, config.max_steps) as report, noted_signals() as signals:
        report.say(f"{describe(run)}\nrun folder: {run.folder}")
        if run.step == config.max_steps:
            report.say(f"nothing to do: all {config.max_steps:,} steps were done")
        while run.step < config.max_steps:
            began = time.perf_counter()
            tokens, targets = loader.batch(run.step)
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
            if run.data.val is not None and (last or _due(run.step, config.eval_every)):
                record["val_loss"] = validate(run, run.data.val)
                _write_sample(run, sampler)
            report.step(record)
            if last or stop or _due(run.step, config.save_every):
                _save(run)
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
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    synchronize(run.device)
    return loss.item(), norm.item()


@torch.no_grad()
def validate(run: Run, tokens: TokenShards) -> float:
    """Mean loss over the validation tokens in nats, every one of them a target once (up to `eval_tokens`)."""
    run.model.eval()
    config = run.config
    rows = config.micro_batch_size or config.batch_size
    total, count = torch.zeros((), device=run.device, dtype=torch.float64), 0
    for inputs, targets in evaluation_batches(tokens, rows, config.block_size, config.eval_tokens or None):
        with autocast(run.device, run.dtype):
            total += run.model.loss(inputs.to(run.device), targets.to(run.device), divisor=1.0)
        count += int((targets != IGNORE).sum())
    return total.item() / count


def set_up(config: TrainConfig) -> Run:
    """From a config to a run that is ready for its next step: fresh, or where a checkpoint left off."""
    config.check()
    folder = _run_folder(config)
    device = pick_device(config.device)
    init = find_model(config.init_from) if config.init_from else None
    data = open_data(config.data, _tokenizer_for(config, init))
    seed_everything(config.seed)
    model = _fresh_model(config, data.tokenizer) if init is None else _given_model(config, init)
    model.to(device)
    shape, dtype = model.config, pick_training_dtype(config.dtype, device, model.config.n_embd)
    config = replace(
        config,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        block_size=min(config.block_size, shape.block_size),
        device=str(device),
        dtype=DTYPE_NAMES[dtype],
        compile=pick_compile(config.compile, device, config.max_steps),
    )
    run = Run(folder, config, data, model, build_optimizer(model, config), device, dtype)
    Loader(data.train, config.batch_size, config.block_size, config.seed)  # refuses data that is too short
    _start_folder(run)
    if config.compile:
        compile_blocks(model.transformer.h)
    return run


def describe(run: Run) -> str:
    """Two lines on what is about to be trained, on what."""
    config, data = run.config, run.data
    held_out = f"{len(data.val):,} held out" if data.val is not None else "none held out"
    compiled = ", compiled" if config.compile else ""
    return (
        f"model: {run.model.num_parameters():,} parameters, {config.n_layer} layers of {config.n_embd}, "
        f"context {config.block_size}, on {run.device} in {config.dtype}{compiled}\n"
        f"data: {data.name}, {len(data.train):,} tokens to learn from, {held_out}"
    )


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM only leave a note here, read at the end of a step; a second one does what it always did."""
    noted: list[int] = []
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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


def _run_folder(config: TrainConfig) -> Path:
    """Where the run lives. Raises UserError for a folder that holds another run, or not the one to resume."""
    if config.name is None or Path(config.name).name != config.name:
        raise UserError(f"a run needs a --name that can be a folder's, not '{config.name or ''}'")
    folder = Path(config.out_dir) / config.name
    if config.resume == "never" and folder.exists():
        raise UserError(f"{folder} exists: --resume auto goes on with it, another --name starts beside it")
    return folder


def _tokenizer_for(config: TrainConfig, init: Path | None) -> str | None:
    """What `open_data` should tokenize with: the model's own tokenizer when one is given, else what was asked for."""
    if init is None or config.tokenizer is not None:
        return config.tokenizer
    return str(init) if load_tokenizer(init) is not None else "gpt2"


def _fresh_model(config: TrainConfig, tokenizer: Tokenizer) -> GPT:
    return GPT(
        GPTConfig(
            vocab_size=tokenizer.vocab_size,
            block_size=config.block_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            dropout=config.dropout,
        )
    )


def _given_model(config: TrainConfig, folder: Path) -> GPT:
    given, _ = load(folder)
    model = GPT(replace(given.config, dropout=config.dropout))
    model.load_state_dict(given.state_dict())
    return model


def _start_folder(run: Run) -> None:
    """Make the run folder, or take up the state of its newest checkpoint."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        checkpoint = newest_checkpoint(run.folder / "checkpoints")
        if checkpoint is not None:
            run.step = load_checkpoint(checkpoint, run.model, run.optimizer)
        (run.folder / "config.toml").write_text(to_toml(replace(run.config, resume="never")))
    except OSError as error:
        raise UserError(f"cannot write the run folder {run.folder}: {error.strerror or error}") from error


def _save(run: Run) -> None:
    checkpoints = run.folder / "checkpoints"
    tokenizer = run.data.tokenizer
    save_checkpoint(checkpoints, run.step, run.model, tokenizer, run.optimizer, run.config.keep_checkpoints)
    save(run.model, tokenizer, run.folder / "model")


def _write_sample(run: Run, sampler: Sampler | None) -> None:
    config, tokenizer = run.config, run.data.tokenizer
    if sampler is None or config.sample_tokens == 0:
        return
    run.model.eval()
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
