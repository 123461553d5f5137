"""The processes of one run: which of them this is, and how they agree.

torchrun starts them, and tells each by its environment who it is; nothing here starts, watches or restarts anything.
Every step's talk goes through `group`, where whoever keeps the others waiting for too long is given up; what comes
before and after the steps (a corpus that one rank tokenizes, a report that one writes) through `patient`.
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
from gpt2.errors import RankFailure, ReportedByOtherRank, UserError

T = TypeVar("T")

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MASTER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # for all to be there
CONTROL_TIMEOUT = timedelta(hours=12)  # for what one does while the others wait, before and after the steps
COMMUNICATION_ERROR = re.compile(
    r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed out|Broken pipe|TCPStore|barrier"
)


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those of its run.

    rank, size:             of all.
    local_rank, local_size: of those on this host.
    patient, group:         what they talk through, before and after the steps and in them; None for a process alone.
    timeout:                how long `group` waits for a rank.
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
        """Is this the one that writes the run folder and speaks?"""
        return self.rank == 0

    @property
    def is_single_process(self) -> bool:
        """Is there no process group: was this started without torchrun?"""
        return self.control_group is None

    def with_timeout(self, seconds: float) -> "ProcessGroup":
        """The same, with a group for the steps: who keeps the others waiting for so long counts as lost."""
        if self.is_single_process:
            return self
        timeout = timedelta(seconds=seconds)
        return replace(self, timeout=timeout, step_group=dist.new_group(timeout=timeout))

    def set_device(self, device: torch.device) -> None:
        """Make `device` this rank's own. Raises UserError where there are not enough, or they cannot talk."""
        if self.is_single_process:
            return
        if device.type == "mps" or device.index is not None:
            raise UserError(
                f"--device {device} is one device: under torchrun take cuda or cpu, and each rank has its own"
            )
        if device.type == "cuda":
            if not dist.is_nccl_available():
                raise UserError(
                    "this torch has no NCCL, without which GPUs cannot talk: --device cpu, or another torch"
                )
            if self.local_rank >= torch.cuda.device_count():
                count = torch.cuda.device_count()
                raise UserError(f"there are {count} GPUs on {socket.gethostname()}: --nproc-per-node={count}")
            torch.cuda.set_device(self.local_rank)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """A block whose UserError on any rank is one on all of them; the first that has one tells of it."""
        if self.is_single_process:
            yield
            return
        error: UserError | None = None
        try:
            yield
        except UserError as raised:
            error = raised
        told = self.all_gather_object(None if error is None else str(error))
        failed = [rank for rank, line in enumerate(told) if line is not None]
        if not failed:
            return
        if failed[0] != self.rank:
            raise ReportedByOtherRank
        assert error is not None
        if self.rank == 0:
            raise error
        raise type(error)(f"rank {self.rank} on {socket.gethostname()}: {error}") from error

    def broadcast_from_main(self, fn: Callable[[], T]) -> T:
        """What rank 0 makes, for all of them."""
        if self.is_single_process:
            return fn()
        made: list[Any] = [None]
        with self.raise_on_all_ranks():
            made = [fn() if self.is_main_process else None]
        dist.broadcast_object_list(made, src=0, group=self.control_group)
        return made[0]

    def main_process_first(self, fn: Callable[[], T]) -> T:
        """What each makes for itself: the first of every host, and then the others, who find what that one cached."""
        made: list[T] = []
        for firsts in (True, False):
            with self.raise_on_all_ranks():
                if (self.local_rank == 0) == firsts:
                    made.append(fn())
        return made[0]

    def assert_same_on_all_ranks(self, facts: Mapping[str, Any], fix: str) -> None:
        """Raises UserError where a rank's `facts`, by name, are not those of rank 0."""
        if self.is_single_process:
            return
        told = self.all_gather_object((socket.gethostname(), dict(facts)))
        first_host, first = told[0]
        rank = next((rank for rank, (_, theirs) in enumerate(told) if theirs != first), None)
        if rank is None:
            return
        if not self.is_main_process:
            raise ReportedByOtherRank
        host, theirs = told[rank]
        name = next(name for name in [*first, *theirs] if first.get(name) != theirs.get(name))
        raise UserError(
            f"rank {rank} on {host} has {name} {_truncated(theirs.get(name))}, "
            f"rank 0 on {first_host} {_truncated(first.get(name))}: {fix}"
        )

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.is_single_process:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def all_reduce_scalars(self, *numbers: float) -> list[float]:
        """Each of the numbers, summed over the ranks, as float64."""
        if self.is_single_process:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.step_group)
        return total.tolist()

    def any_rank(self, flag: bool) -> bool:
        """Is it so on any rank?"""
        return flag if self.is_single_process else bool(self.all_reduce_scalars(float(flag))[0])

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, summed over the ranks in place."""
        if not self.is_single_process:
            dist.all_reduce(tensor, group=self.step_group)
        return tensor

    def shard(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """This rank's part of the batches, dealt like cards; each rank has as many, the last one perhaps a blank."""
        batches = iter(batches)
        while some := list(islice(batches, self.world_size)):
            yield some[self.rank] if self.rank < len(some) else some[0].with_targets_ignored()

    def barrier(self) -> None:
        """Wait until all are here."""
        self.all_gather_object(None)


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """This process among those that torchrun started with it; `ALONE` without it.

    Raises UserError when the environment is not what torchrun makes it, and when the others cannot be reached; and
    LostRanks when they are lost on the way.
    """
    place = _from_environment(os.environ)
    if place is None:
        yield SINGLE_PROCESS
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT)))
        store = _store_of_this_attempt(store, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=RENDEZVOUS_TIMEOUT)
        ranks = replace(place, control_group=dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise _rendezvous_error(place, error) from error
    try:
        yield ranks
        ranks.barrier()
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or COMMUNICATION_ERROR.search(str(error))):
            raise
        raise RankFailure(_lost_ranks_message(ranks, error)) from error
    except UserError:
        dist.destroy_process_group()  # or its threads may abort the process on its way out
        raise
    dist.destroy_process_group()


