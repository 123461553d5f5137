"""Full fine-tuning and LoRA of GPT-2 124M: peak memory of the command, and step time.

    python benchmarks/lora_memory.py [--rounds 2]

Random weights in OpenAI's shape, micro-batches of one row of 512 tokens; the whole command `gpt2 finetune` including
its final comparison, each in a separate process, alternating. Writes results/lora_memory.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import write_result

import gpt2
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import get_tokenizer

MODES = {
    "whole": [],
    "LoRA, rank 8": ["--lora-rank", "8"],
    "LoRA, rank 8, --recompute": ["--lora-rank", "8", "--recompute"],
}
STEPS = 6


def run_finetune(base: Path, folder: Path, flags: list[str]) -> dict[str, float]:
    """Run the command; return its peak memory in GB and its median step time in seconds, without the first two."""
    command = [sys.executable, "-m", "gpt2", "finetune", str(base), "--data", "python-docs", "--name", folder.name]
    command += ["--out-dir", str(folder.parent), "--batch-size", "1", "--block-size", "512", "--max-steps", str(STEPS)]
    command += ["--eval-every", "0", "--eval-tokens", "4096", "--sample-tokens", "20", "--dtype", "float32", *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        stderr = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(stderr)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(line["update_seconds"] for line in lines[2:])
    return {"peak_gb": usage.ru_maxrss * 1024 / 1e9, "step_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(1)
        base = gpt2.save(GPT(GPTConfig()), get_tokenizer("bytes"), Path(name) / "base")
        for number in range(rounds):
            for mode, flags in MODES.items():
                runs[mode].append(run_finetune(base, Path(name) / f"{number}-{len(flags)}", flags))
    found: dict[str, Any] = {
        mode: {key: round(statistics.median(run[key] for run in results), 3) for key in results[0]}
        for mode, results in runs.items()
    }
    command = f"python benchmarks/lora_memory.py --rounds {rounds}"
    print(json.dumps(write_result("lora_memory", command, found), indent=2))


if __name__ == "__main__":
    main()
