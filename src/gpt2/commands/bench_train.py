"""gpt2 bench train [--flags]"""

from argparse import Namespace
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from gpt2.bench import ladder_chart
from gpt2.bench.common import (
    CONTEXT_LENGTH,
    SubprocessRunner,
    Workload,
    environment,
    load_benchmark,
    run_in_subprocess,
)
from gpt2.bench.ladder import matmul_rate_variation, parse_step_names, run_ladder
from gpt2.commands.bench_args import SHAPE_FIELDS
from gpt2.commands.bench_output import (
    check_outputs,
    format_gib,
    format_quartiles,
    openai_config,
    wide_console,
)
from gpt2.commands.json_output import prints_json, write_json
from gpt2.errors import ConfigError
from gpt2.hardware import device_name
from gpt2.progress import print_status
from gpt2.runtime import pick_device


def main(args: Namespace) -> int:
    """Run `gpt2 bench train`. Returns 1 if a loss is wrong, or a device has no measurement, else 0."""
    devices = _devices(args.device)
    workloads = [_workload(args, device, devices) for device in devices]
    step_names = parse_step_names(args.ladder_steps)
    train_peers = load_benchmark("train_peers", "--peer") if args.peer else None
    peers = train_peers.parse_peers(args.peer) if train_peers else {}
    if args.peers_only and not peers:
        raise ConfigError("--peers-only needs a --peer", field="peers_only")
    if args.rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, not {args.rounds}", field="rounds")
    check_outputs(args)

    result: dict[str, Any] = {"kind": "bench train", **environment(), "devices": []}
    result["workload"] = _workload_record(workloads[0])
    for workload in workloads:
        name = device_name(torch.device(workload.device))
        device: dict[str, Any] = {"device": workload.device, "name": name, "workload": _workload_record(workload)}
        result["devices"].append(device | {"rungs": [], "peers": None})
        device = result["devices"][-1]
        if not args.peers_only:
            device["rungs"] = run_ladder(
                workload, step_names, args.rounds, run=run_in_subprocess, progress=print_status
            )
        if train_peers:
            device["peers"] = train_peers.compare_with_peers(workload, peers, SubprocessRunner, print_status)
        is_last = workload is workloads[-1]
        write_json(args.json, result, partial=not is_last)  # after each device, so that nothing is lost
        if prints_json(args.json):
            continue
        _print_results(device)
        if train_peers:
            train_peers.print_comparison(wide_console(), device["peers"])
    if args.chart is not None:
        ladder_chart.draw(result, args.chart)
    return int(not all(_passed(device) for device in result["devices"]))


def _devices(names: str) -> list[torch.device]:
    """Parse a comma-separated list of devices. Raises UserError for one that this machine does not have."""
    devices = []
    for name in dict.fromkeys(name.strip() for name in names.split(",") if name.strip()):
        kind, _, index = name.partition(":")
        count = torch.cuda.device_count()
        missing = kind == "cuda" and (not index or index.isdigit()) and int(index or 0) >= count
        if missing or ((device := pick_device(name)).type != kind and name != "auto"):
            raise ConfigError(f"there is no {name} device on this machine", field="device")
        devices.append(device)
    if not devices:
        raise ConfigError("--device is empty: name some of auto, cpu, cuda, cuda:N, mps", field="device")
    return devices


def _workload(args: Namespace, device: torch.device, devices: list[torch.device]) -> Workload:
    """The workload on `device`. All `devices` get the same shapes, so that they can be compared."""
    small = any(d.type == "cpu" for d in devices)
    given = {name: getattr(args, name) for name in SHAPE_FIELDS if getattr(args, name) is not None}
    block_size = _or_default(args.block_size, 256 if small else 1024)
    context = max(CONTEXT_LENGTH, block_size)
    return Workload(
        device=str(device),
        config=replace(openai_config("--shape", args.shape), block_size=context, **given),
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
    """Return whether a device has measurements, none of them wrong and none cut short."""
    peers = device["peers"] or {"contestants": {}, "reason": None}
    records = [*device["rungs"], *peers["contestants"].values()]
    measured = any("ms" in record for record in records) and peers["reason"] is None
    return measured and not any(record.get("wrong", False) for record in records)


def _print_results(device: dict[str, Any]) -> None:
    """Print a device's tables."""
    console = wide_console()
    w = device["workload"]
    shape = f"{w['n_layer']} layers of {w['n_embd']}, {w['batch_size']} x {w['block_size']:,} tokens"
    console.print(f"{device['device']}: {device['name']}; {shape}, {w['steps']} steps", markup=False)
    if device["rungs"]:
        console.print(_ladder_table(device["rungs"]))
        for line in _ladder_notes(device["rungs"]):
            console.print(line, markup=False)


def _ladder_table(steps: list[dict[str, Any]]) -> Table:
    table = Table("step", box=None, pad_edge=False)
    for heading in ("ms/step", "quartiles", "speed-up", "tokens/s", "MFU", "of datasheet", "peak", "loss"):
        table.add_column(heading, justify="right")
    table.add_column("difference from the first loss")
    baseline = next((step for step in steps if "ms" in step), None)
    for step in steps:
        if baseline is None or "ms" not in step:
            table.add_row(step["name"], *[""] * 8, Text(step["reason"], style="dim"))
            continue
        datasheet = step["mfu_datasheet"]
        table.add_row(
            step["name"],
            *format_quartiles(step["ms"]),
            f"{baseline['ms']['median'] / step['ms']['median']:.2f}x",
            f"{step['tokens_per_second']:,.0f}",
            f"{step['mfu']:.0%}",
            "" if datasheet is None else f"{datasheet:.0%}",
            format_gib(step["peak_memory"]),
            "not finite" if step["loss"] is None else f"{step['loss']:.4f}",
            _loss_check_text(step, is_baseline=step is baseline),
        )
    return table


def _loss_check_text(step: dict[str, Any], is_baseline: bool) -> Text:
    if step["wrong"]:
        off = "not finite" if step["drift"] is None else f"off by {step['drift']:.2g}"
        return Text(f"WRONG: {off}, {step['allowed']:.0e} allowed", style="bold red")
    return Text("" if is_baseline else f"within {step['drift']:.0e} ({step['allowed']:.0e} allowed)")


def _ladder_notes(steps: list[dict[str, Any]]) -> list[str]:
    rates = {step["arithmetic"]: step["matmul"] for step in steps if "ms" in step}
    text = ", ".join(f"{arithmetic} {rate / 1e12:,.3g} TFLOP/s" for arithmetic, rate in rates.items())
    notes = [f"MFU is relative to matmuls measured in this run: {text}"] if text else []
    variation = matmul_rate_variation(steps)
    if variation > 0.15:
        notes.append(f"timings are noisy: the matmul rate varied by {variation:.0%} between steps; try --rounds 3")
    return notes
