"""Hostile folders: each is accepted, or refused in one line, in limited memory and time.

The corpus and a few seeded mutations run in `make test`. `make fuzz` tries other mutations for GPT2_FUZZ_SECONDS.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.checks import CHECKS
from tests.fuzz.corpus import corpus
from tests.fuzz.inputs import Files, mutate, write_files
from tests.fuzz.seeds import make_seeds

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits of the worker are those of Linux")
ROOT = Path(__file__).parents[2]
NUM_MUTATIONS = {"template": 4}
DEFAULT_MUTATIONS = 40
WALL_SECONDS = 300.0  # for a busy machine; the limit of CPU time is the worker's


class Worker:
    """A process that checks folders, and is started again after it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def check(self, kind: str, folder: Path) -> str | None:
        """What is wrong with how the program treats the folder; None if nothing is."""
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([kind, str(folder)]) + "\n")
        self._process.stdin.flush()
        answer = self._read(self._process)
        if answer is not None:
            return answer.get("bug")
        code = self._process.wait()
        self.stop()
        return "it takes too much CPU time" if code == -signal.SIGPROF else f"the process died with {code}"

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self._read(process) == {}
        return process

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> dict[str, str] | None:
        timer = threading.Timer(WALL_SECONDS, process.kill)
        timer.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        timer.cancel()
        return json.loads(line) if line.endswith("\n") else None


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    return make_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.stop()


def check(worker: Worker, kind: str, folder: Path, files: Files) -> str | None:
    """`Worker.check` for files that are written into the folder, which is removed if nothing is wrong."""
    write_files(folder, files)
    bug = worker.check(kind, folder)
    if bug is None:
        shutil.rmtree(folder)
    return bug


@pytest.mark.parametrize("kind", sorted(CHECKS))
def test_hostile_folders(kind: str, worker: Worker, seeds: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    seed = seeds[kind]
    cases = {"valid": seed, **corpus(seeds)[kind]}
    bugs = {
        name: bug
        for i, (name, files) in enumerate(cases.items())
        if (bug := check(worker, kind, tmp_path / f"{i}", files))
    }
    for number in range(NUM_MUTATIONS.get(kind, DEFAULT_MUTATIONS)):
        files = mutate(seed, random.Random(f"{kind} {number}"))
        if bug := check(worker, kind, tmp_path / f"mutation-{number}", files):
            bugs[f"mutation {number}"] = bug
    assert not bugs, "\n".join(f"{name}: {bug}" for name, bug in bugs.items())


@pytest.mark.slow
@pytest.mark.skipif("GPT2_FUZZ_SECONDS" not in os.environ, reason="make fuzz runs it")
@pytest.mark.parametrize("kind", sorted(CHECKS))
def test_mutations(kind: str, worker: Worker, seeds: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    """The folder of a failure is kept in the temporary folder of this test."""
    start = int(os.environ.get("GPT2_FUZZ_SEED", time.time_ns() % 10**9))
    cases = [
        seeds[kind],
        *(files for files in corpus(seeds)[kind].values() if all(isinstance(f, bytes) for f in files.values())),
    ]
    until, number, bugs = time.monotonic() + float(os.environ["GPT2_FUZZ_SECONDS"]), 0, {}
    while time.monotonic() < until and len(bugs) < 5:
        rng = random.Random(f"{kind} {start + number}")
        if bug := check(worker, kind, tmp_path / f"{start + number}", mutate(rng.choice(cases), rng)):
            bugs[start + number] = bug
        number += 1
    print(f"{kind}: {number} mutations from seed {start}")
    assert not bugs, "\n".join(f"{number}: {bug}" for number, bug in bugs.items())
