"""Shakespeare race: nanoGPT's CPU recipe against `gpt2 train shakespeare-cpu` on this machine, alternating.

    python benchmarks/shakespeare_race.py --nanogpt PATH_OF_A_CHECKOUT --data input.txt

Both use the official 90/10 split of tinyshakespeare. nanoGPT runs the command of its README for a computer without a
GPU. Compared are the wall-clock time of the whole process, and its final loss over the whole validation split in nats
per character (the text is ASCII: a byte is a character), in non-overlapping windows of 64. Writes
results/shakespeare_race.json.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import write_result

NANOGPT_FLAGS = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


def run_nanogpt(checkout: Path, data: Path, folder: Path) -> dict[str, float]:
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git"))
    shutil.copy(data, folder / "data/shakespeare_char/input.txt")
    subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=folder, check=True, capture_output=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "train.py", *NANOGPT_FLAGS.split()], cwd=folder, check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    own = next(line for line in done.stdout.splitlines() if line.startswith("step 2000"))
    return {"seconds": seconds, "own_estimate": float(own.split()[-1]), "val_loss": nanogpt_loss(folder)}


def nanogpt_loss(folder: Path) -> float:
    """The loss of nanoGPT's checkpoint over its whole validation file."""
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig  # pyright: ignore[reportMissingImports]

    sys.path.pop(0)
    checkpoint = torch.load(folder / "out-shakespeare-char" / "ckpt.pt", weights_only=False)  # written by this script
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    model.eval()
    tokens = torch.from_numpy(np.fromfile(folder / "data/shakespeare_char/val.bin", np.uint16).astype(np.int64))
    total, count = 0.0, len(tokens) - 1
    with torch.no_grad():
        for start in range(0, count, 64):
            window = tokens[start : start + 65]
            _, loss = model(window[None, :-1], window[None, 1:])
            total += loss.item() * (len(window) - 1)
    return total / count


def run_ours(data: Path, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "gpt2", "train", "shakespeare-cpu", "--data", str(data), "--out-dir", str(folder)]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    last = json.loads((folder / "shakespeare-cpu" / "metrics.jsonl").read_text().splitlines()[-1])
    return {"seconds": seconds, "steps": last["step"], "val_loss": last["val_loss"]}


def write_rounds(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Write the results of the rounds so far; return the medians."""
    assert all(math.isfinite(r["ours"]["val_loss"]) for r in rounds)
    found = {
        "rounds": rounds,
        "median": {
            side: {key: median(r[side][key] for r in rounds) for key in ("seconds", "val_loss")}
            for side in ("nanogpt", "ours")
        },
        "time_ratio_of_medians": median(r["ours"]["seconds"] for r in rounds)
        / median(r["nanogpt"]["seconds"] for r in rounds),
    }
    command = "python benchmarks/shakespeare_race.py --nanogpt PATH --data input.txt"
    return write_result("shakespeare_race", command, found)["median"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Shakespeare race against nanoGPT on this machine.")
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--data", type=Path, required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            theirs = run_nanogpt(args.nanogpt, args.data, Path(folder) / "nanoGPT")
            ours = run_ours(args.data, Path(folder) / "runs")
        rounds.append({"nanogpt": theirs, "ours": ours})
        print(f"round {number + 1}: nanoGPT {theirs['val_loss']:.4f} in {theirs['seconds']:.1f} s, ", end="")
        print(f"ours {ours['val_loss']:.4f} in {ours['seconds']:.1f} s", flush=True)
        write_rounds(rounds)
    print(json.dumps(write_rounds(rounds), indent=2))


if __name__ == "__main__":
    main()
