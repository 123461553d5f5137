"""Scaling of a step: bytes sent, time, and overlap, compared with hand-computed examples and with torch."""

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2.commands.plan import main
from gpt2.errors import UserError
from gpt2.hardware import ACCELERATORS
from gpt2.lora import LoRAConfig
from gpt2.model import GPT, OPENAI_CONFIGS, GPTConfig
from gpt2.optimizers import build_optimizers
from gpt2.planning.cluster import Cluster, Link, all_reduce_bytes_sent, all_reduce_seconds, cpu_cluster, gpu_cluster
from gpt2.planning.costs import (
    FLOAT32_BYTES,
    StepSetup,
    block_tensor_sizes,
    flops_per_token,
    num_parameters,
    num_trainable_parameters,
    training_memory,
)
from gpt2.planning.plan import plan
from gpt2.planning.scaling import (
    COMPUTE,
    INTER_NODE,
    INTRA_NODE,
    LayerWork,
    StepWork,
    Task,
    ddp_buckets,
    predict_step,
    simulate,
    split_step_work,
    update_seconds,
)
from gpt2.runtime import autocast
from gpt2.train.recipes import load_recipe

H100 = ACCELERATORS["h100"]
TINY = GPTConfig(vocab_size=101, block_size=32, n_layer=3, n_head=4, n_embd=64)
MIB = 2**20


def work_of(name: str, rows: int = 8, micro_batches: int = 1, **changes: Any) -> StepWork:
    shape = OPENAI_CONFIGS[name]
    setup = replace(StepSetup(rows=rows, length=1024, micro_batches=micro_batches, dtype=torch.bfloat16), **changes)
    passes = flops_per_token(shape, 1024) * rows * micro_batches * 1024 / (0.45 * H100.bf16)
    return split_step_work(shape, setup, passes, update_seconds(shape, setup, H100))


@pytest.mark.parametrize("tie", [True, False])
def test_block_tensor_sizes_equal_the_model(tie: bool) -> None:
    shape = replace(TINY, n_inner=100, tie_word_embeddings=tie)
    with torch.device("meta"):
        model = GPT(shape)
    assert block_tensor_sizes(shape) == [p.numel() for p in model.transformer.h[0].parameters()]
    work = split_step_work(shape, StepSetup(rows=1, length=32), 1.0, 0.0)
    gradients = [size for layer in work.layers for size in layer.gradient_bytes]
    assert gradients == [FLOAT32_BYTES * p.numel() for p in model.parameters()]
    assert work.weight_bytes == work.gradient_bytes == FLOAT32_BYTES * num_parameters(shape)


@pytest.mark.parametrize(
    "changes", [{}, {"activation_checkpointing": True}, {"freeze": 5}, {"lora": LoRAConfig()}, {"freeze": 12}]
)
def test_layer_times_add_up_to_the_step(changes: dict[str, Any]) -> None:
    work = work_of("gpt2", micro_batches=3, **changes)
    assert 3 * work.micro_batch_seconds == pytest.approx(
        flops_per_token(OPENAI_CONFIGS["gpt2"], 1024) * 24 * 1024 / (0.45 * H100.bf16)
    )
    assert all(layer.forward >= 0 and layer.backward >= 0 for layer in work.layers)


