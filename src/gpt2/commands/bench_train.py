"""gpt2 bench train [--flags]"""

from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from gpt2.bench import ladder_chart
from gpt2.bench.common import CONTEXT_LENGTH, SubprocessRunner, Workload, environment, run_in_subprocess
from gpt2.bench.ladder import matmul_rate_variation, parse_step_names, run_ladder
from gpt2.bench.train_peers import OURS, compare_with_peers, parse_peers
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
from gpt2.model import OPENAI_CONFIGS
from gpt2.runtime import pick_device

KIND = "bench train"


def main(argv: list[str]) -> int:
    """`gpt2 bench train`: 0 when all is well, 1 when a loss is wrong, or a device gave no measurement at all."""
    args = _parse(argv)
    devices = _devices(args.devices)
    workloads = [_workload(args, device, devices) for device in devices]
    chosen, peers = parse_step_names(args.rungs), parse_peers(args.peer)
    if args.peers_only and not peers:
        raise UserError("--peers-only needs a --peer")
    if args.rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {args.rounds}")
    check_outputs(args.json, args.chart)

    result: dict[str, Any] = {"kind": KIND, **environment(), "workload": _workload_record(workloads[0]), "devices": []}
    for workload in workloads:
        name = device_name(torch.device(workload.device))
        device: dict[str, Any] = {"device": workload.device, "name": name, "workload": _workload_record(workload)}
        result["devices"].append(device | {"rungs": [], "peers": None})
        device = result["devices"][-1]
        if not args.peers_only:
            device["rungs"] = run_ladder(workload, chosen, args.rounds, run=run_in_subprocess, progress=print_progress)
        if peers:
            device["peers"] = compare_with_peers(
                workload, peers, runner_class=SubprocessRunner, progress=print_progress
            )
        write_json(args.json, result)  # after each device: what is measured is not lost
        _print_results(device)
    if args.chart is not None:
        ladder_chart.draw(result, args.chart)
    return int(not all(_passed(device) for device in result["devices"]))


