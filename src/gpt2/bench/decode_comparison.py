"""The race of all decoders: every lane in a process of its own, all in turns, and what follows from the times."""

import contextlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpt2.bench.common import BenchmarkError, InProcessRunner, ProgressFn, SubprocessRunner, no_progress, quartiles_ms
from gpt2.bench.decode import (
    NUM_CHECKED_TOKENS,
    OURS,
    PRECISION_FAMILIES,
    TIE_LOGIT_GAP,
    DecodeVariant,
    DecodeWorkload,
    ReferenceDecoder,
    VariantSpec,
    bytes_per_step,
)
from gpt2.hardware import measure_bandwidth

ReferenceTokens = tuple[list[int], list[float]]  # what `Reference.follow` gives


@dataclass(frozen=True)
class _RunningVariant:
    """A lane that takes part: what was asked for, the record of it, and its process."""

    spec: VariantSpec
    record: dict[str, Any]
    process: InProcessRunner


def run_comparison(
    workload: DecodeWorkload,
    specs: Iterable[VariantSpec],
    text_tokens: Sequence[int] = (),
    runner_class: type[InProcessRunner] = SubprocessRunner,
    progress: ProgressFn = no_progress,
    save_partial: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Let every lane write, in turns, so that whatever else the machine does hits all alike; see `rank`.

    text: tokens on which our own lanes tell their perplexity.
    keep: is given the result so far after each batch size, so that what took long is not lost.
    Returns the lanes with the raw seconds of each batch size, or the reason why there are none, and the rates at which
    memory was read meanwhile. Raises Failed where the model itself cannot be run.
    """
    device = torch.device(workload.device)
    progress(f"{device}: what the plain model writes in float32")
    with runner_class(ReferenceDecoder, workload) as reference:
        expected = reference.call("greedy_tokens")
    records: list[dict[str, Any]] = []
    rates: list[float] = []
    with contextlib.ExitStack() as stack:
        runners = []
        for entry in sorted(specs, key=lambda entry: list(PRECISION_FAMILIES).index(entry.precision)):
            about = {name: getattr(entry, name) for name in ("contestant", "name", "precision", "reason")}
            records.append(about | {"family": PRECISION_FAMILIES[entry.precision], "batches": []})
            if entry.reason is not None:
                continue
            progress(f"{device}: {entry.contestant} {entry.name}: making ready")
            try:
                runner = _RunningVariant(
                    entry, records[-1], stack.enter_context(runner_class(DecodeVariant, entry, workload))
                )
                _record_info(runner, text_tokens)
            except BenchmarkError as failure:
                records[-1]["reason"] = str(failure)
            else:
                runners.append(runner)
        for rows in workload.batch_sizes:
            rates.append(measure_bandwidth(device))
            _run_batch_size(workload, rows, runners, expected, progress)
            save_partial(compute_metrics({"bandwidths": rates, "lanes": records}, workload))
    rates.append(measure_bandwidth(device))
    return compute_metrics({"bandwidths": rates, "lanes": records}, workload)


def _record_info(variant: _RunningVariant, text_tokens: Sequence[int]) -> None:
    variant.record.update(variant.process.call("info"))
    if text_tokens and variant.spec.contestant == OURS:
        variant.record["perplexity"] = variant.process.call("perplexity", list(text_tokens))


def _run_batch_size(
    workload: DecodeWorkload,
    batch_size: int,
    variants: Iterable[_RunningVariant],
    expected: ReferenceTokens,
    progress: ProgressFn,
) -> None:
    """Warm up and time every lane that can do so many rows at once."""
    running: list[tuple[_RunningVariant, dict[str, Any]]] = []
    for runner in variants:
        entry = runner.spec
        if batch_size > (entry.max_batch_size or batch_size):
            continue
        batch: dict[str, Any] = {"batch_size": batch_size}
        batch["new_tokens"] = min(workload.new_tokens, entry.max_new_tokens or workload.new_tokens)
        runner.record["batches"].append(batch)
        progress(f"{workload.device}: batch {batch_size}: {entry.contestant} {entry.name}: warm-up")
        try:
            _, _, tokens, _ = runner.process.call("run", 0, batch_size, NUM_CHECKED_TOKENS)
        except BenchmarkError as failure:
            batch["reason"] = str(failure)
            continue
        batch |= {"reason": None, **check_tokens(tokens, expected, entry.precision)}
        batch |= {"first_seconds": [], "decode_seconds": [], "peak_memory": None}
        running.append((runner, batch))
    for number in range(1, workload.rounds + 1):
        progress(
            f"{workload.device}: batch {batch_size}: round {number} of {workload.rounds}, {len(running)} lanes in turns"
        )
        for runner, batch in running:
            if batch["reason"] is None:
                _time_round(runner, batch, number)


def _time_round(variant: _RunningVariant, batch: dict[str, Any], round_index: int) -> None:
    try:
        first, rest, _, peak = variant.process.call("run", round_index, batch["batch_size"], batch["new_tokens"])
    except BenchmarkError as failure:
        batch["reason"] = str(failure)
        return
    batch["first_seconds"].append(first)
    batch["decode_seconds"].append(rest)
    batch["peak_memory"] = None if peak is None else max(peak, batch["peak_memory"] or 0)


def check_tokens(tokens: Sequence[int], expected: ReferenceTokens, precision: str) -> dict[str, Any]:
    """How many of the first tokens are the plain model's in float32, and whether a lane in float32 is wrong.

    It is not where two tokens were as good as equally likely (see `TIE`), and after that another text has begun.
    """
    same = 0
    while same < NUM_CHECKED_TOKENS and tokens[same] == expected[0][same]:
        same += 1
    wrong = precision == "float32" and same < NUM_CHECKED_TOKENS and expected[1][same] >= TIE_LOGIT_GAP
    return {"agreement": same, "wrong": wrong}


def compute_metrics(raw: dict[str, Any], workload: DecodeWorkload) -> dict[str, Any]:
    """The raw result with what follows from it.

    bandwidth: bytes/s, the median of the rates measured between the batches (a shared machine's goes up and down).
    Of each batch that ran: first_ms, until all rows had their first token; tokens_per_second of all rows after that;
    limit, the same if a step took no longer than reading what it must; of_limit, the share of it that was reached.
    ratios: for each batch size, how many times our fastest lane is as fast as the fastest peer of its family.
    """
    raw["bandwidth"] = statistics.median(raw["bandwidths"])
    for lane in raw["lanes"]:
        for batch in lane["batches"]:
            if batch["reason"] is not None:
                continue
            rows, count = batch["batch_size"], batch["new_tokens"]
            ms = quartiles_ms(batch["decode_seconds"])
            written = 1e3 * rows * (count - 1)
            rate = {"median": written / ms["median"], "low": written / ms["high"], "high": written / ms["low"]}
            limit = (
                rows
                * raw["bandwidth"]
                / bytes_per_step(workload, lane["weight_bytes"], lane["cache_width"], rows, count)
            )
            batch |= {"first_ms": quartiles_ms(batch["first_seconds"]), "tokens_per_second": rate}
            batch |= {"limit": limit, "of_limit": rate["median"] / limit}
    raw["ratios"] = list(_ratios(raw["lanes"], workload.batch_sizes))
    return raw


def _ratios(variants: list[dict[str, Any]], batch_sizes: Iterable[int]) -> Iterable[dict[str, Any]]:
    for rows in batch_sizes:
        for family in dict.fromkeys(lane["family"] for lane in variants):
            ran = [
                (lane, speed)
                for lane in variants
                if lane["family"] == family and (speed := median_throughput(lane, rows))
            ]
            ours = [one for one in ran if one[0]["contestant"] == OURS]
            peers = [one for one in ran if one[0]["contestant"] != OURS]
            if ours and peers:
                (our, mine), (other, theirs) = (max(lot, key=lambda one: one[1]) for lot in (ours, peers))
                about = {"batch_size": rows, "family": family, "ours": our["name"], "contestant": other["contestant"]}
                yield about | {"theirs": other["name"], "ratio": mine / theirs}


def median_throughput(variant: dict[str, Any], batch_size: int) -> float | None:
    """The median tokens/s of a lane in a batch of so many rows; None where there is none."""
    found = (
        b["tokens_per_second"]["median"]
        for b in variant["batches"]
        if b["batch_size"] == batch_size and not b["reason"]
    )
    return next(found, None)
