"""Soak test of checkpoints: a run that is killed and resumed many times must give the same files as one that is not.

    python benchmarks/soak.py --kills 50

A tiny training runs once without interruption, with the real command. Then it runs again, and its process is killed
with SIGKILL: at random moments during start, during training, and while a checkpoint is written. It is resumed each
time until it finishes. Its files are compared with those of the first run, byte for byte (metrics.jsonl without
timings). New runs start until there were enough kills. Writes results/soak.json; the exit code is 1 if anything
differed.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import write_result

from gpt2.config import TrainConfig, to_toml
from gpt2.reporting.metrics import read_metrics, without_timings

MOMENTS = ("starting", "training", "saving", "saving")  # when to kill, with saving twice as likely
SKIPPED_SUFFIXES = (".png", ".md", ".jsonl")  # files with timings; metrics.jsonl is compared by line
TIMEOUT_SECONDS = 600.0  # for one process

CONFIG = TrainConfig(
    name="soak",
    data="numbers.txt",
    tokenizer="bytes",
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=32,
    dropout=0.1,
    batch_size=8,
    max_steps=120,
    lr=3e-3,
    warmup_steps=10,
    device="cpu",
    dtype="float32",
    eval_every=7,
    eval_tokens=2048,
    save_every=3,
    sample_prompt="The number",
    sample_tokens=30,
)
TEXT = "".join(f"The number {i} comes before the number {i + 1},\r\nas everybody knows.\n" for i in range(2000))


@dataclass
class SoakResult:
    """The kills of one run, and the files that differ."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(dict.fromkeys(MOMENTS), 0))
    mid_save: int = 0  # kills that left an incomplete checkpoint or model folder
    before_first_checkpoint: int = 0
    differences: list[str] = field(default_factory=list)


