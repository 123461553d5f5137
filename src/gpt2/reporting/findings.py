"""What a run's metrics say about its health and speed, and what to do about it.

Pure functions of the records of `metrics.jsonl`, the config, and a few facts that neither holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

from gpt2.config import TrainConfig

Record = dict[str, Any]  # one line of metrics.jsonl

TIME_FIELDS = {  # what a step's record says it spent time on
    "update_seconds": "updates",
    "data_seconds": "waiting for data",
    "eval_seconds": "validation",
    "sample_seconds": "samples",
    "save_seconds": "checkpoints",
}
PAUSE_FIELDS = ("eval_seconds", "sample_seconds", "save_seconds")


@dataclass(frozen=True)
class RunFacts:
    """What a report needs and the run folder does not hold. None stands for what is not known."""

    parameters: int
    vocab_size: int
    tokenizer: str  # its name: gpt2, bytes, bpe, ...
    device: str  # as a person calls it
    data: str  # the corpus's name
    train_tokens: int
    val_tokens: int | None  # None where nothing was held out
    flops_per_token: float  # of a training step, forward and backward
    matmul_flops: float | None = None  # FLOP/s of large matrix products in the run's dtype, on all its devices
    peak_memory_bytes: int | None = None
    unigram_entropy: float | None = None  # nats per token, of the train split
    bytes_per_token: float | None = None  # of the validation text
    finished: bool = True
    why_stopped: str = ""  # in a few words, where it did not finish: "SIGTERM", "--max-minutes"


@dataclass(frozen=True)
class Finding:
    """Something worth knowing about a run, and what to do about it, with the flags that do it."""

    name: str
    observation: str
    advice: str


def findings(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> list[Finding]:
    """What the metrics of a run say about it, the weightiest first; at least one for a run that has ended well."""
    found = [
        _unfinished(records, config, facts),
        _diverged(records, config),
        _overfitting(records, config, facts),
        _no_context(records, facts),
    ]
    if not any(found):  # else more steps are not the cure
        found += _convergence(records, config, facts)
    found += [_no_validation(records, facts), _outlier_steps(records, config), _clipping(records, config)]
    found += [*_slow_pauses(records, config, facts), _data_bound(records), _low_mfu(records, config, facts)]
    return [finding for finding in found if finding is not None]


def time_spent(records: Sequence[Record]) -> dict[str, float]:
    """Seconds by what they went into, "other" for what no part accounts for.

    `seconds` is the whole step; where its parts come to more, some were timed beside it and are added.
    """
    spent = {label: sum(r.get(part, 0.0) for r in records) for part, label in TIME_FIELDS.items()}
    whole = sum(max(r.get("seconds", 0.0), sum(r.get(part, 0.0) for part in TIME_FIELDS)) for r in records)
    return spent | {"other": max(0.0, whole - sum(spent.values()))}


def model_flops_utilization(records: Sequence[Record], facts: RunFacts) -> float | None:
    """MFU: the share of the device's measured matrix-product rate that the median step makes use of."""
    values = throughputs(records)
    if not facts.matmul_flops or not values:
        return None
    return facts.flops_per_token * median(values) / facts.matmul_flops


