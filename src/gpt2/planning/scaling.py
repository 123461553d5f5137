"""Scaling of a training step: communication volume and time with DDP and FSDP, and its overlap with computing.

A step is simulated as tasks: the layers (embeddings, blocks, head) compute when their inputs are ready, and each
message is sent when its data is ready and the link is free. The assumptions about links are in
`gpt2.planning.cluster`, those about computing below; docs/scaling.md compares predictions with measurements.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpt2.hardware import Accelerator
from gpt2.model import GPTConfig
from gpt2.planning.cluster import (
    ACHIEVED_BANDWIDTH,
    Cluster,
    all_gather_seconds,
    all_reduce_bytes_sent,
    all_reduce_seconds,
)
from gpt2.planning.costs import (
    FLOAT32_BYTES,
    StepSetup,
    block_matrices,
    block_tensor_sizes,
    flops_per_token,
    num_trainable_parameters,
)

ASSUMED_MFU = 0.45  # for a device that cannot be measured, of the datasheet's peak
BUCKET_BYTES, FIRST_BUCKET_BYTES = 25 * 2**20, 2**20  # DDP's bucket sizes (torch's defaults)
# Bytes of memory traffic per trainable parameter: gradient norm and clipping, and the optimizer's update.
CLIP_BYTES, UPDATE_BYTES = 12, {"adamw": 28, "muon": 28, "sgd": 20}
NEWTON_SCHULZ_STEPS = 5  # of Muon, with three matrix products each
COMPUTE, INTRA_NODE, INTER_NODE = "compute", "inside", "between"  # the streams


class LayerWork(NamedTuple):
    """The work of a block, of the embeddings, or of the final norm with the head.

    forward, backward: seconds of a micro-batch. weight_bytes: of all its parameters.
    gradient_bytes:    of each trainable tensor, in the order of the parameters.
    """

    forward: float
    backward: float
    weight_bytes: int
    gradient_bytes: tuple[int, ...]


@dataclass(frozen=True)
class StepWork:
    """The work of one device in a step."""

    layers: tuple[LayerWork, ...]  # embeddings, blocks, final norm with head
    micro_batches: int
    update: float  # seconds of the optimizer's update of all weights

    @property
    def micro_batch_seconds(self) -> float:
        """Seconds of a micro-batch, forward and backward."""
        return sum(layer.forward + layer.backward for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def gradient_bytes(self) -> int:
        return sum(sum(layer.gradient_bytes) for layer in self.layers)


def split_step_work(shape: GPTConfig, setup: StepSetup, passes: float, update: float) -> StepWork:
    """Split the work of a step into layers: `passes` seconds in proportion to FLOPs (embeddings: 0), and the update."""
    V, C, L = shape.vocab_size, shape.n_embd, shape.n_layer
    total = flops_per_token(shape, setup.length, lora=setup.lora, freeze=setup.freeze)
    forward = flops_per_token(shape, setup.length, lora=setup.lora, backward=False)
    head = 2.0 * V * C
    block = (forward - head) / L
    learns = setup.trains_embeddings or not shape.tie_word_embeddings
    head_backward = (2 if learns and setup.lora is None else 1) * head
    trained = L - setup.freeze  # blocks with a backward pass
    backward = (total - forward - head_backward) / max(1, trained)
    if setup.activation_checkpointing:
        backward, total = backward + block, total + trained * block
    flop_seconds = passes / setup.micro_batches / total
    tensors = tuple(FLOAT32_BYTES * size for size in block_tensor_sizes(shape))
    gradients = tensors
    if setup.lora is not None:
        gradients = (FLOAT32_BYTES * num_trainable_parameters(shape, setup.lora) // L,)
    frozen_block = LayerWork(flop_seconds * block, 0.0, sum(tensors), ())
    trained_block = LayerWork(flop_seconds * block, flop_seconds * backward, sum(tensors), gradients)
    embeddings = (FLOAT32_BYTES * V * C, FLOAT32_BYTES * shape.block_size * C)
    last = (FLOAT32_BYTES * C, FLOAT32_BYTES * C, *(() if shape.tie_word_embeddings else (FLOAT32_BYTES * V * C,)))
    layers = (
        LayerWork(0.0, 0.0, sum(embeddings), embeddings if setup.trains_embeddings else ()),
        *(frozen_block if i < setup.freeze else trained_block for i in range(L)),
        LayerWork(flop_seconds * head, flop_seconds * head_backward, sum(last), last if setup.lora is None else ()),
    )
    return StepWork(layers, setup.micro_batches, update)


def update_seconds(shape: GPTConfig, setup: StepSetup, datasheet: Accelerator) -> float:
    """Seconds of gradient clipping and optimizer step, from the datasheet: memory traffic, and Muon's products."""
    trainable = num_trainable_parameters(shape, setup.lora, setup.freeze)
    seconds = (CLIP_BYTES + UPDATE_BYTES[setup.optimizer]) * trainable / (ACHIEVED_BANDWIDTH * datasheet.bandwidth)
    if setup.optimizer == "muon" and setup.lora is None:
        matrices = [sorted(matrix) for matrix in block_matrices(shape).values()]
        flops = sum(NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m**3) for m, n in matrices)
        seconds += (shape.n_layer - setup.freeze) * flops / (ASSUMED_MFU * datasheet.bf16)
    return seconds


