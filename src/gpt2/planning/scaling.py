"""How a step scales: what devices send each other, how long that takes, and how much of it computing hides.

Arithmetic alone. A step's work is cut into its parts (embeddings, blocks, head) and walked through in time: each part
computes when what it needs is there, and each message leaves when it is ready and the link is free. What is assumed
of links is in `train.cluster`, what of computing below; docs/scaling.md says how far it holds.
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
    BytesSent,
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

ASSUMED_MFU = 0.45  # of the datasheet's peak, for a device that is not here to be measured
BUCKET_BYTES, FIRST_BUCKET_BYTES = (
    25 * 2**20,
    2**20,
)  # of DDP: a message is sent once it has so many bytes (torch's defaults)
# Bytes read and written in memory for each number that learns: the norm, the clipping, the optimizer's own.
CLIP_BYTES, UPDATE_BYTES = 12, {"adamw": 28, "muon": 28, "sgd": 20}
NEWTON_SCHULZ_STEPS = 5  # of Muon: steps, of three products each
COMPUTE, INTRA_NODE, INTER_NODE = "compute", "inside", "between"  # what can be busy


class LayerWork(NamedTuple):
    """A block, or what is before and after the blocks.

    forward, backward: seconds of a micro-batch. weights: bytes of all its parameters.
    gradients:         bytes of each of its tensors that learns, in the order of the parameters.
    """

    forward: float
    backward: float
    weight_bytes: int
    gradient_bytes: tuple[int, ...]


@dataclass(frozen=True)
class StepWork:
    """What one device does in a step, in parts from the first to the last of a forward pass. update: of all weights."""

    layers: tuple[LayerWork, ...]  # embeddings, blocks, final norm with head
    micro_batches: int
    update: float

    @property
    def micro_batch_seconds(self) -> float:
        """Seconds of a micro-batch, forward and backward."""
        return sum(part.forward + part.backward for part in self.layers)

    @property
    def weight_bytes(self) -> int:
        return sum(part.weight_bytes for part in self.layers)

    @property
    def gradient_bytes(self) -> int:
        return sum(sum(part.gradient_bytes) for part in self.layers)


def split_step_work(shape: GPTConfig, setup: StepSetup, passes: float, update: float) -> StepWork:
    """The work of a step whose passes take `passes` seconds in all, with the time divided as the FLOPs are.

    The embeddings take none of it: they are looked up.
    """
    V, C, L = shape.vocab_size, shape.n_embd, shape.n_layer
    whole = flops_per_token(shape, setup.length, lora=setup.lora, freeze=setup.freeze)
    forward = flops_per_token(shape, setup.length, lora=setup.lora, backward=False)
    head = 2.0 * V * C
    block = (forward - head) / L
    learns = setup.trains_embeddings or not shape.tie_word_embeddings
    head_backward = (2 if learns and setup.lora is None else 1) * head
    learning = L - setup.freeze  # blocks that a backward pass goes through
    backward = (whole - forward - head_backward) / max(1, learning)
    if setup.activation_checkpointing:
        backward, whole = backward + block, whole + learning * block
    second = passes / setup.micro_batches / whole
    tensors = tuple(FLOAT32_BYTES * size for size in block_tensor_sizes(shape))
    learned = tensors
    if setup.lora is not None:
        learned = (FLOAT32_BYTES * num_trainable_parameters(shape, setup.lora) // L,)
    blocks = [
        LayerWork(second * block, 0.0, sum(tensors), ())
        if i < setup.freeze
        else LayerWork(second * block, second * backward, sum(tensors), learned)
        for i in range(L)
    ]
    norm, embeddings = (
        (FLOAT32_BYTES * C, FLOAT32_BYTES * C),
        (FLOAT32_BYTES * V * C, FLOAT32_BYTES * shape.block_size * C),
    )
    last = norm if shape.tie_word_embeddings else (*norm, FLOAT32_BYTES * V * C)
    return StepWork(
        layers=(
            LayerWork(0.0, 0.0, sum(embeddings), embeddings if setup.trains_embeddings else ()),
            *blocks,
            LayerWork(second * head, second * head_backward, sum(last), last if setup.lora is None else ()),
        ),
        micro_batches=setup.micro_batches,
        update=update,
    )


def update_seconds(shape: GPTConfig, setup: StepSetup, datasheet: Accelerator) -> float:
    """An optimizer's step with the clipping, on a device that is not here: memory's rate, and Muon's products."""
    learned = num_trainable_parameters(shape, setup.lora, setup.freeze)
    seconds = (CLIP_BYTES + UPDATE_BYTES[setup.optimizer]) * learned / (ACHIEVED_BANDWIDTH * datasheet.bandwidth)
    if setup.optimizer == "muon" and setup.lora is None:
        wide = [sorted(matrix) for matrix in block_matrices(shape).values()]
        flops = sum(NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m**3) for m, n in wide)
        seconds += (shape.n_layer - setup.freeze) * flops / (ASSUMED_MFU * datasheet.bf16)
    return seconds