def test_ring_all_reduce_bytes() -> None:
    link = Link(1e9)
    for devices in (2, 3, 8, 1024):
        ring = 2 * (devices - 1) / devices * 7e6
        assert all_reduce_bytes_sent(7e6, Cluster(1, devices, link, link)) == (pytest.approx(ring), 0)
        assert all_reduce_bytes_sent(7e6, Cluster(devices, 1, link, link)) == (0, pytest.approx(ring))
        assert 8 * all_reduce_bytes_sent(7e6, Cluster(devices, 8, link, link)).inter_node == pytest.approx(ring)


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (4, 8), (4, 1)])
def test_bytes_sent_in_a_step(nodes: int, gpus: int) -> None:
    work, cluster = work_of("gpt2", micro_batches=2), gpu_cluster(H100, nodes, gpus)
    size = FLOAT32_BYTES * 124_439_808
    ddp, fsdp = (predict_step(work, cluster, way) for way in ("ddp", "fsdp"))
    loss = all_reduce_bytes_sent(FLOAT32_BYTES, cluster)
    assert ddp.sent_inside == pytest.approx(all_reduce_bytes_sent(size, cluster).intra_node + loss.intra_node)
    assert ddp.sent_between == pytest.approx(all_reduce_bytes_sent(size, cluster).inter_node + loss.inter_node)
    block = FLOAT32_BYTES * sum(block_tensor_sizes(OPENAI_CONFIGS["gpt2"]))
    shards = gpus if gpus > 1 else nodes
    gathered = 2 * (size + 12 * block)  # per micro-batch: all parameters once, those of the blocks twice
    around = (shards - 1) / shards * (gathered + size)
    across = 2 * (nodes - 1) / nodes * size / shards if gpus > 1 else 0
    assert fsdp.sent_inside + fsdp.sent_between == pytest.approx(around + across + sum(loss))
    assert fsdp.sent_inside == (pytest.approx(around + loss.intra_node) if gpus > 1 else 0)


def test_ddp_step_computed_by_hand() -> None:
    ready = (MIB, 30 * MIB, 40 * MIB)  # bytes of gradients: last layer, middle, first
    layers = (LayerWork(0, 1, 0, ready[2:]), LayerWork(2, 4, 0, ready[1:2]), LayerWork(1, 3, 0, ready[:1]))
    link = Link(bandwidth=MIB, latency=0.5, hop_latency=0.25)  # two devices: 1, 30 and 40 s for the bytes
    result = predict_step(StepWork(layers, 1, update=7), Cluster(1, 2, link, link), "ddp")
    sends = [each + 0.5 + 2 * 0.25 for each in (1, 30, 40)]
    last = 0.5 + 2 * 0.25 + 4 / MIB
    first_sent = 3 + 3 + sends[0]  # the forward pass, the head's backward
    middle_sent = max(first_sent, 3 + 3 + 4) + sends[1]
    assert result.seconds == pytest.approx(middle_sent + sends[2] + last + 7)
    assert result.compute == 3 + 8 + 7
    assert result.communication == pytest.approx(sum(sends) + last)
    assert result.messages == 4


def test_fsdp_step_computed_by_hand() -> None:
    """Two devices, one block: all-gather (each sends half of the bytes), compute, reduce-scatter the gradients."""
    outside, block = LayerWork(0, 0, 3 * MIB, (3 * MIB,)), LayerWork(1, 2, 8 * MIB, (8 * MIB,))
    head = LayerWork(10, 20, 0, ())
    link = Link(bandwidth=MIB)
    work = StepWork((outside, block, head), 1, update=6)
    result = predict_step(work, Cluster(1, 2, link, link), "fsdp")
    # root gathered at 1.5, block at 5.5, computed at 6.5, head at 16.5; gathered again under the head's 20 s, at 20.5;
    # backward at 38.5; 4 s for the block's gradients, 1.5 for the root's, almost nothing for the loss; half the update
    assert result.seconds == pytest.approx(38.5 + 4 + 1.5 + 3, abs=1e-4)
    with_gloo = predict_step(work, Cluster(1, 2, link, link, gloo=True), "fsdp")
    # no overlap, and the reduce-scatter takes twice as long
    assert with_gloo.seconds == pytest.approx(1.5 + 4 + 1 + 10 + 4 + 20 + 2 + 8 + 3 + 3, abs=1e-4)
    assert with_gloo.communication == pytest.approx(with_gloo.exposed)
    slower = predict_step(work, Cluster(1, 2, link, link, gloo=True, gather_rate=0.5), "fsdp")
    assert slower.seconds == pytest.approx(with_gloo.seconds + 1.5 + 4 + 4)  # only all-gathers are slower
    assert slower.sent_inside == with_gloo.sent_inside