def _store_of_this_attempt(store: Store, rank: int, world_size: int) -> Store:
    """The store where the ranks find each other, under a name that only those who live now agree on.

    torchrun keeps one store through all its restarts, and the addresses that the dead have left there are still in it.
    Rank 0 makes up a name, the others answer under it, and it says whose answers it has seen: a name on which none of
    ours is was of an attempt before this one.
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
    raise RuntimeError(f"rank 0 has not come in {RENDEZVOUS_TIMEOUT.total_seconds():.0f} seconds")


def max_restarts() -> int:
    """How often torchrun would start the run anew."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def _from_environment(environment: Mapping[str, str]) -> ProcessGroup | None:
    """Who the environment says this process is; None when it says nothing."""
    if not any(environment.get(name) for name in RANK_VARIABLES):
        return None
    trouble = _environment_error(environment)
    if trouble is not None:
        raise UserError(trouble) if _reports_environment_error(environment) else ReportedByOtherRank
    rank, size, local_rank, local_size = (int(environment[name]) for name in RANK_VARIABLES)
    return ProcessGroup(rank, size, local_rank, local_size)


def _environment_error(environment: Mapping[str, str]) -> str | None:
    """What is wrong with what the environment says of this process, and the mend."""
    missing = next((name for name in (*RANK_VARIABLES, *MASTER_VARIABLES) if not environment.get(name)), None)
    if missing is not None:
        there = next(name for name in RANK_VARIABLES if environment.get(name))
        return f"{there} is set and {missing} is not: start with torchrun, which sets all it takes, or unset it"
    numbers, port = [environment[name] for name in RANK_VARIABLES], environment["MASTER_PORT"]
    said = f"{', '.join(RANK_VARIABLES)} are {', '.join(numbers)}"
    if not all(number.isdecimal() for number in numbers):
        return f"{said}: each must be a number, as torchrun sets them"
    rank, size, local_rank, local_size = map(int, numbers)
    if not (rank < size and local_rank < local_size <= size):
        return f"{said}, which cannot be: start with torchrun, which sets them"
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        return f"MASTER_PORT is {port}, which is no port: start with torchrun, which sets it"
    return None


def _reports_environment_error(environment: Mapping[str, str]) -> bool:
    """Is it for this process to say what is wrong with the environment: is there no rank 0 beside it that will?"""
    rank, size = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "")
    if not rank.isdecimal() or int(rank) == 0:
        return True
    return sum(bool(environment.get(name)) for name in RANK_VARIABLES) == 1 or (
        size.isdecimal() and int(rank) >= int(size)
    )


def _rendezvous_error(ranks: ProcessGroup, error: Exception) -> UserError:
    """One line for what kept the ranks from finding each other."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return UserError(f"another program has the port of {address}: take another (--rdzv-endpoint, --master-port)")
    who = f"rank {ranks.rank} on {socket.gethostname()}"
    return UserError(f"{who} does not find the others at {address}: {_first_sentence(error)}")


def _lost_ranks_message(ranks: ProcessGroup, error: Exception) -> str:
    return (
        f"rank {ranks.rank} on {socket.gethostname()} lost the others, or waited too long for them "
        f"({_first_sentence(error)}): with --resume auto the run goes on from its last checkpoint"
    )


def _first_sentence(error: Exception) -> str:
    """The first sentence of what torch says, without the places in its source and the errors on the way."""
    text = " ".join(str(error).split()).split("RuntimeError: ")[-1].split(" At: ")[0]
    text = re.sub(r"\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", text)
    return text.split(". ")[0][:160].rstrip(" .")


def _truncated(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
