"""Devices joined by links: bandwidth and latency of the links, and the time of collective operations on them.

All assumptions about links are here, with their sources; docs/scaling.md compares them with measurements.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from gpt2.hardware import Accelerator

# The share of a link's or a memory's datasheet rate that is reached. NCCL itself expects 235 of an A100's 300 GB/s (its
# src/graph/tuning.cc), and 46 to 48 of 50 GB/s between hosts (nccl-tests issue 290): this is the lower of the two.
ACHIEVED_BANDWIDTH = 0.8
# Seconds to start a collective operation, and of each hop of it: NCCL's estimates for its ring (the same file).
COLLECTIVE_LATENCY, NVLINK_HOP_LATENCY, PCIE_HOP_LATENCY, NETWORK_HOP_LATENCY = 8.4e-6, 3.4e-6, 5.7e-6, 9.6e-6
# CPUs with gloo: the order of magnitude that benchmarks/gloo_check.py measures, and Ethernet of 10 Gbit/s.
CPU_LINK_BANDWIDTH, CPU_NETWORK_BANDWIDTH, CPU_GATHER_RATE = 0.8e9, 1.25e9, 0.75
CPU_COLLECTIVE_LATENCY, CPU_HOP_LATENCY = 1e-4, 1e-4


@dataclass(frozen=True)
class Link:
    """A link of a device: bytes/s in each direction, seconds to start an operation, seconds per hop."""

    bandwidth: float
    latency: float = 0.0
    hop_latency: float = 0.0

    def transfer_seconds(self, num_bytes: float, hops: int) -> float:
        """Seconds to send `num_bytes` over `hops` hops; 0 without a hop."""
        return self.latency + hops * self.hop_latency + num_bytes / self.bandwidth if hops else 0.0


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines with `devices_per_node` devices each, and a device's links within and between machines.

    gloo: CPU ranks. With gloo, FSDP2 waits for each message, where NCCL communicates while the device computes; and a
          reduce-scatter is an all-reduce, which sends twice as much (torch 2.13: benchmarks/gloo_check.py).
    busy: the share of computing that is lost while a message is sent: 0 is assumed for NCCL; with gloo the CPU's work.
    gather_rate: the share of a link's bandwidth that an all-gather reaches; gloo does not use both directions at once.
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
        """Bytes/s of a machine to the others, as in its datasheet."""
        return self.inter_node.bandwidth * self.devices_per_node / ACHIEVED_BANDWIDTH

    @property
    def shards(self) -> int:
        """Number of FSDP shards of a model: the devices of a machine; with one device per machine, all machines."""
        return self.devices_per_node if self.devices_per_node > 1 else self.nodes


def gpu_cluster(datasheet: Accelerator, nodes: int, devices_per_node: int, network: float | None = None) -> Cluster:
    """Machines with such GPUs. network: bytes/s of a machine in each direction; None for the usual value."""
    hop = NVLINK_HOP_LATENCY if datasheet.link_bandwidth > 1e11 else PCIE_HOP_LATENCY
    per_gpu = (network or datasheet.node_bandwidth(devices_per_node)) / devices_per_node
    intra_node = Link(ACHIEVED_BANDWIDTH * datasheet.link_bandwidth, COLLECTIVE_LATENCY, hop)
    inter_node = Link(ACHIEVED_BANDWIDTH * per_gpu, COLLECTIVE_LATENCY, NETWORK_HOP_LATENCY)
    return Cluster(nodes, devices_per_node, intra_node, inter_node)


def cpu_cluster(nodes: int, ranks_per_node: int, network: float | None = None) -> Cluster:
    """Machines with `ranks_per_node` CPU ranks each, which communicate through gloo."""
    per_rank = ACHIEVED_BANDWIDTH * (network or CPU_NETWORK_BANDWIDTH) / ranks_per_node
    intra_node = Link(CPU_LINK_BANDWIDTH, CPU_COLLECTIVE_LATENCY, CPU_HOP_LATENCY)
    inter_node = Link(per_rank, CPU_COLLECTIVE_LATENCY, CPU_HOP_LATENCY)
    return Cluster(nodes, ranks_per_node, intra_node, inter_node, gloo=True, gather_rate=CPU_GATHER_RATE)


class BytesSent(NamedTuple):
    """Bytes that a device sends within its machine and to other machines."""

    intra_node: float
    inter_node: float


def all_reduce_bytes_sent(num_bytes: float, cluster: Cluster) -> BytesSent:
    """Bytes a device sends in a ring all-reduce: reduce-scatter in each machine, all-reduce between, all-gather."""
    n, m = cluster.nodes, cluster.devices_per_node
    return BytesSent(2 * (m - 1) / m * num_bytes, 2 * (n - 1) / n * num_bytes / m)


def all_reduce_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Seconds of that all-reduce. Its stages are pipelined over pieces of the data, so the slower link decides."""
    sent = all_reduce_bytes_sent(num_bytes, cluster)
    transfer = max(sent.intra_node / cluster.intra_node.bandwidth, sent.inter_node / cluster.inter_node.bandwidth)
    return _all_reduce_latency(cluster) + transfer


def _all_reduce_latency(cluster: Cluster) -> float:
    """Seconds to start, plus the hops: twice around the ring of the machine, up and down a tree of the machines."""
    if cluster.num_devices == 1:
        return 0.0
    start = max(cluster.intra_node.latency, cluster.inter_node.latency if cluster.nodes > 1 else 0.0)
    inside = 2 * (cluster.devices_per_node - 1) * cluster.intra_node.hop_latency
    return start + inside + 2 * math.ceil(math.log2(cluster.nodes)) * cluster.inter_node.hop_latency


def all_gather_seconds(num_bytes: float, world_size: int, link: Link) -> float:
    """Seconds of a ring all-gather or reduce-scatter of `num_bytes` in all over `world_size` ranks."""
    return link.transfer_seconds((world_size - 1) / world_size * num_bytes, world_size - 1)
