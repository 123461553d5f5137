"""A run: its folder, its parts, and how it is set up, fresh or from where a checkpoint left off."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gpt2.costs import flops_per_token
from gpt2.data.dataset import Dataset
from gpt2.data.loader import Batches
from gpt2.errors import UserError
from gpt2.hardware import device_name, measure_matmul, peak_memory
from gpt2.lora import trainable_parameters
from gpt2.model import GPT
from gpt2.runtime import (
    DTYPE_NAMES,
    compile_blocks,
    pick_compile,
    pick_training_dtype,
    recompute_blocks,
    seed_everything,
)
from gpt2.train.best import Best
from gpt2.train.checkpoint import load_checkpoint, newest_checkpoint
from gpt2.train.config import AUTO, TrainConfig
from gpt2.train.findings import RunFacts
from gpt2.train.folder import check_facts, run_facts
from gpt2.train.optim import build_optimizers
from gpt2.train.plan import largest_batch, ready_device
from gpt2.train.product import Product
from gpt2.train.report import plot_loss, read_metrics
from gpt2.train.spikes import SpikeGuard
from gpt2.train.start import start
from gpt2.train.summary import ENTROPY_TOKENS, unigram_entropy, write_report

log = logging.getLogger("gpt2")


@dataclass
class Run:
    """Everything a step needs."""

    folder: Path
    config: TrainConfig
    data: Dataset
    loader: Batches
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    dtype: torch.dtype
    product: Product
    step: int = 0  # updates done
    checkpoint: Path | None = None  # the one that the run goes on from
    facts: dict[str, Any] = field(default_factory=dict)  # what every checkpoint carries: see `run_facts`
    spikes: SpikeGuard = field(default_factory=lambda: SpikeGuard(0.0))
    best: Best = field(default_factory=Best)

    @property
    def given_up(self) -> bool:
        """Have so many validations been no better than the best that the run should end?"""
        return 0 < self.config.patience <= self.best.since

    @property
    def publishes(self) -> bool:
        """Are the weights, as they are now, to be the run's own?"""
        return not self.config.keep_best or self.best.step in (None, self.step)

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.block_size


def set_up(config: TrainConfig, folder: Path) -> Run:
    """From a config to a run that is ready for its next step: fresh, or where a checkpoint in `folder` left off.

    Writes nothing. Raises UserError for data, models and settings that do not go together.
    """
    if not config.data:
        raise UserError(
            "--data is missing: name what the model should learn from (gpt2 data list shows what has a name)"
        )
    device = ready_device(config)
    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None and any((folder / name).exists() for name in ("model", "adapter")):
        raise UserError(f"{folder} has no whole checkpoint to go on from: --init-from {folder}, with another --name")
    model, data, product = start(config, checkpoint)
    config, dtype = _resolved(config, model, device)
    facts = run_facts(config, data)
    if checkpoint is not None:
        check_facts(checkpoint, facts)
    _check_fit(config, model, data)
    model.to(device)
    loader = data.loader(config.batch_size, config.block_size, config.seed)
    config = config.in_epochs(loader.windows_per_epoch).check()
    optimizers = build_optimizers(model, config)
    run = Run(
        folder, config, data, loader, model, optimizers, device, dtype, product, checkpoint=checkpoint, facts=facts
    )
    if checkpoint is None:
        seed_everything(config.seed)  # anew: what was measured on the way drew numbers that a resumed run does not draw
    else:
        run.step = load_checkpoint(checkpoint, model, optimizers)
        if run.step > config.max_steps:
            raise UserError(f"{folder} has done {run.step:,} steps, more than --max-steps ({config.max_steps:,})")
    records = _records_until(run.step, folder)
    run.best = Best(records)
    if config.skip_spikes:
        run.spikes = SpikeGuard(config.skip_spikes, records)
    if config.recompute:
        recompute_blocks(model.transformer.h)
    if config.compile:
        compile_blocks(model.transformer.h)
    return run


def _resolved(config: TrainConfig, model: GPT, device: torch.device) -> tuple[TrainConfig, torch.dtype]:
    """The config with all that was left to us chosen, and the dtype of matrix products."""
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
    if config.batch_size == AUTO:
        config = replace(config, batch_size=largest_batch(config, shape, device, dtype), micro_batch_size=None)
    return config, dtype


def _check_fit(config: TrainConfig, model: GPT, data: Dataset) -> None:
    """Raises UserError when the data's tokens are not the model's, or the sample's prompt is longer than it can see."""
    if data.tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{config.data} has {data.tokenizer.vocab_size:,} token ids, the model {model.config.vocab_size:,}"
        )
    prompt = data.tokenizer.encode(config.sample_prompt, allow_special=True)
    if config.sample_tokens and len(prompt) > model.config.block_size:
        context = model.config.block_size
        raise UserError(f"--sample-prompt has {len(prompt)} tokens, more than the context of {context}")


def _records_until(step: int, folder: Path) -> list[dict[str, Any]]:
    metrics = folder / "metrics.jsonl"
    return [record for record in read_metrics(metrics) if record["step"] <= step] if metrics.exists() else []


def describe(run: Run) -> str:
    """Two lines on what is about to be trained, on what."""
    config, data = run.config, run.data
    held_out = f"{data.val_tokens:,} held out" if data.val_tokens else "none held out"
    compiled = ", compiled" if config.compile else ""
    learned = sum(parameter.numel() for parameter in trainable_parameters(run.model).values())
    some = f", {learned:,} of them learned" if learned < run.model.num_parameters() else ""
    return (
        f"model: {run.model.num_parameters():,} parameters{some}, {config.n_layer} layers of {config.n_embd}, "
        f"context {config.block_size}, on {run.device} in {config.dtype}{compiled}\n"
        f"data: {data.name}, {data.train_tokens:,} tokens to learn from, {held_out}"
    )


def explain(run: Run, why_stopped: str) -> None:
    """Leave the picture and the report of a run that ends here; `why_stopped` is empty for one that is done."""
    vocab_size = run.data.tokenizer.vocab_size
    peak = peak_memory(run.device)  # before anything is measured here
    entropy = unigram_entropy(run.data.token_counts(ENTROPY_TOKENS))
    title = f"{run.config.name}: {run.model.num_parameters() / 1e6:.1f}M parameters on {run.data.name}"
    try:
        plot_loss(run.folder, title, vocab_size, entropy)
    except UserError as error:  # matplotlib is optional, and the run is worth as much without the picture
        log.warning("%s", error)
    write_report(run.folder, _facts(run, entropy, peak, why_stopped))


def _facts(run: Run, entropy: float, peak: int, why_stopped: str) -> RunFacts:
    config, data = run.config, run.data
    return RunFacts(
        parameters=run.model.num_parameters(),
        vocab_size=data.tokenizer.vocab_size,
        tokenizer=data.tokenizer.name,
        device=device_name(run.device),
        data=data.name,
        train_tokens=data.train_tokens,
        val_tokens=data.val_tokens,
        flops_per_token=flops_per_token(run.model.config, config.block_size),
        matmul_flops=None if why_stopped else measure_matmul(run.device, run.dtype),
        peak_memory_bytes=peak or None,
        unigram_entropy=entropy,
        bytes_per_token=data.bytes_per_token,
        finished=not why_stopped,
        why_stopped=why_stopped,
    )
