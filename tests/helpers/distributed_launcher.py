"""Runs a function on a few ranks in the tests, without importing torch in every process.

The ranks are forked from multiprocessing's forkserver, which has imported everything and computed nothing. They have
the same environment variables as torchrun's workers, and call `process_group()`.
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
TIMEOUT_SECONDS = 300  # after which the ranks count as hung

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED_MODULES)


class RankFailed(Exception):
    """A rank raised an exception, whose traceback this is; the others were killed."""


def run_on_ranks(world_size: int, fn: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of `fn(ranks, *arguments)` in order of rank; `world_size` 0 is one process without torchrun.

    fn: a module-level function of the tests.
    Raises RankFailed with the traceback of the first rank that fails.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has one
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
    """The process of one rank, and the pipe for its result."""

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
            failed, value = True, f"exited with code {self.process.exitcode} without a result"
        if failed:
            raise RankFailed(value)
        return value


def _collect_results(members: Sequence[_RankProcess]) -> list[Any]:
    found: dict[int, Any] = {}
    waiting: dict[Any, int] = {member.pipe: number for number, member in enumerate(members)}
    while waiting:
        ready = wait(list(waiting), TIMEOUT_SECONDS)
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting.values())} sent no result for {TIMEOUT_SECONDS} seconds")
        for pipe in ready:
            number = waiting.pop(pipe)
            found[number] = members[number].result()
    return [found[number] for number in range(len(members))]


def _rank_main(
    pipe: Connection, environment: dict[str, str], work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    """Runs in the process of a rank."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        with process_group() as ranks:
            result = (False, work(ranks, *arguments))
    except BaseException:
        result = (True, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # a normal exit would wait for ranks that are gone
