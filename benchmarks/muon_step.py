"""Time of an update: our Muon against torch.optim.Muon in turns, and over two ranks, shared against each for itself.

    python benchmarks/muon_step.py
    torchrun --standalone --nproc-per-node=2 benchmarks/muon_step.py

Only the matrices of the blocks, with random gradients. Writes results/muon_step.json, or muon_step_ranks.json.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from machine import write_result
from torch import nn

from gpt2.model import GPTConfig
from gpt2.muon import Muon
from gpt2.planning.costs import block_matrices

SHAPES = {  # name -> layers, width, rounds
    "quickstart": (3, 128, 40),
    "shakespeare": (6, 384, 12),
    "gpt2-124m": (12, 768, 3),
}


def matrices(layers: int, width: int) -> list[nn.Parameter]:
    """The matrices of the blocks, with gradients."""
    shapes = block_matrices(GPTConfig(n_layer=layers, n_head=1, n_embd=width)).values()
    parameters = [nn.Parameter(torch.randn(shape)) for _ in range(layers) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def medians_ms(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each step, timed in turns, after one step of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def main() -> None:
    torch.manual_seed(0)
    torchrun = dist.is_torchelastic_launched()
    if torchrun:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    ours = partial(Muon, lr=0.01, weight_decay=0.1)
    theirs = partial(torch.optim.Muon, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    found = {}
    for name, (layers, width, rounds) in SHAPES.items():
        if torchrun:
            optimizers = {"shared": ours(matrices(layers, width), group=dist.group.WORLD)}
            optimizers["alone"] = ours(matrices(layers, width))
        else:
            optimizers = {"ours": ours(matrices(layers, width)), "torch": theirs(matrices(layers, width))}
        times = medians_ms({key: optimizer.step for key, optimizer in optimizers.items()}, rounds)
        fast, slow = times
        found[name] = {**times, "ratio": round(times[slow] / times[fast], 2)}
        if not torchrun or dist.get_rank() == 0:
            print(name, found[name], flush=True)
    launcher = "torchrun --standalone --nproc-per-node=2" if torchrun else "python"
    if not torchrun or dist.get_rank() == 0:
        write_result("muon_step_ranks" if torchrun else "muon_step", f"{launcher} benchmarks/muon_step.py", found)
    if torchrun:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
