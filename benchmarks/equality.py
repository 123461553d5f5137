"""Equality of training with 1, 2 and 4 processes: differences to a single process after the same steps.

    python benchmarks/equality.py --steps 50 [--optimizer muon]

Trains a small model on the Python documentation as bytes in float32 with the real command: in a single process, and
under torchrun with DDP and FSDP2 at the same global batch; four ranks also as two hosts with two ranks each, where
FSDP2 shards within a host and replicates across hosts. Compares final weights, the loss of each step, and validation
losses. The effect of float32 rounding alone is in the row of a single process with gradient accumulation over
micro-batches of one row. Each process has one thread. Writes benchmarks/results/equality.json, or
equality_OPTIMIZER.json.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import write_result

import gpt2
from gpt2.config import OPTIMIZERS, TrainConfig, to_toml
from gpt2.reporting.metrics import read_metrics

CONFIG = TrainConfig(
    data="python-docs",
    tokenizer="bytes",
    n_layer=4,
    n_head=4,
    n_embd=128,
    block_size=128,
    batch_size=8,
    lr=1e-3,
    warmup_steps=10,
    schedule="constant",
    device="cpu",
    dtype="float32",
    eval_every=10,
    eval_tokens=20_000,
    save_every=0,
    sample_tokens=0,
)
TIMEOUT_SECONDS = 600  # for one run


@dataclass(frozen=True)
class RunVariant:
    """A way to run the training: number of processes (0: one without torchrun), parallelism, number of hosts."""

    processes: int
    parallel: str = "auto"
    hosts: int = 1
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.processes:
            return "1, in micro-batches" if self.flags else "1"
        return f"{self.processes} {self.parallel}" + (f", {self.hosts} hosts" if self.hosts > 1 else "")

    def commands(self) -> list[list[str]]:
        """The commands to start, one per host."""
        program = ["-m", "gpt2", "train", "equality.toml", "--parallel", self.parallel, *self.flags]
        if not self.processes:
            return [[sys.executable, *program]]
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        torchrun += ["--nnodes", str(self.hosts), "--nproc-per-node", str(self.processes // self.hosts)]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{_free_port()}"]
        return [[*torchrun, *program] for _ in range(self.hosts)]


@dataclass(frozen=True)
class RunResult:
    """The results of a run: weights by name, the loss of each step, and the validation losses."""

    weights: dict[str, torch.Tensor]
    losses: torch.Tensor
    val_losses: torch.Tensor


def run_variant(variant: RunVariant, parent: Path) -> RunResult:
    """Do the run in its own folder under `parent`."""
    name = str(variant).replace(",", "").replace(" ", "-")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, "--name", name],
            cwd=parent,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in variant.commands()
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT_SECONDS)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    if any(process.returncode for process in running):
        sys.exit("\n".join(errors))
    folder = parent / "runs" / name
    records = read_metrics(folder / "metrics.jsonl")
    return RunResult(
        weights={name: p.detach() for name, p in gpt2.load(folder)[0].named_parameters()},
        losses=torch.tensor([record["loss"] for record in records], dtype=torch.float64),
        val_losses=torch.tensor([record["val_loss"] for record in records if "val_loss" in record]).double(),
    )


def differences(one: RunResult, other: RunResult) -> dict[str, float]:
    """The largest differences between two runs: of weights, losses, and validation losses."""
    return {
        "weights": max(float((p - other.weights[name]).abs().max()) for name, p in one.weights.items()),
        "loss": float((one.losses - other.losses).abs().max()),
        "val_loss": float((one.val_losses - other.val_losses).abs().max()),
    }


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return bound.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="divisors of 8, the batch size")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    args = parser.parse_args()
    variants = [RunVariant(0, flags=("--micro-batch-size", "1"))]
    variants += [RunVariant(ranks, parallel) for ranks in args.ranks for parallel in ("ddp", "fsdp")]
    if 4 in args.ranks:
        variants.append(RunVariant(4, "fsdp", hosts=2))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder)
        config = replace(CONFIG, max_steps=args.steps, optimizer=args.optimizer, name="equality")
        (parent / "equality.toml").write_text(to_toml(config), encoding="utf-8")
        alone = run_variant(RunVariant(0), parent)
        scale = max(float(p.abs().max()) for p in alone.weights.values())
        print(f"one process: loss {alone.losses[0]:.3f} -> {alone.losses[-1]:.3f}, largest weight {scale:.2f}")
        print(f"largest differences to it after {args.steps} steps:\n")
        print("| processes | weights | loss of a step | validation loss |\n|:--|--:|--:|--:|")
        for variant in variants:
            found = differences(alone, run_variant(variant, parent))
            row = {"processes": max(1, variant.processes), "parallel": variant.parallel, "hosts": variant.hosts}
            rows.append({**row, **found, "way": str(variant)})
            print(f"| {variant} | {found['weights']:.1e} | {found['loss']:.1e} | {found['val_loss']:.1e} |", flush=True)
    result: dict[str, Any] = {"steps": args.steps, "rows": rows, "largest_weight": scale}
    result |= {"first_loss": alone.losses[0].item(), "last_loss": alone.losses[-1].item()}
    command = f"python benchmarks/equality.py --steps {args.steps} --optimizer {args.optimizer}"
    write_result("equality" if args.optimizer == "adamw" else f"equality_{args.optimizer}", command, result)


if __name__ == "__main__":
    main()
