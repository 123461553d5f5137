"""Findings about a run: problems and opportunities that its metrics show, each with advice.

Pure functions of the records of `metrics.jsonl`, the config, and facts that neither contains.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

from gpt2.config import TrainConfig

Record = dict[str, Any]  # one line of metrics.jsonl

TIME_FIELDS = {  # the fields of a record that hold seconds, and their labels
    "update_seconds": "updates",
    "data_seconds": "waiting for data",
    "eval_seconds": "validation",
    "sample_seconds": "samples",
    "save_seconds": "checkpoints",
}
PAUSE_FIELDS = ("eval_seconds", "sample_seconds", "save_seconds")


@dataclass(frozen=True)
class RunFacts:
    """What a report needs beyond the files of the run folder. None: unknown."""

    parameters: int
    vocab_size: int
    tokenizer: str  # its name: gpt2, bytes, bpe, ...
    device: str  # its product name
    data: str  # the corpus's name
    train_tokens: int
    val_tokens: int | None  # None without a validation split
    flops_per_token: float  # of a training step, forward and backward
    tokens_per_epoch: int | None = None  # with prompts and padding; None: train_tokens
    matmul_flops: float | None = None  # FLOP/s of large matrix products in the run's dtype, on all its devices
    peak_memory_bytes: int | None = None
    unigram_entropy: float | None = None  # nats per token, of the train split
    bytes_per_token: float | None = None  # of the validation text
    finished: bool = True
    why_stopped: str = ""  # if not finished, the reason: "SIGTERM", "--max-minutes"


@dataclass(frozen=True)
class Finding:
    """An observation about a run, and advice that names the flags to use."""

    name: str
    observation: str
    advice: str


def findings(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> list[Finding]:
    """The findings about a run, the most important first; at least one for a run without problems."""
    found = [
        _unfinished(records, config, facts),
        _diverged(records, config),
        _overfitting(records, config, facts),
        _no_context(records, facts),
    ]
    if not any(found):  # else more steps would not help
        found += _convergence(records, config, facts)
    found += [_no_validation(records, facts), _outlier_steps(records, config), _clipping(records, config)]
    found += [*_slow_pauses(records, config, facts), _data_bound(records), _low_mfu(records, config, facts)]
    return [finding for finding in found if finding is not None]


def time_spent(records: Sequence[Record]) -> dict[str, float]:
    """Seconds by category, "other" for the rest.

    A record's `seconds` is the whole step; where its parts add up to more, the sum of the parts counts.
    """
    spent = {label: sum(r.get(field, 0.0) for r in records) for field, label in TIME_FIELDS.items()}
    total = sum(max(r.get("seconds", 0.0), sum(r.get(field, 0.0) for field in TIME_FIELDS)) for r in records)
    return spent | {"other": max(0.0, total - sum(spent.values()))}


def model_flops_utilization(records: Sequence[Record], facts: RunFacts) -> float | None:
    """MFU: the FLOP/s of the median step as a share of the device's measured rate of matrix products."""
    values = throughputs(records)
    if not facts.matmul_flops or not values:
        return None
    return facts.flops_per_token * median(values) / facts.matmul_flops


