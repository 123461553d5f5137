"""Starts ranks for the tests of faults and errors, and collects their output: see fault_workers.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NO_RANK_ENVIRONMENT = dict.fromkeys(RANK_VARIABLES, "")  # the environment of a process without torchrun


class ExitResults(NamedTuple):
    """For each rank: exit code (-n after signal n), standard output, standard error."""

    codes: list[int]
    out: list[str]
    err: list[str]

    @property
    def messages(self) -> list[str]:
        """The lines of gpt2 on standard error, of all ranks; without those of torch."""
        return [line.removeprefix("gpt2: ") for err in self.err for line in err.splitlines() if line[:6] == "gpt2: "]


class RankForkServer:
    """Runs the ranks of one run at a time, as torchrun would."""

    def __init__(self, folder: Path) -> None:
        script = Path(__file__).with_name("fault_workers.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GPT2_HOME": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._output_prefix = folder / "rank"
        self.pids: list[int] = []

    def start(
        self,
        argv: Sequence[str],
        folder: Path,
        size: int = 2,
        port: int | None = None,
        overrides: dict[int, Any] | None = None,
    ) -> None:
        """Start `size` ranks in `folder`.

        overrides: by rank, other values of `argv`, `folder`, `change` (of fault_workers.CHANGES), `environment`.
        """
        there = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        there["MASTER_PORT"] = free_port() if port is None else port
        ranks = []
        for number in range(size):
            own = (overrides or {}).get(number, {})
            environment = {**there, "RANK": number, "LOCAL_RANK": number, **own.get("environment", {})}
            words = {name: str(value) for name, value in environment.items()}
            rank = {"argv": list(argv), "change": "", **own, "environment": words}
            ranks.append({"folder": str(folder), **rank, "output_prefix": f"{self._output_prefix}-{number}"})
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ranks": ranks}) + "\n")
        self._process.stdin.flush()
        self.pids = self._read_reply(60)

    def wait(self, seconds: float = 120) -> ExitResults:
        """Wait for all ranks; those that take longer are killed."""
        codes = self._read_reply(seconds)
        texts = [
            [Path(f"{self._output_prefix}-{n}.{name}").read_text() for n in range(len(codes))]
            for name in ("out", "err")
        ]
        self.pids = []
        return ExitResults(codes, *texts)

    def run(self, argv: Sequence[str], folder: Path, **given: Any) -> ExitResults:
        """Start ranks and wait for them."""
        self.start(argv, folder, **given)
        return self.wait()

    def close(self) -> None:
        self._kill()
        self._process.kill()
        self._process.wait()

    def _kill(self) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _read_reply(self, seconds: float) -> list[int]:
        timer = threading.Timer(seconds, self._kill)
        timer.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        timer.cancel()
        return json.loads(line)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
