"""Race of data preparation: `gpt2 data prepare`, the tokenizer alone, and the recipe of nanoGPT's openwebtext script.

    python benchmarks/prepare_race.py --text FOLDER --datasets-python VENV/bin/python --rounds 3

The text files of FOLDER, cut into documents of about 3,000 characters and repeated to --megabytes, become one Parquet
file. In each round, in turns: (1) the tokenizer alone: GPT-2's tokens of all documents, which are in memory, by one
thread per core; (2) `gpt2 data prepare`, the whole process; (3) as nanoGPT does it: `datasets` maps tiktoken over the
Parquet file with one process per core, and the tokens are written to a memory map. Seconds are wall time, and of (2)
and (3) also without the start of the process and its imports; so are CPU seconds. Ratios are of the medians.

    python benchmarks/prepare_race.py --memory-gigabytes 5 --tokenizer bytes

prepares that much text in Parquet, and then the first gigabyte with --shuffle --dedup, and reports the peak memory:
the peak resident set of the process (VmHWM in /proc/self/status), whose workers are threads. The first gigabyte is one
file of one row group. Writes results/prepare_race.json or results/prepare_memory.json.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from machine import write_result

from gpt2.byte_level import encode_pieces
from gpt2.data.text_blocks import count_cores
from gpt2.tokenizer import get_tokenizer

DOCUMENT_CHARACTERS = 3000
OURS = """
import sys, time
from pathlib import Path
from gpt2.data.corpora import find_corpus
from gpt2.data.prepare import corpus_tokenizer
from gpt2.data.prepare_corpus import CorpusOptions, prepare_corpus
corpus = find_corpus("hf://race/corpus")
tokenizer = corpus_tokenizer(corpus, sys.argv[2])
start = time.perf_counter()
cpu = time.process_time()
options = CorpusOptions(shuffle=1, dedup=True) if sys.argv[3:] else CorpusOptions()
meta = prepare_corpus(corpus, tokenizer, Path(sys.argv[1]), options)
print("SECONDS", time.perf_counter() - start, sum(split.tokens for split in meta.splits.values()))
print("CPU", time.process_time() - cpu)
print("PEAK", *(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""
PEER = """
import os, sys, time
import numpy as np, tiktoken
from datasets import load_dataset
out, path, cores, cache = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
encoding = tiktoken.get_encoding("gpt2")

def tokenize(row):
    ids = encoding.encode_ordinary(row["text"])
    ids.append(encoding.eot_token)
    return {"ids": ids, "len": len(ids)}

if __name__ == "__main__":
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    data = load_dataset("parquet", data_files=path, split="train", cache_dir=cache)
    data = data.map(tokenize, remove_columns=["text"], num_proc=cores)
    total = int(np.sum(data["len"], dtype=np.uint64))
    tokens = np.memmap(out, dtype=np.uint16, mode="w+", shape=(total,))
    index, batches = 0, min(1024, len(data))
    for i in range(batches):
        shard = data.shard(num_shards=batches, index=i, contiguous=True).with_format("numpy")
        part = np.concatenate(shard["ids"])
        tokens[index:index + len(part)] = part
        index += len(part)
    tokens.flush()
    print("SECONDS", time.perf_counter() - start, total)
    print("CPU", sum(os.times()[:4]) - cpu)
"""


class Timing(NamedTuple):
    """Seconds of a process in all, without its start, of CPU time; and its tokens."""

    seconds: float
    inside: float
    cpu: float
    tokens: int


def read_documents(folder: Path, megabytes: int) -> list[str]:
    """Documents of the text files, repeated."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))
    documents = [text[i : i + DOCUMENT_CHARACTERS] for i in range(0, len(text), DOCUMENT_CHARACTERS)]
    repeats = max(1, round(megabytes * 1e6 / len(text)))
    return documents * repeats


def run_tokenizer(documents: list[str]) -> Timing:
    """The tokenizer alone, one thread per core."""
    tokenizer = get_tokenizer("gpt2")
    blocks = [[piece for text in documents[i : i + 64] for piece in (text, None)] for i in range(0, len(documents), 64)]
    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(count_cores()) as pool:
        total = sum(pool.map(lambda pieces: len(encode_pieces(tokenizer, pieces)), blocks))
    seconds = time.perf_counter() - start
    return Timing(seconds, seconds, time.process_time() - cpu, total)


def run_process(command: list[str]) -> Timing:
    """A process that prints its own seconds, tokens and CPU time."""
    start = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - start
    tokens = int(find_number(output, r"SECONDS \S+"))
    return Timing(seconds, float(find_number(output, "SECONDS")), float(find_number(output, "CPU")), tokens)


def find_number(output: str, label: str) -> str:
    """The number after a label (a pattern) in what a process printed."""
    match = re.search(rf"{label} ([\d.e+-]+)", output)
    assert match is not None, output
    return match[1]


def race(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All variants in turns."""
    documents = read_documents(Path(args.text), args.megabytes)
    source = folder / "home" / "datasets" / "race" / "corpus" / "train.parquet"
    source.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": documents}), source, row_group_size=1000)
    found: dict[str, list[Timing]] = {}
    loads = []
    for number in range(args.rounds):
        loads.append(round(os.getloadavg()[0], 1))
        found.setdefault("tokenizer alone", []).append(run_tokenizer(documents))
        ours = [sys.executable, "-c", OURS, str(folder / f"ours-{number}"), "gpt2"]
        found.setdefault("gpt2 data prepare", []).append(run_process(ours))
        if args.datasets_python:
            peer = folder / "peer.py"
            peer.write_text(PEER)
            cache = folder / f"cache-{number}"
            parts = (str(folder / f"peer-{number}.bin"), str(source), str(count_cores()), str(cache))
            found.setdefault("nanoGPT's recipe", []).append(run_process([args.datasets_python, str(peer), *parts]))
        print({name: [round(run.inside, 2) for run in runs] for name, runs in found.items()}, flush=True)
    table = {
        name: {
            "seconds": [round(run.seconds, 3) for run in runs],
            "seconds_without_start": [round(run.inside, 3) for run in runs],
            "cpu_seconds": [round(run.cpu, 3) for run in runs],
            "tokens": runs[0].tokens,
            "tokens_per_second": round(runs[0].tokens / statistics.median(run.inside for run in runs)),
            "tokens_per_cpu_second": round(runs[0].tokens / statistics.median(run.cpu for run in runs)),
        }
        for name, runs in found.items()
    }
    relative = {
        unit: {
            name: round(table["gpt2 data prepare"][unit] / values[unit], 3)
            for name, values in table.items()
            if name != "gpt2 data prepare"
        }
        for unit in ("tokens_per_second", "tokens_per_cpu_second")
    }
    sizes = {"characters": sum(map(len, documents)), "documents": len(documents), "cores": count_cores()}
    return {**sizes, "load_averages": loads, "variants": table, "ours_relative_to": relative}


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak memory of the preparation of Parquet with this many gigabytes of text."""
    source = folder / "home" / "datasets" / "race" / "corpus"
    source.mkdir(parents=True)
    schema = pa.schema([("text", pa.string())])
    size = 0
    for number in range(args.memory_gigabytes):
        path = source / f"train-{number}.parquet"
        groups = [pa.table({"text": texts_of_group(number, group)}, schema=schema) for group in range(100)]
        size += sum(table.nbytes for table in groups)
        rows = None if number else sum(table.num_rows for table in groups)
        pq.write_table(pa.concat_tables(groups), path, compression="none", row_group_size=rows or 2700)
    found: dict[str, Any] = {"text_bytes": size, "files_bytes": sum(path.stat().st_size for path in source.iterdir())}
    for name, flags in (("plain", []), ("--shuffle --dedup of the first gigabyte", ["shuffled"])):
        if flags:
            for path in source.glob("train-[!0]*"):
                path.unlink()
        command = [sys.executable, "-c", OURS, str(folder / "out"), args.tokenizer, *flags]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        shutil.rmtree(folder / "out")
        found[name] = {
            "tokens": int(find_number(output, r"SECONDS \S+")),
            "seconds": round(float(find_number(output, "SECONDS"))),
            "peak_memory_bytes": 1024 * int(find_number(output, "PEAK")),
        }
        print(name, found[name], flush=True)
    return found


def texts_of_group(number: int, group: int) -> list[str]:
    """About ten megabytes of documents, all different."""
    return [f"{number} {group} {i} " + f"word{i % 977} and {i % 89} more. " * 150 for i in range(2700)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time data preparation against its peers, or measure its memory.")
    parser.add_argument("--text", help="folder of .txt files")
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--datasets-python", help="a Python with datasets and tiktoken, for nanoGPT's recipe")
    parser.add_argument("--memory-gigabytes", type=int, default=0)
    parser.add_argument("--tokenizer", default="gpt2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"GPT2_HOME": str(Path(name) / "home"), "HF_HUB_OFFLINE": "1"}
        measure = measure_memory if args.memory_gigabytes else race
        found = measure(args, Path(name))
    used = (
        f"--memory-gigabytes {args.memory_gigabytes} --tokenizer {args.tokenizer}"
        if args.memory_gigabytes
        else (f"--text FOLDER --megabytes {args.megabytes} --rounds {args.rounds}")
    )
    kind = "prepare_memory" if args.memory_gigabytes else "prepare_race"
    print(json.dumps(write_result(kind, f"python benchmarks/prepare_race.py {used}", found), indent=2))


if __name__ == "__main__":
    main()
