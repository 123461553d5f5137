"""gpt2 bench serve [--flags]"""

from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from gpt2.bench import serving_chart
from gpt2.bench.common import CONTEXT_LENGTH, BenchmarkError, SubprocessRunner, environment
from gpt2.bench.decode import DecodeWorkload
from gpt2.bench.serving import cold_start, measure_serving
from gpt2.cli import Parser
from gpt2.commands.bench_output import check_outputs, print_progress, wide_console, write_json
from gpt2.errors import UserError, did_you_mean, missing_extra
from gpt2.generation.inference import PRECISIONS
from gpt2.hardware import device_name
from gpt2.model import OPENAI_CONFIGS, GPTConfig
from gpt2.runtime import pick_device
from gpt2.weights import load

KIND = "bench serve"


def main(argv: list[str]) -> int:
    """`gpt2 bench serve`: 0 when all is well."""
    args = _parse(argv)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_extra(error.name or "FastAPI", "serve", "gpt2 bench serve") from error
    check_outputs(args.json, args.chart)
    work = DecodeWorkload(
        device=str(pick_device(args.device)),
        config=_config(args),
        model=args.model,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        batch_sizes=_parse_client_counts(args.clients),
        rounds=args.rounds,
    )
    result: dict[str, Any] = {"kind": KIND, **environment(), "device": work.device, "precision": args.dtype}
    result |= {"name": device_name(torch.device(work.device)), "workload": _workload_record(work), "cold_start": None}
    try:
        if args.model is not None:
            print_progress("a cold start")
            result["cold_start"] = cold_start(work, args.dtype)
        keep = lambda found: write_json(args.json, result | {"clients": found})  # noqa: E731
        result["clients"] = measure_serving(work, args.dtype, SubprocessRunner, print_progress, keep)
    except BenchmarkError as failure:
        raise UserError(f"the server cannot be measured: {failure}") from failure
    write_json(args.json, result)
    _print_results(result)
    if args.chart is not None:
        serving_chart.draw(result, args.chart)
    return 0


def _parse(argv: list[str]) -> Namespace:
    parser = Parser(
        prog="gpt2 bench serve",
        description="What clients get from `gpt2 serve`: tokens/s, time to the first token and between tokens, beside "
        "the engine's own rate in the same run. Server and clients are processes of their own, on this machine.",
    )
    parser.add_flag("device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    parser.add_flag("dtype", default="float32", help=f"{', '.join(PRECISIONS)} [float32]")
    parser.add_flag("model", metavar="MODEL", help="a run folder, a model folder, or a hub name [random weights]")
    parser.add_flag(
        "shape", default="gpt2", metavar="NAME", help=f"of random weights: {', '.join(OPENAI_CONFIGS)} [gpt2]"
    )
    for flag in ("n-layer", "n-head", "n-embd", "vocab-size"):
        parser.add_flag(flag, type=int, metavar="INT", help="instead of that shape's")
    parser.add_flag("clients", default="1,8,32,128", metavar="LIST", help="how many at a time [1,8,32,128]")
    parser.add_flag("prompt-tokens", type=int, default=64, metavar="INT", help="in each text's prompt [64]")
    parser.add_flag("new-tokens", type=int, default=64, metavar="INT", help="that follow it [64]")
    parser.add_flag("rounds", type=int, default=3, metavar="INT", help="everything is timed so many times [3]")
    parser.add_flag("json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_flag("chart", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    if args.dtype not in PRECISIONS:
        raise UserError(f"there is no precision '{args.dtype}'{did_you_mean(args.dtype, PRECISIONS)}")
    return args


def _parse_client_counts(text: str) -> tuple[int, ...]:
    """How many clients, each once, the fewest first. Raises UserError for what is no number."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and 1 <= int(word) <= 1000 for word in words):
        raise UserError(f"--clients are whole numbers from 1 to 1,000, such as 1,8,32, not {text}")
    return tuple(sorted(set(map(int, words))))


def _config(args: Namespace) -> GPTConfig:
    """The model's shape."""
    if args.model is not None:
        return load(args.model)[0].config
    if args.shape not in OPENAI_CONFIGS:
        hint = did_you_mean(args.shape, OPENAI_CONFIGS)
        raise UserError(f"--shape {args.shape} is not one of {', '.join(OPENAI_CONFIGS)}{hint}")
    shape = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    given = {name: value for name, value in shape.items() if value is not None}
    return replace(
        OPENAI_CONFIGS[args.shape], block_size=max(CONTEXT_LENGTH, args.prompt_tokens + args.new_tokens), **given
    )


def _workload_record(workload: DecodeWorkload) -> dict[str, Any]:
    about = asdict(workload)
    shape = about.pop("config")
    return {name: shape[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")} | about


def _print_results(result: dict[str, Any]) -> None:
    console, w = wide_console(), result["workload"]
    shape = f"{w['n_layer']} layers of {w['n_embd']}, {w['new_tokens']} tokens after {w['prompt_tokens']}"
    console.print(f"{result['device']}: {result['name']}; {shape}, {result['precision']}", markup=False)
    table = Table("clients", box=None, pad_edge=False)
    latencies = ("first token, ms", "p99", "between tokens, ms", "p99", "p99 / median")
    for heading in ("tokens/s", "the engine's", "of it", *latencies):
        table.add_column(heading, justify="right")
    for row in result["clients"]:
        first, between, ratio = row["first_token_ms"], row["between_tokens_ms"], row["between_tokens_p99_of_median"]
        table.add_row(
            str(row["clients"]),
            f"{row['tokens_per_second']:,.1f}",
            f"{row['engine_tokens_per_second']:,.1f}",
            f"{row['of_engine']:.0%}",
            *(f"{spread[name]:,.1f}" for spread in (first, between) for name in ("median", "p99")),
            f"{ratio:,.1f}" if ratio else "",
        )
    console.print(table)
    if result["cold_start"]:
        cold = result["cold_start"]
        ready, first = cold["ready"], cold["first_token"]
        console.print(f"from nothing: it answers after {ready:.1f} s, and the first token comes after {first:.1f} s")
