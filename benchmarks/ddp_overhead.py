"""Overhead of DDP with a single process: steps of `torchrun --nproc-per-node=1` compared with plain ones.

    torchrun --standalone --nproc-per-node=1 benchmarks/ddp_overhead.py

The same model twice in one process, without DDP and as the only rank of a run with DDP. They alternate step by step,
and so does their order. A step is the update and the check whether any rank stops. Writes
benchmarks/results/ddp_overhead.json; the ratio is that of the medians.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from machine import write_result

from gpt2.config import TrainConfig
from gpt2.data.loader import Batch
from gpt2.distributed.process_group import SINGLE_PROCESS, process_group
from gpt2.runtime import configure_malloc
from gpt2.train.setup import Run, setup_run
from gpt2.train.trainer import update

COMMAND = "torchrun --standalone --nproc-per-node=1 benchmarks/ddp_overhead.py"
CONFIG = TrainConfig(
    name="overhead",
    data="python-docs",
    tokenizer="bytes",
    n_layer=6,
    n_head=6,
    n_embd=384,
    block_size=256,
    batch_size=2,
    device="cpu",
    dtype="float32",
    compile=False,
)
WARMUP_STEPS = 5


def timed_step(run: Run, batch: Batch) -> float:
    """The seconds of one step."""
    start = time.perf_counter()
    run.step += 1
    update(run, batch, 1e-4)
    run.ranks.any_rank(False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    args = parser.parse_args()
    configure_malloc(keep_freed=True)
    with tempfile.TemporaryDirectory() as folder, process_group() as ranks:
        if ranks.world_size != 1 or ranks.is_single_process:
            sys.exit(f"run it with torchrun: {COMMAND}")
        alone = setup_run(CONFIG, Path(folder), SINGLE_PROCESS)
        ddp = setup_run(replace(CONFIG, parallel="ddp"), Path(folder), ranks)
        seconds: dict[str, list[float]] = {"none": [], "ddp": []}
        for pair in range(WARMUP_STEPS + args.pairs):
            batch = alone.loader.batch(pair)
            for run in (alone, ddp) if pair % 2 else (ddp, alone):
                elapsed = timed_step(run, batch)
                if pair >= WARMUP_STEPS:
                    seconds[run.distributed_model.kind].append(elapsed)
        same = all(torch.equal(*each) for each in zip(alone.model.parameters(), ddp.model.parameters(), strict=True))
    if not same:
        sys.exit("the two models have different weights")
    medians = {kind: statistics.median(each) for kind, each in seconds.items()}
    paired = [ddp / none for ddp, none in zip(seconds["ddp"], seconds["none"], strict=True)]
    ratio = medians["ddp"] / medians["none"]
    found = {
        "pairs": args.pairs,
        "threads": torch.get_num_threads(),
        "seconds": medians,
        "ratio": ratio,
        "median_of_ratios": statistics.median(paired),
    }
    write_result("ddp_overhead", COMMAND, found)
    print(f"median step: {1000 * medians['none']:.1f} ms alone, {1000 * medians['ddp']:.1f} ms with DDP: {ratio:.4f}")
    print(f"median ratio of the {args.pairs} pairs: {statistics.median(paired):.4f}")


if __name__ == "__main__":
    main()
