"""The predictions in docs/scaling.md: `gpt2 plan` for OpenAI's four model sizes on 1 to 1,024 GPUs.

    python benchmarks/scaling.py [--on h100]

Computed, not measured, so the same on every machine. Writes results/scaling.json and docs/images/scaling-*.png, and
prints Markdown tables. Machines have eight GPUs each; up to eight GPUs are in one machine.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import write_result
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2.config import TrainConfig
from gpt2.model import OPENAI_CONFIGS
from gpt2.planning.plan import STRATEGIES, plan
from gpt2.train.recipes import load_recipe

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MODELS = {"gpt2": "124M", "gpt2-medium": "350M", "gpt2-large": "774M", "gpt2-xl": "1.5B"}
COLOURS = dict(zip(MODELS, ("#1f77b4", "#2ca02c", "#ff7f0e", "#d62728"), strict=True))
LINES = {"ddp": "-", "fsdp": "--"}
GPUS = [2**i for i in range(11)]
BATCH = 512  # rows of 1,024 tokens: the 0.5M tokens of GPT-3's small models
ROWS_PER_GPU = 8  # where the batch grows with the number of GPUs
NETWORKS = [10, 25, 50, 100, 200, 400, 800, 1600, 3200]  # Gbit/s of a machine
NUM_NODES = 8  # in the comparison of networks


def make_config(name: str, rows: int) -> TrainConfig:
    shape = OPENAI_CONFIGS[name]
    size = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd}
    return replace(load_recipe("gpt2-124m"), **size, batch_size=rows, micro_batch_size=None)


def predict_run(name: str, on: str, gpus: int, rows: int, network: float | None = None) -> dict[str, Any]:
    """A run with DDP and with FSDP, with the largest micro-batch that fits, of at most 16 rows."""
    config = make_config(name, rows)
    devices = {"on": on, "nodes": max(1, gpus // 8), "devices": min(gpus, 8), "network": network}
    largest = next((n for n in (16, 8, 4, 2) if _fits(replace(config, micro_batch_size=n), gpus, devices)), 1)
    planned = plan(replace(config, micro_batch_size=min(largest, rows // gpus)), **devices)
    steps = {way: planned.ways[way].step for way in STRATEGIES} if planned.ways else {"none": None}
    return {
        "micro_batch_size": planned.micro_batch_size,
        "auto": planned.parallel,
        "memory": {w: planned.ways[w].memory.step if planned.ways else planned.memory.step for w in STRATEGIES},
        "fits": {w: planned.ways[w].fits if planned.ways else planned.fits for w in STRATEGIES},
        "seconds": {w: planned.seconds_per_step if step is None else step.seconds for w, step in steps.items()},
        "computing": {w: 1.0 if step is None else step.efficiency for w, step in steps.items()},
        "exposed": {w: 0.0 if step is None else step.exposed for w, step in steps.items()},
        "sent": {w: 0.0 if step is None else step.sent_inside + step.sent_between for w, step in steps.items()},
    }


def _fits(config: TrainConfig, gpus: int, devices: dict[str, Any]) -> bool:
    assert config.micro_batch_size is not None
    if config.batch_size // gpus < config.micro_batch_size:
        return False
    planned = plan(config, **devices)
    return planned.fits if not planned.ways else any(way.fits for way in planned.ways.values())


def scaling_curve(name: str, on: str, gpu_counts: list[int], batch_size: Callable[[int], int]) -> dict[str, Any]:
    """The runs on each number of GPUs, with the throughput per GPU relative to that of a single GPU."""
    runs: dict[str, Any] = {}
    for gpus in gpu_counts:
        run = predict_run(name, on, gpus, batch_size(gpus))
        single = batch_size(1) / runs.get("1", run)["seconds"]["none"]
        run["efficiency"] = {way: batch_size(gpus) / gpus / s / single for way, s in run["seconds"].items()}
        runs[str(gpus)] = run
    return runs


def value_of(run: dict[str, Any], key: str, strategy: str) -> float:
    return run[key].get(strategy, run[key].get("none"))


def draw_efficiency(found: dict[str, Any], on: str, path: Path) -> None:
    figure = Figure(figsize=(10, 7.6), dpi=110, layout="constrained")
    strong, weak, networks, memory = figure.subplots(2, 2).flat
    for axes, key, title in (
        (strong, "same_batch", "Strong scaling: a batch of 0.5M tokens"),
        (weak, "same_share", f"Weak scaling: {ROWS_PER_GPU} rows of 1,024 tokens per GPU"),
    ):
        for name in MODELS:
            for way in STRATEGIES:
                runs = found[key][name]
                points = [(int(gpus), 100 * value_of(run, "efficiency", way)) for gpus, run in runs.items()]
                axes.plot(*zip(*points, strict=True), LINES[way], color=COLOURS[name], linewidth=1.8)
        _style_percent_axis(axes, title, "throughput per GPU (% of a single GPU)")
        _style_gpu_axis(axes)
    weak.set_ylim(70, 112)
    for name in MODELS:
        for way in STRATEGIES:
            points = [
                (float(gbit), 100 * value_of(run, "computing", way)) for gbit, run in found["network"][name].items()
            ]
            networks.plot(*zip(*points, strict=True), LINES[way], color=COLOURS[name], linewidth=1.8)
            points = [(int(gpus), value_of(run, "memory", way) / 2**30) for gpus, run in found["memory"][name].items()]
            memory.plot(*zip(*points, strict=True), LINES[way], color=COLOURS[name], linewidth=1.8)
    title = f"{NUM_NODES} machines with 8 GPUs, {ROWS_PER_GPU} rows per GPU, by network"
    _style_percent_axis(networks, title, "share of a step computing (%)")
    networks.set_xscale("log")
    networks.set_xticks(NETWORKS, [f"{gbit:,}" for gbit in NETWORKS], fontsize=8)
    networks.minorticks_off()
    networks.set_xlabel("network of each machine (Gbit/s)")
    _style_gpu_axis(memory)
    memory.set_title("Memory per GPU, micro-batch of one row", fontsize=10)
    memory.set_ylabel("memory (GiB)")
    memory.set_ylim(0)
    _remove_spines(memory)
    handles = [memory.plot([], [], color=COLOURS[name], label=label)[0] for name, label in MODELS.items()]
    handles += [memory.plot([], [], LINES[way], color="0.3", label=way.upper())[0] for way in STRATEGIES]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"Predicted: GPT-2 on {on.upper()} GPUs, eight per machine", fontsize=12)
    figure.savefig(path)


def _style_percent_axis(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(label)
    axes.set_ylim(0, 104)
    _remove_spines(axes)


def _style_gpu_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS[::2], [f"{count:,}" for count in GPUS[::2]])
    axes.set_xlabel("number of GPUs")


def _remove_spines(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")


def table(found: dict[str, Any]) -> str:
    """The steps of the fixed batch, in Markdown."""
    lines = [
        "| model | GPUs | micro-batch | memory, DDP / FSDP | step, DDP / FSDP | exposed | throughput per GPU |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, label in MODELS.items():
        for gpus, run in found["same_batch"][name].items():
            if gpus in ("1", "8", "64", "512"):
                values = {
                    what: [value_of(run, what, way) for way in STRATEGIES]
                    for what in ("memory", "seconds", "exposed", "efficiency")
                }
                cells = (
                    " / ".join(f"{value / 2**30:.1f}" for value in values["memory"]) + " GiB",
                    " / ".join(f"{1000 * value:,.{1 if value < 0.1 else 0}f}" for value in values["seconds"]) + " ms",
                    " / ".join(f"{1000 * value:.1f}" for value in values["exposed"]) + " ms",
                    " / ".join(f"{value:.0%}" for value in values["efficiency"]),
                )
                lines.append(f"| {label} | {gpus} | {run['micro_batch_size']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def network_table(found: dict[str, Any]) -> str:
    """The share of a step that is computing, by network, in Markdown."""
    lines = [
        "| model | " + " | ".join(f"{gbit} Gbit/s" for gbit in NETWORKS) + " |",
        "| --- |" + " ---: |" * len(NETWORKS),
    ]
    for name, label in MODELS.items():
        runs = found["network"][name].values()
        cells = [" / ".join(f"{value_of(run, 'computing', way):.0%}" for way in STRATEGIES) for run in runs]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", default="h100", help="a GPU that gpt2 plan knows")
    on = parser.parse_args().on
    found = {
        "on": on,
        "same_batch": {
            name: scaling_curve(name, on, [n for n in GPUS if n <= BATCH], lambda gpus: BATCH) for name in MODELS
        },
        "same_share": {name: scaling_curve(name, on, GPUS, lambda gpus: ROWS_PER_GPU * gpus) for name in MODELS},
        "memory": {name: scaling_curve(name, on, GPUS, lambda gpus: gpus) for name in MODELS},
        "network": {
            name: {
                str(gbit): predict_run(name, on, 8 * NUM_NODES, 8 * NUM_NODES * ROWS_PER_GPU, gbit * 1e9 / 8)
                for gbit in NETWORKS
            }
            for name in MODELS
        },
    }
    write_result("scaling", f"python benchmarks/scaling.py --on {on}", found)
    draw_efficiency(found, on, IMAGES / f"scaling-{on}.png")
    print(table(found), network_table(found), sep="\n\n")


if __name__ == "__main__":
    main()
