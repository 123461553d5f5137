"""Soak test of data preparation: it is killed with SIGKILL at random moments and goes on; the shards must not change.

    python benchmarks/prepare_soak.py --kills 20

Parquet files of random words are prepared once without interruption, plain and with --shuffle --dedup. Then the same
again, killed at random moments until there were enough kills. All files are compared byte for byte. No network is used.
Writes results/prepare_soak.json; the exit code is 1 if anything differed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from machine import write_result

VARIANTS = {"plain": (), "shuffled": ("--shuffle", "7", "--dedup")}
WORDS = ("the", "shard", "naïve", "3.14", "don't", "数", "\n", "resume")


def write_corpus(folder: Path, megabytes: int, seed: int) -> None:
    """Two Parquet files of documents of random words, some of them twice."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    documents = [" ".join(rng.choices(WORDS, k=rng.randrange(10, 900))) for _ in range(400)]
    for number in range(2):
        texts = [f"{i} {rng.choice(documents)}" if i % 7 else documents[0] for i in range(200 * megabytes)]
        pq.write_table(pa.table({"text": texts}), folder / f"train-{number}.parquet", row_group_size=500)


def command(out: Path, variant: str) -> list[str]:
    """The preparation, in shards that are small enough to be closed often."""
    flags = ("--tokenizer", "bytes", "--shard-tokens", "200000", *VARIANTS[variant])
    return [sys.executable, "-m", "gpt2", "data", "prepare", "hf://soak/corpus", str(out), *flags]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kill_until_done(out: Path, variant: str, rng: random.Random, kills: int, work_seconds: float) -> int:
    """Start the preparation and kill it while it works, at most `kills` times, until it finishes; returns the kills."""
    done = 0
    while True:
        process = subprocess.Popen(command(out, variant))
        if done < kills and wait_for_work(process, out):
            time.sleep(rng.uniform(0, work_seconds))
        if done >= kills:
            process.wait()
        if process.poll() is None:
            process.kill()
            process.wait()
            done += 1
        elif process.returncode:
            raise RuntimeError(f"gpt2 data prepare failed with exit code {process.returncode}")
        else:
            return done


def wait_for_work(process: subprocess.Popen[bytes], out: Path) -> bool:
    """Wait until the process works on its folder; return False if it finished before that was seen."""
    state = out.with_name(f"{out.name}.partial") / "progress.json"
    before = state.stat().st_mtime_ns if state.exists() else 0
    while process.poll() is None:
        try:
            if state.stat().st_mtime_ns != before:
                return True
        except FileNotFoundError:
            pass
        time.sleep(0.001)
    return False


def time_of_work(out: Path, variant: str) -> float:
    """Prepare without interruption; returns the seconds since the first file."""
    process = subprocess.Popen(command(out, variant))
    wait_for_work(process, out)
    start = time.monotonic()
    if process.wait():
        raise RuntimeError(f"gpt2 data prepare failed with exit code {process.returncode}")
    return time.monotonic() - start


def soak(kills: int, seed: int, megabytes: int, folder: Path) -> dict[str, Any]:
    """Kill preparations until there were `kills` kills; returns the summary."""
    os.environ |= {"GPT2_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    write_corpus(folder / "home" / "datasets" / "soak" / "corpus", megabytes, seed)
    rng, expected, longest, differing, runs, done = random.Random(seed), {}, {}, [], 0, 0
    for variant in VARIANTS:
        longest[variant] = time_of_work(folder / variant, variant)
        expected[variant] = contents(folder / variant)
    while done < kills:
        variant = list(VARIANTS)[runs % len(VARIANTS)]
        out = folder / f"run-{runs}"
        killed = kill_until_done(out, variant, rng, min(5, kills - done), longest[variant])
        found = contents(out)
        names = expected[variant].keys() | found.keys()
        differing += [f"run-{runs}/{name}" for name in names if expected[variant].get(name) != found.get(name)]
        done, runs = done + killed, runs + 1
        print(f"run {runs} ({variant}): killed {killed} times, {len(differing)} differences so far", flush=True)
    return {"kills": done, "runs": runs, "shards": len(expected["plain"]), "differences": differing}


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill data preparation at random moments, go on, compare the shards.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=20, help="about the size of the text")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(args.kills, args.seed, args.megabytes, Path(folder))
    line = f"python benchmarks/prepare_soak.py --kills {args.kills} --seed {args.seed} --megabytes {args.megabytes}"
    result = write_result("prepare_soak", line, {"seconds": round(time.monotonic() - start), **found})
    print(json.dumps(result, indent=2))
    return 1 if found["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