def test_gloo_fsdp_hides_no_communication() -> None:
    result = predict_step(work_of("gpt2"), cpu_cluster(2, 2), "fsdp")
    assert result.exposed == pytest.approx(result.communication)


def test_all_reduce_stages_overlap() -> None:
    cluster = Cluster(4, 2, Link(2e9, 1e-3, 1e-4), Link(1e9, 2e-3, 5e-4))
    inside, between = 8e8 / 2e9, 2 * 3 / 4 * 4e8 / 1e9
    assert all_reduce_seconds(8e8, cluster) == pytest.approx(2e-3 + 2 * 1e-4 + 4 * 5e-4 + max(inside, between))


def test_simulate_respects_streams_and_dependencies() -> None:
    tasks = [Task(COMPUTE, 2, ()), Task(INTRA_NODE, 5, (0,)), Task(COMPUTE, 4, ()), Task(INTER_NODE, 1, (1,))]
    assert simulate(tasks) == 8
    assert simulate([*tasks, Task(COMPUTE, 1, (3,))]) == 9
    assert simulate([]) == 0


def test_communication_that_slows_computing() -> None:
    tasks = [Task(COMPUTE, 4, ()), Task(INTRA_NODE, 2, ())]
    assert simulate(tasks) == 4
    assert simulate(tasks, compute_slowdown=0.5) == pytest.approx(5)
    assert simulate(tasks, compute_slowdown=1.0) == pytest.approx(6)


def test_ddp_buckets_equal_torchs() -> None:
    """The buckets are those of torch's own DDP, in the same order."""
    from torch._C import _distributed_c10d as c10d

    with torch.device("meta"):
        tensors = list(GPT(OPENAI_CONFIGS["gpt2-medium"]).parameters())[::-1]
    tensors = [torch.empty(p.shape, device="meta") for p in tensors]
    result, _ = c10d._compute_bucket_assignment_by_size(tensors, [MIB, 25 * MIB])
    sizes = [sum(FLOAT32_BYTES * tensors[i].numel() for i in bucket) for bucket in result]
    assert [size for size, _ in ddp_buckets(work_of("gpt2-medium").layers)] == sizes
    assert sizes[-1] > FLOAT32_BYTES * 50257 * 1024  # includes the tied embedding, whose gradient is ready last


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_step_time_bounds_and_faster_links(name: str, way: str) -> None:
    work, before = work_of(name, rows=2), float("inf")
    for gbit in (1, 10, 100, 400, 3200, 10**6):
        result = predict_step(work, gpu_cluster(H100, 16, 8, gbit * 1e9 / 8), way)
        assert result.seconds >= result.compute
        assert result.seconds >= result.communication
        assert result.exposed == pytest.approx(result.seconds - result.compute)
        assert result.efficiency == pytest.approx(result.compute / result.seconds)
        assert result.seconds <= before
        before = result.seconds


@pytest.mark.parametrize("way", ["ddp", "fsdp", "none"])
def test_one_device_sends_nothing(way: str) -> None:
    work = work_of("gpt2", micro_batches=3)
    result = predict_step(work, gpu_cluster(H100, 1, 1), way)
    assert (result.messages, result.sent_inside, result.sent_between, result.communication) == (0, 0, 0, 0)
    assert result.seconds == pytest.approx(3 * work.micro_batch_seconds + work.update)
    assert result.efficiency == pytest.approx(1)


def test_all_reduce_of_the_tied_embedding_is_exposed() -> None:
    cluster = gpu_cluster(H100, 1, 8)
    embedding = FLOAT32_BYTES * 50257 * 768
    result = predict_step(work_of("gpt2", rows=64), cluster, "ddp")
    assert result.exposed > all_reduce_seconds(embedding, cluster)
    assert result.exposed < 1.5 * all_reduce_seconds(embedding, cluster)


def test_ddp_all_reduces_once_per_step() -> None:
    cluster = gpu_cluster(H100, 2, 8)
    once, often = (predict_step(work_of("gpt2", micro_batches=count), cluster, "ddp") for count in (1, 5))
    assert (once.sent_inside, once.sent_between) == (often.sent_inside, often.sent_between)
    assert once.exposed == pytest.approx(often.exposed)
    gathered = predict_step(work_of("gpt2", micro_batches=5), cluster, "fsdp").sent_inside
    assert gathered > 3 * predict_step(work_of("gpt2"), cluster, "fsdp").sent_inside