class Workspace:
    """A working directory with the data and the config of a run, and the run in `runs/soak`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "numbers.txt").write_bytes(TEXT.encode())
        (folder / "soak.toml").write_text(to_toml(CONFIG), encoding="utf-8")
        self.folder, self.run, self.log_path = folder, folder / "runs" / "soak", folder / "log.txt"

    def start_process(self) -> subprocess.Popen[bytes]:
        """Start or resume the run."""
        arguments = ["--resume", "runs/soak"] if (self.run / "config.toml").exists() else ["soak.toml"]
        with self.log_path.open("wb") as log:
            command = [sys.executable, "-m", "gpt2", "train", *arguments]
            return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)

    def wait_until_done(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a process that is not to be killed. Raises RuntimeError if it fails."""
        if process.wait(TIMEOUT_SECONDS) != 0:
            raise RuntimeError(f"the training failed: {self.log_path.read_text(errors='replace')}")

    def steps_recorded(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def partial_folders(self) -> set[tuple[str, int]]:
        """The hidden folders that exist while a checkpoint or the model folder is written."""
        found = set()
        for path in [*self.run.glob("checkpoints/.step-*"), *self.run.glob(".model*")]:
            with suppress(FileNotFoundError):  # just renamed to a checkpoint
                found.add((path.name, path.stat().st_ctime_ns))
        return found


def kill_at_moment(workspace: Workspace, process: subprocess.Popen[bytes], moment: str, rng: random.Random) -> bool:
    """Wait for the moment and kill the process; return False if it finished before."""
    if not wait_for_moment(workspace, process, moment, rng, start_seconds=4.0):
        return False
    process.kill()
    process.wait()
    return True


def wait_for_moment(
    workspace: Workspace, process: subprocess.Popen[bytes], moment: str, rng: random.Random, start_seconds: float
) -> bool:
    """Wait for the moment; return False if the process finished before. start_seconds: upper limit for "starting"."""
    if moment == "starting":
        wait_until(process, lambda: False, rng.uniform(0.0, start_seconds))
    else:
        before = workspace.steps_recorded()  # by earlier processes; truncated when this one starts
        wait_until(process, lambda: workspace.steps_recorded() != before)
        wait_until(process, lambda: False, rng.random() ** 3)  # at most a second, mostly much less
        if moment == "saving":
            wait_until(process, lambda: bool(workspace.partial_folders()))
            wait_until(process, lambda: False, rng.uniform(0.0, 0.03))
    return process.poll() is None


def wait_until(
    process: subprocess.Popen[bytes],
    condition: Callable[[], bool],
    seconds: float = TIMEOUT_SECONDS,
    poll_seconds: float = 0.0005,
) -> None:
    """Wait for the condition, the end of the process, or the timeout, whichever comes first."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and (remaining := end - time.monotonic()) > 0:
        time.sleep(min(poll_seconds, remaining))


def interrupted_run(workspace: Workspace, rng: random.Random, kills: int) -> SoakResult:
    """One run that is killed at most `kills` times, and resumed until it finishes."""
    tally = SoakResult()
    while True:
        partial_before = workspace.partial_folders()
        process, moment = workspace.start_process(), rng.choice(MOMENTS)
        try:
            killed = sum(tally.kills.values()) < kills and kill_at_moment(workspace, process, moment, rng)
            if not killed:
                workspace.wait_until_done(process)
                return tally
        finally:
            process.kill()
            process.wait()
        tally.kills[moment] += 1
        tally.mid_save += bool(workspace.partial_folders() - partial_before)
        tally.before_first_checkpoint += not any(workspace.run.glob("checkpoints/step-*"))


def differences(whole: Path, interrupted: Path) -> list[str]:
    """The files that differ between two run folders."""
    names = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in (whole, interrupted)]
    found = sorted(names[0] ^ names[1])
    for name in sorted(names[0] & names[1]):
        one, other = whole / name, interrupted / name
        if one.is_file() and not name.endswith(SKIPPED_SUFFIXES) and one.read_bytes() != other.read_bytes():
            found.append(name)
    metrics = [without_timings(read_metrics(folder / "metrics.jsonl")) for folder in (whole, interrupted)]
    if metrics[0] != metrics[1]:
        found.append("metrics.jsonl")
    return found


def soak(kills: int, seed: int, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Start, kill and resume runs in `folder` until there were `kills` kills; return the summary."""
    rng = random.Random(seed)
    reference = Workspace(folder / "uninterrupted")
    reference.wait_until_done(reference.start_process())
    tallies: list[SoakResult] = []
    while (remaining := kills - sum(sum(tally.kills.values()) for tally in tallies)) > 0:
        workspace = Workspace(folder / f"run-{len(tallies) + 1}")
        tally = interrupted_run(workspace, rng, remaining)
        tally.differences = differences(reference.run, workspace.run)
        tallies.append(tally)
        report(
            f"run {len(tallies)}: killed {sum(tally.kills.values())} times, {tally.mid_save} during a save: "
            + (f"differs in {', '.join(tally.differences)}" if tally.differences else "no difference")
        )
    return {
        "kills": sum(sum(tally.kills.values()) for tally in tallies),
        "kills_aimed_at": {moment: sum(t.kills[moment] for t in tallies) for moment in dict.fromkeys(MOMENTS)},
        "kills_mid_save": sum(tally.mid_save for tally in tallies),
        "kills_before_the_first_checkpoint": sum(tally.before_first_checkpoint for tally in tallies),
        "runs": len(tallies),
        "steps_in_a_run": CONFIG.max_steps,
        "checkpoints_in_a_run": CONFIG.max_steps // CONFIG.save_every,
        "differences": [name for tally in tallies for name in tally.differences],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a training at random moments, resume it, compare the result.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(args.kills, args.seed, Path(folder), lambda line: print(line, flush=True))
    command = f"python benchmarks/soak.py --kills {args.kills} --seed {args.seed}"
    result = write_result("soak", command, {"seconds": round(time.monotonic() - start), **found})
    print(json.dumps(result, indent=2))
    return 1 if found["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