@dataclass(frozen=True)
class StepEstimate:
    """The prediction of a step. Times in seconds; bytes sent by one device, within and between machines.

    compute:       time of computing alone.
    communication: time of the messages alone: on the busiest link, or the sum where messages are serialized (gloo).
    exposed:       time of the step that is not computing: communication that is not overlapped.
    efficiency:    the share of the step that is computing.
    """

    parallel: str
    seconds: float
    compute: float
    communication: float
    exposed: float
    efficiency: float
    messages: int
    sent_inside: float
    sent_between: float


def predict_step(work: StepWork, cluster: Cluster, parallel: str, bucket_bytes: int = BUCKET_BYTES) -> StepEstimate:
    """Predict a step of `work` on every device of `cluster` with "ddp" or "fsdp", or "none" on one device."""
    timeline = _Timeline(cluster)
    if parallel == "fsdp" and cluster.num_devices > 1:
        _fsdp_step(timeline, work)
    else:
        _ddp_step(timeline, work, bucket_bytes)
    seconds = simulate(timeline.tasks, cluster.busy)
    compute, *communication = (
        sum(task.seconds for task in timeline.tasks if task.stream == stream)
        for stream in (COMPUTE, INTRA_NODE, INTER_NODE)
    )
    return StepEstimate(
        parallel=parallel,
        seconds=seconds,
        compute=compute,
        communication=sum(communication) if timeline.serial else max(communication),
        exposed=seconds - compute,
        efficiency=compute / seconds,
        messages=sum(task.stream != COMPUTE for task in timeline.tasks),
        sent_inside=timeline.sent_inside,
        sent_between=timeline.sent_between,
    )


class Task(NamedTuple):
    """Work on a stream. It starts when its dependencies and all earlier tasks of its stream are done."""

    stream: str
    seconds: float
    dependencies: tuple[int, ...]  # indices of tasks


def simulate(tasks: Sequence[Task], compute_slowdown: float = 0.0) -> float:
    """The time at which all tasks are done. While a message is sent, computing is slower by `compute_slowdown`."""
    queues: dict[str, deque[int]] = {}
    for number, task in enumerate(tasks):
        queues.setdefault(task.stream, deque()).append(number)
    left, done, now = [task.seconds for task in tasks], [False] * len(tasks), 0.0
    while any(queues.values()):
        running = [
            queue[0] for queue in queues.values() if queue and all(done[n] for n in tasks[queue[0]].dependencies)
        ]
        slowed = any(tasks[number].stream != COMPUTE for number in running)
        rate = {
            number: 1 - compute_slowdown if slowed and tasks[number].stream == COMPUTE else 1.0 for number in running
        }
        elapsed = min(left[number] / rate[number] if rate[number] else math.inf for number in running)
        now += elapsed
        for number in running:
            left[number] -= elapsed * rate[number]
            if left[number] <= 1e-12:
                done[number] = True
                queues[tasks[number].stream].popleft()
    return now


