"""Accuracy of `gpt2 plan`: predicted memory and step time compared with those of short real runs.

    python benchmarks/plan_check.py [--only NAME ...]

Each case is planned, and then trained for a few steps, in separate processes. On a CPU the memory is the peak of the
whole process (VmHWM), on a GPU that of torch's tensors. The time is the median step without the first few. Writes
results/plan_check.json. Run it on an idle machine. The 12-layer cases need GPT-2's vocabulary, from the network or from
$TIKTOKEN_CACHE_DIR.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import RESULTS, describe_machine

RESULT = RESULTS / "plan_check.json"
MID_SIZE_FLAGS = "--n-layer 6 --n-head 6 --n-embd 384 --block-size 256 --batch-size 16 --tokenizer bpe:1024"
GPT2_SMALL_FLAGS = "--n-layer 12 --n-head 12 --n-embd 768 --block-size 256 --batch-size 4 --tokenizer gpt2"
CASES = {
    "quickstart": "quickstart",
    "6x384 float32": f"quickstart {MID_SIZE_FLAGS} --dtype float32",
    "6x384 bfloat16": f"quickstart {MID_SIZE_FLAGS} --dtype bfloat16",
    "6x384 float32, recompute": f"quickstart {MID_SIZE_FLAGS} --dtype float32 --recompute",
    "6x384 float32, muon, 4 micro-batches": (
        f"quickstart {MID_SIZE_FLAGS} --dtype float32 --optimizer muon --micro-batch-size 4"
    ),
    "12x768 float32": f"quickstart {GPT2_SMALL_FLAGS} --dtype float32",
    "12x768 bfloat16": f"quickstart {GPT2_SMALL_FLAGS} --dtype bfloat16",
    "12x768 bfloat16, recompute": f"quickstart {GPT2_SMALL_FLAGS} --dtype bfloat16 --recompute",
}
# no validation, samples or checkpoints during the run
NO_EVAL_FLAGS = "--no-compile --max-steps {steps} --warmup-steps 2 --eval-every 0 --eval-tokens 1024 --sample-tokens 0"
TRAIN_SCRIPT = """
import sys
import torch
from gpt2.commands.train import main
from gpt2.hardware import peak_memory
from gpt2.runtime import pick_device

code = main(sys.argv[1:])
print(peak_memory(pick_device()))
sys.exit(code)
"""

PREPARE_SCRIPT = """
import sys
from gpt2.data.prepare import open_data

open_data("python-docs", sys.argv[1])
"""


def compare(flags: str, folder: Path) -> dict[str, float]:
    """Plan a run, do the run, and return predictions and measurements."""
    steps = 40 if flags == "quickstart" else 8
    words = [*flags.split(), *NO_EVAL_FLAGS.format(steps=steps).split(), "--save-every", "0"]
    planned = subprocess.run(
        [sys.executable, "-m", "gpt2", "plan", *words, "--json", "-"], stdout=subprocess.PIPE, text=True, check=True
    )
    plan = json.loads(planned.stdout)
    tokenizer = "gpt2" if "gpt2" in words else "bpe:1024"
    subprocess.run([sys.executable, "-c", PREPARE_SCRIPT, tokenizer], check=True)  # not in the measured run
    run = [*words, "--name", "run", "--out-dir", str(folder)]
    trained = subprocess.run([sys.executable, "-c", TRAIN_SCRIPT, *run], stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(line["data_seconds"] + line["update_seconds"] for line in lines[3:])
    peak = int(trained.stdout.split()[-1])
    return {
        "predicted_memory": plan["memory"]["peak"],
        "seen_memory": peak,
        "memory_ratio": plan["memory"]["peak"] / peak,
        "predicted_seconds": plan["seconds_per_step"],
        "seen_seconds": seconds,
        "time_ratio": plan["seconds_per_step"] / seconds,
        "memory": plan["memory"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    known = json.loads(args.out.read_text())["runs"] if args.out.exists() else {}
    print(f"{'':38} {'memory, MiB':>24} {'ms per step':>24}\n{'':38}" + f" {'planned':>8} {'real':>8} ratio " * 2)
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            result = compare(CASES[name], Path(folder))
        known[name] = {**result, "machine": describe_machine()}  # other cases keep their earlier results
        print(
            f"{name:38} {result['predicted_memory'] / 2**20:8,.0f} {result['seen_memory'] / 2**20:8,.0f}"
            f" {result['memory_ratio']:5.2f}  {1000 * result['predicted_seconds']:8,.1f}"
            f" {1000 * result['seen_seconds']:8,.1f} {result['time_ratio']:5.2f}",
            flush=True,
        )
    args.out.parent.mkdir(exist_ok=True)
    result = {
        "command": "python benchmarks/plan_check.py",
        "runs": {name: known[name] for name in CASES if name in known},
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
