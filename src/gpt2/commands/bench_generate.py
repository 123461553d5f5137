"""gpt2 bench generate [--flags]"""

import tempfile
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from gpt2.bench import decode_chart
from gpt2.bench.common import CONTEXT_LENGTH, BenchmarkError, SubprocessRunner, environment
from gpt2.bench.decode import NUM_CHECKED_TOKENS, OUR_VARIANTS, OURS, DecodeWorkload, our_variants
from gpt2.bench.decode_comparison import run_comparison
from gpt2.bench.decode_peers import PEERS, parse_decode_peers, peer_variants
from gpt2.cli import Parser
from gpt2.commands.bench_output import (
    check_outputs,
    format_gib,
    format_quartiles,
    print_progress,
    wide_console,
    write_json,
)
from gpt2.errors import UserError, did_you_mean
from gpt2.hardware import device_name
from gpt2.model import OPENAI_CONFIGS, GPTConfig
from gpt2.runtime import pick_device
from gpt2.weights import load

KIND = "bench generate"


def main(argv: list[str]) -> int:
    """`gpt2 bench generate`: 0 when all is well, 1 when a lane wrote the wrong tokens or none could be timed."""
    args = _parse(argv)
    peers, ours = parse_decode_peers(args.peer), our_variants(args.lanes)
    check_outputs(args.json, args.chart)
    config, text = _model_and_text(args)
    work = DecodeWorkload(
        device=str(pick_device(args.device)),
        config=config,
        model=args.model,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        batch_sizes=_parse_batch_sizes(args.batch_sizes),
        rounds=args.rounds,
    )
    result: dict[str, Any] = {"kind": KIND, **environment(), "device": work.device}
    result |= {
        "name": device_name(torch.device(work.device)),
        "workload": _workload_record(work),
        "text": _text_record(args, text),
    }
    try:
        with tempfile.TemporaryDirectory(prefix="gpt2-bench-") as folder:
            entries = [*ours, *peer_variants(work, peers, Path(folder), SubprocessRunner, print_progress)]
            result |= run_comparison(
                work,
                entries,
                text,
                SubprocessRunner,
                print_progress,
                save_partial=lambda found: write_json(args.json, result | found),
            )
    except BenchmarkError as failure:
        raise UserError(f"the model cannot be run: {failure}") from failure
    write_json(args.json, result)
    _print_results(result)
    batches = [batch for lane in result["lanes"] for batch in lane["batches"] if batch["reason"] is None]
    if args.chart is not None and batches:
        decode_chart.draw(result, args.chart)
    return int(not batches or any(batch["wrong"] for batch in batches))