def _unfinished(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> Finding | None:
    if facts.finished:
        return None
    why = f" ({facts.why_stopped})" if facts.why_stopped else ""
    done = records[-1]["step"] if records else 0
    seen = f"The run stopped{why} after step {done:,} of {config.max_steps:,}."
    folder = Path(config.out_dir) / (config.name or "")
    return Finding("unfinished", seen, f"Go on where it stopped: `gpt2 train --resume {folder}`.")


def _diverged(records: Sequence[Record], config: TrainConfig) -> Finding | None:
    """The training loss ends clearly above its own best twentieth of the run."""
    losses = [r["loss"] for r in valid_steps(records)]
    width = len(losses) // 20
    if width < 2:
        return None
    blocks = [losses[i : i + width] for i in range(len(losses) % width, len(losses), width)]
    best, last = min(blocks, key=fmean), blocks[-1]
    rise = fmean(last) - fmean(best)
    if rise < max(0.1 * abs(fmean(best)), 4 * _standard_error(best, last)):
        return None
    seen = f"The training loss ends at {fmean(last):.3f}, {rise:.3f} above the best it had: the run has diverged."
    advice = f"Learn more slowly: `--lr {config.lr / 2:g}`, with a longer warm-up: "
    return Finding("diverged", seen, advice + f"`--warmup-steps {max(100, 2 * config.warmup_steps)}`.")


def _overfitting(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> Finding | None:
    """Validation rose from its best, beyond its noise, for two measurements or more while the training loss fell."""
    steps = [step for step, _ in validation_losses(records)]
    losses = [loss for _, loss in validation_losses(records)]
    best = losses.index(min(losses)) if losses else 0
    if len(losses) < 3 or best > len(losses) - 3:
        return None
    bends = [abs(a - 2 * b + c) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    noise = median(bends) / 0.6745 / math.sqrt(6)  # of one measurement, as independent normal ones would have it
    rise = losses[-1] - losses[best]
    window = max(1, len(valid_steps(records)) // 20)
    before = [r["loss"] for r in valid_steps(records) if r["step"] <= steps[best]][-window:]
    after = [r["loss"] for r in valid_steps(records)][-window:]
    if rise < max(0.005 * losses[best], 3 * noise) or not before or fmean(after) >= fmean(before):
        return None
    seen = (
        f"Overfitting: validation was best, {losses[best]:.3f}, at step {steps[best]:,} and rose to {losses[-1]:.3f}, "
        f"while the training loss fell on to {fmean(after):.3f}. {_epochs_sentence(records, facts)}"
    )
    advice = (
        f"Against overfitting, the surest is more text. With this one: `--dropout {_higher_dropout(config.dropout)}`, "
        f"or stop near the best step with `--max-steps {steps[best]}`, or a smaller model."
    )
    return Finding("overfitting", seen, advice)


def _no_validation(records: Sequence[Record], facts: RunFacts) -> Finding | None:
    if facts.val_tokens or validation_losses(records):
        return None
    seen = "Nothing was held out, so nothing here tells learning from memorizing."
    advice = "Hold something out: `gpt2 data prepare` makes shards with a validation split."
    return Finding("no validation", seen, advice)


def _no_context(records: Sequence[Record], facts: RunFacts) -> Finding | None:
    loss, _ = final_loss(records)
    if facts.unigram_entropy is None or not loss >= facts.unigram_entropy:
        return None
    seen = f"A loss of {loss:.3f} is no better than knowing how frequent each token is ({facts.unigram_entropy:.3f})."
    steps = max(1000, 10 * records[-1]["step"])
    return Finding("no context", seen, f"It has hardly begun: `--max-steps {steps}`, or a higher rate, `--lr`.")


def _outlier_steps(records: Sequence[Record], config: TrainConfig) -> Finding | None:
    """Steps taken though their loss stood far above those just before."""
    losses = [r["loss"] for r in valid_steps(records)]
    high = 0
    for start in range(32, len(losses), 32):  # each block of 32 is judged by the block before it
        before = losses[start - 32 : start]
        middle = median(before)
        spread = median(abs(loss - middle) for loss in before) / 0.6745
        high += sum(loss - middle > max(8 * spread, 0.2 * abs(middle)) for loss in losses[start : start + 32])
    if not high:
        return None
    seen = f"{high:,} of {len(losses):,} steps had a loss far above the ones before (8 deviations or more)."
    skip = f"`--skip-spikes {config.skip_spikes / 2 or 5:g}`"
    advice = f"Leave such batches out: {skip}; or, where there are many, lower the rate: {_lower_lr_flag(config)}."
    return Finding("spikes", seen, advice)


def _clipping(records: Sequence[Record], config: TrainConfig) -> Finding | None:
    share = clipped_fraction(records, config)
    if share is None or share < 0.8 or len(records) < 20:
        return None
    seen = f"Clipping was at work in {share:.0%} of the steps, where it is meant to catch accidents."
    usual = 2 * median(grad_norms(records))
    advice = f"Let usual gradients through, `--grad-clip {usual:.2g}`, or lower the rate: {_lower_lr_flag(config)}."
    return Finding("clipping", seen, advice)


def _convergence(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> list[Finding]:
    """Whether the loss still fell in the last fifth of the run: validation where measured, else training."""
    done = records[-1]["step"]
    fall, which = _late_decrease(records)
    if fall is None:
        seen = f"{done:,} {'steps are' if done > 1 else 'step is'} too few to see a trend in."
        return [Finding("short", seen, f"Train longer: `--max-steps {max(1000, 10 * done)}`.")]
    if fall >= 0.01:
        seen = f"The {which} loss still fell by {fall:.1%} in the last fifth of the run."
        longer = Finding("still falling", seen, f"Train longer: `--max-steps {2 * config.max_steps}`.")
        return [longer, _token_budget(records, config, facts)]
    seen = f"The {which} loss has levelled off: {abs(fall):.1%} {'down' if fall > 0 else 'up'} in the last fifth."
    gap = final_loss(records)[0] - training_loss(records)
    if gap > 0.15 * training_loss(records) and epochs_done(records, facts) > 2:
        seen += f" It is {gap:.3f} above the training loss. {_epochs_sentence(records, facts)}"
        advice = f"It learns by heart: find more text (`--data`), or `--dropout {_higher_dropout(config.dropout)}`."
    else:
        advice = f"More steps bring little. A larger model may bring more: {_more_layers_flag(config)}."
    return [Finding("levelled off", seen, advice)]


def _token_budget(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> Finding:
    """Do the tokens suit the model? 20 a parameter (Hoffmann et al. 2022), 4 times each (Muennighoff et al. 2023)."""
    each = records[-1]["tokens"] / facts.parameters
    seen = f"It has read {each:.3g} tokens per parameter; about 20 make the best of a given amount of computing."
    if epochs_done(records, facts) > 4:
        seen = f"{_epochs_sentence(records, facts)} Beyond about 4 times a text teaches less and less."
        return Finding("budget", seen, "Find more text (`--data`), and watch for overfitting.")
    if each < 20:
        fewer = f"`--n-layer {max(1, config.n_layer // 2)}`"
        return Finding("budget", seen, f"For the same time, a smaller model on more tokens: {fewer}.")
    return Finding("budget", seen, f"For the same time, a larger model on fewer tokens: {_more_layers_flag(config)}.")


def _slow_pauses(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> list[Finding]:
    """Validation, samples and checkpoints that take more than their share of the time."""
    spent = time_spent(records)
    read = min(config.eval_tokens or facts.val_tokens or 0, facts.val_tokens or 0)
    rarer = f"`--eval-every {4 * config.eval_every}` or " if config.eval_every else ""
    mends = {
        "validation": (0.2, f"{rarer}`--eval-tokens {max(1, read // 4)}`"),
        "samples": (0.1, f"`--sample-tokens {config.sample_tokens // 4}`"),
        "checkpoints": (0.1, f"`--save-every {4 * config.save_every}`" if config.save_every else "a longer run"),
    }
    found = []
    for label, (limit, mend) in mends.items():
        share = spent[label] / (sum(spent.values()) or 1.0)
        if share > limit and len(records) > 1:
            seen = f"{label.capitalize()} took {share:.0%} of the time."
            found.append(Finding(f"slow {label}", seen, f"Spend less on {label}: {mend}."))
    return found


def _data_bound(records: Sequence[Record]) -> Finding | None:
    spent = time_spent(records)
    share = spent["waiting for data"] / (sum(spent.values()) or 1.0)
    if share < 0.05 or len(records) < 2:
        return None
    seen = f"The model waited for data {share:.0%} of the time."
    advice = "Put the shards on a fast local disk: `gpt2 data prepare` there, then `--data`."
    return Finding("waiting for data", seen, advice)


def _low_mfu(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> Finding | None:
    mfu = model_flops_utilization(records, facts)
    if mfu is None or mfu >= 0.4:
        return None
    rows = config.micro_batch_size or config.batch_size
    mends = ["`--dtype bfloat16`"] if config.dtype == "float32" else []
    mends += ["`--compile`"] if not config.compile else []
    larger = next((n for n in range(2 * rows, config.batch_size + 1) if config.batch_size % n == 0), None)
    mends += [f"`--micro-batch-size {larger}`" if larger else "`--batch-size auto`"]
    seen = f"Steps use {mfu:.0%} of the rate that large matrix products reach on this device."
    return Finding("low mfu", seen, f"For speed, try {', '.join(mends)}; `--profile` shows where a step's time goes.")


# --- the numbers they judge by; the report shows them too


def valid_steps(records: Sequence[Record]) -> list[Record]:
    """The steps that were not skipped, with a finite loss."""
    return [r for r in records if not r.get("skipped") and math.isfinite(r["loss"])]


def validation_losses(records: Sequence[Record]) -> list[tuple[int, float]]:
    """(step, validation loss) wherever there is one."""
    return [(r["step"], r["val_loss"]) for r in records if math.isfinite(r.get("val_loss", math.nan))]


def training_loss(records: Sequence[Record]) -> float:
    """The mean of the last fiftieth of the steps taken; NaN when there are none."""
    losses = [r["loss"] for r in valid_steps(records)]
    return fmean(losses[-max(1, len(losses) // 50) :]) if losses else math.nan


def final_loss(records: Sequence[Record]) -> tuple[float, str]:
    """The last validation loss, or without one the training loss, and which it is."""
    values = validation_losses(records)
    return (values[-1][1], "validation") if values else (training_loss(records), "training")


def epochs_done(records: Sequence[Record], facts: RunFacts) -> float:
    """How often the run has read its corpus."""
    return records[-1]["tokens"] / facts.train_tokens


def throughputs(records: Sequence[Record]) -> list[float]:
    """Tokens per second of the steps, but for those that also validated, sampled or saved."""
    plain = [r["tokens_per_second"] for r in records if not any(r.get(part) for part in PAUSE_FIELDS)]
    return plain or [r["tokens_per_second"] for r in records]


def grad_norms(records: Sequence[Record]) -> list[float]:
    """The gradient's norm before clipping, at the steps taken."""
    return [r["grad_norm"] for r in valid_steps(records) if math.isfinite(r.get("grad_norm", math.nan))]


def clipped_fraction(records: Sequence[Record], config: TrainConfig) -> float | None:
    """The share of the steps whose gradient was clipped; None when none could be."""
    values = grad_norms(records)
    if not values or not config.grad_clip:
        return None
    return sum(norm > config.grad_clip for norm in values) / len(values)


def _late_decrease(records: Sequence[Record]) -> tuple[float | None, str]:
    """By what share of itself the loss fell over the last fifth of the run; None where that cannot be told."""
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
    fall = fmean(early) - fmean(late)
    return (fall if abs(fall) > 2 * _standard_error(early, late) else 0.0) / fmean(early), "training"


def _standard_error(a: Sequence[float], b: Sequence[float]) -> float:
    """The standard error of the difference of two means."""
    return math.sqrt(variance(a) / len(a) + variance(b) / len(b))


def _epochs_sentence(records: Sequence[Record], facts: RunFacts) -> str:
    return f"The corpus was read {epochs_done(records, facts):.1f} times."


def _lower_lr_flag(config: TrainConfig) -> str:
    return f"`--lr {config.lr / 2:g}`"


def _more_layers_flag(config: TrainConfig) -> str:
    return f"`--n-layer {config.n_layer + max(1, config.n_layer // 2)}`"


def _higher_dropout(dropout: float) -> str:
    return f"{min(0.5, dropout + 0.1):.2g}"
