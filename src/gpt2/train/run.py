"""A run: its folder, its parts, and how it is set up, fresh or from where a checkpoint left off."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gpt2.config import AUTO_BATCH_SIZE, TrainConfig
from gpt2.data.dataset import Dataset
from gpt2.data.loader import BatchLoader
from gpt2.distributed.parallel import DistributedModel, pick_parallel_kind
from gpt2.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from gpt2.errors import UserError
from gpt2.hardware import device_name, measure_matmul, peak_memory
from gpt2.lora import trainable_parameters
from gpt2.model import GPT
from gpt2.optimizers import build_optimizers
from gpt2.planning.costs import flops_per_token
from gpt2.planning.plan import fits_full_model, largest_batch_size
from gpt2.planning.target import setup_device
from gpt2.reporting.findings import RunFacts
from gpt2.reporting.metrics import read_metrics
from gpt2.reporting.plots import plot_loss
from gpt2.reporting.report import MAX_ENTROPY_TOKENS, unigram_entropy, write_markdown_report
from gpt2.runtime import (
    DTYPE_NAMES,
    DTYPES,
    apply_activation_checkpointing,
    compile_blocks,
    pick_compile,
    pick_training_dtype,
)
from gpt2.train.artifact import ModelArtifact
from gpt2.train.checkpoint import latest_checkpoint, load_optimizers
from gpt2.train.early_stopping import BestValidation
from gpt2.train.outlier_batches import OutlierFilter
from gpt2.train.run_folder import check_run_metadata, run_metadata
from gpt2.train.setup import load_model_and_data

log = logging.getLogger("gpt2")


@dataclass
class Run:
    """Everything a step needs."""

    folder: Path
    config: TrainConfig
    data: Dataset
    loader: BatchLoader
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    dtype: torch.dtype
    artifact: ModelArtifact
    ranks: ProcessGroup
    distributed_model: DistributedModel
    step: int = 0  # updates done
    checkpoint: Path | None = None  # the one that the run goes on from
    checkpoint_metadata: dict[str, Any] = field(default_factory=dict)  # what every checkpoint carries: see `run_facts`
    outlier_filter: OutlierFilter = field(default_factory=lambda: OutlierFilter(0.0))
    best_validation: BestValidation = field(default_factory=BestValidation)

    @property
    def early_stopped(self) -> bool:
        """Have so many validations been no better than the best that the run should end?"""
        return 0 < self.config.patience <= self.best_validation.evals_since_best

    @property
    def should_publish(self) -> bool:
        """Are the weights, as they are now, to be the run's own?"""
        return not self.config.keep_best or self.best_validation.step in (None, self.step)

    @property
    def micro_batch_size(self) -> int:
        """Rows of a micro-batch on each rank."""
        return micro_batch_size_per_rank(self.config, self.ranks)

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.block_size


def setup_run(config: TrainConfig, folder: Path, ranks: ProcessGroup = SINGLE_PROCESS) -> Run:
    """From a config to a run that is ready for its next step: fresh, or where a checkpoint in `folder` left off.

    All ranks of a run set it up together, each with its part. Writes nothing.
    Raises UserError for data, models and settings that do not go together, and for ranks that differ.
    """
    with ranks.raise_on_all_ranks():
        device = setup_device(config)
        ranks.set_device(device)
    checkpoint = ranks.broadcast_from_main(lambda: _checkpoint_to_resume(config, folder))
    with ranks.raise_on_all_ranks():
        if checkpoint is not None and not checkpoint.exists():
            raise UserError(f"{checkpoint} is not here: the run folder must be on a disk that every host sees")
    model, data, product = ranks.main_process_first(lambda: load_model_and_data(config, checkpoint))
    config, kind = ranks.broadcast_from_main(lambda: _resolve_config(config, model, device, ranks))
    ranks = ranks.with_timeout(config.rank_timeout)
    facts = run_metadata(config, data)
    ranks.assert_same_on_all_ranks(
        {"a device of kind": device.type, "data": data.fingerprint}, "give all ranks the same data and device"
    )
    with ranks.raise_on_all_ranks():
        if checkpoint is not None:
            check_run_metadata(checkpoint, facts)
        _check_compatible(config, model, data)
        loader = data.loader(config.batch_size, config.block_size, config.seed)
        config = config.with_steps_from_epochs(loader.windows_per_epoch).check()
    if config.recompute:
        apply_activation_checkpointing(model.transformer.h)
    if config.compile:
        compile_blocks(model.transformer.h)
    spread = DistributedModel(kind, model, ranks, device)
    optimizers = build_optimizers(model, config)
    run = Run(
        folder=folder,
        config=config,
        data=data,
        loader=loader,
        model=model,
        optimizers=optimizers,
        device=device,
        dtype=DTYPES[config.dtype],
        artifact=product,
        ranks=ranks,
        distributed_model=spread,
        checkpoint=checkpoint,
        checkpoint_metadata=facts,
    )
    if checkpoint is not None:
        with ranks.raise_on_all_ranks():
            run.step = load_optimizers(checkpoint, model, optimizers)
            if run.step > config.max_steps:
                raise UserError(f"{folder} has done {run.step:,} steps, more than --max-steps ({config.max_steps:,})")
    records = ranks.broadcast_from_main(lambda: _read_metrics_until(run.step, folder))
    run.best_validation = BestValidation(records)
    if config.skip_spikes:
        run.outlier_filter = OutlierFilter(config.skip_spikes, records)
    return run


