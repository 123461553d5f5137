"""Devices that talk: how fast their links are, and how long a collective operation takes on them.

All that is assumed about links stands here, with where it comes from; docs/scaling.md says how far it holds.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from gpt2.hardware import Accelerator

# Of a link's or a memory's datasheet rate. NCCL itself expects 235 of an A100's 300 GB/s (its src/graph/tuning.cc), and
# 46 to 48 of 50 GB/s between hosts (its maintainers, nccl-tests issue 290): this is the lower of the two.
ACHIEVED_BANDWIDTH = 0.8
# Seconds to begin a collective operation, and of each hop of it: NCCL's estimates for its ring (the same file).
COLLECTIVE_LATENCY, NVLINK_HOP_LATENCY, PCIE_HOP_LATENCY, NETWORK_HOP_LATENCY = 8.4e-6, 3.4e-6, 5.7e-6, 9.6e-6
# Between CPUs, through gloo: of the order that benchmarks/gloo_check.py sees, and Ethernet of 10 Gbit/s.
CPU_LINK_BANDWIDTH, CPU_NETWORK_BANDWIDTH, CPU_COLLECTIVE_LATENCY, CPU_HOP_LATENCY, CPU_GATHER_RATE = (
    0.8e9,
    1.25e9,
    1e-4,
    1e-4,
    0.75,
)


@dataclass(frozen=True)
class Link:
    """How a device reaches the others: bytes/s each way, seconds to begin an operation, and seconds of each hop."""

    bandwidth: float
    latency: float = 0.0
    hop_latency: float = 0.0

    def transfer_seconds(self, num_bytes: float, hops: int) -> float:
        """To send so many bytes, on so many hops; nothing takes no time."""
        return self.latency + hops * self.hop_latency + num_bytes / self.bandwidth if hops else 0.0


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
    devices_per_node: int
    intra_node: Link
    inter_node: Link
    gloo: bool = False
    busy: float = 0.0
    gather_rate: float = 1.0

    @property
    def num_devices(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def node_bandwidth(self) -> float:
        """Bytes/s of a machine to the others, as its datasheet has it."""
        return self.inter_node.bandwidth * self.devices_per_node / ACHIEVED_BANDWIDTH

    @property
    def shards(self) -> int:
        """How many devices divide a model with FSDP: those of a machine; where each has but one, all."""
        return self.devices_per_node if self.devices_per_node > 1 else self.nodes


def gpu_cluster(datasheet: Accelerator, nodes: int, devices_per_node: int, network: float | None = None) -> Cluster:
    """Machines with such GPUs. network: bytes/s, each way, of each machine; by default what they usually have."""
    hop = NVLINK_HOP_LATENCY if datasheet.link_bandwidth > 1e11 else PCIE_HOP_LATENCY
    per_gpu = (network or datasheet.node_bandwidth(devices_per_node)) / devices_per_node
    inside = Link(ACHIEVED_BANDWIDTH * datasheet.link_bandwidth, COLLECTIVE_LATENCY, hop)
    return Cluster(
        nodes, devices_per_node, inside, Link(ACHIEVED_BANDWIDTH * per_gpu, COLLECTIVE_LATENCY, NETWORK_HOP_LATENCY)
    )


def cpu_cluster(nodes: int, ranks_per_node: int, network: float | None = None) -> Cluster:
    """Machines with so many processes each, that talk through gloo."""
    inside = Link(CPU_LINK_BANDWIDTH, CPU_COLLECTIVE_LATENCY, CPU_HOP_LATENCY)
    between = Link(
        ACHIEVED_BANDWIDTH * (network or CPU_NETWORK_BANDWIDTH) / ranks_per_node,
        CPU_COLLECTIVE_LATENCY,
        CPU_HOP_LATENCY,
    )
    return Cluster(nodes, ranks_per_node, inside, between, gloo=True, gather_rate=CPU_GATHER_RATE)


class BytesSent(NamedTuple):
    """Bytes that a device sends to others in its machine, and in others."""

    intra_node: float
    inter_node: float


def all_reduce_bytes_sent(num_bytes: float, cluster: Cluster) -> BytesSent:
    """What rings send for a sum of `size` bytes: divided in a machine, each part summed over machines, and gathered."""
    n, m = cluster.nodes, cluster.devices_per_node
    return BytesSent(2 * (m - 1) / m * num_bytes, 2 * (n - 1) / n * num_bytes / m)


def all_reduce_seconds(num_bytes: float, cluster: Cluster) -> float:
    """The time of that sum. Its stages work at once, on one piece of it after the other: the slower link decides."""
    sent = all_reduce_bytes_sent(num_bytes, cluster)
    waiting = _all_reduce_latency(cluster)
    rates = cluster.intra_node.bandwidth, cluster.inter_node.bandwidth
    return waiting + max(sent.intra_node / rates[0], sent.inter_node / rates[1])


def _all_reduce_latency(cluster: Cluster) -> float:
    """To begin, twice around the machine, and up and down a tree of the machines."""
    if cluster.num_devices == 1:
        return 0.0
    start = max(cluster.intra_node.latency, cluster.inter_node.latency if cluster.nodes > 1 else 0.0)
    inside = 2 * (cluster.devices_per_node - 1) * cluster.intra_node.hop_latency
    return start + inside + 2 * math.ceil(math.log2(cluster.nodes)) * cluster.inter_node.hop_latency


def all_gather_seconds(num_bytes: float, world_size: int, link: Link) -> float:
    """To gather `size` bytes from as many shards as there are ranks, or to sum and divide them: one way around."""
    return link.transfer_seconds((world_size - 1) / world_size * num_bytes, world_size - 1)