def test_fsdp_memory_decreases_with_shards() -> None:
    shape, setup = OPENAI_CONFIGS["gpt2-xl"], StepSetup(rows=1, length=1024, dtype=torch.bfloat16, device="cuda")
    alone = training_memory(shape, setup)
    assert training_memory(shape, replace(setup, shards=1)) == alone
    assert alone.gathered == 0
    steps = [training_memory(shape, replace(setup, shards=shards)).step for shards in (2, 4, 8, 64)]
    assert steps == sorted(steps, reverse=True)
    eighth = training_memory(shape, replace(setup, shards=8))
    for name in ("weights", "gradients", "optimizer"):
        assert 8 * getattr(eighth, name) == getattr(alone, name)


def test_fsdp_with_micro_batches_holds_full_gradients() -> None:
    shape, setup = (
        OPENAI_CONFIGS["gpt2-xl"],
        StepSetup(rows=1, length=1024, dtype=torch.bfloat16, device="cuda", shards=8),
    )
    once, often = (training_memory(shape, replace(setup, micro_batches=count)) for count in (1, 2))
    assert often.step - once.step > 0.7 * FLOAT32_BYTES * num_parameters(shape)


def test_plan_includes_communication() -> None:
    result = plan(load_recipe("gpt2-124m"), on="h100", devices=8, nodes=4)
    assert (result.devices, result.nodes, result.parallel, result.micro_batch_size) == (32, 4, "ddp", 16)
    assert result.seconds_per_step == result.ways["ddp"].step.seconds > result.ways["ddp"].step.compute
    assert result.network == pytest.approx(8 * 50e9)
    assert result.flops_per_step == plan(load_recipe("gpt2-124m"), on="h100").flops_per_step
    slow = plan(load_recipe("gpt2-124m"), on="h100", devices=8, nodes=4, network=1e9)
    assert slow.seconds_per_step > 2 * result.seconds_per_step
    assert plan(load_recipe("gpt2-124m"), on="h100").parallel == "none"


def test_fsdp_is_chosen_where_ddp_does_not_fit() -> None:
    xl = replace(load_recipe("gpt2-124m"), n_layer=48, n_head=25, n_embd=1600, batch_size=64, micro_batch_size=None)
    result = plan(xl, on="a10g", devices=8, nodes=8)
    assert (result.parallel, result.ways["ddp"].fits, result.ways["fsdp"].fits, result.fits) == (
        "fsdp",
        False,
        True,
        True,
    )
    assert result.memory == result.ways["fsdp"].memory
    found = plan(replace(xl, batch_size=-1), on="a10g", devices=8, nodes=8)
    assert (found.parallel, found.fits, found.batch_size % 64) == ("fsdp", True, 0)


def test_lora_is_planned_with_ddp_only() -> None:
    config = replace(load_recipe("gpt2-124m"), init_from="gpt2", lora_rank=8)
    result = plan(config, on="h100", devices=2)
    assert (result.parallel, set(result.ways)) == ("ddp", {"ddp"})
    with pytest.raises(UserError, match="whole matrices, and --parallel fsdp shards them: --parallel ddp"):
        replace(config, parallel="fsdp").check()


def test_lora_and_freezing_send_fewer_bytes() -> None:
    shape = OPENAI_CONFIGS["gpt2"]
    work = work_of("gpt2", lora=LoRAConfig(rank=8))
    assert work.gradient_bytes == FLOAT32_BYTES * num_trainable_parameters(shape, LoRAConfig(rank=8))
    frozen = work_of("gpt2", freeze=4)
    assert frozen.gradient_bytes == FLOAT32_BYTES * num_trainable_parameters(shape, freeze=4)
    assert sum(layer.backward == 0 for layer in frozen.layers) == 5  # four frozen blocks and the embeddings


