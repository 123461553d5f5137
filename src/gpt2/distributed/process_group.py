"""The ranks of one run, and their collective operations.

torchrun starts the processes and sets their environment (rank, world size); nothing here starts or restarts them.
Training steps use `step_group`, with a short timeout for lost ranks. Everything before and after the steps (a corpus
that one rank tokenizes, a report that one rank writes) uses `control_group`, with a long one.
"""

import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from gpt2.data.loader import Batch
from gpt2.errors import ConfigError, RankFailure, ReportedByOtherRank, UserError

T = TypeVar("T")

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MASTER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # until all ranks have joined
CONTROL_TIMEOUT = timedelta(hours=12)  # of operations outside the training steps
# gloo raises plain RuntimeErrors, also out of DDP and FSDP: only their text distinguishes them from other errors.
COMMUNICATION_ERROR = re.compile(
    r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed out|Broken pipe|TCPStore|barrier"
)


@dataclass(frozen=True)
class ProcessGroup:
    """This process among the ranks of its run.

    rank, world_size:             among all ranks.
    local_rank, local_world_size: among the ranks on this host.
    control_group, step_group:    torch's process groups outside and inside the training steps; None without torchrun.
    timeout:                      of operations of `step_group`.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    control_group: dist.ProcessGroup | None = None
    step_group: dist.ProcessGroup | None = None
    timeout: timedelta | None = None

    @property
    def is_main_process(self) -> bool:
        """Return whether this is rank 0, which writes the run folder and the log."""
        return self.rank == 0

    @property
    def is_single_process(self) -> bool:
        """Return whether there is no process group: the run was started without torchrun."""
        return self.control_group is None

    def with_timeout(self, seconds: float) -> "ProcessGroup":
        """The same ranks with a `step_group` of this timeout."""
        if self.is_single_process:
            return self
        timeout = timedelta(seconds=seconds)
        return replace(self, timeout=timeout, step_group=dist.new_group(timeout=timeout))

    def set_device(self, device: torch.device) -> None:
        """Select this rank's device. Raises UserError when there are too few, or NCCL is missing."""
        if self.is_single_process:
            return
        if device.type == "mps" or device.index is not None:
            raise ConfigError(
                f"--device {device} is one device: under torchrun use cuda or cpu, and each rank has its own",
                field="device",
            )
        if device.type == "cuda":
            if not dist.is_nccl_available():
                raise UserError(
                    "this torch has no NCCL, which GPUs need to communicate: --device cpu, or another torch"
                )
            if self.local_rank >= torch.cuda.device_count():
                count = torch.cuda.device_count()
                raise UserError(f"there are {count} GPUs on {socket.gethostname()}: --nproc-per-node={count}")
            torch.cuda.set_device(self.local_rank)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """If any rank raises a UserError in the block, all ranks raise one.

        The lowest rank that failed raises the error itself, with its rank and host name unless it is rank 0; the others
        raise ReportedByOtherRank.
        """
        if self.is_single_process:
            yield
            return
        error: UserError | None = None
        try:
            yield
        except UserError as raised:
            error = raised
        failed = self.all_gather_object(error is not None)
        if not any(failed):
            return
        if error is None or failed.index(True) != self.rank:
            raise ReportedByOtherRank
        if self.rank > 0:
            error.args = (f"rank {self.rank} on {socket.gethostname()}: {error}",)
        raise error

    def broadcast_from_main(self, fn: Callable[[], T]) -> T:
        """Call `fn` on rank 0 only, and return its result on every rank."""
        if self.is_single_process:
            return fn()
        result: list[Any] = [None]
        with self.raise_on_all_ranks():
            result = [fn() if self.is_main_process else None]
        dist.broadcast_object_list(result, src=0, group=self.control_group)
        return result[0]

    def main_process_first(self, fn: Callable[[], T]) -> T:
        """Call `fn` on every rank: first on the main process of each host, then on the others, which find its cache."""
        result: list[T] = []
        for is_turn_of_main in (True, False):
            with self.raise_on_all_ranks():
                if (self.local_rank == 0) == is_turn_of_main:
                    result.append(fn())
        return result[0]

    def assert_same_on_all_ranks(self, facts: Mapping[str, Any], fix: str) -> None:
        """Raises UserError when the values of a rank differ from those of rank 0; `fix` ends the message."""
        if self.is_single_process:
            return
        gathered = self.all_gather_object((socket.gethostname(), dict(facts)))
        first_host, first = gathered[0]
        rank = next((rank for rank, (_, theirs) in enumerate(gathered) if theirs != first), None)
        if rank is None:
            return
        if not self.is_main_process:
            raise ReportedByOtherRank
        host, theirs = gathered[rank]
        name = next(name for name in [*first, *theirs] if first.get(name) != theirs.get(name))
        raise UserError(
            f"rank {rank} on {host} has {name} {_truncated(theirs.get(name))}, "
            f"rank 0 on {first_host} {_truncated(first.get(name))}: {fix}"
        )

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank."""
        if self.is_single_process:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def all_reduce_scalars(self, *numbers: float) -> list[float]:
        """Each number, summed over the ranks in float64."""
        if self.is_single_process:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.step_group)
        return total.tolist()

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank."""
        return flag if self.is_single_process else bool(self.all_reduce_scalars(float(flag))[0])

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor on the device over the ranks, in place, and return it."""
        if not self.is_single_process:
            dist.all_reduce(tensor, group=self.step_group)
        return tensor

    def shard(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """This rank's shard of the batches, round robin; all get equally many, the last perhaps without targets."""
        batches = iter(batches)
        while turn := list(islice(batches, self.world_size)):
            yield turn[self.rank] if self.rank < len(turn) else turn[0].with_targets_ignored()

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.all_gather_object(None)


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The ranks that torchrun started; SINGLE_PROCESS without torchrun.

    Raises UserError for an environment that is not torchrun's and when the other ranks cannot be reached, and
    RankFailure when they are lost inside the block.
    """
    ranks = _from_environment(os.environ)
    if ranks is None:
        yield SINGLE_PROCESS
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT)))
        store = _store_of_this_start(store, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=RENDEZVOUS_TIMEOUT)
        ranks = replace(ranks, control_group=dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise _rendezvous_error(ranks, error) from error
    try:
        yield ranks
        ranks.barrier()
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or COMMUNICATION_ERROR.search(str(error))):
            raise
        raise RankFailure(_lost_ranks_message(ranks, error)) from error
    except UserError:
        dist.destroy_process_group()  # otherwise its threads may abort the process at exit
        raise
    dist.destroy_process_group()


def _store_of_this_start(store: Store, rank: int, world_size: int) -> Store:
    """The rendezvous store with a key prefix that only the processes of this start use.

    torchrun keeps one store through all restarts, so it still has the addresses of dead ranks. Rank 0 chooses a random
    prefix, the others write a random key of their own under it, and rank 0 publishes the keys it has read. A rank that
    does not find its own key there has read the prefix of an earlier start, and tries again.
    """
    own, deadline = uuid4().hex, time.monotonic() + RENDEZVOUS_TIMEOUT.total_seconds()
    if rank == 0:
        store.set("gpt2/attempt", own)
        seen = [store.get(f"gpt2/{own}/{other}").decode() for other in range(1, world_size)]  # waits for each
        store.set(f"gpt2/{own}/seen", " ".join(seen))
        return PrefixStore(own, store)
    while time.monotonic() < deadline:
        if store.check(["gpt2/attempt"]):
            name = store.get("gpt2/attempt").decode()
            store.set(f"gpt2/{name}/{rank}", own)
            if store.check([f"gpt2/{name}/seen"]) and own in store.get(f"gpt2/{name}/seen").decode().split():
                return PrefixStore(name, store)
        time.sleep(0.1)
    raise RuntimeError(f"rank 0 has not joined within {RENDEZVOUS_TIMEOUT.total_seconds():.0f} seconds")


def max_restarts() -> int:
    """How often torchrun restarts the ranks after a failure."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def _from_environment(environment: Mapping[str, str]) -> ProcessGroup | None:
    """The rank of this process by its environment variables; None when they are not set."""
    if not any(environment.get(name) for name in RANK_VARIABLES):
        return None
    problem = _environment_error(environment)
    if problem is not None:
        raise UserError(problem) if _reports_environment_error(environment) else ReportedByOtherRank
    rank, size, local_rank, local_size = (int(environment[name]) for name in RANK_VARIABLES)
    return ProcessGroup(rank, size, local_rank, local_size)


