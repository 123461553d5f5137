"""Soak test of distributed training: ranks are killed, torchrun restarts them, and the result must not change.

    python benchmarks/restart_soak.py --kills 20

A tiny training with dropout runs with two ranks under torchrun, once without interruption with DDP and once with FSDP.
Then it runs again, alternating DDP and FSDP, under `torchrun --max-restarts`, and a random rank is killed with SIGKILL:
at random moments during start, during training, and while a checkpoint is written. torchrun stops the other rank and
restarts both, which resume with `--resume auto`. The final files are compared with those of the uninterrupted run, byte
for byte (metrics.jsonl without timings). New runs start until there were enough kills. Writes
results/restart_soak.json; the exit code is 1 if anything differed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import write_result
from soak import CONFIG, MOMENTS, Workspace, differences, wait_for_moment, wait_until

RANKS = 2
KINDS = ("ddp", "fsdp")
MAX_KILLS_PER_RUN = 5
TRAIN = ("train", "soak.toml", "--resume", "auto")


@dataclass
class SoakResult:
    """The kills of one run, and the files that differ."""

    kind: str
    moments: Counter[str] = field(default_factory=Counter[str])
    ranks: Counter[int] = field(default_factory=Counter[int])
    mid_save: int = 0  # kills that left an incomplete checkpoint or model folder
    differences: list[str] = field(default_factory=list)


class TorchrunWorkspace(Workspace):
    """A working directory with a run of two ranks under torchrun."""

    def start_ranks(self, *flags: str, restarts: int = 0, shutdown: int = 30) -> subprocess.Popen[bytes]:
        """Start or resume the run. flags: of `gpt2 train`."""
        launch = ["--standalone", f"--nproc-per-node={RANKS}", f"--max-restarts={restarts}"]
        launch += [f"--shutdown-timeout={shutdown}", "-m", "gpt2", *TRAIN, *flags]
        with self.log_path.open("ab") as log:
            command = [sys.executable, "-m", "torch.distributed.run", *launch]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=environment)


def rank_pids(torchrun: int) -> dict[int, int]:
    """The process ids of torchrun's live ranks, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it just exited
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            environment = (process / "environ").read_bytes() if int(parent) == torchrun else b""
            rank = next((word for word in environment.split(b"\0") if word.startswith(b"RANK=")), None)
            if rank is not None:
                found[int(rank.removeprefix(b"RANK="))] = int(process.name)
    return found


def wait_for_ranks(torchrun: subprocess.Popen[bytes], seen: set[int]) -> dict[int, int]:
    """Wait until torchrun has (re)started all ranks; add their process ids to `seen`, those of earlier starts."""
    found: dict[int, int] = {}

    def all_started() -> bool:
        found.clear()
        found.update(rank_pids(torchrun.pid))
        return len(found) == RANKS and not seen & set(found.values())

    wait_until(torchrun, all_started, poll_seconds=0.02)
    seen.update(found.values())
    return found


def kill_rank_at_moment(
    workspace: Workspace,
    torchrun: subprocess.Popen[bytes],
    pids: dict[int, int],
    moment: str,
    rank: int,
    rng: random.Random,
) -> bool:
    """Wait for the moment and kill a rank; pids: process ids by rank. Return False if the run finished before."""
    if not wait_for_moment(workspace, torchrun, moment, rng, start_seconds=6.0):
        return False
    try:
        os.kill(pids[rank], signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def interrupted_run(workspace: TorchrunWorkspace, kind: str, kills: int, rng: random.Random) -> SoakResult:
    """One run under one torchrun, whose ranks are killed at most `kills` times until it finishes."""
    tally, seen = SoakResult(kind), set[int]()
    torchrun = workspace.start_ranks("--parallel", kind, restarts=kills)
    try:
        while tally.moments.total() < kills:
            partial_before = workspace.partial_folders()
            pids = wait_for_ranks(torchrun, seen)
            moment, rank = rng.choice(MOMENTS), rng.randrange(RANKS)
            if len(pids) < RANKS or not kill_rank_at_moment(workspace, torchrun, pids, moment, rank, rng):
                break
            tally.moments[moment] += 1
            tally.ranks[rank] += 1
            tally.mid_save += bool(workspace.partial_folders() - partial_before)
        workspace.wait_until_done(torchrun)
    finally:
        torchrun.terminate()  # torchrun stops its ranks
        torchrun.wait()
    return tally


def soak(kills: int, seed: int, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Start runs in `folder` and kill their ranks until there were `kills` kills; return the summary."""
    rng = random.Random(seed)
    references = {kind: TorchrunWorkspace(folder / f"uninterrupted-{kind}") for kind in KINDS}
    for kind, workspace in references.items():
        workspace.wait_until_done(workspace.start_ranks("--parallel", kind))
    tallies: list[SoakResult] = []
    while (remaining := kills - sum(tally.moments.total() for tally in tallies)) > 0:
        kind = KINDS[len(tallies) % len(KINDS)]
        workspace = TorchrunWorkspace(folder / f"run-{len(tallies) + 1}")
        tally = interrupted_run(workspace, kind, min(remaining, MAX_KILLS_PER_RUN), rng)
        tally.differences = differences(references[kind].run, workspace.run)
        tallies.append(tally)
        report(
            f"run {len(tallies)} ({kind}): {tally.moments.total()} kills, {tally.mid_save} during a save: "
            + (f"differs in {', '.join(tally.differences)}" if tally.differences else "no difference")
        )
    return {
        "kills": sum(tally.moments.total() for tally in tallies),
        "kills_aimed_at": {moment: sum(t.moments[moment] for t in tallies) for moment in dict.fromkeys(MOMENTS)},
        "kills_of_rank": {rank: sum(tally.ranks[rank] for tally in tallies) for rank in range(RANKS)},
        "kills_mid_save": sum(tally.mid_save for tally in tallies),
        "runs": {kind: sum(tally.kind == kind for tally in tallies) for kind in KINDS},
        "steps_in_a_run": CONFIG.max_steps,
        "checkpoints_in_a_run": CONFIG.max_steps // CONFIG.save_every,
        "differences": [name for tally in tallies for name in tally.differences],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill ranks of a training at random moments, and compare the result.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(args.kills, args.seed, Path(folder), lambda line: print(line, flush=True))
    command = f"python benchmarks/restart_soak.py --kills {args.kills} --seed {args.seed}"
    result = write_result("restart_soak", command, {"seconds": round(time.monotonic() - start), **found})
    print(json.dumps(result, indent=2))
    return 1 if found["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
