"""gpt2 bench generate [--flags]"""

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from gpt2.bench import decode_chart
from gpt2.bench.common import OURS, BenchmarkError, SubprocessRunner, load_benchmark
from gpt2.bench.decode import NUM_CHECKED_TOKENS, DecodeWorkload, our_variants
from gpt2.bench.decode_comparison import run_comparison
from gpt2.commands.bench_args import SHAPE_FIELDS
from gpt2.commands.bench_output import (
    check_outputs,
    format_gib,
    format_quartiles,
    new_decode_result,
    parse_counts,
    random_model_config,
    wide_console,
)
from gpt2.commands.json_output import prints_json, write_json
from gpt2.errors import ConfigError, DataError, ModelFilesError, UserError
from gpt2.model import GPTConfig
from gpt2.progress import print_status
from gpt2.resolve import resolve_model
from gpt2.runtime import pick_device


def main(args: Namespace) -> int:
    """Run `gpt2 bench generate`. Returns 1 if a variant generated wrong tokens or none could be timed, else 0."""
    decode_peers = load_benchmark("decode_peers", "--peer") if args.peer else None
    peers = decode_peers.parse_decode_peers(args.peer) if decode_peers else {}
    specs = our_variants(args.variants)
    check_outputs(args)
    config, text_tokens = _config_and_text(args)
    workload = DecodeWorkload(
        device=str(pick_device(args.device)),
        config=config,
        model=args.model,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.max_new_tokens,
        batch_sizes=parse_counts("--batch-size", args.batch_size, 10**6),
        rounds=args.rounds,
    )
    result = new_decode_result("bench generate", workload)
    result["text"] = {"file": args.text.name, "tokens": len(text_tokens)} if text_tokens else None
    save_partial = lambda found: write_json(args.json, result | found, partial=True)  # noqa: E731
    try:
        with tempfile.TemporaryDirectory(prefix="gpt2-bench-") as folder:
            if decode_peers:
                specs += decode_peers.peer_variants(workload, peers, Path(folder), SubprocessRunner, print_status)
            result |= run_comparison(workload, specs, text_tokens, SubprocessRunner, print_status, save_partial)
    except BenchmarkError as failure:
        raise UserError(f"the model cannot be run: {failure}") from failure
    write_json(args.json, result)
    if not prints_json(args.json):
        _print_results(result)
    batches = [batch for variant in result["lanes"] for batch in variant["batches"] if batch["reason"] is None]
    if args.chart is not None and batches:
        decode_chart.draw(result, args.chart)
    return int(not batches or any(batch["wrong"] for batch in batches))


def _config_and_text(args: Namespace) -> tuple[GPTConfig, list[int]]:
    """The model's config, and the tokens for --text."""
    if args.model is None:
        if args.text is not None:
            raise ConfigError("--text needs --model: perplexity is meaningless for random weights", field="text")
        return random_model_config(args, args.prompt_tokens + max(args.max_new_tokens, NUM_CHECKED_TOKENS)), []
    if args.shape or any(getattr(args, name) is not None for name in SHAPE_FIELDS):
        raise ConfigError("--model defines the shape: leave out --shape, --n-layer and the like", field="shape")
    model = resolve_model(args.model)
    if args.text is None:
        return model.config, []
    if model.tokenizer is None:
        raise ModelFilesError(f"--text: {args.model} has no tokenizer")
    if args.text_tokens < 2:
        raise ConfigError(f"--text-tokens must be at least 2, not {args.text_tokens}", field="text_tokens")
    try:
        tokens = model.tokenizer.encode(args.text.read_text(encoding="utf-8"))[: args.text_tokens]
    except (OSError, UnicodeError) as error:
        raise DataError(f"{args.text} cannot be read: {error}") from error
    if len(tokens) < 2:
        raise DataError(f"{args.text} has fewer than two tokens")
    return model.config, tokens


def _print_results(result: dict[str, Any]) -> None:
    """Print a table for each batch size, the ratios to peers, and notes."""
    console, w = wide_console(), result["workload"]
    shape = f"{w['n_layer']} layers of {w['n_embd']}, {w['new_tokens']} new tokens after {w['prompt_tokens']}"
    console.print(f"{result['device']}: {result['name']}; {shape}, {w['rounds']} rounds", markup=False)
    for batch_size in w["batch_sizes"]:
        console.print(_table(result, batch_size))
        for r in (r for r in result["ratios"] if r["batch_size"] == batch_size):
            comparison = f"{OURS} {r['ours']} is {r['ratio']:.2f}x as fast as {r['contestant']} {r['theirs']}"
            console.print(f"{r['family']}: {comparison}", markup=False)
        console.print()
    console.print(f"the limit assumes {result['bandwidth'] / 1e9:,.1f} GB/s, measured in this run", markup=False)
    if text := result["text"]:
        console.print(f"perplexity is on the first {text['tokens']:,} tokens of {text['file']}", markup=False)
    for variant in result["lanes"]:
        if variant["reason"] is not None:
            console.print(f"{variant['contestant']} {variant['name']}: {variant['reason']}", markup=False, style="dim")


def _table(result: dict[str, Any], batch_size: int) -> Table:
    table = Table(f"batch {batch_size}", "", box=None, pad_edge=False)
    headings = ("first token, ms", "quartiles", "tokens/s", "quartiles", "of limit", "peak")
    for heading in (*headings, *(["perplexity"] if result["text"] else [])):
        table.add_column(heading, justify="right")
    table.add_column("")
    for variant in result["lanes"]:
        for batch in (batch for batch in variant["batches"] if batch["batch_size"] == batch_size):
            value = variant.get("perplexity")
            perplexity = ["" if value is None else f"{value:.3f}"] if result["text"] else []
            table.add_row(variant["contestant"], variant["name"], *_table_cells(batch, perplexity))
    return table


def _table_cells(batch: dict[str, Any], perplexity: list[str]) -> list[str | Text]:
    if batch["reason"] is not None:
        return [*[""] * (6 + len(perplexity)), Text(batch["reason"], style="dim")]
    peak = "?" if batch["peak_memory"] is None else format_gib(batch["peak_memory"])
    times = [*format_quartiles(batch["first_ms"]), *format_quartiles(batch["tokens_per_second"])]
    return [*times, f"{batch['of_limit']:.0%}", peak, *perplexity, _token_check_text(batch)]


def _token_check_text(batch: dict[str, Any]) -> Text:
    same = batch["agreement"]
    if batch["wrong"]:
        return Text(f"WRONG: other tokens from token {same + 1} on", style="bold red")
    return Text("" if same == NUM_CHECKED_TOKENS else f"{same} of the first {NUM_CHECKED_TOKENS} tokens equal float32")
