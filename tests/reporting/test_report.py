"""report.md, findings, and the profiler: each finding on metrics that show it, and on metrics that do not."""

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2.config import TrainConfig, to_toml
from gpt2.data.dataset import TokenDataset
from gpt2.data.shards import ShardWriter, TokenShards
from gpt2.errors import UserError
from gpt2.reporting.findings import Finding, RunFacts, findings, model_flops_utilization, throughputs, time_spent
from gpt2.reporting.report import unigram_entropy, write_markdown_report
from gpt2.tokenizer import get_tokenizer

CONFIG = TrainConfig(name="it", n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8, max_steps=1000, lr=1e-3)
FACTS = RunFacts(
    parameters=50_000,
    vocab_size=1024,
    tokenizer="bpe",
    device="cpu",
    data="words",
    train_tokens=100_000,
    val_tokens=10_000,
    flops_per_token=400_000.0,
)


def run(
    steps: int,
    loss: Callable[[int], float] = lambda step: 3.0,
    val: Callable[[int], float] | None = None,
    every: int = 100,
    noise: float = 0.05,
    **more: Any,
) -> list[dict[str, Any]]:
    """The records of a run with these losses; `more` is added to each."""
    rng = random.Random(5)
    records = []
    for step in range(1, steps + 1):
        record = {"step": step, "loss": loss(step) + rng.gauss(0, noise), "lr": 1e-3, "grad_norm": 0.5}
        record |= {"tokens": step * 256, "seconds": 0.1, "tokens_per_second": 2560.0, **more}
        if val is not None and step % every == 0:
            record["val_loss"] = val(step)
        records.append(record)
    return records


def falling(step: int) -> float:
    return 2 + 4 * math.exp(-step / 400)


def level(step: int) -> float:
    return 3 + 4 * math.exp(-step / 50)


def found(records: list[dict[str, Any]], config: TrainConfig = CONFIG, facts: RunFacts = FACTS) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings(records, config, facts)}


def test_overfitting_names_the_best_step() -> None:
    records = run(1000, falling, lambda step: 3 + abs(step - 400) / 1000)
    finding = found(records)["overfitting"]
    assert "best, 3.000, at step 400 and rose to 3.600" in finding.observation
    assert "did 2.6 epochs" in finding.observation
    assert "`--dropout 0.1`" in finding.advice
    assert "`--max-steps 400`" in finding.advice
    assert "`--dropout 0.3`" in found(records, replace(CONFIG, dropout=0.2))["overfitting"].advice


