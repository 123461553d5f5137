"""The comparison of all decoding variants, each in its own process and timed in turns, and its metrics."""

import contextlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpt2.bench.common import (
    OURS,
    BenchmarkError,
    InProcessRunner,
    ProgressFn,
    SubprocessRunner,
    no_progress,
    quartiles_ms,
)
from gpt2.bench.decode import (
    NUM_CHECKED_TOKENS,
    PRECISION_FAMILIES,
    TIE_LOGIT_GAP,
    DecodeVariant,
    DecodeWorkload,
    ReferenceDecoder,
    VariantSpec,
    bytes_per_step,
)
from gpt2.hardware import measure_bandwidth

ReferenceTokens = tuple[list[int], list[float]]  # the result of `ReferenceDecoder.greedy_tokens`


@dataclass(frozen=True)
class _RunningVariant:
    """A variant that runs: its spec, its record in the result, and its process."""

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
    """Time all variants in turns, so that other load on the machine affects all alike; see `compute_metrics`.

    text_tokens:  tokens on which the perplexity of our own variants is measured.
    save_partial: called with the result so far after each batch size, so that long runs lose nothing.
    Returns the variants ("lanes" in the result file) with the raw seconds of each batch size, or the reason why there
    are none, and the memory bandwidths measured meanwhile. Raises BenchmarkError if the plain model cannot run.
    """
    device = torch.device(workload.device)
    progress(f"{device}: reference tokens of the plain model in float32")
    with runner_class(ReferenceDecoder, workload) as reference:
        expected = reference.call("greedy_tokens")
    records: list[dict[str, Any]] = []
    rates: list[float] = []
    with contextlib.ExitStack() as stack:
        variants = []
        for spec in sorted(specs, key=lambda spec: list(PRECISION_FAMILIES).index(spec.precision)):
            record = {name: getattr(spec, name) for name in ("contestant", "name", "precision", "reason")}
            records.append(record | {"family": PRECISION_FAMILIES[spec.precision], "batches": []})
            if spec.reason is not None:
                continue
            progress(f"{device}: {spec.contestant} {spec.name}: loading")
            try:
                process = stack.enter_context(runner_class(DecodeVariant, spec, workload))
                variant = _RunningVariant(spec, records[-1], process)
                _record_info(variant, text_tokens)
            except BenchmarkError as failure:
                records[-1]["reason"] = str(failure)
            else:
                variants.append(variant)
        for batch_size in workload.batch_sizes:
            rates.append(measure_bandwidth(device))
            _run_batch_size(workload, batch_size, variants, expected, progress)
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
    """Warm up and time every variant that supports the batch size."""
    running: list[tuple[_RunningVariant, dict[str, Any]]] = []
    label = f"{workload.device}: batch {batch_size}"
    for variant in variants:
        spec = variant.spec
        if batch_size > (spec.max_batch_size or batch_size):
            continue
        batch: dict[str, Any] = {"batch_size": batch_size}
        batch["new_tokens"] = min(workload.new_tokens, spec.max_new_tokens or workload.new_tokens)
        variant.record["batches"].append(batch)
        progress(f"{label}: {spec.contestant} {spec.name}: warm-up")
        try:
            _, _, tokens, _ = variant.process.call("run", 0, batch_size, NUM_CHECKED_TOKENS)
        except BenchmarkError as failure:
            batch["reason"] = str(failure)
            continue
        batch |= {"reason": None, **check_tokens(tokens, expected, spec.precision)}
        batch |= {"first_seconds": [], "decode_seconds": [], "peak_memory": None}
        running.append((variant, batch))
    for number in range(1, workload.rounds + 1):
        progress(f"{label}: round {number} of {workload.rounds}, {len(running)} variants in turns")
        for variant, batch in running:
            if batch["reason"] is None:
                _time_round(variant, batch, number)


def _time_round(variant: _RunningVariant, batch: dict[str, Any], round_index: int) -> None:
    try:
        first, decode, _, peak = variant.process.call("run", round_index, batch["batch_size"], batch["new_tokens"])
    except BenchmarkError as failure:
        batch["reason"] = str(failure)
        return
    batch["first_seconds"].append(first)
    batch["decode_seconds"].append(decode)
    batch["peak_memory"] = None if peak is None else max(peak, batch["peak_memory"] or 0)


def check_tokens(tokens: Sequence[int], expected: ReferenceTokens, precision: str) -> dict[str, Any]:
    """How many of the first tokens equal the plain model's in float32, and whether a float32 variant is wrong.

    It is not wrong if the logits of two tokens were nearly tied at the first difference (see `TIE_LOGIT_GAP`).
    """
    same = 0
    while same < NUM_CHECKED_TOKENS and tokens[same] == expected[0][same]:
        same += 1
    wrong = precision == "float32" and same < NUM_CHECKED_TOKENS and expected[1][same] >= TIE_LOGIT_GAP
    return {"agreement": same, "wrong": wrong}


def compute_metrics(raw: dict[str, Any], workload: DecodeWorkload) -> dict[str, Any]:
    """Add metrics to the raw result.

    bandwidth: bytes/s, the median of the rates measured between the batches (it varies on a shared machine).
    For each batch that ran: first_ms, until all rows had their first token; tokens_per_second of all rows after that;
    limit, tokens/s if a step took only as long as reading its bytes; of_limit, the fraction of it that was reached.
    ratios: for each batch size and precision family, the speed of our fastest variant over that of the fastest peer.
    """
    raw["bandwidth"] = statistics.median(raw["bandwidths"])
    for variant in raw["lanes"]:
        for batch in variant["batches"]:
            if batch["reason"] is not None:
                continue
            batch_size, new_tokens = batch["batch_size"], batch["new_tokens"]
            ms = quartiles_ms(batch["decode_seconds"])
            decoded = 1e3 * batch_size * (new_tokens - 1)
            rate = {"median": decoded / ms["median"], "low": decoded / ms["high"], "high": decoded / ms["low"]}
            widths = variant["weight_bytes"], variant["cache_width"]
            limit = batch_size * raw["bandwidth"] / bytes_per_step(workload, *widths, batch_size, new_tokens)
            batch |= {"first_ms": quartiles_ms(batch["first_seconds"]), "tokens_per_second": rate}
            batch |= {"limit": limit, "of_limit": rate["median"] / limit}
    raw["ratios"] = list(_ratios(raw["lanes"], workload.batch_sizes))
    return raw


def _ratios(variants: list[dict[str, Any]], batch_sizes: Iterable[int]) -> Iterable[dict[str, Any]]:
    for batch_size in batch_sizes:
        for family in dict.fromkeys(variant["family"] for variant in variants):
            rates = {
                (v["contestant"], v["name"]): median_throughput(v, batch_size)
                for v in variants
                if v["family"] == family
            }
            ran = {key: rate for key, rate in rates.items() if rate}
            ours = [key for key in ran if key[0] == OURS]
            peers = [key for key in ran if key[0] != OURS]
            if ours and peers:
                best, peer = (max(keys, key=ran.__getitem__) for keys in (ours, peers))
                names = {"ours": best[1], "contestant": peer[0], "theirs": peer[1]}
                yield {"batch_size": batch_size, "family": family, **names, "ratio": ran[best] / ran[peer]}


def median_throughput(variant: dict[str, Any], batch_size: int) -> float | None:
    """The median tokens/s of a variant at a batch size; None if it did not run."""
    batches = (b for b in variant["batches"] if b["batch_size"] == batch_size and not b["reason"])
    return next((batch["tokens_per_second"]["median"] for batch in batches), None)