@dataclass(frozen=True)
class StepEstimate:
    """A step as predicted. Times in seconds, bytes of one device.

    compute:       of the device, if it had never to wait.
    communication: of its messages alone, on the link that has most to do; of all where they wait for each other.
    exposed:       what the step takes beyond computing.
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
    """A step of `work` on every device of `cluster`, with "ddp" or "fsdp" between them, or "none" on one device.

    bucket: bytes of gradients after which DDP sends.
    """
    timeline = _Timeline(cluster)
    if parallel == "fsdp" and cluster.num_devices > 1:
        _fsdp_step(timeline, work)
    else:
        _ddp_step(timeline, work, bucket_bytes)
    seconds = simulate(timeline.tasks, cluster.busy)
    total = {
        lane: sum(task.seconds for task in timeline.tasks if task.stream == lane)
        for lane in (COMPUTE, INTRA_NODE, INTER_NODE)
    }
    sending = total[INTRA_NODE], total[INTER_NODE]
    return StepEstimate(
        parallel=parallel,
        seconds=seconds,
        compute=total[COMPUTE],
        communication=sum(sending) if timeline.serial else max(sending),
        exposed=seconds - total[COMPUTE],
        efficiency=total[COMPUTE] / seconds,
        messages=sum(task.stream != COMPUTE for task in timeline.tasks),
        sent_inside=timeline.sent_inside,
        sent_between=timeline.sent_between,
    )


class Task(NamedTuple):
    """Something that keeps a lane busy, once all tasks it needs are done and those before it in its lane."""

    stream: str
    seconds: float
    dependencies: tuple[int, ...]  # their numbers


def simulate(tasks: Sequence[Task], compute_slowdown: float = 0.0) -> float:
    """The time at which all is done. While a message is under way, computing loses the part `busy` of its pace."""
    queues: dict[str, deque[int]] = {}
    for number, task in enumerate(tasks):
        queues.setdefault(task.stream, deque()).append(number)
    left, done, now = [task.seconds for task in tasks], [False] * len(tasks), 0.0
    while any(queues.values()):
        running = [
            queue[0] for queue in queues.values() if queue and all(done[n] for n in tasks[queue[0]].dependencies)
        ]
        slowed = any(tasks[number].stream != COMPUTE for number in running)
        pace = {
            number: 1 - compute_slowdown if slowed and tasks[number].stream == COMPUTE else 1.0 for number in running
        }
        until = min(left[number] / pace[number] if pace[number] else math.inf for number in running)
        now += until
        for number in running:
            left[number] -= until * pace[number]
            if left[number] <= 1e-12:
                done[number] = True
                queues[tasks[number].stream].popleft()
    return now


class _Timeline:
    """The tasks of a step, as they are written down, and what they send."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.tasks = cluster, list[Task]()
        self.sent_inside = self.sent_between = 0.0
        self.serial = False  # does each task wait for the one before it?

    def compute(self, seconds: float, *needs: int) -> int:
        return self._add_task(COMPUTE, seconds, needs)

    def all_reduce(self, size: float, *needs: int) -> int | None:
        """One operation over all devices; nothing on one."""
        if self.cluster.num_devices == 1:
            return None
        sent = all_reduce_bytes_sent(size, self.cluster)
        self._record_sent(sent)
        lane = INTRA_NODE if self.cluster.nodes == 1 else INTER_NODE
        return self._add_task(lane, all_reduce_seconds(size, self.cluster), needs)

    def all_gather(self, size: float, *needs: int) -> int:
        """Shards to a whole, among those who divide the model."""
        return self._ring_collective(size, needs, self.cluster.gather_rate)

    def reduce_scatter(self, size: float, *needs: int) -> int:
        """Wholes to shards of their sum, among the same."""
        return self._ring_collective(2 * size if self.cluster.gloo else size, needs)

    def _ring_collective(self, size: float, needs: Sequence[int], rate: float = 1.0) -> int:
        ranks, inside = self.cluster.shards, self.cluster.devices_per_node > 1
        sent = (ranks - 1) / ranks * size
        self._record_sent(BytesSent(sent, 0.0) if inside else BytesSent(0.0, sent))
        link = self.cluster.intra_node if inside else self.cluster.inter_node
        return self._add_task(INTRA_NODE if inside else INTER_NODE, all_gather_seconds(size / rate, ranks, link), needs)

    def all_reduce_across_nodes(self, shard: float, *needs: int) -> int:
        """The sum of a shard over the machines, where each has the whole model."""
        across = Cluster(self.cluster.nodes, 1, self.cluster.intra_node, self.cluster.inter_node)
        self._record_sent(all_reduce_bytes_sent(shard, across))
        return self._add_task(INTER_NODE, all_reduce_seconds(shard, across), needs)

    def _record_sent(self, sent: BytesSent) -> None:
        self.sent_inside += sent.intra_node
        self.sent_between += sent.inter_node

    def _add_task(self, lane: str, seconds: float, needs: Sequence[int]) -> int:
        number = len(self.tasks)
        self.tasks.append(Task(lane, seconds, (*needs, number - 1) if self.serial and number else tuple(needs)))
        return number