def test_requested_strategy_is_planned() -> None:
    for way in ("ddp", "fsdp"):
        result = plan(replace(load_recipe("gpt2-124m"), parallel=way), on="h100", devices=8)
        assert result.parallel == way
        assert result.seconds_per_step == result.ways[way].step.seconds


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes in tensors; FSDP's gathered tensors keep their storages and resize them to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
                storage = local.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        alive = [storage for storage in (each() for each in self.storages.values()) if storage is not None]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive))
        return result


@pytest.fixture
def fake_rank_of_eight() -> Iterator[None]:
    """This process as rank 0 of a fake process group of eight: collectives return no meaningful data."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake_rank_of_eight")
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1024, 8192])  # the peak is in the blocks, or in the head
def test_fsdp_memory_matches_torch(vocab_size: int, micro_batches: int, dtype: torch.dtype) -> None:
    shape = GPTConfig(vocab_size=vocab_size, block_size=128, n_layer=6, n_head=4, n_embd=256)
    model, tokens = GPT(shape), torch.zeros(1, 128, dtype=torch.int64)
    for block in model.transformer.h:
        fully_shard(block)
    sharded = fully_shard(model)
    register_fsdp_forward_method(model, "loss")
    (optimizer,) = build_optimizers(model, load_recipe("gpt2-124m"))

    def step() -> None:
        for number in range(micro_batches):
            sharded.set_requires_gradient_sync(number == micro_batches - 1)
            with autocast(torch.device("cpu"), dtype):
                loss = model.loss(tokens, tokens)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with LiveBytes() as alive:
        step()
    setup = StepSetup(rows=1, length=128, dtype=dtype, micro_batches=micro_batches, shards=8)
    predicted = training_memory(shape, setup)
    moments = predicted.optimizer  # only the update's operations see these tensors
    assert 1.0 <= (predicted.step - predicted.allocator) / (alive.peak + moments) < 1.2


def test_cpu_cluster_uses_gloo() -> None:
    cluster = cpu_cluster(2, 4, network=1e8)
    assert cluster.gloo
    assert cluster.node_bandwidth == pytest.approx(1e8)
    assert cluster.inter_node.bandwidth == pytest.approx(0.8 * 1e8 / 4)


def test_cluster_plan_as_json_and_as_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["gpt2-124m", "--on", "h100", "--nodes", "4", "--gpus", "8", "--network", "800"]
    main([*flags, "--json", "-"])
    result = json.loads(capsys.readouterr().out)
    assert set(result["ways"]) == {"ddp", "fsdp"}
    assert set(result["ways"]["ddp"]) == {"memory", "fits", "step"}
    assert set(result["ways"]["ddp"]["step"]) == {
        *("parallel", "seconds", "compute", "communication", "exposed", "efficiency", "messages"),
        *("sent_inside", "sent_between"),
    }
    assert result["network"] == pytest.approx(1e11)
    main([*flags, "--json", "-"])
    assert json.loads(capsys.readouterr().out) == result
    monkeypatch.setenv("COLUMNS", "160")
    main(flags)
    out = capsys.readouterr().out
    for words in ("Parallel: ddp", "ddp: sent", "830.7 MiB inside its machine, 89.0 MiB to others", "fsdp: memory"):
        assert words in out
    assert "800 Gbit/s" in out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--nodes", "3", "--gpus", "2"], r"--batch-size \(512\) must be a multiple of the 6 devices"),
        (["--gpus", "8", "--micro-batch-size", "32", "--batch-size", "384"], "each device has 48 rows of the batch"),
        (["--nodes", "0"], "'0' is not a number of at least 1"),
        (["--network", "0"], "'0' is not a bandwidth over 0"),
        (["--network", "fast"], "'fast' is not a bandwidth over 0"),
        (["--nods", "2"], "did you mean '--nodes'"),
    ],
)
def test_invalid_cluster_is_a_one_line_error(flags: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        main(["gpt2-124m", "--on", "h100", *flags])
    assert "\n" not in str(caught.value)
