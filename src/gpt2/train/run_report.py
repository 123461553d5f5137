"""The description of a run at its start, and its loss plot and report at its end."""

import logging
from collections.abc import Mapping

from gpt2.data.mixture import MixtureDataset, MixtureLoader
from gpt2.errors import UserError
from gpt2.hardware import device_name, measure_matmul, peak_memory
from gpt2.lora import trainable_parameters
from gpt2.planning.costs import flops_per_token
from gpt2.reporting.findings import RunFacts
from gpt2.reporting.plots import plot_loss
from gpt2.reporting.report import MAX_ENTROPY_TOKENS, unigram_entropy, write_markdown_report
from gpt2.train.setup import Run

log = logging.getLogger("gpt2")


def describe_run(run: Run) -> tuple[str, ...]:
    """Lines: the model and the device, the data, and the parts of a mixture."""
    config, data = run.config, run.data
    validation = f"{data.val_tokens:,} validation tokens" if data.val_tokens else "no validation tokens"
    compiled = ", compiled" if config.compile else ""
    parallel = "" if run.ranks.is_single_process else f"{run.ranks.world_size} ranks ({run.distributed_model.kind}) of "
    reason = f" (--dtype auto: {run.dtype_reason})" if run.dtype_reason else ""
    trainable = sum(parameter.numel() for parameter in trainable_parameters(run.model).values())
    partly = f", {trainable:,} of them trainable" if trainable < run.model.num_parameters() else ""
    return (
        f"model: {run.model.num_parameters():,} parameters{partly}, {config.n_layer} layers of {config.n_embd}, "
        f"context {config.block_size}, on {parallel}{run.device} in {config.dtype}{reason}{compiled}",
        f"data: {data.name}, {data.train_tokens:,} training tokens, {validation}",
        *_describe_mixture(run),
    )


def _describe_mixture(run: Run) -> list[str]:
    """How often the run goes through each part of a mixture, a line each; empty for other data."""
    if not isinstance(run.loader, MixtureLoader):
        return []
    assert isinstance(run.data, MixtureDataset)
    epochs = run.loader.epochs(run.config.max_steps * run.loader.batch_size)
    parts = zip(run.data.parts, run.data.shares, epochs, strict=True)
    return [f"  {part.name}: {float(share):.1%} of the rows, {n:.2f} epochs" for part, share, n in parts]


def write_report(run: Run, stop_reason: str, published: Mapping[str, Mapping[str, float]] | None = None) -> None:
    """Write the loss plot and the report of a run that ends here; `stop_reason` is empty if it is finished.

    published: values of OpenAI's models on the evaluation tasks: see `task_evaluation.TaskEvaluator`.
    """
    vocab_size = run.data.tokenizer.vocab_size
    peak = peak_memory(run.device)  # before the measurement below uses memory
    entropy = unigram_entropy(run.data.token_counts(MAX_ENTROPY_TOKENS))
    title = f"{run.config.name}: {run.model.num_parameters() / 1e6:.1f}M parameters on {run.data.name}"
    try:
        plot_loss(run.folder, title, vocab_size, entropy, published)
    except UserError as error:  # matplotlib is an optional dependency
        log.warning("%s", error)
    write_markdown_report(run.folder, _run_facts(run, entropy, peak, stop_reason), published)


def _run_facts(run: Run, entropy: float, peak: int, stop_reason: str) -> RunFacts:
    config, data, size = run.config, run.data, run.ranks.world_size
    return RunFacts(
        parameters=run.model.num_parameters(),
        vocab_size=data.tokenizer.vocab_size,
        tokenizer=data.tokenizer.name,
        device=f"{size} x {device_name(run.device)}" if size > 1 else device_name(run.device),
        data=data.name,
        train_tokens=data.train_tokens,
        val_tokens=data.val_tokens,
        tokens_per_epoch=run.loader.windows_per_epoch * config.block_size,
        flops_per_token=flops_per_token(run.model.config, config.block_size),
        matmul_flops=None if stop_reason else size * measure_matmul(run.device, run.dtype),
        peak_memory_bytes=peak or None,
        unigram_entropy=entropy,
        bytes_per_token=data.bytes_per_token,
        finished=not stop_reason,
        why_stopped=stop_reason,
    )
