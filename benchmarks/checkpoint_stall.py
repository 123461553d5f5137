"""Cost of asynchronous checkpoints: GPT-2 124M with AdamW, 1.5 GB, saved while training continues.

    python benchmarks/checkpoint_stall.py

Writes results/checkpoint_stall.json. The stall is the time of `save`; the write runs in parallel with later steps.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from machine import write_result

from gpt2.config import TrainConfig
from gpt2.model import GPT, GPTConfig
from gpt2.optimizers import build_optimizers
from gpt2.runtime import configure_malloc, pick_device
from gpt2.train.artifact import ModelArtifact
from gpt2.train.checkpoint import CheckpointWriter

NUM_SAVES = 4


def main() -> None:
    device = pick_device()
    configure_malloc(keep_freed=True)
    model = GPT(GPTConfig()).to(device)
    optimizers = build_optimizers(model, TrainConfig())
    tokens = torch.randint(50257, (1, 256), device=device)

    def step() -> float:
        start = time.perf_counter()
        model.loss(tokens, tokens).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    step()
    alone, during_write, stalls, writes = [step() for _ in range(5)], [], [], []
    artifact = ModelArtifact(model.config, None)
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter(Path(folder), artifact, keep=1) as writer:
        for number in range(NUM_SAVES):
            writer.save(number, model, optimizers)
            stalls.append(writer.stall_seconds)
            during_write.append(step())
            writer.wait()
            writes.append(writer.write_seconds)
    found = {
        "device": str(device),
        "stall_seconds": {"first": stalls[0], "later": statistics.median(stalls[1:])},
        "write_seconds": statistics.median(writes),
        "step_seconds": {"alone": statistics.median(alone), "beside_a_write": statistics.median(during_write)},
    }
    result = write_result("checkpoint_stall", "python benchmarks/checkpoint_stall.py", found)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