def _unfinished(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> Finding | None:
    if facts.finished:
        return None
    reason = f" ({facts.why_stopped})" if facts.why_stopped else ""
    done = records[-1]["step"] if records else 0
    observation = f"The run stopped{reason} after step {done:,} of {config.max_steps:,}."
    folder = Path(config.out_dir) / (config.name or "")
    return Finding("unfinished", observation, f"Resume it: `gpt2 train --resume {folder}`.")


def _diverged(records: Sequence[Record], config: TrainConfig) -> Finding | None:
    """The training loss of the last twentieth of the run is clearly above that of the best twentieth."""
    losses = [r["loss"] for r in valid_steps(records)]
    width = len(losses) // 20
    if width < 2:
        return None
    blocks = [losses[i : i + width] for i in range(len(losses) % width, len(losses), width)]
    best, last = min(blocks, key=fmean), blocks[-1]
    rise = fmean(last) - fmean(best)
    if rise < max(0.1 * abs(fmean(best)), 4 * _standard_error(best, last)):
        return None
    observation = f"The training loss ends at {fmean(last):.3f}, {rise:.3f} above its best: the run has diverged."
    warmup = f"`--warmup-steps {max(100, 2 * config.warmup_steps)}`"
    return Finding(
        "diverged", observation, f"Lower the learning rate: {_lower_lr_flag(config)}, and warm up: {warmup}."
    )


def _overfitting(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> Finding | None:
    """The last validation loss is above the best, two or more before it, by more than noise; the training loss fell."""
    steps = [step for step, _ in validation_losses(records)]
    losses = [loss for _, loss in validation_losses(records)]
    best = losses.index(min(losses)) if losses else 0
    if len(losses) < 3 or best > len(losses) - 3:
        return None
    bends = [abs(a - 2 * b + c) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    noise = median(bends) / 0.6745 / math.sqrt(6)  # standard deviation, if independent and normal
    rise = losses[-1] - losses[best]
    window = max(1, len(valid_steps(records)) // 20)
    before = [r["loss"] for r in valid_steps(records) if r["step"] <= steps[best]][-window:]
    after = [r["loss"] for r in valid_steps(records)][-window:]
    if rise < max(0.005 * losses[best], 3 * noise) or not before or fmean(after) >= fmean(before):
        return None
    observation = (
        f"Overfitting: the validation loss was best, {losses[best]:.3f}, at step {steps[best]:,} and rose to "
        f"{losses[-1]:.3f}, while the training loss fell to {fmean(after):.3f}. {_epochs_sentence(records, facts)}"
    )
    advice = (
        f"Against overfitting, use more text. With this text: `--dropout {_higher_dropout(config.dropout)}`, "
        f"early stopping with `--max-steps {steps[best]}`, or a smaller model."
    )
    return Finding("overfitting", observation, advice)


def _no_validation(records: Sequence[Record], facts: RunFacts) -> Finding | None:
    if facts.val_tokens or validation_losses(records):
        return None
    observation = "There is no validation split, so overfitting cannot be detected."
    advice = "Hold out a validation split: `gpt2 data prepare` makes shards with one."
    return Finding("no validation", observation, advice)


def _no_context(records: Sequence[Record], facts: RunFacts) -> Finding | None:
    loss, _ = final_loss(records)
    if facts.unigram_entropy is None or not loss >= facts.unigram_entropy:
        return None
    observation = f"The loss of {loss:.3f} is not below the unigram baseline of {facts.unigram_entropy:.3f}."
    steps = max(1000, 10 * records[-1]["step"])
    return Finding(
        "no context", observation, f"The model does not use context yet: train longer, `--max-steps {steps}`."
    )


def _outlier_steps(records: Sequence[Record], config: TrainConfig) -> Finding | None:
    """Steps that were taken with a loss far above those before."""
    losses = [r["loss"] for r in valid_steps(records)]
    high = 0
    for start in range(32, len(losses), 32):  # each block of 32 is judged by the block before it
        before = losses[start - 32 : start]
        middle = median(before)
        spread = median(abs(loss - middle) for loss in before) / 0.6745
        high += sum(loss - middle > max(8 * spread, 0.2 * abs(middle)) for loss in losses[start : start + 32])
    if not high:
        return None
    observation = f"{high:,} of {len(losses):,} steps had a loss 8 or more deviations above those before."
    skip = f"`--skip-spikes {config.skip_spikes / 2 or 5:g}`"
    advice = f"Skip outlier batches: {skip}; if there are many, lower the learning rate: {_lower_lr_flag(config)}."
    return Finding("spikes", observation, advice)


def _clipping(records: Sequence[Record], config: TrainConfig) -> Finding | None:
    share = clipped_fraction(records, config)
    if share is None or share < 0.8 or len(records) < 20:
        return None
    observation = f"Gradient clipping was active in {share:.0%} of the steps; it is meant for rare large gradients."
    limit = f"`--grad-clip {2 * median(grad_norms(records)):.2g}`"
    advice = f"Clip only unusual gradients: {limit}, or lower the learning rate: {_lower_lr_flag(config)}."
    return Finding("clipping", observation, advice)


def _convergence(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> list[Finding]:
    """Whether the loss still decreased in the last fifth of the run: validation loss if measured, else training."""
    done = records[-1]["step"]
    decrease, which = _late_decrease(records)
    if decrease is None:
        observation = f"{done:,} {'steps are' if done > 1 else 'step is'} too few to show a trend."
        return [Finding("short", observation, f"Train longer: `--max-steps {max(1000, 10 * done)}`.")]
    if decrease >= 0.01:
        observation = f"The {which} loss still fell by {decrease:.1%} in the last fifth of the run."
        longer = Finding("still falling", observation, f"Train longer: `--max-steps {2 * config.max_steps}`.")
        return [longer, _token_budget(records, config, facts)]
    direction = "down" if decrease > 0 else "up"
    observation = f"The {which} loss has levelled off: {abs(decrease):.1%} {direction} in the last fifth of the run."
    gap = final_loss(records)[0] - training_loss(records)
    if gap > 0.15 * training_loss(records) and epochs_done(records, facts) > 2:
        observation += f" It is {gap:.3f} above the training loss. {_epochs_sentence(records, facts)}"
        dropout = f"`--dropout {_higher_dropout(config.dropout)}`"
        advice = f"This is overfitting: use more text (`--data`), or {dropout}."
    else:
        advice = f"More steps will gain little; a larger model may gain more: {_more_layers_flag(config)}."
    return [Finding("levelled off", observation, advice)]


def _token_budget(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> Finding:
    """Tokens against model size: 20 per parameter (Hoffmann et al. 2022), 4 epochs (Muennighoff et al. 2023)."""
    if epochs_done(records, facts) > 4:
        observation = f"{_epochs_sentence(records, facts)} After about 4 epochs, more repetition gains less and less."
        return Finding("budget", observation, "Use more text (`--data`), and watch for overfitting.")
    ratio = records[-1]["tokens"] / facts.parameters
    observation = f"Trained on {ratio:.3g} tokens per parameter; for a given compute budget about 20 are optimal."
    if ratio < 20:
        advice = f"For the same compute, a smaller model on more tokens: `--n-layer {max(1, config.n_layer // 2)}`."
    else:
        advice = f"For the same compute, a larger model on fewer tokens: {_more_layers_flag(config)}."
    return Finding("budget", observation, advice)


def _slow_pauses(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> list[Finding]:
    """Validation, samples and checkpoints that take more than 20%, 10% and 10% of the time."""
    spent = time_spent(records)
    eval_tokens = min(config.eval_tokens or facts.val_tokens or 0, facts.val_tokens or 0)
    rarer = f"`--eval-every {4 * config.eval_every}` or " if config.eval_every else ""
    fixes = {
        "validation": (0.2, f"{rarer}`--eval-tokens {max(1, eval_tokens // 4)}`"),
        "samples": (0.1, f"`--sample-tokens {config.sample_tokens // 4}`"),
        "checkpoints": (0.1, f"`--save-every {4 * config.save_every}`" if config.save_every else "a longer run"),
    }
    found = []
    for label, (limit, fix) in fixes.items():
        share = spent[label] / (sum(spent.values()) or 1.0)
        if share > limit and len(records) > 1:
            observation = f"{label.capitalize()} took {share:.0%} of the time."
            found.append(Finding(f"slow {label}", observation, f"Spend less time on {label}: {fix}."))
    return found


def _data_bound(records: Sequence[Record]) -> Finding | None:
    spent = time_spent(records)
    share = spent["waiting for data"] / (sum(spent.values()) or 1.0)
    if share < 0.05 or len(records) < 2:
        return None
    observation = f"Training waited for data {share:.0%} of the time."
    advice = "Put the shards on a fast local disk: `gpt2 data prepare` there, then `--data`."
    return Finding("waiting for data", observation, advice)


def _low_mfu(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> Finding | None:
    mfu = model_flops_utilization(records, facts)
    if mfu is None or mfu >= 0.4:
        return None
    rows = config.micro_batch_size or config.batch_size
    flags = ["`--dtype bfloat16`"] if config.dtype == "float32" else []
    flags += ["`--compile`"] if not config.compile else []
    larger = next((n for n in range(2 * rows, config.batch_size + 1) if config.batch_size % n == 0), None)
    flags += [f"`--micro-batch-size {larger}`" if larger else "`--batch-size auto`"]
    observation = f"MFU is {mfu:.0%} of the rate that large matrix products reach on this device."
    advice = f"For more throughput, try {', '.join(flags)}; `--profile` shows where a step's time goes."
    return Finding("low mfu", observation, advice)


# --- the statistics that findings are based on; the report shows them too


def valid_steps(records: Sequence[Record]) -> list[Record]:
    """The records of steps that were not skipped and have a finite loss."""
    return [r for r in records if not r.get("skipped") and math.isfinite(r["loss"])]


def validation_losses(records: Sequence[Record]) -> list[tuple[int, float]]:
    """All (step, validation loss)."""
    return [(r["step"], r["val_loss"]) for r in records if math.isfinite(r.get("val_loss", math.nan))]


def training_loss(records: Sequence[Record]) -> float:
    """The mean loss of the last fiftieth of the valid steps; NaN when there are none."""
    losses = [r["loss"] for r in valid_steps(records)]
    return fmean(losses[-max(1, len(losses) // 50) :]) if losses else math.nan


def final_loss(records: Sequence[Record]) -> tuple[float, str]:
    """The last validation loss, or without one the training loss; and "validation" or "training"."""
    values = validation_losses(records)
    return (values[-1][1], "validation") if values else (training_loss(records), "training")


def epochs_done(records: Sequence[Record], facts: RunFacts) -> float:
    """Number of passes over the training split."""
    return records[-1]["tokens"] / (facts.tokens_per_epoch or facts.train_tokens)


def throughputs(records: Sequence[Record]) -> list[float]:
    """Tokens per second of each step, without steps that also validated, sampled or saved."""
    plain = [r["tokens_per_second"] for r in records if not any(r.get(field) for field in PAUSE_FIELDS)]
    return plain or [r["tokens_per_second"] for r in records]


def grad_norms(records: Sequence[Record]) -> list[float]:
    """The gradient norms before clipping of the valid steps."""
    return [r["grad_norm"] for r in valid_steps(records) if math.isfinite(r.get("grad_norm", math.nan))]


def clipped_fraction(records: Sequence[Record], config: TrainConfig) -> float | None:
    """The share of steps with a clipped gradient; None without gradient norms or clipping."""
    values = grad_norms(records)
    if not values or not config.grad_clip:
        return None
    return sum(norm > config.grad_clip for norm in values) / len(values)


def _late_decrease(records: Sequence[Record]) -> tuple[float | None, str]:
    """The relative decrease of the loss over the last fifth of the run, or None; and which loss it is."""
    values = validation_losses(records)
    border = 0.8 * records[-1]["step"]
    before = [loss for step, loss in values if step <= border]
    if len(values) >= 4 and before:
        return 1 - values[-1][1] / before[-1], "validation"
    losses = [r["loss"] for r in valid_steps(records)]
    width = len(losses) // 10
    if width < 4:
        return None, "training"
    middle = len(losses) - 2 * width
    early, late = losses[middle - width // 2 : middle + width // 2], losses[-width:]
    decrease = fmean(early) - fmean(late)
    return (decrease if abs(decrease) > 2 * _standard_error(early, late) else 0.0) / fmean(early), "training"


def _standard_error(a: Sequence[float], b: Sequence[float]) -> float:
    """The standard error of the difference of two means."""
    return math.sqrt(variance(a) / len(a) + variance(b) / len(b))


def _epochs_sentence(records: Sequence[Record], facts: RunFacts) -> str:
    return f"The run did {epochs_done(records, facts):.1f} epochs."


def _lower_lr_flag(config: TrainConfig) -> str:
    return f"`--lr {config.lr / 2:g}`"


def _more_layers_flag(config: TrainConfig) -> str:
    return f"`--n-layer {config.n_layer + max(1, config.n_layer // 2)}`"


def _higher_dropout(dropout: float) -> str:
    return f"{min(0.5, dropout + 0.1):.2g}"
