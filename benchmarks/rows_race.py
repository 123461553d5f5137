"""Race of rows against a file: seconds and peak memory of `open_data` on the same text as rows and as one text file.

    python benchmarks/rows_race.py --rows 1000000 --rounds 3

The rows are sentences of a few random words. Each run is a new process without a cache: finding the data, tokenizing,
writing the shards. Seconds are of `open_data` alone, without the start of Python and its imports; memory is the peak
resident set of the process (VmHWM in /proc/self/status). Variants alternate; ratios are of the medians. Writes
results/rows_race.json.
"""

import argparse
import csv
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from machine import write_result

OPEN = """
import sys, time
from gpt2.data.prepare import open_data
from gpt2.tokenizer import get_tokenizer
tokenizer = sys.argv[2]
if not tokenizer.startswith("bpe"):
    tokenizer = get_tokenizer(tokenizer)
start = time.perf_counter()
data = open_data(sys.argv[1], tokenizer)
seconds = time.perf_counter() - start
tokens = len(data.train) + len(data.val)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print("RESULT", seconds, 1024 * peak, tokens)
"""


def write_files(folder: Path, count: int) -> dict[str, Path]:
    """The same sentences in every format."""
    rng = random.Random(1)
    words = [f"{a}{b}" for a in ("the", "quick", "brown", "model", "learns", "from") for b in ("", "s", "ed", "ing")]
    texts = [" ".join(rng.choices(words, k=rng.randrange(2, 8))) for _ in range(count)]
    files = {name: folder / f"texts.{name}" for name in ("txt", "jsonl", "csv", "parquet")}
    files["txt"].write_text("\n".join(texts))
    with files["jsonl"].open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    with files["csv"].open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    pq.write_table(pa.table({"text": texts}), files["parquet"])
    return files


def run(path: Path, tokenizer: str) -> tuple[float, int, int]:
    """Seconds, peak bytes and tokens of one process."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-c", OPEN, str(path), tokenizer]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(home))
    seconds, peak, tokens = re.search(r"RESULT (\S+) (\d+) (\d+)", done.stdout).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(seconds), int(peak), int(tokens)


def environment(home: str) -> dict[str, str]:
    """The variables of this process with another cache; GPT-2's vocabulary is still found."""
    return {**os.environ, "GPT2_HOME": home}


def race(count: int, rounds: int, tokenizer: str, folder: Path) -> dict[str, Any]:
    """All variants in turns."""
    files = write_files(folder, count)
    runs: dict[str, list[tuple[float, int, int]]] = {name: [] for name in files}
    loads = []
    for _ in range(rounds):
        loads.append(round(os.getloadavg()[0], 1))
        for name, path in files.items():
            runs[name].append(run(path, tokenizer))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    medians = {name: [statistics.median(one[i] for one in found) for i in range(2)] for name, found in runs.items()}
    table = {
        name: {
            "seconds": [round(one[0], 2) for one in found],
            "peak_memory_bytes": [one[1] for one in found],
            "tokens": found[0][2],
            "times_the_seconds_of_txt": round(medians[name][0] / medians["txt"][0], 2),
            "times_the_memory_of_txt": round(medians[name][1] / medians["txt"][1], 2),
        }
        for name, found in runs.items()
    }
    sizes = {"rows": count, "text_bytes": files["txt"].stat().st_size}
    return {**sizes, "tokenizer": tokenizer, "load_averages": loads, "variants": table}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory of rows against the same text as a file.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes or bpe:N")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = race(args.rows, args.rounds, args.tokenizer, Path(folder))
    line = f"python benchmarks/rows_race.py --rows {args.rows} --rounds {args.rounds} --tokenizer {args.tokenizer}"
    print(json.dumps(write_result("rows_race", line, found), indent=2))


if __name__ == "__main__":
    main()
