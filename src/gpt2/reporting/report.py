"""`report.md`: losses beside baselines, throughput and time, training health, and what to try next."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

import numpy as np

from gpt2.config import TrainConfig, read_toml
from gpt2.errors import UserError
from gpt2.reporting.findings import (
    Finding,
    Record,
    RunFacts,
    clipped_fraction,
    epochs_done,
    final_loss,
    findings,
    grad_norms,
    model_flops_utilization,
    throughputs,
    time_spent,
    training_loss,
    valid_steps,
    validation_losses,
)
from gpt2.reporting.metrics import read_metrics
from gpt2.reporting.task_metrics import task_rows
from gpt2.units import format_bytes, format_count, format_duration, format_flops

MAX_ENTROPY_TOKENS = 100_000_000  # larger corpora are sampled for the unigram entropy
NANOGPT_LINK = "[nanoGPT](https://github.com/karpathy/nanoGPT)"
GPT2_LOSSES = {  # on OpenWebText's validation split, all from nanoGPT's README
    "GPT-2 124M, as published": 3.12,
    "GPT-2 124M, trained on OpenWebText": 2.85,
    "GPT-2 350M, as published": 2.84,
    "GPT-2 774M, as published": 2.67,
    "GPT-2 1558M, as published": 2.54,
}
SHAKESPEARE_LOSSES = {"nanoGPT, 4 layers of 128, on a CPU": 1.88, "nanoGPT, 6 layers of 384, on a GPU": 1.4697}


def unigram_entropy(counts: np.ndarray) -> float:
    """The entropy in nats of the tokens' frequencies, from their counts, int64 (V,): the loss of a unigram model."""
    probs = counts[counts > 0] / counts.sum()
    return float(-(probs * np.log(probs)).sum())


def write_markdown_report(
    folder: Path, facts: RunFacts, published: Mapping[str, Mapping[str, float]] | None = None
) -> Path:
    """Write `report.md` from the files of the run in `folder`, finished or not, and return its path.

    published: by key of an evaluation metric, the values of OpenAI's models by name.
    Raises UserError when the files cannot be read, or the report cannot be written.
    """
    config, path = read_toml(folder / "config.toml"), folder / "report.md"
    try:
        records = read_metrics(folder / "metrics.jsonl")
        sections = [f"# {folder.name}", _overview(folder, records, config, facts)]
        if (folder / "loss.png").exists():
            sections.append("![training and validation loss](loss.png)")
        if records:
            found = findings(records, config, facts)
            sections += [
                _section("Losses", _loss_table(records, config, facts)),
                *_task_section(records, published or {}),
                _section("Speed", _speed_lines(records, config, facts)),
                _section("Time", _time_table(records)),
                _section("Training health", _health_lines(records, config, found)),
                _section("What to try next", [f"{number}. {f.advice}" for number, f in enumerate(found[:4], 1)]),
            ]
        path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return path


