"""gpt2 bench serve [--flags]"""

from argparse import Namespace
from typing import Any

from rich.table import Table

from benchmarks import serving_chart
from benchmarks.serving import cold_start, measure_serving
from gpt2.bench.common import BenchmarkError, SubprocessRunner
from gpt2.bench.decode import DecodeWorkload
from gpt2.commands.bench_output import (
    check_outputs,
    new_decode_result,
    parse_counts,
    random_model_config,
    wide_console,
)
from gpt2.commands.json_output import prints_json, write_json
from gpt2.errors import UserError, missing_extra
from gpt2.progress import print_status
from gpt2.resolve import resolve_model
from gpt2.runtime import pick_device

MAX_CLIENTS = 1000


def main(args: Namespace) -> int:
    """Run `gpt2 bench serve`. Returns 0."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_extra(error.name or "FastAPI", "serve", "gpt2 bench serve") from error
    check_outputs(args)
    random_config = random_model_config(args, args.prompt_tokens + args.max_new_tokens)
    workload = DecodeWorkload(
        device=str(pick_device(args.device)),
        config=random_config if args.model is None else resolve_model(args.model).config,
        model=args.model,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.max_new_tokens,
        batch_sizes=tuple(sorted(parse_counts("--clients", args.clients, MAX_CLIENTS))),
        rounds=args.rounds,
    )
    result = new_decode_result("bench serve", workload) | {"precision": args.dtype, "cold_start": None}
    try:
        if args.model is not None:
            print_status("cold start")
            result["cold_start"] = cold_start(workload, args.dtype)
        save_partial = lambda found: write_json(args.json, result | {"clients": found}, partial=True)  # noqa: E731
        result["clients"] = measure_serving(workload, args.dtype, SubprocessRunner, print_status, save_partial)
    except BenchmarkError as failure:
        raise UserError(f"the server cannot be measured: {failure}") from failure
    write_json(args.json, result)
    if not prints_json(args.json):
        _print_results(result)
    if args.chart is not None:
        serving_chart.draw(result, args.chart)
    return 0


def _print_results(result: dict[str, Any]) -> None:
    console, w = wide_console(), result["workload"]
    shape = f"{w['n_layer']} layers of {w['n_embd']}, {w['new_tokens']} new tokens after {w['prompt_tokens']}"
    console.print(f"{result['device']}: {result['name']}; {shape}, {result['precision']}", markup=False)
    table = Table("clients", box=None, pad_edge=False)
    latencies = ("first token, ms", "p99", "inter-token, ms", "p99", "p99 / median")
    for heading in ("tokens/s", "engine alone", "ratio", *latencies):
        table.add_column(heading, justify="right")
    for row in result["clients"]:
        first, between, ratio = row["first_token_ms"], row["between_tokens_ms"], row["between_tokens_p99_of_median"]
        table.add_row(
            str(row["clients"]),
            f"{row['tokens_per_second']:,.1f}",
            f"{row['engine_tokens_per_second']:,.1f}",
            f"{row['of_engine']:.0%}",
            *(f"{latency[name]:,.1f}" for latency in (first, between) for name in ("median", "p99")),
            f"{ratio:,.1f}" if ratio else "",
        )
    console.print(table)
    if result["cold_start"]:
        ready, first = result["cold_start"]["ready"], result["cold_start"]["first_token"]
        console.print(f"cold start: ready after {ready:.1f} s, first token after {first:.1f} s")
