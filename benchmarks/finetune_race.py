"""Training from scratch, fine-tuning, and LoRA: validation loss by step on Shakespeare, with one model shape.

    python benchmarks/finetune_race.py BASE --data shakespeare [--steps 600]

BASE is a model trained on other text. All three runs have its shape and tokenizer, and the same batches; each has its
own learning rate. --rates tries several rates for each and keeps the best. Writes results/finetune_race.json and .png.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, write_result
from matplotlib.figure import Figure

import gpt2
from gpt2.config import TrainConfig
from gpt2.lora import add_adapter, trainable_parameters
from gpt2.model import GPT
from gpt2.reporting.metrics import read_metrics
from gpt2.train.trainer import train
from gpt2.weights import find_model_folder, load, save

CANDIDATE_LRS = {"from scratch": (2e-3, 4e-3), "fine-tuned": (5e-4, 1e-3), "LoRA": (2e-3, 4e-3, 8e-3)}
DEFAULT_LRS = {"from scratch": 2e-3, "fine-tuned": 1e-3, "LoRA": 4e-3}
COLOURS = {"from scratch": "#7f7f7f", "fine-tuned": "#1f77b4", "LoRA": "#d62728"}
LORA_RANK = 8


def train_variant(variant: str, lr: float, base: str, data: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train one variant; return its validation losses by step, and its trainable parameters and memory."""
    model, tokenizer = load(base)
    shape = model.config
    if variant == "from scratch":
        torch.manual_seed(1)
        base = str(save(GPT(replace(shape, dropout=0.0)), tokenizer, folder / "random"))
    config = TrainConfig(
        name=f"{variant}-{lr}".replace(" ", "-"),
        out_dir=str(folder),
        data=data,
        init_from=base,
        block_size=shape.block_size,
        batch_size=16,
        max_steps=steps,
        lr=lr,
        warmup_steps=min(50, steps // 10),
        dropout=0.0 if variant == "LoRA" else 0.1,
        weight_decay=0.01,
        beta2=0.99,
        lora_rank=LORA_RANK if variant == "LoRA" else 0,
        eval_every=max(1, steps // 24),
        eval_tokens=0,
        save_every=0,
        sample_tokens=0,
    )
    run = train(config)
    records = read_metrics(run / "metrics.jsonl")
    curve = [{"step": r["step"], "val_loss": r["val_loss"]} for r in records if "val_loss" in r]
    if variant == "LoRA":
        add_adapter(model, config.lora_config())
    trainable = sum(p.numel() for p in trainable_parameters(model).values())
    seconds = sorted(r["update_seconds"] for r in records)[len(records) // 2]
    state = (run / "checkpoints" / f"step-{steps}" / "optimizer.safetensors").stat().st_size
    return {
        "lr": lr,
        "parameters": model.num_parameters(),
        "trainable_parameters": trainable,
        "trainable_bytes": 8 * trainable + state,  # weights and gradients in float32, and the optimizer state
        "median_step_seconds": round(seconds, 3),
        "best_val_loss": min(point["val_loss"] for point in curve),
        "curve": curve,
    }


def step_at_loss(curve: list[dict[str, float]], loss: float) -> float | None:
    """The step at which a curve first reaches `loss`, by linear interpolation between two measurements."""
    if curve[0]["val_loss"] <= loss:
        return curve[0]["step"]
    for before, after in pairwise(curve):
        if after["val_loss"] <= loss:
            fraction = (before["val_loss"] - loss) / (before["val_loss"] - after["val_loss"])
            return round(before["step"] + fraction * (after["step"] - before["step"]), 1)
    return None


def draw(found: dict[str, dict[str, Any]], target: float, path: Path) -> None:
    """Draw the curves, and the best loss of training from scratch as a line."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for variant, run in found.items():
        steps, losses = zip(*((point["step"], point["val_loss"]) for point in run["curve"]), strict=True)
        share = run["trainable_parameters"] / run["parameters"]
        axes.plot(steps, losses, color=COLOURS[variant], label=f"{variant} ({share:.0%} of the weights trained)")
        step = step_at_loss(run["curve"], target)
        if step is not None and step > steps[0]:  # else it was reached before the first measurement
            axes.plot([step], [target], "o", color=COLOURS[variant])
    axes.axhline(target, color="#7f7f7f", linewidth=0.8, linestyle=":")
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("Shakespeare: from scratch, fine-tuned, and LoRA")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--data", default="shakespeare")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rates", action="store_true", help="try several learning rates, and keep the best of each")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        for variant in DEFAULT_LRS:
            rates = CANDIDATE_LRS[variant] if args.rates else (DEFAULT_LRS[variant],)
            runs = [train_variant(variant, rate, args.base, args.data, args.steps, Path(name)) for rate in rates]
            found[variant] = min(runs, key=lambda run: run["best_val_loss"])
    target = found["from scratch"]["best_val_loss"]
    steps = {variant: step_at_loss(run["curve"], target) for variant, run in found.items()}
    full, lora = found["fine-tuned"], found["LoRA"]
    result = {
        "base": gpt2.load(find_model_folder(args.base))[0].num_parameters(),
        "target": target,
        "steps_to_target": steps,
        "lora_loss_over_full": lora["best_val_loss"] / full["best_val_loss"],
        "lora_trainable_bytes_over_full": lora["trainable_bytes"] / full["trainable_bytes"],
        "runs": found,
    }
    command = f"python benchmarks/finetune_race.py BASE --data {Path(args.data).stem} --steps {args.steps}"
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))
    write_result("finetune_race", command, result)
    draw(found, target, RESULTS / "finetune_race.png")


if __name__ == "__main__":
    main()
