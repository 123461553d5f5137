"""The race of all decoders: every lane in a process of its own, all in turns, and what follows from the times."""

import contextlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpt2.bench.decode import CHECKED, FAMILIES, OURS, TIE, Decoding, Entry, Lane, Reference, step_bytes
from gpt2.bench.timing import Elsewhere, Failed, Here, Say, milliseconds, silent
from gpt2.hardware import measure_bandwidth

Expected = tuple[list[int], list[float]]  # what `Reference.follow` gives


@dataclass(frozen=True)
class _Runner:
    """A lane that takes part: what was asked for, the record of it, and its process."""

    entry: Entry
    record: dict[str, Any]
    process: Here


def race(
    work: Decoding,
    entries: Iterable[Entry],
    text: Sequence[int] = (),
    host: type[Here] = Elsewhere,
    say: Say = silent,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Let every lane write, in turns, so that whatever else the machine does hits all alike; see `rank`.

    text: tokens on which our own lanes tell their perplexity.
    keep: is given the result so far after each batch size, so that what took long is not lost.
    Returns the lanes with the raw seconds of each batch size, or the reason why there are none, and the rates at which
    memory was read meanwhile. Raises Failed where the model itself cannot be run.
    """
    device = torch.device(work.device)
    say(f"{device}: what the plain model writes in float32")
    with host(Reference, work) as reference:
        expected = reference.call("follow")
    records: list[dict[str, Any]] = []
    rates: list[float] = []
    with contextlib.ExitStack() as stack:
        runners = []
        for entry in sorted(entries, key=lambda entry: list(FAMILIES).index(entry.precision)):
            about = {name: getattr(entry, name) for name in ("contestant", "name", "precision", "reason")}
            records.append(about | {"family": FAMILIES[entry.precision], "batches": []})
            if entry.reason is not None:
                continue
            say(f"{device}: {entry.contestant} {entry.name}: making ready")
            try:
                runner = _Runner(entry, records[-1], stack.enter_context(host(Lane, entry, work)))
                _ask(runner, text)
            except Failed as failure:
                records[-1]["reason"] = str(failure)
            else:
                runners.append(runner)
        for rows in work.batch_sizes:
            rates.append(measure_bandwidth(device))
            _run_batch(work, rows, runners, expected, say)
            keep(rank({"bandwidths": rates, "lanes": records}, work))
    rates.append(measure_bandwidth(device))
    return rank({"bandwidths": rates, "lanes": records}, work)


def _ask(runner: _Runner, text: Sequence[int]) -> None:
    runner.record.update(runner.process.call("about"))
    if text and runner.entry.contestant == OURS:
        runner.record["perplexity"] = runner.process.call("perplexity", list(text))


def _run_batch(work: Decoding, rows: int, runners: Iterable[_Runner], expected: Expected, say: Say) -> None:
    """Warm up and time every lane that can do so many rows at once."""
    running: list[tuple[_Runner, dict[str, Any]]] = []
    for runner in runners:
        entry = runner.entry
        if rows > (entry.most_rows or rows):
            continue
        batch: dict[str, Any] = {"batch_size": rows}
        batch["new_tokens"] = min(work.new_tokens, entry.most_tokens or work.new_tokens)
        runner.record["batches"].append(batch)
        say(f"{work.device}: batch {rows}: {entry.contestant} {entry.name}: warm-up")
        try:
            _, _, tokens, _ = runner.process.call("run", 0, rows, CHECKED)
        except Failed as failure:
            batch["reason"] = str(failure)
            continue
        batch |= {"reason": None, **verdict(tokens, expected, entry.precision)}
        batch |= {"first_seconds": [], "decode_seconds": [], "peak_memory": None}
        running.append((runner, batch))
    for number in range(1, work.rounds + 1):
        say(f"{work.device}: batch {rows}: round {number} of {work.rounds}, {len(running)} lanes in turns")
        for runner, batch in running:
            if batch["reason"] is None:
                _time(runner, batch, number)


def _time(runner: _Runner, batch: dict[str, Any], number: int) -> None:
    try:
        first, rest, _, peak = runner.process.call("run", number, batch["batch_size"], batch["new_tokens"])
    except Failed as failure:
        batch["reason"] = str(failure)
        return
    batch["first_seconds"].append(first)
    batch["decode_seconds"].append(rest)
    batch["peak_memory"] = None if peak is None else max(peak, batch["peak_memory"] or 0)


def verdict(tokens: Sequence[int], expected: Expected, precision: str) -> dict[str, Any]:
    """How many of the first tokens are the plain model's in float32, and whether a lane in float32 is wrong.

    It is not where two tokens were as good as equally likely (see `TIE`), and after that another text has begun.
    """
    same = 0
    while same < CHECKED and tokens[same] == expected[0][same]:
        same += 1
    wrong = precision == "float32" and same < CHECKED and expected[1][same] >= TIE
    return {"agreement": same, "wrong": wrong}


def rank(raw: dict[str, Any], work: Decoding) -> dict[str, Any]:
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
            ms = milliseconds(batch["decode_seconds"])
            written = 1e3 * rows * (count - 1)
            rate = {"median": written / ms["median"], "low": written / ms["high"], "high": written / ms["low"]}
            limit = rows * raw["bandwidth"] / step_bytes(work, lane["weight_bytes"], lane["cache_width"], rows, count)
            batch |= {"first_ms": milliseconds(batch["first_seconds"]), "tokens_per_second": rate}
            batch |= {"limit": limit, "of_limit": rate["median"] / limit}
    raw["ratios"] = list(_ratios(raw["lanes"], work.batch_sizes))
    return raw


def _ratios(lanes: list[dict[str, Any]], batch_sizes: Iterable[int]) -> Iterable[dict[str, Any]]:
    for rows in batch_sizes:
        for family in dict.fromkeys(lane["family"] for lane in lanes):
            ran = [(lane, speed) for lane in lanes if lane["family"] == family and (speed := speed_of(lane, rows))]
            ours = [one for one in ran if one[0]["contestant"] == OURS]
            peers = [one for one in ran if one[0]["contestant"] != OURS]
            if ours and peers:
                (our, mine), (other, theirs) = (max(lot, key=lambda one: one[1]) for lot in (ours, peers))
                about = {"batch_size": rows, "family": family, "ours": our["name"], "contestant": other["contestant"]}
                yield about | {"theirs": other["name"], "ratio": mine / theirs}


def speed_of(lane: dict[str, Any], rows: int) -> float | None:
    """The median tokens/s of a lane in a batch of so many rows; None where there is none."""
    found = (b["tokens_per_second"]["median"] for b in lane["batches"] if b["batch_size"] == rows and not b["reason"])
    return next(found, None)