def _parse(argv: list[str]) -> Namespace:
    parser = Parser(
        prog="gpt2 bench generate",
        description="How fast a model writes: time to the first token, tokens/s after it, and the share of what memory "
        "bandwidth allows. Every lane runs in a process of its own, all in turns; one in float32 that does not write "
        f"what the plain model writes is flagged (exit code 1). Our lanes: {', '.join(OUR_VARIANTS)}.",
    )
    parser.add_flag("device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    parser.add_flag("model", metavar="MODEL", help="a run folder, a model folder, or a hub name [random weights]")
    parser.add_flag("shape", metavar="NAME", help=f"of random weights: {', '.join(OPENAI_CONFIGS)} [gpt2]")
    for flag in ("n-layer", "n-head", "n-embd", "vocab-size"):
        parser.add_flag(flag, type=int, metavar="INT", help="instead of that shape's")
    parser.add_flag("lanes", default="all", metavar="LIST", help="which of ours [all]")
    parser.add_flag("peer", action="append", default=[], metavar="PEER", help=f"{_peer_names()}; repeatable")
    parser.add_flag("batch-sizes", default="1,8,32,128", metavar="LIST", help="texts at once [1,8,32,128]")
    parser.add_flag("prompt-tokens", type=int, default=64, metavar="INT", help="in each text's prompt [64]")
    parser.add_flag("new-tokens", type=int, default=64, metavar="INT", help="that follow it [64]")
    parser.add_flag("rounds", type=int, default=3, metavar="INT", help="every lane is timed so many times [3]")
    parser.add_flag("text", type=Path, metavar="FILE", help="tell the perplexity of our lanes on it; needs --model")
    parser.add_flag(
        "text-tokens", type=int, default=8192, metavar="INT", help="so much of it, from its beginning [8192]"
    )
    parser.add_flag("json", type=Path, metavar="FILE", help="write everything measured, with all raw times")
    parser.add_flag("chart", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    return parser.parse_args(argv)


def _peer_names() -> str:
    return ", ".join("nanogpt=PATH" if name == "nanogpt" else name for name in PEERS)


def _parse_batch_sizes(text: str) -> tuple[int, ...]:
    """The batch sizes, each once. Raises UserError for what is no number."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and len(word) < 7 for word in words):
        raise UserError(f"--batch-sizes are whole numbers such as 1,8,32, not {text}")
    return tuple(dict.fromkeys(map(int, words)))


def _model_and_text(args: Namespace) -> tuple[GPTConfig, list[int]]:
    """The model's shape, and the tokens that perplexity is told on, if it was asked for."""
    shape = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    given = {name: value for name, value in shape.items() if value is not None}
    if args.model is None:
        if args.text is not None:
            raise UserError("--text needs --model: random weights have no perplexity worth telling")
        name = args.shape or "gpt2"
        if name not in OPENAI_CONFIGS:
            raise UserError(
                f"--shape {name} is not one of {', '.join(OPENAI_CONFIGS)}{did_you_mean(name, OPENAI_CONFIGS)}"
            )
        room = max(CONTEXT_LENGTH, args.prompt_tokens + max(args.new_tokens, NUM_CHECKED_TOKENS))
        return replace(OPENAI_CONFIGS[name], block_size=room, **given), []
    if given or args.shape:
        raise UserError("--model has a shape of its own: leave out --shape, --n-layer and the like")
    model, tokenizer = load(args.model)
    if args.text is None:
        return model.config, []
    if tokenizer is None:
        raise UserError(f"--text: {args.model} has no tokenizer")
    if args.text_tokens < 2:
        raise UserError(f"--text-tokens must be at least 2, not {args.text_tokens}")
    try:
        tokens = tokenizer.encode(args.text.read_text(encoding="utf-8"))[: args.text_tokens]
    except (OSError, UnicodeError) as error:
        raise UserError(f"{args.text} cannot be read: {error}") from error
    if len(tokens) < 2:
        raise UserError(f"{args.text} has no two tokens")
    return model.config, tokens


def _workload_record(workload: DecodeWorkload) -> dict[str, Any]:
    about = asdict(workload)
    shape = about.pop("config")
    return {name: shape[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")} | about


def _text_record(args: Namespace, text: list[int]) -> dict[str, Any] | None:
    return {"file": args.text.name, "tokens": len(text)} if text else None


def _print_results(result: dict[str, Any]) -> None:
    """Print a table for each batch size, and what follows from all."""
    console, w = wide_console(), result["workload"]
    shape = f"{w['n_layer']} layers of {w['n_embd']}, {w['new_tokens']} tokens after {w['prompt_tokens']}"
    console.print(f"{result['device']}: {result['name']}; {shape}, {w['rounds']} rounds", markup=False)
    for rows in w["batch_sizes"]:
        console.print(_table(result, rows))
        for one in (one for one in result["ratios"] if one["batch_size"] == rows):
            line = f"{one['family']}: {OURS} {one['ours']} is {one['ratio']:.2f}x as fast as {one['contestant']}"
            console.print(f"{line} {one['theirs']}", markup=False)
        console.print()
    console.print(f"the limit is by {result['bandwidth'] / 1e9:,.1f} GB/s, measured in this run", markup=False)
    if result["text"]:
        text = result["text"]
        console.print(f"perplexity is on the first {text['tokens']:,} tokens of {text['file']}", markup=False)
    for lane in result["lanes"]:
        if lane["reason"] is not None:
            console.print(f"{lane['contestant']} {lane['name']}: {lane['reason']}", markup=False, style="dim")


def _table(result: dict[str, Any], batch_size: int) -> Table:
    table = Table(f"batch {batch_size}", "", box=None, pad_edge=False)
    headings = ("first token, ms", "quartiles", "tokens/s", "quartiles", "of limit", "peak")
    for heading in (*headings, *(["perplexity"] if result["text"] else [])):
        table.add_column(heading, justify="right")
    table.add_column("")
    for lane in result["lanes"]:
        for batch in lane["batches"]:
            if batch["batch_size"] == batch_size:
                told = lane.get("perplexity")
                perplexity = ["" if told is None else f"{told:.3f}"] if result["text"] else []
                table.add_row(lane["contestant"], lane["name"], *_table_cells(batch, perplexity))
    return table


def _table_cells(batch: dict[str, Any], perplexity: list[str]) -> list[str | Text]:
    if batch["reason"] is not None:
        return [*[""] * (6 + len(perplexity)), Text(batch["reason"], style="dim")]
    peak = "?" if batch["peak_memory"] is None else format_gib(batch["peak_memory"])
    cells = [
        *format_quartiles(batch["first_ms"]),
        *format_quartiles(batch["tokens_per_second"]),
        f"{batch['of_limit']:.0%}",
        peak,
    ]
    return [*cells, *perplexity, _token_check_text(batch)]


def _token_check_text(batch: dict[str, Any]) -> Text:
    same = batch["agreement"]
    if batch["wrong"]:
        return Text(f"WRONG: writes another text from token {same + 1} on", style="bold red")
    return Text("" if same == NUM_CHECKED_TOKENS else f"the first {same} of {NUM_CHECKED_TOKENS} tokens are float32's")
