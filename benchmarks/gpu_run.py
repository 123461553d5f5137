"""Everything that only a GPU can show, in three parts of under nine minutes each, on a machine without a network.

    python benchmarks/gpu_run.py --part a|b|c --out FOLDER [--data FOLDER] [--nanogpt PATH] [--wheels FOLDER]

a: the tests marked `gpu`: losses, gradients and logits against the CPU's, attention backends, compiled blocks, CUDA
   graphs, an exact resume. b: the speed ladder at 124M, at batch 16 x 1,024 and at the batch that fits, 350M and 774M,
   with MFU against the measured matmul rate, memory, and peers; decoding at batch 1, 8, 64 and 256; rows/s of
   `gpt2 eval`. c: 124M on text for two minutes with AdamW and two with Muon, with curves and samples.

Each step is a command of its own with a time limit. OUT/gpu_run_PART.json is written after every step, so an
interrupted run keeps what it has; commands write their own JSON, charts and logs to OUT. A step that fails or that does
not fit in the time left is listed with the reason, and the next one runs.

data: a folder with text files to train on, and hellaswag_val.jsonl.gz in its parent's eval/hellaswag; without it the
built-in text is used. wheels: packages to install first, with pip and without a network. --rehearse runs the same
commands on a CPU with a tiny model, which tests/bench/test_gpu_run.py does.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import describe_machine

ROOT = Path(__file__).parents[1]
PART_SECONDS = 520  # of the device's limit of 600 per command


@dataclass(frozen=True)
class Step:
    """One command: a name, the arguments of Python, and the most seconds that it may take."""

    name: str
    arguments: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Setup:
    """Where a part runs: the device, the sizes, the data and the folder for its results."""

    out: Path
    data: Path | None
    nanogpt: Path | None
    rehearse: bool

    @property
    def device(self) -> str:
        """The name of the device."""
        return "cpu" if self.rehearse else "cuda"

    def ladder(self, name: str, shape: str, batch: int, limit: float, *more: str) -> Step:
        """`gpt2 bench train` of one shape."""
        sizes = ("--batch-size", str(batch), "--block-size", "1024", "--model", shape, "--steps", "10")
        if self.rehearse:
            tiny = (
                "--n-layer",
                "1",
                "--n-head",
                "2",
                "--n-embd",
                "32",
                "--vocab-size",
                "257",
                "--ladder-steps",
                "float32",
            )
            sizes, more = ("--batch-size", "2", "--block-size", "16", "--steps", "1", "--warmup", "1", *tiny), ()
        files = ("--json", str(self.out / f"{name}.json"), "--chart", str(self.out / f"{name}.png"))
        return Step(name, ("-m", "gpt2", "bench", "train", "--devices", self.device, *sizes, *more, *files), limit)

    def decode(self, name: str, limit: float) -> Step:
        """`gpt2 bench generate` at four batch sizes."""
        sizes = (
            "--batch-sizes",
            "1,8,64,256",
            "--new-tokens",
            "128",
            "--rounds",
            "3",
            "--variants",
            "float32,bfloat16",
        )
        if self.rehearse:
            tiny = ("--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--vocab-size", "257", "--prompt-tokens", "4")
            sizes = ("--batch-sizes", "1,2", "--new-tokens", "4", "--rounds", "1", "--variants", "float32", *tiny)
        files = ("--json", str(self.out / f"{name}.json"), "--chart", str(self.out / f"{name}.png"))
        return Step(name, ("-m", "gpt2", "bench", "generate", "--device", self.device, *sizes, *files), limit)

    def train(self, name: str, optimizer: str, lr: float, minutes: float) -> Step:
        """`gpt2 train` of the 124M shape on text for some minutes."""
        sizes = ["--n-layer", "12", "--n-head", "12", "--n-embd", "768", "--block-size", "1024", "--batch-size", "32"]
        sizes += [
            "--max-steps",
            "4000",
            "--max-minutes",
            str(minutes),
            "--eval-every",
            "100",
            "--tokenizer",
            "bpe:16384",
        ]
        if self.rehearse:
            sizes = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--batch-size", "4"]
            sizes += ["--max-steps", "4", "--eval-every", "2", "--tokenizer", "bytes", "--eval-tokens", "64"]
        text = [] if self.data is None else ["--data", str(self.data)]
        flags = ["--optimizer", optimizer, "--lr", str(lr), "--device", self.device, "--out-dir", str(self.out)]
        limit = 60 * minutes + 60
        return Step(name, ("-m", "gpt2", "train", "quickstart", *text, *sizes, *flags, "--name", name), limit)

    def evaluation(self, name: str, model: str, limit: float) -> Step:
        """`gpt2 eval` on HellaSwag with --data, else on the model's own validation text."""
        tasks: tuple[str, ...] = ()
        if self.data is not None and not self.rehearse:
            rows = self.data.parent / "eval" / "hellaswag" / "hellaswag_val.jsonl.gz"
            tasks = ("--tasks", "hellaswag", "--task-data", f"hellaswag={rows}", "--limit", "2000")
        files = ("--json", str(self.out / f"{name}.json"))
        return Step(name, ("-m", "gpt2", "eval", model, "--device", self.device, *tasks, *files), limit)

    @property
    def peers(self) -> tuple[str, ...]:
        """The flags of the peers that are here."""
        nanogpt = () if self.nanogpt is None else ("--peer", f"nanogpt={self.nanogpt}")
        transformers = () if importlib.util.find_spec("transformers") is None else ("--peer", "transformers")
        return (*transformers, *nanogpt)


