"""A fork server for ranks: one process that has imported torch, and forks the ranks of a run on request.

Each rank has the environment and command line that torchrun would give it, but starts without importing torch.
Standard input has one JSON object per line: {"ranks": [{"argv", "environment", "folder", "output_prefix", "change"}]}.
Standard output has the process ids, and when all ranks have exited, their exit codes; -n after signal n.
"""

import json
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import gpt2.commands.train  # noqa: F401 (imported before the forks)
from gpt2.cli import main
from gpt2.distributed import process_group
from gpt2.train import run_report, trainer


def serve_forks() -> list[str]:
    """Fork ranks until standard input ends. Returns only in a rank, with its command line."""
    for line in sys.stdin:
        pids = []
        for rank in json.loads(line)["ranks"]:
            if (pid := os.fork()) == 0:
                return become_rank(**rank)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
    sys.exit()


def become_rank(
    argv: list[str], environment: dict[str, str], folder: str, output_prefix: str, change: str
) -> list[str]:
    """Make this process a rank: set its environment, folder, output files and change."""
    out = os.open(f"{output_prefix}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    err = os.open(f"{output_prefix}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
        os.dup2(file, number)
    os.environ.update(environment)
    os.chdir(folder)
    run_report.measure_matmul = lambda *_: 1e9  # the measurement takes a second
    if change:
        CHANGES[change]()
    return argv


def other_torch() -> None:
    """Another version of torch."""
    torch.__version__ = "1.0"


def impatient() -> None:
    """The rendezvous times out after three seconds."""
    process_group.RENDEZVOUS_TIMEOUT = timedelta(seconds=3)


def no_nccl() -> None:
    """There are two GPUs, but no NCCL."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    dist.is_nccl_available = lambda: False


def other_host() -> None:
    """Another host name."""
    socket.gethostname = lambda: "elsewhere"


def at_step(number: int, action: Callable[[Any], None]) -> None:
    """Call `action` with the run before the update of a step."""
    update = trainer.update

    def changed(now: Any, *rest: Any) -> Any:
        if now.step == number:
            action(now)
        return update(now, *rest)

    trainer.update = changed


def clumsy() -> None:
    """An exception at step 4."""

    def stumble(now: Any) -> None:
        raise KeyError("a bug")

    at_step(4, stumble)


def spoilt() -> None:
    """Weights that overflow at step 4."""

    def spoil(now: Any) -> None:
        with torch.no_grad():
            now.model.transformer.ln_f.weight.mul_(1e38)

    at_step(4, spoil)


CHANGES: dict[str, Callable[[], None]] = {
    change.__name__: change for change in (other_torch, other_host, impatient, no_nccl, clumsy, spoilt)
}

if __name__ == "__main__":
    main(serve_forks())