def ddp_buckets(layers: Sequence[LayerWork], bucket_bytes: int = BUCKET_BYTES) -> Iterator[tuple[int, int]]:
    """DDP's messages, first to last: (bytes, number of the part whose backward pass completes it).

    Tensors join in reverse order of the parameters, and a message is full once it has `full` bytes (the first: 1 MiB).
    """
    size, limit, part = 0, min(bucket_bytes, FIRST_BUCKET_BYTES), 0
    for number in reversed(range(len(layers))):
        for tensor in reversed(layers[number].gradient_bytes):
            size, part = size + tensor, number
            if size >= limit:
                yield size, part
                size, limit = 0, bucket_bytes
    if size:
        yield size, part


def _ddp_step(timeline: _Timeline, work: StepWork, bucket_bytes: int) -> None:
    """All passes, with the messages of the last one as gradients become ready; then the update of everything."""
    timeline.compute((work.micro_batches - 1) * work.micro_batch_seconds + sum(part.forward for part in work.layers))
    ready = {}
    for number in reversed(range(len(work.layers))):
        ready[number] = timeline.compute(work.layers[number].backward)
    sent = [timeline.all_reduce(size, ready[part]) for size, part in ddp_buckets(work.layers, bucket_bytes)]
    sent.append(timeline.all_reduce(FLOAT32_BYTES, ready[0]))  # the loss
    timeline.compute(work.update, *(number for number in sent if number is not None))


def _fsdp_step(timeline: _Timeline, work: StepWork) -> None:
    """Each pass gathers the root's parameters once and each block's twice; the last one divides its gradients.

    As FSDP2 orders it: on the way forward a block may be gathered once the second before it begins to compute, on the
    way back once the one after it does. Its gradients follow that in the queue, and are summed over the machines on
    their own link.
    """
    embeddings, *blocks, head = work.layers
    timeline.serial = timeline.cluster.gloo
    done: list[int] = []  # the computing so far
    root = embeddings.weight_bytes + head.weight_bytes
    for micro_batch in range(work.micro_batches):
        gathered = timeline.all_gather(root, *done[-1:])
        began = len(done)
        done.append(timeline.compute(embeddings.forward, gathered))
        for number, block in enumerate(blocks):
            before = done[began + number - 2 : began + number - 1] if number > 1 else ()
            done.append(timeline.compute(block.forward, timeline.all_gather(block.weight_bytes, *before)))
        done.append(timeline.compute(head.forward))
        last = micro_batch == work.micro_batches - 1
        _fsdp_backward(timeline, work, done, last=last)
    timeline.all_reduce(FLOAT32_BYTES, *done[-1:])  # the loss and the norm of the gradient
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
        divided = timeline.reduce_scatter(size, ready)
        if timeline.cluster.nodes > 1 and timeline.cluster.devices_per_node > 1:
            timeline.all_reduce_across_nodes(size / timeline.cluster.shards, divided)
