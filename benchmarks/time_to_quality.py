"""AdamW against Muon: steps and seconds to the same validation loss, each at the best of several learning rates.

    python benchmarks/time_to_quality.py --data input.txt

Same model (recipe shakespeare-cpu: GPT-2's architecture, 2 layers of 128), batches and schedule; only the optimizer and
its learning rate differ. Times are of the updates, without validation. Writes results/time_to_quality.json and .png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from machine import RESULTS, write_result
from matplotlib.figure import Figure

CANDIDATE_LRS = {"adamw": (3e-3, 6e-3, 1e-2, 2e-2), "muon": (5e-3, 1e-2, 2e-2, 4e-2)}
COLOURS = {"adamw": "#1f77b4", "muon": "#d62728"}


def train_with_optimizer(optimizer: str, lr: float, steps: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train once; return its validation losses, each with the seconds of the updates so far."""
    name = f"{optimizer}-{lr}"
    flags = {
        "data": data,
        "optimizer": optimizer,
        "lr": lr,
        "max-steps": steps,
        "eval-every": max(1, steps // 12),
        "eval-tokens": 0,
        "sample-tokens": 0,
        "save-every": 0,
        "out-dir": folder,
        "name": name,
    }
    command = [sys.executable, "-m", "gpt2", "train", "shakespeare-cpu"]
    command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    subprocess.run(command, check=True, capture_output=True)
    curve, seconds = [], 0.0
    for line in (folder / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        seconds += record["data_seconds"] + record["update_seconds"]
        if "val_loss" in record:
            curve.append({"step": record["step"], "seconds": round(seconds, 2), "val_loss": record["val_loss"]})
    return {"optimizer": optimizer, "lr": lr, "curve": curve}


def first_reached(run: dict[str, Any], loss: float) -> dict[str, float] | None:
    """The step and seconds at which a run first reaches `loss`, by linear interpolation between two measurements."""
    for before, after in pairwise(run["curve"]):
        if after["val_loss"] <= loss < before["val_loss"]:
            fraction = (before["val_loss"] - loss) / (before["val_loss"] - after["val_loss"])
            return {key: round(before[key] + fraction * (after[key] - before[key]), 1) for key in ("step", "seconds")}
    return None


def draw(runs: list[dict[str, Any]], best: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("step", "seconds"), strict=True):
        for run in runs:
            is_best = run is best[run["optimizer"]]
            points = run["curve"]
            axes.plot(
                [p[key] for p in points],
                [p["val_loss"] for p in points],
                color=COLOURS[run["optimizer"]],
                linewidth=2 if is_best else 0.8,
                alpha=1 if is_best else 0.4,
                label=f"{run['optimizer']}, lr {run['lr']:g}: {points[-1]['val_loss']:.3f}",
            )
        axes.set(xlabel="step" if key == "step" else "training time (s, updates only)", yscale="log")
        axes.set_yticks([1.6, 1.8, 2.0, 2.4, 3.0], labels=["1.6", "1.8", "2.0", "2.4", "3.0"])
        axes.minorticks_off()
        axes.set_ylim(top=3.2)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("validation loss (nats per byte)")
    figure.axes[1].legend(frameon=False)
    figure.suptitle("AdamW and Muon on Shakespeare: GPT-2 with 2 layers of 128, same batches")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="AdamW against Muon, each at its best learning rate.")
    parser.add_argument("--data", type=Path, required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rates in zip(*CANDIDATE_LRS.values(), strict=True):  # alternating, so that other load affects both
            for optimizer, rate in zip(CANDIDATE_LRS, rates, strict=True):
                runs.append(train_with_optimizer(optimizer, rate, args.steps, args.data.absolute(), Path(folder)))
                print(f"{optimizer} {rate:g}: {runs[-1]['curve'][-1]}", flush=True)
    best = {
        name: min((run for run in runs if run["optimizer"] == name), key=lambda run: run["curve"][-1]["val_loss"])
        for name in CANDIDATE_LRS
    }
    goal = best["adamw"]["curve"][-1]["val_loss"]
    found = {
        "goal": goal,
        "to_goal": {name: first_reached(run, goal) for name, run in best.items()},
        "best_lr": {name: run["lr"] for name, run in best.items()},
        "runs": runs,
    }
    write_result("time_to_quality", "python benchmarks/time_to_quality.py --data input.txt", found)
    draw(runs, best, RESULTS / "time_to_quality.png")
    print(json.dumps({key: found[key] for key in ("goal", "to_goal", "best_lr")}, indent=1))


if __name__ == "__main__":
    main()
