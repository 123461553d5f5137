"""Worlds of a few ranks for the tests, without the seconds that every new process takes to import torch.

The ranks are forked from a server that has imported all there is to import and computed nothing (multiprocessing's
forkserver), and told who they are by the same environment as torchrun's workers: what they call is `joined()`.
"""

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from gpt2.distributed.process_group import process_group

PRELOADED_MODULES = ["pytest", "torch._dynamo", "torch.testing", "torch.distributed.fsdp", "torch.distributed.tensor"]
PRELOADED_MODULES += ["gpt2.train.trainer", "gpt2.generation.text"]
TIMEOUT_SECONDS = 300  # after which a world counts as hung

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED_MODULES)


class RankFailed(Exception):
    """A rank raised what is told here; the others were ended."""


def run_on_ranks(world_size: int, fn: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(ranks, *arguments)` returns on each of `size` ranks, by rank; `size` 0 is one process by itself.

    work: a function that a module of tests/ knows by name.
    Raises RankFailed with the traceback of the first rank that fails.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent keeps one
    members = [
        _RankProcess(_environment(rank, world_size, store.port), fn, arguments) for rank in range(max(1, world_size))
    ]
    try:
        return _collect_results(members)
    finally:
        for member in members:
            member.process.kill()
            member.process.join()
            member.pipe.close()
        del store


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    own = dict(os.environ)
    if size:
        own |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return own


class _RankProcess:
    """One rank's process, and the end of a pipe that its result comes through."""

    def __init__(self, environment: Mapping[str, str], work: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self.pipe, theirs = _context.Pipe(duplex=False)
        self.process = _context.Process(
            target=_rank_main, args=(theirs, dict(environment), work, arguments), daemon=True
        )
        self.process.start()
        theirs.close()

    def result(self) -> Any:
        try:
            failed, value = pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.process.join()
            failed, value = True, f"ended with code {self.process.exitcode} and no word"
        if failed:
            raise RankFailed(value)
        return value


def _collect_results(members: Sequence[_RankProcess]) -> list[Any]:
    found: dict[int, Any] = {}
    waiting: dict[Any, int] = {member.pipe: number for number, member in enumerate(members)}
    while waiting:
        ready = wait(list(waiting), TIMEOUT_SECONDS)
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting.values())} said nothing for {TIMEOUT_SECONDS} seconds")
        for pipe in ready:
            number = waiting.pop(pipe)
            found[number] = members[number].result()
    return [found[number] for number in range(len(members))]


def _rank_main(
    pipe: Connection, environment: dict[str, str], work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    """In the process of a rank."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        with process_group() as ranks:
            told = (False, work(ranks, *arguments))
    except BaseException:
        told = (True, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(told))
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # a rank whose others are gone would wait for them on its way out