def _checkpoint_to_resume(config: TrainConfig, folder: Path) -> Path | None:
    """The checkpoint that the run goes on from; None for a fresh one."""
    if not config.data:
        raise UserError(
            "--data is missing: name what the model should learn from (gpt2 data list shows what has a name)"
        )
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None and any((folder / name).exists() for name in ("model", "adapter")):
        raise UserError(f"{folder} has no whole checkpoint to go on from: --init-from {folder}, with another --name")
    return checkpoint


def _resolve_config(
    config: TrainConfig, model: GPT, device: torch.device, ranks: ProcessGroup
) -> tuple[TrainConfig, str]:
    """The config with all that was left to us chosen, and how the ranks share the model: see `parallel.pick_kind`."""
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
    if config.batch_size == AUTO_BATCH_SIZE:
        rows = largest_batch_size(config, shape, device, dtype, ranks.local_world_size)
        config = replace(config, batch_size=rows * ranks.world_size, micro_batch_size=None)
    micro_batch_size_per_rank(config, ranks)  # for its errors
    fits = fits_full_model(config, shape, device, dtype, config.batch_size // ranks.world_size, ranks.local_world_size)
    return config, pick_parallel_kind(config, ranks, fits=fits)


def micro_batch_size_per_rank(config: TrainConfig, ranks: ProcessGroup) -> int:
    """Rows of a micro-batch on each rank. Raises UserError where the batch cannot be shared so."""
    share, left = divmod(config.batch_size, ranks.world_size)
    if left:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be shared by {ranks.world_size} ranks: make it a multiple of them"
        )
    rows = min(config.micro_batch_size or share, share)
    if share % rows:
        raise UserError(f"each rank has {share} rows of the batch, which --micro-batch-size {rows} does not divide")
    return rows


def _check_compatible(config: TrainConfig, model: GPT, data: Dataset) -> None:
    """Raises UserError when the data's tokens are not the model's, or the sample's prompt is longer than it can see."""
    if data.tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{config.data} has {data.tokenizer.vocab_size:,} token ids, the model {model.config.vocab_size:,}"
        )
    prompt = data.tokenizer.encode(config.sample_prompt, allow_special=True)
    if config.sample_tokens and len(prompt) > model.config.block_size:
        context = model.config.block_size
        raise UserError(f"--sample-prompt has {len(prompt)} tokens, more than the context of {context}")


def _read_metrics_until(step: int, folder: Path) -> list[dict[str, Any]]:
    metrics = folder / "metrics.jsonl"
    return [record for record in read_metrics(metrics) if record["step"] <= step] if metrics.exists() else []


def describe_run(run: Run) -> str:
    """Two lines on what is about to be trained, on what."""
    config, data = run.config, run.data
    held_out = f"{data.val_tokens:,} held out" if data.val_tokens else "none held out"
    compiled = ", compiled" if config.compile else ""
    together = "" if run.ranks.is_single_process else f"{run.ranks.world_size} ranks ({run.distributed_model.kind}) of "
    learned = sum(parameter.numel() for parameter in trainable_parameters(run.model).values())
    some = f", {learned:,} of them learned" if learned < run.model.num_parameters() else ""
    return (
        f"model: {run.model.num_parameters():,} parameters{some}, {config.n_layer} layers of {config.n_embd}, "
        f"context {config.block_size}, on {together}{run.device} in {config.dtype}{compiled}\n"
        f"data: {data.name}, {data.train_tokens:,} tokens to learn from, {held_out}"
    )


def write_report(run: Run, stop_reason: str) -> None:
    """Leave the picture and the report of a run that ends here; `why_stopped` is empty for one that is done."""
    vocab_size = run.data.tokenizer.vocab_size
    peak = peak_memory(run.device)  # before anything is measured here
    entropy = unigram_entropy(run.data.token_counts(MAX_ENTROPY_TOKENS))
    title = f"{run.config.name}: {run.model.num_parameters() / 1e6:.1f}M parameters on {run.data.name}"
    try:
        plot_loss(run.folder, title, vocab_size, entropy)
    except UserError as error:  # matplotlib is optional, and the run is worth as much without the picture
        log.warning("%s", error)
    write_markdown_report(run.folder, _run_facts(run, entropy, peak, stop_reason))


def _run_facts(run: Run, entropy: float, peak: int, stop_reason: str) -> RunFacts:
    config, data = run.config, run.data
    return RunFacts(
        parameters=run.model.num_parameters(),
        vocab_size=data.tokenizer.vocab_size,
        tokenizer=data.tokenizer.name,
        device=device_name(run.device)
        if run.ranks.world_size == 1
        else f"{run.ranks.world_size} x {device_name(run.device)}",
        data=data.name,
        train_tokens=data.train_tokens,
        val_tokens=data.val_tokens,
        tokens_per_epoch=run.loader.windows_per_epoch * config.block_size,
        flops_per_token=flops_per_token(run.model.config, config.block_size),
        matmul_flops=None if stop_reason else run.ranks.world_size * measure_matmul(run.device, run.dtype),
        peak_memory_bytes=peak or None,
        unigram_entropy=entropy,
        bytes_per_token=data.bytes_per_token,
        finished=not stop_reason,
        why_stopped=stop_reason,
    )
