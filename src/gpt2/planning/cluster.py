"""Devices that talk: how fast their links are, and how long a collective operation takes on them.

All that is assumed about links stands here, with where it comes from; docs/scaling.md says how far it holds.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from gpt2.hardware import Accelerator

# Of a link's or a memory's datasheet rate. NCCL itself expects 235 of an A100's 300 GB/s (its src/graph/tuning.cc), and
# 46 to 48 of 50 GB/s between hosts (its maintainers, nccl-tests issue 290): this is the lower of the two.
ACHIEVED = 0.8
# Seconds to begin a collective operation, and of each hop of it: NCCL's estimates for its ring (the same file).
START, NVLINK_HOP, PCIE_HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 5.7e-6, 9.6e-6
# Between CPUs, through gloo: of the order that benchmarks/gloo_check.py sees, and Ethernet of 10 Gbit/s.
CPU_LINK, CPU_NETWORK, CPU_START, CPU_HOP, CPU_GATHERS = 0.8e9, 1.25e9, 1e-4, 1e-4, 0.75


@dataclass(frozen=True)
class Link:
    """How a device reaches the others: bytes/s each way, seconds to begin an operation, and seconds of each hop."""

    bandwidth: float
    start: float = 0.0
    hop: float = 0.0

    def seconds(self, sent: float, hops: int) -> float:
        """To send so many bytes, on so many hops; nothing takes no time."""
        return self.start + hops * self.hop + sent / self.bandwidth if hops else 0.0


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `gpus` devices each, and a device's links to those in its machine and in others.

    gloo: do CPUs talk? With gloo, FSDP2 waits for each message, where NCCL sends while the device computes; and a sum
          that is divided takes a whole all-reduce, so twice as much is sent (torch 2.13: benchmarks/gloo_check.py).
    busy: the part of a message's time that the device cannot compute in: nothing with NCCL, as far as is assumed; with
          gloo what the CPU does for it.
    gather_rate: the part of a link's speed that gathering reaches: all with NCCL; gloo does not keep both ways busy.
    """

    nodes: int
    gpus: int
    inside: Link
    between: Link
    gloo: bool = False
    busy: float = 0.0
    gather_rate: float = 1.0

    @property
    def devices(self) -> int:
        return self.nodes * self.gpus

    @property
    def network(self) -> float:
        """Bytes/s of a machine to the others, as its datasheet has it."""
        return self.between.bandwidth * self.gpus / ACHIEVED

    @property
    def shards(self) -> int:
        """How many devices divide a model with FSDP: those of a machine; where each has but one, all."""
        return self.gpus if self.gpus > 1 else self.nodes


def gpu_cluster(datasheet: Accelerator, nodes: int, gpus: int, network: float | None = None) -> Cluster:
    """Machines with such GPUs. network: bytes/s, each way, of each machine; by default what they usually have."""
    hop = NVLINK_HOP if datasheet.link > 1e11 else PCIE_HOP
    per_gpu = (network or datasheet.host_network(gpus)) / gpus
    inside = Link(ACHIEVED * datasheet.link, START, hop)
    return Cluster(nodes, gpus, inside, Link(ACHIEVED * per_gpu, START, NETWORK_HOP))


def cpu_cluster(nodes: int, ranks: int, network: float | None = None) -> Cluster:
    """Machines with so many processes each, that talk through gloo."""
    inside = Link(CPU_LINK, CPU_START, CPU_HOP)
    between = Link(ACHIEVED * (network or CPU_NETWORK) / ranks, CPU_START, CPU_HOP)
    return Cluster(nodes, ranks, inside, between, gloo=True, gather_rate=CPU_GATHERS)


class Sent(NamedTuple):
    """Bytes that a device sends to others in its machine, and in others."""

    inside: float
    between: float


def all_reduce_sent(size: float, cluster: Cluster) -> Sent:
    """What rings send for a sum of `size` bytes: divided in a machine, each part summed over machines, and gathered."""
    n, m = cluster.nodes, cluster.gpus
    return Sent(2 * (m - 1) / m * size, 2 * (n - 1) / n * size / m)


def all_reduce_seconds(size: float, cluster: Cluster) -> float:
    """The time of that sum. Its stages work at once, on one piece of it after the other: the slower link decides."""
    sent = all_reduce_sent(size, cluster)
    waiting = _hops_seconds(cluster)
    rates = cluster.inside.bandwidth, cluster.between.bandwidth
    return waiting + max(sent.inside / rates[0], sent.between / rates[1])


def _hops_seconds(cluster: Cluster) -> float:
    """To begin, twice around the machine, and up and down a tree of the machines."""
    if cluster.devices == 1:
        return 0.0
    start = max(cluster.inside.start, cluster.between.start if cluster.nodes > 1 else 0.0)
    inside = 2 * (cluster.gpus - 1) * cluster.inside.hop
    return start + inside + 2 * math.ceil(math.log2(cluster.nodes)) * cluster.between.hop


def gather_seconds(size: float, ranks: int, link: Link) -> float:
    """To gather `size` bytes from as many shards as there are ranks, or to sum and divide them: one way around."""
    return link.seconds((ranks - 1) / ranks * size, ranks - 1)