class _Timeline:
    """Collects the tasks of a step and the bytes that they send."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.tasks = cluster, list[Task]()
        self.sent_inside = self.sent_between = 0.0
        self.serial = False  # whether each task also depends on the one before it

    def compute(self, seconds: float, *dependencies: int) -> int:
        return self._add_task(COMPUTE, seconds, dependencies)

    def all_reduce(self, size: float, *dependencies: int) -> int | None:
        """Sum over all devices; None on a single device."""
        if self.cluster.num_devices == 1:
            return None
        stream = INTRA_NODE if self.cluster.nodes == 1 else INTER_NODE
        return self._add_all_reduce(size, self.cluster, stream, dependencies)

    def all_reduce_across_nodes(self, size: float, *dependencies: int) -> int:
        """Sum of an FSDP shard over the machines."""
        one_per_node = Cluster(self.cluster.nodes, 1, self.cluster.intra_node, self.cluster.inter_node)
        return self._add_all_reduce(size, one_per_node, INTER_NODE, dependencies)

    def all_gather(self, size: float, *dependencies: int) -> int:
        """Gather FSDP shards that are `size` bytes together."""
        return self._add_ring_collective(size, dependencies, self.cluster.gather_rate)

    def reduce_scatter(self, size: float, *dependencies: int) -> int:
        """Sum `size` bytes into FSDP shards."""
        return self._add_ring_collective(2 * size if self.cluster.gloo else size, dependencies)

    def _add_all_reduce(self, size: float, cluster: Cluster, stream: str, dependencies: Sequence[int]) -> int:
        sent = all_reduce_bytes_sent(size, cluster)
        self.sent_inside += sent.intra_node
        self.sent_between += sent.inter_node
        return self._add_task(stream, all_reduce_seconds(size, cluster), dependencies)

    def _add_ring_collective(self, size: float, dependencies: Sequence[int], rate: float = 1.0) -> int:
        shards = self.cluster.shards
        sent = (shards - 1) / shards * size
        if self.cluster.devices_per_node > 1:
            stream, link = INTRA_NODE, self.cluster.intra_node
            self.sent_inside += sent
        else:
            stream, link = INTER_NODE, self.cluster.inter_node
            self.sent_between += sent
        return self._add_task(stream, all_gather_seconds(size / rate, shards, link), dependencies)

    def _add_task(self, stream: str, seconds: float, dependencies: Sequence[int]) -> int:
        number = len(self.tasks)
        if self.serial and number:
            dependencies = (*dependencies, number - 1)
        self.tasks.append(Task(stream, seconds, tuple(dependencies)))
        return number


def ddp_buckets(layers: Sequence[LayerWork], bucket_bytes: int = BUCKET_BYTES) -> Iterator[tuple[int, int]]:
    """DDP's messages in order: (bytes, index of the layer whose backward pass completes the bucket).

    Gradients fill buckets in reverse order of the parameters; a bucket is sent once it has `bucket_bytes` (the first:
    1 MiB).
    """
    size, limit, last = 0, min(bucket_bytes, FIRST_BUCKET_BYTES), 0
    for index in reversed(range(len(layers))):
        for tensor in reversed(layers[index].gradient_bytes):
            size, last = size + tensor, index
            if size >= limit:
                yield size, index
                size, limit = 0, bucket_bytes
    if size:
        yield size, last


def _ddp_step(timeline: _Timeline, work: StepWork, bucket_bytes: int) -> None:
    """All passes, with an all-reduce of each bucket in the last backward pass; then the update of all parameters."""
    timeline.compute((work.micro_batches - 1) * work.micro_batch_seconds + sum(each.forward for each in work.layers))
    ready = {index: timeline.compute(work.layers[index].backward) for index in reversed(range(len(work.layers)))}
    sent = [timeline.all_reduce(size, ready[index]) for size, index in ddp_buckets(work.layers, bucket_bytes)]
    sent.append(timeline.all_reduce(FLOAT32_BYTES, ready[0]))  # the loss
    timeline.compute(work.update, *(number for number in sent if number is not None))


def _fsdp_step(timeline: _Timeline, work: StepWork) -> None:
    """Each micro-batch gathers the root's parameters once and each block's twice; the last one scatters gradients.

    The order is FSDP2's: in the forward pass a block may be gathered once the second block before it starts computing,
    in the backward pass once the block after it does. Its gradients follow in the same queue; their all-reduce over the
    machines uses its own link.
    """
    embeddings, *blocks, head = work.layers
    timeline.serial = timeline.cluster.gloo
    compute_tasks: list[int] = []
    root = embeddings.weight_bytes + head.weight_bytes
    for micro_batch in range(work.micro_batches):
        gathered = timeline.all_gather(root, *compute_tasks[-1:])
        first = len(compute_tasks)
        compute_tasks.append(timeline.compute(embeddings.forward, gathered))
        for number, block in enumerate(blocks):
            before = compute_tasks[first + number - 2 : first + number - 1] if number > 1 else ()
            compute_tasks.append(timeline.compute(block.forward, timeline.all_gather(block.weight_bytes, *before)))
        compute_tasks.append(timeline.compute(head.forward))
        _fsdp_backward(timeline, work, compute_tasks, last=micro_batch == work.micro_batches - 1)
    timeline.all_reduce(FLOAT32_BYTES, *compute_tasks[-1:])  # the loss and the gradient norm
    timeline.compute(work.update / timeline.cluster.shards, *range(len(timeline.tasks)))


def _fsdp_backward(timeline: _Timeline, work: StepWork, compute_tasks: list[int], *, last: bool) -> None:
    embeddings, *blocks, head = work.layers
    next_gather = timeline.all_gather(blocks[-1].weight_bytes, compute_tasks[-1])
    compute_tasks.append(timeline.compute(head.backward))
    for number in reversed(range(len(blocks))):
        gathered = next_gather
        if number:
            next_gather = timeline.all_gather(blocks[number - 1].weight_bytes, compute_tasks[-1])
        compute_tasks.append(timeline.compute(blocks[number].backward, gathered))
        if last:
            _reduce_gradients(timeline, sum(blocks[number].gradient_bytes), compute_tasks[-1])
    compute_tasks.append(timeline.compute(embeddings.backward))
    if last:
        _reduce_gradients(timeline, sum(embeddings.gradient_bytes) + sum(head.gradient_bytes), compute_tasks[-1])


def _reduce_gradients(timeline: _Timeline, size: int, ready: int) -> None:
    if size:
        scattered = timeline.reduce_scatter(size, ready)
        if timeline.cluster.nodes > 1 and timeline.cluster.devices_per_node > 1:
            timeline.all_reduce_across_nodes(size / timeline.cluster.shards, scattered)
