"""report.md: what a run came to, where its time went, what looks wrong with it, and what to try next."""

import math
from collections.abc import Sequence
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
from gpt2.reporting.units import format_bytes, format_count, format_duration, format_flops

MAX_ENTROPY_TOKENS = 100_000_000  # as many are counted at most for the unigram entropy
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
    """The entropy of single tokens in nats, of how often each occurs: int64 (V,).

    It is the loss of a model that knows how frequent each token is, and nothing else.
    """
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def write_markdown_report(folder: Path, facts: RunFacts) -> Path:
    """Write `report.md` from the files of the run in `folder`, finished or not, and return its path.

    Raises UserError when those cannot be read, or the report cannot be written.
    """
    config, path = read_toml(folder / "config.toml"), folder / "report.md"
    try:
        records = read_metrics(folder / "metrics.jsonl")
        sections = [f"# {folder.name}", _overview(folder, records, config, facts)]
        if (folder / "loss.png").exists():
            sections.append("![the losses, step by step](loss.png)")
        if records:
            found = findings(records, config, facts)
            sections += [
                _section("Losses", _loss_table(records, config, facts)),
                _section("Speed", _speed_lines(records, config, facts)),
                _section("Where the time went", _time_table(records)),
                _section("How it learned", _health_lines(records, config, found)),
                _section("What to try next", [f"{number}. {f.advice}" for number, f in enumerate(found[:4], 1)]),
            ]
        path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return path


def _section(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(lines)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns are all but the first and the last set to the right."""
    rule = [":--", *["--:"] * (len(header) - 2), ":--"]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


def _overview(folder: Path, records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> str:
    """One paragraph: what was trained, for how long, and how good it is."""
    model = (
        f"A GPT-2 of {format_count(facts.parameters)} parameters ({config.n_layer} layers of {config.n_embd}, "
        f"context {config.block_size:,})"
    )
    if not records:
        return f"{model} was to learn from `{facts.data}`, and no step was done."
    last = records[-1]
    text = (
        f"{model} learned from `{facts.data}` for {last['step']:,} step{'s' * (last['step'] > 1)} in "
        f"{format_duration(sum(time_spent(records).values()))} on {facts.device} in {config.dtype}: "
        f"{format_count(last['tokens'])} tokens, {_epochs_text(epochs_done(records, facts))}. "
    )
    text += _final_loss_text(records, facts)
    if not facts.finished:
        why = f" ({facts.why_stopped})" if facts.why_stopped else ""
        text += (
            f" **It was stopped{why} after step {last['step']:,} of {config.max_steps:,}**; "
            f"`gpt2 train --resume {folder}` goes on with it."
        )
    return text


def _final_loss_text(records: Sequence[Record], facts: RunFacts) -> str:
    loss, which = final_loss(records)
    if math.isnan(loss):
        return "No step of it could be taken."
    more = f"perplexity {math.exp(min(loss, 700)):,.{0 if loss > 7 else 1}f}"
    if facts.bytes_per_token and which == "validation":
        more += f", {loss / math.log(2) / facts.bytes_per_token:.3f} bits per byte"
    text = f"Its {which} loss is **{loss:.3f} nats per token** ({more})."
    ignorant = math.log(facts.vocab_size)
    text += f" To know nothing is {ignorant:.3f}, the logarithm of {facts.vocab_size:,} tokens"
    if facts.unigram_entropy is not None:
        text += f"; to know only how frequent each token is, {facts.unigram_entropy:.3f}"
    best = ignorant if facts.unigram_entropy is None else min(ignorant, facts.unigram_entropy)
    return text + (f": {best - loss:.3f} better." if loss < best else ": it has learned nothing beyond that.")


def _loss_table(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> list[str]:
    """The run's losses among those of reference, the highest first."""
    rows = [
        (math.log(facts.vocab_size), "a model that knows nothing", f"ln {facts.vocab_size:,}"),
        (training_loss(records), "**this run, training**", "the mean of its last fiftieth"),
    ]
    if facts.unigram_entropy is not None:
        counted = "the training text" if facts.train_tokens <= MAX_ENTROPY_TOKENS else "a sample of the training text"
        rows.append((facts.unigram_entropy, "only how frequent each token is", f"unigram entropy of {counted}"))
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
        where = f"on this text, by characters; {NANOGPT_LINK}"
        rows += [(loss, name, where) for name, loss in SHAKESPEARE_LOSSES.items()]
    rows = sorted((row for row in rows if math.isfinite(row[0])), reverse=True)
    published = GPT2_LOSSES | SHAKESPEARE_LOSSES  # with no more digits than were published
    shown = [(name, f"{loss:g}" if name in published else f"{loss:.3f}", note) for loss, name, note in rows]
    return _markdown_table(("model", "nats per token", "what it is"), shown)


def _speed_lines(records: Sequence[Record], config: TrainConfig, facts: RunFacts) -> list[str]:
    values = throughputs(records)
    deciles = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    whole = sum(time_spent(records).values())
    done = records[-1]["tokens"] / records[-1]["step"] * len(records)
    lines = [
        f"- {median(values):,.0f} tokens per second in the median step; the slowest tenth below {deciles[0]:,.0f}, "
        f"the fastest above {deciles[-1]:,.0f}; {done / max(whole, 1e-9):,.0f} over the whole run",
    ]
    mfu = model_flops_utilization(records, facts)
    if mfu is not None and facts.matmul_flops:
        lines.append(
            f"- MFU {mfu:.1%}: {format_flops(mfu * facts.matmul_flops)} of the {format_flops(facts.matmul_flops)} that a large "
            f"matrix product reaches here in {config.dtype} ({format_count(facts.flops_per_token)} FLOPs per token)"
        )
    if facts.peak_memory_bytes is not None:
        lines.append(f"- peak memory {format_bytes(facts.peak_memory_bytes)}")
    return lines


def _time_table(records: Sequence[Record]) -> list[str]:
    spent = time_spent(records)
    whole = sum(spent.values()) or 1.0
    spent |= {"whole run": sum(spent.values())}
    rows = [(label, format_duration(s), f"{s / whole:.1%}") for label, s in spent.items() if s > 0]
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
        lines.append(f"- {len(skipped):,} of {len(records):,} steps were left out as spikes: {some}.")
    share = clipped_fraction(records, config)
    if share is not None:
        usual, most = median(grad_norms(records)), max(grad_norms(records))
        lines.append(
            f"- The gradient's norm was {usual:.3g} in the median and {most:.3g} at most; "
            f"it was clipped to {config.grad_clip:g} in {share:.0%} of the steps."
        )
    if len(valid_steps(records)) < len(records) - len(skipped):
        lines.append("- Some losses were not finite.")
    return lines + [f"- {finding.observation}" for finding in found]


def _epochs_text(times: float) -> str:
    return f"{times:.2%} of the corpus" if times < 1 else f"the corpus {times:.1f} times over"