def _parse(argv: list[str]) -> Namespace:
    parser = Parser(
        prog="gpt2 bench train",
        description="The speed ladder: a training step from plain float32 upwards, one thing added at a time. "
        "Every rung runs in a process of its own; one that changes the loss beyond rounding is flagged (exit code 1).",
    )
    parser.add_flag("devices", default="auto", metavar="LIST", help="such as cuda, or cpu,cuda [the best there is]")
    parser.add_flag("model", default="gpt2", metavar="NAME", help=f"the shape: {', '.join(OPENAI_CONFIGS)} [gpt2]")
    for flag in ("n-layer", "n-head", "n-embd"):
        parser.add_flag(flag, type=int, metavar="INT", help="instead of that model's")
    parser.add_flag("vocab-size", type=int, default=50257, metavar="INT", help="[50257]")
    parser.add_flag("batch-size", type=int, metavar="INT", help="sequences in a step [16; 4 where a CPU takes part]")
    parser.add_flag(
        "block-size", type=int, metavar="INT", help="tokens in a sequence [1024; 256 where a CPU takes part]"
    )
    parser.add_flag("steps", type=int, metavar="INT", help="timed steps [20; 5 on a CPU]")
    parser.add_flag("warmup", type=int, default=3, metavar="INT", help="steps before them [3]")
    parser.add_flag("rounds", type=int, default=1, metavar="INT", help="climb the ladder so many times [1]")
    parser.add_flag("rungs", default="all", metavar="LIST", help="only these, each with all below it [all]")
    parser.add_flag(
        "peer", action="append", default=[], metavar="PEER", help="nanogpt=PATH or transformers; repeatable"
    )
    parser.add_flag("peers-only", action="store_true", help="leave the ladder out")
    parser.add_flag("json", type=Path, metavar="FILE", help="write everything measured, with all raw times")
    parser.add_flag("chart", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    return parser.parse_args(argv)


def _devices(names: str) -> list[torch.device]:
    """The devices of a comma list. Raises UserError for one that this machine lacks."""
    devices = []
    for name in dict.fromkeys(name.strip() for name in names.split(",") if name.strip()):
        kind, _, index = name.partition(":")
        count = torch.cuda.device_count()
        if kind == "cuda" and (not index or index.isdigit()) and int(index or 0) >= count:
            raise UserError(f"there is no {name} device on this machine")
        devices.append(pick_device(name))
        if name != "auto" and devices[-1].type != kind:
            raise UserError(f"there is no {name} device on this machine")
    if not devices:
        raise UserError("--devices names none: auto, cpu, cuda, cuda:N, mps")
    return devices


def _workload(args: Namespace, device: torch.device, devices: list[torch.device]) -> Workload:
    """What is timed on `device`; the shapes are the same on all `devices`, so that they can stand side by side."""
    small = any(d.type == "cpu" for d in devices)
    if args.model not in OPENAI_CONFIGS:
        known, meant = ", ".join(OPENAI_CONFIGS), did_you_mean(args.model, OPENAI_CONFIGS)
        raise UserError(f"--model {args.model} is not one of {known}{meant}")
    size = OPENAI_CONFIGS[args.model]
    block_size = _or_default(args.block_size, 256 if small else 1024)
    return Workload(
        device=str(device),
        config=replace(
            size,
            vocab_size=args.vocab_size,
            block_size=max(CONTEXT_LENGTH, block_size),
            n_layer=_or_default(args.n_layer, size.n_layer),
            n_head=_or_default(args.n_head, size.n_head),
            n_embd=_or_default(args.n_embd, size.n_embd),
        ),
        batch_size=_or_default(args.batch_size, 4 if small else 16),
        block_size=block_size,
        steps=_or_default(args.steps, 5 if device.type == "cpu" else 20),
        warmup=args.warmup,
    )


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value


def _workload_record(workload: Workload) -> dict[str, Any]:
    shape = asdict(workload.config)
    names = ("vocab_size", "n_layer", "n_head", "n_embd")
    own = ("batch_size", "block_size", "steps", "warmup", "lr", "seed")
    return {name: shape[name] for name in names} | {name: getattr(workload, name) for name in own}


def _passed(device: dict[str, Any]) -> bool:
    race = device["peers"] or {"contestants": {}, "reason": None}
    found = [*device["rungs"], *race["contestants"].values()]
    measured = any("ms" in one for one in found) and race["reason"] is None
    return measured and not any(one.get("wrong", False) for one in found)


def _print_results(device: dict[str, Any]) -> None:
    """Print a device's tables."""
    console = wide_console()
    w = device["workload"]
    shape = (
        f"{w['n_layer']} layers of {w['n_embd']}, {w['batch_size']} x {w['block_size']:,} tokens, {w['steps']} steps"
    )
    console.print(f"{device['device']}: {device['name']}; {shape}", markup=False)
    if device["rungs"]:
        console.print(_ladder_table(device["rungs"]))
        for line in _ladder_notes(device["rungs"]):
            console.print(line, markup=False)
    if device["peers"] and device["peers"]["reason"] is not None:
        console.print(f"the peers could not be timed: {device['peers']['reason']}", markup=False)
    elif device["peers"]:
        console.print(_peers_table(device["peers"]["contestants"]))
        for line in _ratio_lines(device["peers"]["contestants"]):
            console.print(line, markup=False)


def _ladder_table(steps: list[dict[str, Any]]) -> Table:
    table = Table("rung", box=None, pad_edge=False)
    for heading in ("ms/step", "quartiles", "speed-up", "tokens/s", "MFU", "of datasheet", "peak", "loss"):
        table.add_column(heading, justify="right")
    table.add_column("loss beside the first rung's")
    foot = next((rung for rung in steps if "ms" in rung), None)
    for rung in steps:
        if foot is None or "ms" not in rung:
            table.add_row(rung["name"], *[""] * 8, Text(rung["reason"], style="dim"))
            continue
        sheet = rung["mfu_datasheet"]
        table.add_row(
            rung["name"],
            *format_quartiles(rung["ms"]),
            f"{foot['ms']['median'] / rung['ms']['median']:.2f}x",
            f"{rung['tokens_per_second']:,.0f}",
            f"{rung['mfu']:.0%}",
            "" if sheet is None else f"{sheet:.0%}",
            format_gib(rung["peak_memory"]),
            "not finite" if rung["loss"] is None else f"{rung['loss']:.4f}",
            _loss_check_text(rung, is_baseline=rung is foot),
        )
    return table


def _loss_check_text(step: dict[str, Any], is_baseline: bool) -> Text:
    if step["wrong"]:
        off = "not finite" if step["drift"] is None else f"off by {step['drift']:.2g}"
        return Text(f"WRONG: {off}, {step['allowed']:.0e} allowed", style="bold red")
    return Text("" if is_baseline else f"within {step['drift']:.0e} ({step['allowed']:.0e} allowed)")


def _ladder_notes(steps: list[dict[str, Any]]) -> list[str]:
    rates = {rung["arithmetic"]: rung["matmul"] for rung in steps if "ms" in rung}
    told = ", ".join(f"{arithmetic} {rate / 1e12:,.3g} TFLOP/s" for arithmetic, rate in rates.items())
    notes = [f"MFU is against matmuls measured in this run: {told}"] if told else []
    moved = matmul_rate_variation(steps)
    if moved > 0.15:
        notes.append(f"this machine is not quiet: its matmul rate moved by {moved:.0%} between rungs; try --rounds 3")
    return notes


def _peers_table(contestants: dict[str, dict[str, Any]]) -> Table:
    table = Table("contestant", "mode", box=None, pad_edge=False)
    for heading in ("ms/step", "quartiles", "tokens/s", "MFU", "peak", "first loss"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, one in contestants.items():
        if "ms" not in one:
            table.add_row(name, *[""] * 7, Text(one["reason"], style="dim"))
            continue
        for mode, lane in one["modes"].items():
            if "ms" not in lane:
                table.add_row(name, mode, *[""] * 6, Text(lane["reason"], style="dim"))
            elif mode != one["best"]:
                table.add_row(name, mode, *format_quartiles(lane["ms"]))
            else:
                loss = "not finite" if one["first_loss"] is None else f"{one['first_loss']:.4f}"
                peak = format_gib(one["peak_memory"]) if "peak_memory" in one else "?"
                cells = (f"{one['tokens_per_second']:,.0f}", f"{one['mfu']:.0%}", peak, loss)
                wrong = Text("WRONG: not our loss", style="bold red") if one.get("wrong") else Text("best")
                table.add_row(name, mode, *format_quartiles(lane["ms"]), *cells, wrong)
    return table


def _ratio_lines(contestants: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, one in contestants.items():
        if "speed_ratio" in one:
            memory = f", with {one['memory_ratio']:.2f}x its memory" if "memory_ratio" in one else ""
            mode = contestants[OURS]["best"]
            lines.append(
                f"{one['speed_ratio']:.2f}x the speed of {name}'s best mode ({one['best']}; ours {mode}){memory}"
            )
    return lines