def _section(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(lines)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first and the last are right-aligned."""
    rule = [":--", *["--:"] * (len(header) - 2), ":--"]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


def _overview(folder: Path, records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> str:
    """One paragraph: what was trained, for how long, and its loss beside the baselines."""
    model = (
        f"A GPT-2 with {format_count(facts.parameters)} parameters ({config.n_layer} layers of {config.n_embd}, "
        f"context {config.block_size:,})"
    )
    if not records:
        return f"{model}, to be trained on `{facts.data}`: no step was done."
    last, duration = records[-1], format_duration(sum(time_spent(records).values()))
    epochs = epochs_done(records, facts)
    text = (
        f"{model}, trained on `{facts.data}` for {last['step']:,} step{'s' * (last['step'] > 1)} in "
        f"{duration} on {facts.device} in {config.dtype}: {format_count(last['tokens'])} tokens, "
        f"{f'{epochs:.1%} of an epoch' if epochs < 1 else f'{epochs:.1f} epochs'}. {_final_loss_text(records, facts)}"
    )
    if not facts.finished:
        reason = f" ({facts.why_stopped})" if facts.why_stopped else ""
        text += (
            f" **The run was stopped{reason} after step {last['step']:,} of {config.max_steps:,}**; "
            f"`gpt2 train --resume {folder}` resumes it."
        )
    return text


def _final_loss_text(records: Sequence[Record], facts: RunFacts) -> str:
    loss, which = final_loss(records)
    if math.isnan(loss):
        return "All steps were skipped or had a loss that is not finite."
    more = f"perplexity {math.exp(min(loss, 700)):,.{0 if loss > 7 else 1}f}"
    if facts.bytes_per_token and which == "validation":
        more += f", {loss / math.log(2) / facts.bytes_per_token:.3f} bits per byte"
    uniform = best = math.log(facts.vocab_size)
    text = f"The {which} loss is **{loss:.3f} nats per token** ({more}). The uniform baseline is {uniform:.3f}"
    if facts.unigram_entropy is not None:
        text += f", the unigram baseline {facts.unigram_entropy:.3f}"
        best = min(uniform, facts.unigram_entropy)
    return text + (f": the model is {best - loss:.3f} better." if loss < best else ": the model is not better.")


def _loss_table(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> list[str]:
    """The losses of the run, of the baselines, and of published models, the highest first."""
    rows = [
        (math.log(facts.vocab_size), "uniform baseline", f"ln {facts.vocab_size:,}: all tokens equally likely"),
        (training_loss(records), "**this run, training**", "mean of the last fiftieth of the steps"),
    ]
    if facts.unigram_entropy is not None:
        counted = "the training text" if facts.train_tokens <= MAX_ENTROPY_TOKENS else "a sample of the training text"
        rows.append((facts.unigram_entropy, "unigram baseline", f"entropy of the token frequencies of {counted}"))
    values = validation_losses(records)
    if values:
        step, loss = values[-1]
        best_step, best = min(values, key=lambda value: value[1])
        rows.append((loss, "**this run, validation**", f"at step {step:,}"))
        if best < loss:
            rows.append((best, "**this run, best validation**", f"at step {best_step:,}"))
    if facts.tokenizer == "gpt2" and facts.vocab_size == 50257:
        rows += [(loss, name, f"on another text, OpenWebText; {NANOGPT_LINK}") for name, loss in GPT2_LOSSES.items()]
    if facts.tokenizer == "bytes" and config.data in ("shakespeare", "tiny_shakespear"):
        note = f"on this text, by characters; {NANOGPT_LINK}"
        rows += [(loss, name, note) for name, loss in SHAKESPEARE_LOSSES.items()]
    rows = sorted((row for row in rows if math.isfinite(row[0])), reverse=True)
    published = GPT2_LOSSES | SHAKESPEARE_LOSSES  # with no more digits than were published
    cells = [(name, f"{loss:g}" if name in published else f"{loss:.3f}", note) for loss, name, note in rows]
    return _markdown_table(("model", "nats per token", "note"), cells)


def _task_section(records: Sequence[Record], published: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The last values of the evaluation tasks; nothing for a run without them."""
    rows = task_rows(records, published)
    header = ("task", "metric", "value", "at step", "published for OpenAI's models")
    return [_section("Evaluation tasks", _markdown_table(header, rows))] if rows else []


def _speed_lines(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> list[str]:
    values = throughputs(records)
    deciles = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    seconds = sum(time_spent(records).values())
    tokens = records[-1]["tokens"] / records[-1]["step"] * len(records)
    lines = [
        f"- throughput: {median(values):,.0f} tokens per second in the median step (10th percentile {deciles[0]:,.0f}, "
        f"90th {deciles[-1]:,.0f}); {tokens / max(seconds, 1e-9):,.0f} over the whole run",
    ]
    mfu = model_flops_utilization(records, facts)
    if mfu is not None and facts.matmul_flops:
        rate, limit = format_flops(mfu * facts.matmul_flops), format_flops(facts.matmul_flops)
        lines.append(
            f"- MFU {mfu:.1%}: {rate} of the {limit} that large matrix products reach here in {config.dtype} "
            f"({format_count(facts.flops_per_token)} FLOPs per token)"
        )
    if facts.peak_memory_bytes is not None:
        lines.append(f"- peak memory {format_bytes(facts.peak_memory_bytes)}")
    return lines


def _time_table(records: Sequence[Record]) -> list[str]:
    spent = time_spent(records)
    total = sum(spent.values())
    rows = [
        (label, format_duration(s), f"{s / (total or 1.0):.1%}")
        for label, s in {**spent, "total": total}.items()
        if s > 0
    ]
    return _markdown_table(("what", "time", "share"), rows)


def _health_lines(records: Sequence[Record], config: TrainConfig, found: Sequence[Finding]) -> list[str]:
    lines = []
    values = validation_losses(records)
    if values:
        step, loss = min(values, key=lambda value: value[1])
        lines.append(f"- The best of {len(values):,} validation losses is {loss:.3f}, at step {step:,}.")
    skipped = [r["step"] for r in records if r.get("skipped")]
    if skipped:
        some = ", ".join(f"{step:,}" for step in skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        lines.append(f"- {len(skipped):,} of {len(records):,} steps were skipped as outlier batches: {some}.")
    share = clipped_fraction(records, config)
    if share is not None:
        norms = grad_norms(records)
        lines.append(
            f"- The median gradient norm was {median(norms):.3g}, the largest {max(norms):.3g}; gradient clipping to "
            f"{config.grad_clip:g} was active in {share:.0%} of the steps."
        )
    if len(valid_steps(records)) < len(records) - len(skipped):
        lines.append("- Some losses were not finite.")
    return lines + [f"- {finding.observation}" for finding in found]