def _environment_error(environment: Mapping[str, str]) -> str | None:
    """What is wrong with torchrun's environment variables, and the fix; None when they are valid."""
    missing = next((name for name in (*RANK_VARIABLES, *MASTER_VARIABLES) if not environment.get(name)), None)
    if missing is not None:
        present = next(name for name in RANK_VARIABLES if environment.get(name))
        return f"{present} is set and {missing} is not: start with torchrun, which sets all of them, or unset it"
    numbers, port = [environment[name] for name in RANK_VARIABLES], environment["MASTER_PORT"]
    values = f"{', '.join(RANK_VARIABLES)} are {', '.join(numbers)}"
    if not all(number.isdecimal() for number in numbers):
        return f"{values}: each must be a number, as torchrun sets them"
    rank, size, local_rank, local_size = map(int, numbers)
    if not (rank < size and local_rank < local_size <= size):
        return f"{values}, which is not valid: start with torchrun, which sets them"
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        return f"MASTER_PORT is {port}, which is not a port: start with torchrun, which sets it"
    return None


def _reports_environment_error(environment: Mapping[str, str]) -> bool:
    """Return whether this process reports an invalid environment: rank 0 does, and a process without a rank 0."""
    rank, size = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "")
    if not rank.isdecimal() or int(rank) == 0:
        return True
    return sum(bool(environment.get(name)) for name in RANK_VARIABLES) == 1 or (
        size.isdecimal() and int(rank) >= int(size)
    )


def _rendezvous_error(ranks: ProcessGroup, error: Exception) -> UserError:
    """The one-line error for a failed rendezvous."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return UserError(f"another program uses the port of {address}: choose another (--rdzv-endpoint, --master-port)")
    who = f"rank {ranks.rank} on {socket.gethostname()}"
    return UserError(f"{who} cannot reach the other ranks at {address}: {_first_sentence(error)}")


def _lost_ranks_message(ranks: ProcessGroup, error: Exception) -> str:
    return (
        f"rank {ranks.rank} on {socket.gethostname()} lost the other ranks, or waited too long for them "
        f"({_first_sentence(error)}): with --resume auto the run continues from its last checkpoint"
    )


def _first_sentence(error: Exception) -> str:
    """The first sentence of a torch error, without source locations and intermediate errors."""
    text = " ".join(str(error).split()).split("RuntimeError: ")[-1].split(" At: ")[0]
    text = re.sub(r"\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", text)
    return text.split(". ")[0][:160].rstrip(" .")


def _truncated(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