def steps_of(part: str, setup: Setup) -> list[Step]:
    """The steps of a part, the most important first."""
    if part == "a":
        chosen = ("tests/test_devices.py", "-k", "logits") if setup.rehearse else ("tests", "-m", "gpu")
        return [Step("tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen), 500)]
    if part == "b":
        return [
            setup.ladder("ladder_124m", "gpt2", 16, 170, *setup.peers),
            setup.decode("decode_124m", 120),
            setup.ladder("ladder_124m_batch_64", "gpt2", 64, 60, "--ladder-steps", "chunked-loss"),
            setup.ladder("ladder_350m", "gpt2-medium", 16, 60, "--ladder-steps", "chunked-loss"),
            setup.ladder("ladder_774m", "gpt2-large", 8, 80, "--ladder-steps", "chunked-loss"),
        ]
    adamw = setup.train("train_adamw", "adamw", 6e-4, 0.05 if setup.rehearse else 2.5)
    muon = setup.train("train_muon", "muon", 5e-3, 0.05 if setup.rehearse else 2.5)
    return [adamw, muon, setup.evaluation("evaluation", str(setup.out / "train_adamw"), 120)]


def run_step(step: Step, out: Path, seconds_left: float) -> dict[str, Any]:
    """Run a command; its output goes to OUT/NAME.log. Returns its status and seconds."""
    record: dict[str, Any] = {"name": step.name, "command": ["python", *step.arguments]}
    if seconds_left < 20:
        return record | {"status": "skipped: no time left"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    start = time.perf_counter()
    with (out / f"{step.name}.log").open("w") as log:
        try:
            done = subprocess.run(
                [sys.executable, *step.arguments],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=min(step.limit, seconds_left),
                check=False,
            )
            status = "ok" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            status = "stopped at its time limit"
    return record | {"status": status, "seconds": round(time.perf_counter() - start, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", required=True, choices=("a", "b", "c"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first")
    parser.add_argument("--rehearse", action="store_true", help="the same commands on a CPU, at toy sizes")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.wheels is not None:
        wheels = sorted(map(str, args.wheels.glob("*.whl")))
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels], check=True)
    setup = Setup(out, None if args.data is None else args.data.resolve(), args.nanogpt, args.rehearse)
    begin, records = time.perf_counter(), []
    for step in steps_of(args.part, setup):
        records.append(run_step(step, out, PART_SECONDS - (time.perf_counter() - begin)))
        print(f"{step.name}: {records[-1]['status']}", flush=True)
        result = {"part": args.part, "rehearsal": args.rehearse, "machine": describe_machine(), "steps": records}
        (out / f"gpu_run_{args.part}.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(any(record["status"] != "ok" for record in records))


if __name__ == "__main__":
    sys.exit(main())