@pytest.mark.parametrize(
    "val",
    [
        lambda step: falling(step) + 0.3,  # falls to the end
        lambda step: 3 + 0.1 * ((step // 100 + 1) % 2),  # goes up and down
        lambda step: 4.0 if step > 900 else falling(step) + 1,  # one measurement is no trend
        lambda step: 3.0 + step / 1e6,  # rises by less than matters
    ],
)
def test_no_overfitting_without_a_rise_beyond_noise(val: Callable[[int], float]) -> None:
    assert "overfitting" not in found(run(1000, falling, val))


def test_rise_of_both_losses_is_divergence() -> None:
    def breaks(step: int) -> float:
        return falling(step) if step < 600 else 5.0

    names = found(run(1000, breaks, breaks))
    assert "diverged" in names
    assert "overfitting" not in names
    assert "still falling" not in names
    assert "`--lr 0.0005`" in names["diverged"].advice
    assert "diverged" not in found(run(1000, level, noise=0.5))


def test_still_falling_or_levelled_off() -> None:
    for val in (falling, None):
        longer = found(run(1000, falling, val))["still falling"]
        assert "`--max-steps 2000`" in longer.advice
        assert ("validation" if val else "training") in longer.observation
    for val in (level, None):
        finding = found(run(1000, level, val))
        assert "still falling" not in finding
        assert "`--n-layer 3`" in finding["levelled off"].advice
    overfitting = found(run(1000, level, lambda step: 3.6), facts=replace(FACTS, train_tokens=10_000))["levelled off"]
    assert "This is overfitting" in overfitting.advice
    assert "above the training loss" in overfitting.observation
    assert "`--dropout 0.1`" in overfitting.advice
    assert "short" in found(run(10))


def test_token_budget_by_tokens_per_parameter_and_epochs() -> None:
    large_corpus = replace(FACTS, train_tokens=10**9)
    records = run(1000, falling)  # 256,000 tokens
    assert "smaller model" in found(records, facts=large_corpus)["budget"].advice
    assert "larger model" in found(records, facts=replace(large_corpus, parameters=1000))["budget"].advice
    assert "more text" in found(records, facts=replace(FACTS, train_tokens=50_000))["budget"].advice


def test_outlier_steps() -> None:
    records = run(1000, level)
    assert "spikes" not in found(records)
    for step in (500, 777):
        records[step]["loss"] = 9.0
    spikes = found(records)["spikes"]
    assert spikes.observation.startswith("2 of 1,000 steps")
    assert "`--skip-spikes 5`" in spikes.advice
    for step in (500, 777):
        records[step]["skipped"] = True
    assert "spikes" not in found(records)


def test_constant_gradient_clipping() -> None:
    assert "clipping" not in found(run(100))
    clipped = found(run(100, grad_norm=3.0))["clipping"]
    assert "100%" in clipped.observation
    assert "`--grad-clip 6`" in clipped.advice
    assert "clipping" not in found(run(100, grad_norm=3.0), replace(CONFIG, grad_clip=0.0))


def test_no_validation_split() -> None:
    assert "no validation" not in found(run(100))
    assert "gpt2 data prepare" in found(run(100), facts=replace(FACTS, val_tokens=None))["no validation"].advice


def test_epochs_count_all_tokens_of_an_epoch(tmp_path: Path) -> None:
    """A run on rows whose prompts are masked reads more tokens than it learns."""
    facts = replace(FACTS, train_tokens=5_000, tokens_per_epoch=25_600)
    text = write_markdown_report(write_run(tmp_path, run(1000, falling)), facts).read_text()
    assert "256,000 tokens, 10.0 epochs." in text
    assert "The run did 10.0 epochs." in text


def test_advice_on_the_learning_rate_is_consistent() -> None:
    records = run(100, lambda step: 5.5, grad_norm=3.0)
    advice = [each.advice for each in found(records, facts=replace(FACTS, unigram_entropy=5.0)).values()]
    assert any("lower the learning rate" in text for text in advice)
    assert not any("higher" in text for text in advice)


def test_loss_above_the_unigram_baseline() -> None:
    facts = replace(FACTS, unigram_entropy=5.0)
    assert "no context" in found(run(100, lambda step: 5.5), facts=facts)
    assert "no context" not in found(run(100, lambda step: 4.5), facts=facts)


@pytest.mark.parametrize(
    ("part", "name", "fix"),
    [
        ("eval_seconds", "slow validation", "`--eval-every 1000` or `--eval-tokens 2500`"),
        ("sample_seconds", "slow samples", "`--sample-tokens 50`"),
        ("save_seconds", "slow checkpoints", "`--save-every 2000`"),
        ("data_seconds", "waiting for data", "`--data`"),
    ],
)
def test_slow_pauses(part: str, name: str, fix: str) -> None:
    much: dict[str, Any] = {part: 0.03}
    little: dict[str, Any] = {part: 0.001}
    finding = found(run(50, **much))
    assert fix in finding[name].advice
    assert "30%" in finding[name].observation
    assert name not in found(run(50, **little))


def test_low_mfu_suggests_unused_options() -> None:
    facts = replace(FACTS, matmul_flops=1e10)  # 2,560 tokens of 0.4 MFLOP a second are 10% of it
    config = replace(CONFIG, dtype="float32", micro_batch_size=2)
    assert model_flops_utilization(run(50), facts) == pytest.approx(0.1024)
    slow = found(run(50), config, facts)["low mfu"]
    assert "10%" in slow.observation
    for flag in ("`--dtype bfloat16`", "`--compile`", "`--micro-batch-size 4`"):
        assert flag in slow.advice
    tuned = found(run(50), replace(CONFIG, dtype="bfloat16", compile=True), facts)["low mfu"]
    assert "try `--batch-size auto`;" in tuned.advice
    assert "low mfu" not in found(run(50), config, replace(FACTS, matmul_flops=2e9))
    assert "low mfu" not in found(run(50), config)


def test_stopped_run_suggests_resume_first() -> None:
    first, *_ = findings(run(100), CONFIG, replace(FACTS, finished=False, why_stopped="SIGTERM"))
    assert first.observation == "The run stopped (SIGTERM) after step 100 of 1,000."
    assert "`gpt2 train --resume runs/it`" in first.advice


def test_time_spent_and_throughputs() -> None:
    records = run(10, seconds=0.5, update_seconds=0.3, data_seconds=0.1)
    records[4] |= {"eval_seconds": 0.2, "seconds": 0.7}  # inside the step's seconds
    records[9] |= {"save_seconds": 2.0}  # beside them
    spent = time_spent(records)
    assert spent["updates"] == pytest.approx(3.0)
    assert spent["validation"] == pytest.approx(0.2)
    assert spent["checkpoints"] == pytest.approx(2.0)
    assert sum(spent.values()) == pytest.approx(8 * 0.5 + 0.7 + 2.4)
    records[4]["tokens_per_second"] = 1.0
    assert throughputs(records) == [2560.0] * 8


def write_run(folder: Path, records: list[dict[str, Any]], config: TrainConfig = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_report_of_a_complete_run(tmp_path: Path) -> None:
    records = run(1000, falling, falling, update_seconds=0.08, data_seconds=0.001)
    facts = replace(
        FACTS, matmul_flops=5e9, peak_memory_bytes=3 * 2**29, unigram_entropy=5.432, bytes_per_token=2.5, finished=True
    )
    folder = write_run(tmp_path / "it", records)
    (folder / "loss.png").write_bytes(b"")
    text = write_markdown_report(folder, facts).read_text()
    loss = falling(1000)
    for part in (
        "# it\n\nA GPT-2 with 50,000 parameters (2 layers of 32, context 32), trained on `words` for 1,000 steps",
        "in 1 min 40 s on cpu",
        f"**{loss:.3f} nats per token** (perplexity {math.exp(loss):.1f}, ",
        f", {loss / math.log(2) / 2.5:.3f} bits per byte)",
        "The uniform baseline is 6.931, the unigram baseline 5.432: the model is 3.104 better.",
        "![training and validation loss](loss.png)",
        "| uniform baseline | 6.931 | ln 1,024: all tokens equally likely |\n| unigram baseline | 5.432 |",
        f"| **this run, validation** | {loss:.3f} | at step 1,000 |",
        "- throughput: 2,560 tokens per second in the median step",
        "- MFU 20.5%: 1.0 GFLOP/s of the 5.0 GFLOP/s",
        "- peak memory 1.50 GiB",
        "| updates | 1 min 20 s | 80.0% |\n| waiting for data | 1.0 s | 1.0% |\n| other | 19.0 s | 19.0% |",
        "## What to try next\n\n1. Train longer: `--max-steps 2000`.\n2. ",
    ):
        assert part in text, part
    assert "stopped" not in text
    assert "GPT-2 124M, as published" not in text
    assert 2 <= len(re.findall(r"^\d\. ", text, re.MULTILINE)) <= 4


def test_report_of_one_step_with_unknown_facts(tmp_path: Path) -> None:
    text = write_markdown_report(write_run(tmp_path, run(1)), replace(FACTS, val_tokens=None)).read_text()
    assert "for 1 step in 0.1 s on cpu" in text
    assert "training loss is **" in text
    assert "loss.png" not in text
    assert "nan" not in text.lower()
    assert "MFU" not in text


def test_report_of_a_run_without_steps(tmp_path: Path) -> None:
    assert "no step was done" in write_markdown_report(write_run(tmp_path, []), FACTS).read_text()


def test_report_of_a_stopped_run_with_skipped_steps(tmp_path: Path) -> None:
    records = run(300, falling)
    for step in range(3, 300, 50):
        records[step] |= {"skipped": True, "loss": math.nan, "grad_norm": math.nan}
    facts = replace(FACTS, finished=False, why_stopped="--max-minutes")
    text = write_markdown_report(write_run(tmp_path, records), facts).read_text()
    assert "**The run was stopped (--max-minutes) after step 300 of 1,000**" in text
    assert f"`gpt2 train --resume {tmp_path}` resumes it." in text
    assert "- 6 of 300 steps were skipped as outlier batches: 4, 54, 104, 154, 204, ..." in text
    assert "nan" not in text
    everything = [{**record, "skipped": True} for record in records]
    text = write_markdown_report(write_run(tmp_path, everything), facts).read_text()
    assert "All steps were skipped or had a loss that is not finite." in text


def test_published_losses_only_where_comparable(tmp_path: Path) -> None:
    folder = write_run(tmp_path, run(10))
    theirs = replace(FACTS, tokenizer="gpt2", vocab_size=50257)
    text = write_markdown_report(folder, theirs).read_text()
    assert "| GPT-2 124M, as published | 3.12 | on another text" in text
    assert "as published" not in write_markdown_report(folder, replace(FACTS, vocab_size=50257)).read_text()
    assert "nanoGPT" not in write_markdown_report(folder, replace(FACTS, tokenizer="bytes", vocab_size=257)).read_text()
    folder = write_run(tmp_path, run(10), replace(CONFIG, data="shakespeare"))
    assert "| 1.4697 | on this text" in write_markdown_report(folder, replace(FACTS, tokenizer="bytes")).read_text()
    assert "1.4697" not in write_markdown_report(folder, FACTS).read_text()


def test_unwritable_report_is_a_one_line_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path, run(10))
    (folder / "report.md").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.md"):
        write_markdown_report(folder, FACTS)


def make_dataset(folder: Path, tokens: np.ndarray, shard_tokens: int = 1000) -> TokenDataset:
    with ShardWriter(folder, "train", shard_tokens) as writer:
        writer.write(tokens)
    shards = TokenShards([folder / file.name for file in writer.files])
    return TokenDataset("numbers", folder, shards, None, get_tokenizer("bytes"), None)


def test_unigram_entropy_equals_torchs(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).zipf(1.5, 5000) % 200
    counts = torch.tensor(np.bincount(tokens, minlength=257))
    expected = torch.distributions.Categorical(counts.double()).entropy().item()
    assert unigram_entropy(make_dataset(tmp_path, tokens).token_counts(10**6)) == pytest.approx(expected, rel=1e-6)


def test_unigram_entropy_of_a_large_corpus_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_dataset(tmp_path, np.arange(1 << 23) % 64, shard_tokens=1 << 23)
    read = []
    original = TokenShards.read
    monkeypatch.setattr(TokenShards, "read", lambda self, a, b: (read.append(b - a), original(self, a, b))[1])
    assert unigram_entropy(data.token_counts(1 << 22)) == pytest.approx(math.log(64))
    assert sum(read) == 1 << 22
