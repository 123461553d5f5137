"""What a run takes: memory from `gpt2.planning.costs`, time from a few timed steps of a slice of the model."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gpt2.config import AUTO_BATCH_SIZE, TrainConfig
from gpt2.data.prepare import bpe_vocab_size
from gpt2.data.resolve import find_shards
from gpt2.data.shards import ShardsMeta
from gpt2.errors import UserError
from gpt2.hardware import Accelerator, available_memory, device_name, find_accelerator, get_accelerator, measure_matmul
from gpt2.model import OPENAI_CONFIGS, GPTConfig
from gpt2.planning.cluster import Cluster, cpu_cluster, gpu_cluster
from gpt2.planning.costs import (
    Memory,
    StepSetup,
    flops_per_token,
    num_parameters,
    num_trainable_parameters,
    training_memory,
)
from gpt2.planning.scaling import ASSUMED_MFU, StepEstimate, predict_step, split_step_work, update_seconds
from gpt2.planning.step_timing import StepTime, can_time_step, process_memory, time_step
from gpt2.runtime import DTYPE_NAMES, configure_malloc, pick_compile, pick_device, pick_training_dtype
from gpt2.tokenizer import get_tokenizer, load_tokenizer
from gpt2.weights import find_model_folder, read_config

STRATEGIES = ("ddp", "fsdp")
MAX_MEMORY_FRACTION = 0.9  # the share of free memory that a plan may fill
MAX_AUTO_BATCH_TOKENS = 2**19  # in a batch that nobody chose: that of GPT-3's small models, past which few runs gain


@dataclass(frozen=True)
class StrategyEstimate:
    """A run by DDP or by FSDP: the memory of a device, whether that fits, and a step with what is sent in it."""

    memory: Memory
    fits: bool
    step: StepEstimate


@dataclass(frozen=True)
class Plan:
    """What a run takes. Memory is of one device, time and rates are of all together.

    nodes:       how many machines the devices are in.
    parallel:    "none" on one device; "ddp" or "fsdp" on several, as asked for or as `--parallel auto` would choose.
    network:     bytes/s, each way, that is assumed between machines, for each of them.
    ways:        on several devices, what each of the two takes; `memory`, `fits` and the times are those of `parallel`.
    trainable:   how many of the parameters learn; of adapters, those beside them.
    measured:    was computing timed on this machine (and not assumed from a datasheet)? Communication never is.
    utilization: the share of the matmul rate (measured, or the datasheet's) that the step reaches.
    suggestion:  settings for the largest micro-batch that fits; None when nothing does.
    seconds:     of the training steps alone, without validation, samples and checkpoints.
    """

    device: str
    devices: int
    nodes: int
    parallel: str
    network: float
    ways: dict[str, StrategyEstimate]
    measured: bool
    dtype: str
    compile: bool
    parameters: int
    trainable: int
    vocab_size: int
    batch_size: int
    micro_batch_size: int
    recompute: bool
    flops_per_token: float
    flops_per_step: float
    flops: float
    memory: Memory
    device_memory: int
    fits: bool
    suggestion: dict[str, Any] | None
    tokens_per_step: int
    steps: int
    tokens: int
    seconds_per_step: float
    seconds: float
    tokens_per_second: float
    matmul_rate: float
    utilization: float
    cost: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields by name, memory as a table of its parts with the peak."""
        return asdict(self)


@dataclass(frozen=True)
class TargetDevice:
    """Where a run would be: a device at hand, or one known from its datasheet."""

    name: str
    kind: str  # "cpu", "cuda" or "mps"
    device: torch.device | None  # None for one that is not at hand
    datasheet: Accelerator | None
    memory: int  # bytes that a run could have, with what this program holds already
    program: int  # bytes that Python and torch take of it

    def cluster(self, nodes: int, gpus: int, network: float | None) -> Cluster:
        """Machines with so many devices like this; network: bytes/s between them, or what they usually have."""
        if self.datasheet is not None:
            return gpu_cluster(self.datasheet, nodes, gpus, network)
        return cpu_cluster(nodes, gpus, network)


def plan(
    config: TrainConfig,
    *,
    on: str = "here",
    devices: int = 1,
    nodes: int = 1,
    network: float | None = None,
    tokens: int | None = None,
    price_per_hour: float | None = None,
) -> Plan:
    """What the run of `config` takes on `nodes` machines of `devices` devices each.

    on:             what the devices are: "here" for those of this machine, or a name known to `gpt2.hardware`.
    network:        bytes/s, each way, of each machine to the others; by default what such machines usually have.
    tokens:         how many to train on; by default those of max_steps. price_per_hour: of all devices together.

    Here computing is timed, on a slice of the model at its real width and precision; elsewhere it has 45% of the rate
    on the datasheet. Communication is predicted by `train.scaling`. Raises UserError for what cannot be.
    """
    place, shape = _local_device(config) if on == "here" else _datasheet_device(on), model_shape(config)
    cluster, compiled = place.cluster(nodes, devices, network), _will_compile(config, place)
    batch_size, setup = _divide_batch(config, shape, place, cluster)
    rate, timed = _matmul_rate_and_step_time(config, shape, setup, place, compiled)
    ways, chosen = _estimate_strategies(config, shape, setup, place, cluster, timed)
    tokens_per_step, seconds = batch_size * setup.length, chosen.step.seconds
    steps = config.max_steps if tokens is None else max(1, -(-tokens // tokens_per_step))
    flops = _flops_per_token(shape, setup) * tokens_per_step
    return Plan(
        device=place.name,
        devices=cluster.num_devices,
        nodes=nodes,
        parallel=chosen.step.parallel,
        network=cluster.node_bandwidth,
        ways=ways,
        measured=place.device is not None,
        dtype=DTYPE_NAMES[setup.dtype],
        compile=compiled,
        parameters=num_parameters(shape),
        trainable=num_trainable_parameters(shape, setup.lora, setup.freeze),
        vocab_size=shape.vocab_size,
        batch_size=batch_size,
        micro_batch_size=setup.rows,
        recompute=setup.recompute,
        flops_per_token=_flops_per_token(shape, setup),
        flops_per_step=flops,
        flops=flops * steps,
        memory=chosen.memory,
        device_memory=place.memory,
        fits=chosen.fits,
        suggestion=suggest_micro_batch(
            shape, per_device_setup(setup, cluster, chosen.step.parallel), place, batch_size // cluster.num_devices
        ),
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=steps * tokens_per_step,
        seconds_per_step=seconds,
        seconds=seconds * steps,
        tokens_per_second=tokens_per_step / seconds,
        matmul_rate=rate,
        utilization=flops / seconds / (cluster.num_devices * rate),
        cost=None if price_per_hour is None else seconds * steps / 3600 * price_per_hour,
    )


def _will_compile(config: TrainConfig, target: TargetDevice) -> bool:
    if target.device is None:
        return config.compile is not False
    return pick_compile(config.compile, target.device, config.max_steps)


def per_device_setup(setup: StepSetup, cluster: Cluster, parallel: str) -> StepSetup:
    """`setup` on one of the devices of `cluster`: what DDP or FSDP adds to its memory, and what they take off it."""
    if parallel == "fsdp":
        return replace(setup, shards=cluster.shards)
    return replace(setup, buckets=parallel == "ddp")


def _possible_strategies(config: TrainConfig, cluster: Cluster) -> tuple[str, ...]:
    """The ways to run `config` on several devices."""
    if cluster.num_devices == 1:
        return ()
    return ("ddp",) if config.needs_full_model else STRATEGIES


def _estimate_strategies(
    config: TrainConfig, shape: GPTConfig, setup: StepSetup, target: TargetDevice, cluster: Cluster, step_time: StepTime
) -> tuple[dict[str, StrategyEstimate], StrategyEstimate]:
    """What each way takes, and the one to go: as asked for; by default FSDP where DDP does not fit."""
    work = split_step_work(shape, setup, *step_time)

    def way(parallel: str) -> StrategyEstimate:
        memory = training_memory(shape, per_device_setup(setup, cluster, parallel), target.program)
        return StrategyEstimate(
            memory, memory.peak <= MAX_MEMORY_FRACTION * target.memory, predict_step(work, cluster, parallel)
        )

    ways = {parallel: way(parallel) for parallel in _possible_strategies(config, cluster)}
    if not ways:
        return {}, way("none")
    whole_fits = ways["ddp"].fits or "fsdp" not in ways
    return ways, ways.get(config.parallel) or ways["ddp" if whole_fits else "fsdp"]


def largest_batch_size(
    config: TrainConfig, shape: GPTConfig, device: torch.device, dtype: torch.dtype, local_world_size: int = 1
) -> int:
    """What `--batch-size auto` means: the most rows, a power of two, whose training fits in the free memory at once.

    ranks_here: how many ranks this machine has; on a CPU they divide its memory.

    `gpt2.planning.costs` predicts the memory, nothing is allocated; a tenth stays free, and a batch has at most half a
    million tokens. Raises UserError when not even one row fits.
    """
    free = available_memory(device) // (local_world_size if device.type == "cpu" else 1)
    setup = replace(_step_setup(config, shape, device.type, dtype, rows=1), buckets=local_world_size > 1)
    return _largest_batch_size(shape, setup, TargetDevice(str(device), device.type, device, None, free, 0))


def fits_full_model(
    config: TrainConfig,
    shape: GPTConfig,
    device: torch.device,
    dtype: torch.dtype,
    rows_per_rank: int,
    local_world_size: int,
) -> bool:
    """Can a rank on `device` hold all of the model, its gradients and its optimizer, as DDP wants it?

    share:      rows of the batch that are this rank's, done in micro-batches as `config` says.
    ranks_here: how many ranks this machine has. On a CPU they divide its free memory, and one of them saves.

    `gpt2.planning.costs` predicts the memory, nothing is allocated; a tenth of what is free stays free. What is free
    changes: ask before anything large is made, and let one rank's answer be that of all.
    """
    setup = replace(_step_setup(config, shape, device.type, dtype, rows=1), buckets=local_world_size > 1)
    setup = split_into_micro_batches(setup, rows_per_rank, config.micro_batch_size)
    memory = training_memory(shape, setup)
    sharing = local_world_size if device.type == "cpu" else 1
    return sharing * memory.step + (memory.peak - memory.step) <= MAX_MEMORY_FRACTION * available_memory(device)


def split_into_micro_batches(setup: StepSetup, rows_per_device: int, micro_batch_size: int | None) -> StepSetup:
    """`setup` with a device's `share` of the batch, at once or in micro-batches."""
    rows = min(rows_per_device, micro_batch_size or rows_per_device)
    return replace(setup, rows=rows, micro_batches=-(-rows_per_device // rows))


def suggest_micro_batch(
    shape: GPTConfig, setup: StepSetup, target: TargetDevice, rows_per_device: int
) -> dict[str, Any] | None:
    """The largest micro-batch that divides a device's `share` of the batch and fits; recomputing only where it must."""
    for recompute in (setup.recompute,) if setup.recompute else (False, True):
        for rows in (rows for rows in range(rows_per_device, 0, -1) if rows_per_device % rows == 0):
            tried = replace(setup, rows=rows, micro_batches=rows_per_device // rows, recompute=recompute)
            if training_memory(shape, tried, target.program).peak <= MAX_MEMORY_FRACTION * target.memory:
                return {"micro_batch_size": rows, "recompute": recompute}
    return None


def model_shape(config: TrainConfig) -> GPTConfig:
    """The model that `config` trains, from its settings and its tokenizer's name; no data is read."""
    if config.init_from is not None:
        given = OPENAI_CONFIGS.get(config.init_from) or read_config(find_model_folder(config.init_from))
        return replace(given, dropout=config.dropout)
    return config.model_config(vocabulary_size(config))


def vocabulary_size(config: TrainConfig) -> int:
    """How many tokens `config`'s tokenizer has, or will have; for shards without one asked for, their own."""
    shards, spec = find_shards(config.data), config.tokenizer
    if spec is None and shards is not None:
        folder = shards.path if shards.path.is_dir() else shards.path.parent
        meta, own = ShardsMeta.load(folder), load_tokenizer(folder)
        if meta is not None:
            return meta.tokenizer.vocab_size
        if own is not None:
            return own.vocab_size
    if spec is None or spec == "gpt2":
        return OPENAI_CONFIGS["gpt2"].vocab_size  # that model's; the tokenizer itself would be downloaded
    size = bpe_vocab_size(spec)
    return get_tokenizer(spec).vocab_size if size is None else size


def setup_device(config: TrainConfig) -> torch.device:
    """The device to train on, with this process set up for it as `config` asks."""
    device = pick_device(config.device)
    if device.type == "cpu":
        configure_malloc(keep_freed=not config.recompute)
    else:
        torch.set_float32_matmul_precision(config.matmul_precision)
    return device


def _local_device(config: TrainConfig) -> TargetDevice:
    device = setup_device(config)
    program = process_memory(config) if device.type == "cpu" else 0
    name = device_name(device)
    datasheet = find_accelerator(name) if device.type == "cuda" else None
    return TargetDevice(name, device.type, device, datasheet, available_memory(device) + program, program)


def _datasheet_device(name: str) -> TargetDevice:
    datasheet = get_accelerator(name)
    return TargetDevice(datasheet.name, "cuda", None, datasheet, datasheet.memory, 0)


def _dtype(config: TrainConfig, target: TargetDevice, width: int) -> torch.dtype:
    """The dtype of matrix products, as `gpt2 train` would choose it there."""
    if target.device is None and target.datasheet is not None and config.dtype == "auto":
        return torch.bfloat16 if target.datasheet.bfloat16 else torch.float32
    return pick_training_dtype(config.dtype, target.device or torch.device(target.kind), width)


def _divide_batch(
    config: TrainConfig, shape: GPTConfig, target: TargetDevice, cluster: Cluster
) -> tuple[int, StepSetup]:
    """The batch, found out if it is to be, and how each device does its share of it."""
    setup = _step_setup(config, shape, target.kind, _dtype(config, target, shape.n_embd), rows=1)
    if config.batch_size == AUTO_BATCH_SIZE:
        share = _largest_batch_size(shape, _auto_batch_setup(config, shape, setup, target, cluster), target)
        return share * cluster.num_devices, split_into_micro_batches(setup, share, None)
    share, left = divmod(config.batch_size, cluster.num_devices)
    rows = min(share, config.micro_batch_size or share)
    if left:
        asked = f"--gpus ({cluster.devices_per_node})" if cluster.nodes == 1 else f"the {cluster.num_devices} devices"
        raise UserError(f"--batch-size ({config.batch_size}) must be a multiple of {asked}")
    if share % rows:
        raise UserError(f"each device has {share} rows of the batch, which --micro-batch-size {rows} does not divide")
    return config.batch_size, split_into_micro_batches(setup, share, config.micro_batch_size)


def _auto_batch_setup(
    config: TrainConfig, shape: GPTConfig, setup: StepSetup, target: TargetDevice, cluster: Cluster
) -> StepSetup:
    """One row, the way it is to be run; by default with FSDP only where it would not fit without."""
    tried = [
        per_device_setup(setup, cluster, way)
        for way in _possible_strategies(config, cluster)
        if config.parallel in ("auto", way)
    ]
    fitting = (
        each
        for each in tried
        if training_memory(shape, each, target.program).peak <= MAX_MEMORY_FRACTION * target.memory
    )
    return next(fitting, tried[-1] if tried else setup)


def _matmul_rate_and_step_time(
    config: TrainConfig, shape: GPTConfig, setup: StepSetup, target: TargetDevice, compile: bool
) -> tuple[float, StepTime]:
    """FLOP/s of matrix products on one device, and its seconds of a step: measured here, assumed elsewhere."""
    tokens = setup.rows * setup.micro_batches * setup.length
    if target.device is not None:
        rate = measure_matmul(target.device, setup.dtype, 0.3)
        if can_time_step(shape, setup, rate, target.program, target.memory):
            return rate, time_step(config, shape, setup, target.device, rate, compile)
        return rate, StepTime(_flops_per_token(shape, setup) * tokens / (ASSUMED_MFU * rate), 0.0)
    assert target.datasheet is not None
    rate = target.datasheet.flops(setup.dtype, config.matmul_precision)
    again = flops_per_token(shape, setup.length, backward=False) if setup.recompute else 0  # a second forward pass
    passes = (_flops_per_token(shape, setup) + again) * tokens / (ASSUMED_MFU * rate)
    return rate, StepTime(passes, update_seconds(shape, setup, target.datasheet))


def _flops_per_token(shape: GPTConfig, setup: StepSetup) -> float:
    return flops_per_token(shape, setup.length, lora=setup.lora, freeze=setup.freeze)


def _step_setup(config: TrainConfig, shape: GPTConfig, kind: str, dtype: torch.dtype, rows: int) -> StepSetup:
    return StepSetup(
        rows=rows,
        length=min(config.block_size, shape.block_size),
        dtype=dtype,
        recompute=config.recompute,
        optimizer=config.optimizer,
        device=kind,
        saves_midway=0 < config.save_every < config.max_steps,
        lora=config.lora_config() if config.lora_rank else None,
        freeze=config.freeze,
    )


def _largest_batch_size(shape: GPTConfig, setup: StepSetup, target: TargetDevice) -> int:
    def fits(rows: int) -> bool:
        return (
            training_memory(shape, replace(setup, rows=rows), target.program).peak
            <= MAX_MEMORY_FRACTION * target.memory
        )

    if not fits(1):
        needed, there = training_memory(shape, setup, target.program).peak / 2**30, target.memory / 2**30
        raise UserError(
            f"not even one row of the batch fits: it needs {needed:.1f} GiB of {there:.1f} on {target.name}"
        )
    rows = 1
    while 2 * rows * setup.length <= MAX_AUTO_BATCH_TOKENS and fits(2 * rows):
        rows *= 2
    return rows
