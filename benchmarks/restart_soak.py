"""The soak of several ranks: one of them is killed again and again, torchrun starts all anew, and nothing is lost.

    python benchmarks/restart_soak.py --kills 20

A tiny training with dropout is run by two ranks under torchrun, once undisturbed with DDP and once with FSDP. Then it
is run anew, with each in turn, under `torchrun --max-restarts`, and a rank (either of them) killed with SIGKILL: at
random moments while it starts, while it trains, and while a checkpoint is being written. torchrun ends the other one
and starts both again, and they go on by `--resume auto`. Every file that is left in the end is compared with the
undisturbed run's, byte for byte (in metrics.jsonl all but what the clock says). New runs are begun until there were
enough kills. The summary is written to benchmarks/results/restart_soak.json; the exit code is 1 if anything differed.
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
    """What happened to one run on its way."""

    kind: str
    moments: Counter[str] = field(default_factory=Counter[str])
    ranks: Counter[int] = field(default_factory=Counter[int])
    mid_save: int = 0  # kills that left a half-written checkpoint or model folder behind
    differences: list[str] = field(default_factory=list)


class TorchrunWorkspace(Workspace):
    """A working directory whose run is trained by two ranks under torchrun."""

    def start_ranks(self, *flags: str, restarts: int = 0, shutdown: int = 30) -> subprocess.Popen[bytes]:
        """Start the run, or go on with it. flags: of `gpt2 train`."""
        launch = ["--standalone", f"--nproc-per-node={RANKS}", f"--max-restarts={restarts}"]
        launch += [f"--shutdown-timeout={shutdown}", "-m", "gpt2", *TRAIN, *flags]
        with (self.folder / "said.txt").open("ab") as said:
            command = [sys.executable, "-m", "torch.distributed.run", *launch]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, cwd=self.folder, stdout=said, stderr=said, env=environment)


def rank_pids(torchrun: int) -> dict[int, int]:
    """The processes that torchrun has started as ranks and that live, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            environment = (process / "environ").read_bytes() if int(parent) == torchrun else b""
            rank = next((word for word in environment.split(b"\0") if word.startswith(b"RANK=")), None)
            if rank is not None:
                found[int(rank.removeprefix(b"RANK="))] = int(process.name)
    return found


def wait_for_ranks(torchrun: subprocess.Popen[bytes], seen: set[int]) -> dict[int, int]:
    """Wait until torchrun has started all ranks (anew); they are added to the processes `seen` before."""
    found: dict[int, int] = {}

    def are_there() -> bool:
        found.clear()
        found.update(rank_pids(torchrun.pid))
        return len(found) == RANKS and not seen & set(found.values())

    wait_until(torchrun, are_there, poll_seconds=0.02)
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
    """Wait for the moment and kill a rank, whose processes are `pids`; False when the run was done before that."""
    if not wait_for_moment(workspace, torchrun, moment, rng, start_seconds=6.0):
        return False
    try:
        os.kill(pids[rank], signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def interrupted_run(workspace: TorchrunWorkspace, kind: str, kills: int, rng: random.Random) -> SoakResult:
    """One run under one torchrun, in which a rank is killed, at most so many times, until it is done."""
    tally, seen = SoakResult(kind), set[int]()
    torchrun = workspace.start_ranks("--parallel", kind, restarts=kills)
    try:
        while tally.moments.total() < kills:
            left_before = workspace.partial_folders()
            pids = wait_for_ranks(torchrun, seen)
            moment, rank = rng.choice(MOMENTS), rng.randrange(RANKS)
            if len(pids) < RANKS or not kill_rank_at_moment(workspace, torchrun, pids, moment, rank, rng):
                break
            tally.moments[moment] += 1
            tally.ranks[rank] += 1
            tally.mid_save += bool(workspace.partial_folders() - left_before)
        workspace.wait_until_done(torchrun)
    finally:
        torchrun.terminate()  # it ends its ranks
        torchrun.wait()
    return tally


def soak(kills: int, seed: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Begin runs in `folder` and kill their ranks until so many kills happened; returns what came of it."""
    chance = random.Random(seed)
    whole = {kind: TorchrunWorkspace(folder / f"undisturbed-{kind}") for kind in KINDS}
    for kind, home in whole.items():
        home.wait_until_done(home.start_ranks("--parallel", kind))
    tallies: list[SoakResult] = []
    while (left := kills - sum(tally.moments.total() for tally in tallies)) > 0:
        kind = KINDS[len(tallies) % len(KINDS)]
        home = TorchrunWorkspace(folder / f"run-{len(tallies) + 1}")
        tally = interrupted_run(home, kind, min(left, MAX_KILLS_PER_RUN), chance)
        tally.differences = differences(whole[kind].run, home.run)
        tallies.append(tally)
        say(
            f"run {len(tallies)} ({kind}): {tally.moments.total()} kills, {tally.mid_save} in the middle of a save: "
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
    parser = argparse.ArgumentParser(description="Kill ranks of a training at random moments, and compare.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(args.kills, args.seed, Path(folder), lambda line: print(line, flush=True))
    command = f"python benchmarks/restart_soak.py --kills {args.kills} --seed {args.seed}"
    result = write_result("restart_soak", command, {"seconds": round(time.monotonic() - began), **found})
    print(json.dumps(result, indent=2))
    return 1 if found["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
