"""Cold start of the server: seconds from `gpt2 serve MODEL` until it responds, and to the first token.

    python benchmarks/cold_start.py

Starts the server five times with the CPU kernel already compiled, and five times with an empty cache, which includes
compilation; alternating. MODEL is GPT-2 124M with random weights in a temporary folder by default. Its files are in the
page cache, so disk speed is not measured. Writes results/cold_start.json: the medians and all times.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import write_result
from serving import cold_start

from gpt2.bench.common import BenchmarkError
from gpt2.bench.decode import DecodeWorkload
from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig
from gpt2.runtime import pick_device
from gpt2.tokenizer import get_tokenizer
from gpt2.weights import find_model_folder, load, save

PROMPT_TOKENS = 64


def measure(work: DecodeWorkload, dtype: str, times: int) -> dict[str, Any]:
    """Both kinds of start, alternating, after one that compiles the kernel."""
    starts: dict[str, list[dict[str, float]]] = {"kernel_compiled_before": [], "first_time_ever": []}
    cold_start(work, dtype)
    for number in range(1, times + 1):
        print(f"{number} of {times}", file=sys.stderr, flush=True)
        starts["kernel_compiled_before"].append(cold_start(work, dtype))
        with tempfile.TemporaryDirectory() as home:
            starts["first_time_ever"].append(cold_start(work, dtype, Path(home)))
    return {name: _medians(found) for name, found in starts.items()}


def _medians(found: list[dict[str, float]]) -> dict[str, Any]:
    """The seconds by name: the median, and all."""
    seconds = {name: [round(start[name], 3) for start in found] for name in found[0]}
    return {name: {"median_seconds": statistics.median(each), "seconds": each} for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds from `gpt2 serve MODEL` to its first token.")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a folder or a hub name [random weights, 124M]")
    parser.add_argument("--times", type=int, default=5, help="starts of each kind [5]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            torch.manual_seed(1337)
            model = Path(folder, "random-124m")
            save(GPT(GPTConfig()), get_tokenizer("gpt2"), model)
        else:
            model = find_model_folder(args.model)
        config = load(model)[0].config
        work = DecodeWorkload(str(device), config, str(model), PROMPT_TOKENS, new_tokens=2, batch_sizes=(1,))
        found = {
            "model": args.model or "GPT-2 124M, random weights",
            "device": str(device),
            "dtype": args.dtype,
            "prompt_tokens": PROMPT_TOKENS,
            **measure(work, args.dtype, args.times),
        }
    command = shlex.join(["python", "benchmarks/cold_start.py", *sys.argv[1:]])
    print(json.dumps(write_result("cold_start", command, found), indent=2))


if __name__ == "__main__":
    try:
        main()
    except (UserError, BenchmarkError) as error:
        sys.exit(f"error: {error}")
