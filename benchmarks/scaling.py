"""The curves of docs/scaling.md: what `gpt2 plan` predicts for OpenAI's four sizes on 1 to 1,024 GPUs.

    python benchmarks/scaling.py [--on h100]

Arithmetic alone, the same on every machine. Writes results/scaling.json and docs/images/scaling-*.png, and prints
tables in Markdown. Machines have eight GPUs each; fewer GPUs are in one.
"""

import argparse
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
ROWS_PER_GPU = 8  # of each GPU, where the batch grows with them
NETWORKS = [10, 25, 50, 100, 200, 400, 800, 1600, 3200]  # Gbit/s of a machine
NUM_NODES = 8  # for those


def config_of(name: str, rows: int) -> TrainConfig:
    shape = OPENAI_CONFIGS[name]
    wanted = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd}
    return replace(load_recipe("gpt2-124m"), **wanted, batch_size=rows, micro_batch_size=None)


def predict_run(name: str, on: str, gpus: int, rows: int, network: float | None = None) -> dict[str, Any]:
    """A run with the largest micro-batch that fits, of 16 rows at most, by DDP and by FSDP."""
    config = config_of(name, rows)
    where = {"on": on, "nodes": max(1, gpus // 8), "devices": min(gpus, 8), "network": network}
    most = next((rows for rows in (16, 8, 4, 2) if _fits(replace(config, micro_batch_size=rows), gpus, where)), 1)
    made = plan(replace(config, micro_batch_size=min(most, rows // gpus)), **where)
    ways = {way: made.ways[way].step for way in STRATEGIES} if made.ways else {"none": None}
    return {
        "micro_batch_size": made.micro_batch_size,
        "auto": made.parallel,
        "memory": {way: made.ways[way].memory.step if made.ways else made.memory.step for way in STRATEGIES},
        "fits": {way: made.ways[way].fits if made.ways else made.fits for way in STRATEGIES},
        "seconds": {way: made.seconds_per_step if step is None else step.seconds for way, step in ways.items()},
        "computing": {way: 1.0 if step is None else step.efficiency for way, step in ways.items()},
        "exposed": {way: 0.0 if step is None else step.exposed for way, step in ways.items()},
        "sent": {way: 0.0 if step is None else step.sent_inside + step.sent_between for way, step in ways.items()},
    }


def _fits(config: TrainConfig, gpus: int, where: dict[str, Any]) -> bool:
    assert config.micro_batch_size is not None
    if config.batch_size // gpus < config.micro_batch_size:
        return False
    made = plan(config, **where)
    return made.fits if not made.ways else any(way.fits for way in made.ways.values())


def scaling_curve(name: str, on: str, counts: list[int], rows_of: Any) -> dict[str, Any]:
    """The runs on so many GPUs each, with the speed of a GPU in them against that of one GPU alone."""
    runs: dict[str, Any] = {}
    for gpus in counts:
        run = predict_run(name, on, gpus, rows_of(gpus))
        one = runs.get("1", run)
        alone = rows_of(1) / one["seconds"]["none"]
        run["efficiency"] = {way: rows_of(gpus) / gpus / took / alone for way, took in run["seconds"].items()}
        runs[str(gpus)] = run
    return runs


def value_of(run: dict[str, Any], key: str, strategy: str) -> float:
    return run[key].get(strategy, run[key].get("none"))


def draw_efficiency(found: dict[str, Any], on: str, path: Path) -> None:
    figure = Figure(figsize=(10, 7.6), dpi=110, layout="constrained")
    same, growing, slow, memory = figure.subplots(2, 2).flat
    for axes, key, title in (
        (same, "same_batch", "The same batch of 0.5M tokens, divided further"),
        (growing, "same_share", f"{ROWS_PER_GPU} rows of 1,024 tokens for each GPU"),
    ):
        for name in MODELS:
            for way in STRATEGIES:
                runs = found[key][name]
                points = [(int(gpus), 100 * value_of(run, "efficiency", way)) for gpus, run in runs.items()]
                axes.plot(*zip(*points, strict=True), LINES[way], color=COLOURS[name], linewidth=1.8)
        _percent(axes, title, "speed of a GPU, % of one alone")
        _gpus(axes)
    growing.set_ylim(70, 112)
    for name in MODELS:
        for way in STRATEGIES:
            points = [
                (float(gbit), 100 * value_of(run, "computing", way)) for gbit, run in found["network"][name].items()
            ]
            slow.plot(*zip(*points, strict=True), LINES[way], color=COLOURS[name], linewidth=1.8)
            points = [(int(gpus), value_of(run, "memory", way) / 2**30) for gpus, run in found["memory"][name].items()]
            memory.plot(*zip(*points, strict=True), LINES[way], color=COLOURS[name], linewidth=1.8)
    _percent(
        slow, f"{NUM_NODES} machines of 8 GPUs, {ROWS_PER_GPU} rows each, on slower networks", "% of a step computing"
    )
    slow.set_xscale("log")
    slow.set_xticks(NETWORKS, [str(gbit) for gbit in NETWORKS], fontsize=8)
    slow.minorticks_off()
    slow.set_xlabel("Gbit/s of each machine")
    _gpus(memory)
    memory.set_title("Memory of a GPU, one row at once", fontsize=10)
    memory.set_ylabel("GiB")
    memory.set_ylim(0)
    _remove_spines(memory)
    handles = [memory.plot([], [], color=COLOURS[name], label=label)[0] for name, label in MODELS.items()]
    handles += [memory.plot([], [], LINES[way], color="0.3", label=way.upper())[0] for way in STRATEGIES]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"Predicted: GPT-2 on {on.upper()} GPUs, eight in a machine", fontsize=12)
    figure.savefig(path)


def _percent(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(label)
    axes.set_ylim(0, 104)
    _remove_spines(axes)


def _gpus(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS[::2], [f"{count:,}" for count in GPUS[::2]])
    axes.set_xlabel("GPUs")


def _remove_spines(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")


def table(found: dict[str, Any]) -> str:
    """Steps of the same batch, in Markdown."""
    lines = [
        "| model | GPUs | rows at once | memory, DDP / FSDP | step, DDP / FSDP | not hidden | speed of a GPU |",
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
    """The share of a step that is computing, on slower networks, in Markdown."""
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
