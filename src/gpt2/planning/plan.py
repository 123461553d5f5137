"""Plan a training run: memory from `gpt2.planning.costs`, time from a few timed steps of a slice of the model."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gpt2.config import AUTO_BATCH_SIZE, TrainConfig
from gpt2.data.corpora import find_corpus
from gpt2.data.prepare import bpe_vocab_size
from gpt2.data.resolve import find_shards
from gpt2.data.shards import ShardsMeta, token_format
from gpt2.errors import ConfigError, InsufficientMemoryError
from gpt2.hardware import available_memory, measure_matmul
from gpt2.model import OPENAI_CONFIGS, GPTConfig
from gpt2.planning.cluster import Cluster
from gpt2.planning.costs import (
    Memory,
    StepSetup,
    flops_per_token,
    num_parameters,
    num_trainable_parameters,
    training_memory,
)
from gpt2.planning.scaling import ASSUMED_MFU, StepEstimate, predict_step, split_step_work, update_seconds
from gpt2.planning.step_timing import StepTime, can_time_step, time_step
from gpt2.planning.target import MAX_MEMORY_FRACTION, TargetDevice, datasheet_device, local_device
from gpt2.runtime import DTYPE_NAMES, pick_compile, pick_training_dtype
from gpt2.tokenizer import get_tokenizer, load_tokenizer
from gpt2.weights import find_model_folder, read_config

STRATEGIES = ("ddp", "fsdp")
MAX_AUTO_BATCH_TOKENS = 2**19  # tokens per step with --batch-size auto: the batch of GPT-3's small models


@dataclass(frozen=True)
class StrategyEstimate:
    """A run with DDP or FSDP: the memory of one device, whether it fits, and the predicted step."""

    memory: Memory
    fits: bool
    step: StepEstimate


@dataclass(frozen=True)
class Plan:
    """Memory, time and cost of a run. Memory is of one device; times and rates are of all devices together.

    nodes:       number of machines.
    parallel:    "none" on one device; else "ddp" or "fsdp", as requested or as `--parallel auto` chooses.
    network:     assumed bytes/s of each machine to the others, in each direction.
    ways:        on several devices: the estimate of each strategy; `memory`, `fits` and the times are of `parallel`.
    trainable:   number of trainable parameters; with LoRA, those of the adapters, which `parameters` does not count.
    measured:    whether computing was timed on this machine (else: assumed). Communication is never measured.
    utilization: FLOP/s of the step as a share of the matmul rate (measured, or from the datasheet): the MFU.
    suggestion:  settings for the largest micro-batch that fits; None when no micro-batch fits.
    disk:        bytes of the token shards that the run makes first, for a corpus on the hub; None for other data.
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
    activation_checkpointing: bool
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
    disk: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, nested ones as dictionaries, for JSON."""
        return asdict(self)


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
    """Plan the run of `config` on `nodes` machines with `devices` devices each.

    on:             the device: "here" for that of this machine, or a GPU name known to `gpt2.hardware`.
    network:        bytes/s of each machine to the others, in each direction; None for the usual value.
    tokens:         number of training tokens; None for those of `config.max_steps`.
    price_per_hour: of all devices together.

    On this machine computing is timed, on a slice of the model at its real width and dtype; elsewhere an MFU of 45% of
    the datasheet's rate is assumed. Communication is predicted by `gpt2.planning.scaling`. Raises UserError for an
    unknown device, a batch that the devices do not divide, and a model of which no row fits.
    """
    target, shape = local_device(config) if on == "here" else datasheet_device(on), model_shape(config)
    cluster, compiled = target.cluster(nodes, devices, network), _will_compile(config, target)
    batch_size, setup = _divide_batch(config, shape, target, cluster)
    rate, step_time = _matmul_rate_and_step_time(config, shape, setup, target, compiled)
    strategies, chosen = _estimate_strategies(config, shape, setup, target, cluster, step_time)
    tokens_per_step, seconds = batch_size * setup.length, chosen.step.seconds
    steps = config.max_steps if tokens is None else max(1, -(-tokens // tokens_per_step))
    flops = _flops_per_token(shape, setup) * tokens_per_step
    return Plan(
        device=target.name,
        devices=cluster.num_devices,
        nodes=nodes,
        parallel=chosen.step.parallel,
        network=cluster.node_bandwidth,
        ways=strategies,
        measured=target.device is not None,
        dtype=DTYPE_NAMES[setup.dtype],
        compile=compiled,
        parameters=num_parameters(shape),
        trainable=num_trainable_parameters(shape, setup.lora, setup.freeze),
        vocab_size=shape.vocab_size,
        batch_size=batch_size,
        micro_batch_size=setup.rows,
        activation_checkpointing=setup.activation_checkpointing,
        flops_per_token=_flops_per_token(shape, setup),
        flops_per_step=flops,
        flops=flops * steps,
        memory=chosen.memory,
        device_memory=target.memory,
        fits=chosen.fits,
        suggestion=suggest_micro_batch(
            shape, per_device_setup(setup, cluster, chosen.step.parallel), target, batch_size // cluster.num_devices
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
        disk=_disk(config),
    )


def _will_compile(config: TrainConfig, target: TargetDevice) -> bool:
    if target.device is None:
        return config.compile is not False
    return pick_compile(config.compile, target.device, config.max_steps)


def per_device_setup(setup: StepSetup, cluster: Cluster, parallel: str) -> StepSetup:
    """Return `setup` with what "ddp" or "fsdp" changes in the memory of one device of `cluster`."""
    if parallel == "fsdp":
        return replace(setup, shards=cluster.shards)
    return replace(setup, buckets=parallel == "ddp")


def _possible_strategies(config: TrainConfig, cluster: Cluster) -> tuple[str, ...]:
    if cluster.num_devices == 1:
        return ()
    return ("ddp",) if config.needs_full_model else STRATEGIES


def _estimate_strategies(
    config: TrainConfig, shape: GPTConfig, setup: StepSetup, target: TargetDevice, cluster: Cluster, step_time: StepTime
) -> tuple[dict[str, StrategyEstimate], StrategyEstimate]:
    """The estimate of each strategy, and of the chosen one: as configured; by default FSDP only if DDP does not fit."""
    work = split_step_work(shape, setup, *step_time)

    def estimate(parallel: str) -> StrategyEstimate:
        memory = training_memory(shape, per_device_setup(setup, cluster, parallel), target.program)
        return StrategyEstimate(memory, target.can_hold(memory), predict_step(work, cluster, parallel))

    estimates = {parallel: estimate(parallel) for parallel in _possible_strategies(config, cluster)}
    if not estimates:
        return {}, estimate("none")
    default = "ddp" if estimates["ddp"].fits or "fsdp" not in estimates else "fsdp"
    return estimates, estimates.get(config.parallel) or estimates[default]


def largest_batch_size(
    config: TrainConfig, shape: GPTConfig, device: torch.device, dtype: torch.dtype, local_world_size: int = 1
) -> int:
    """The batch of `--batch-size auto`: the most rows, a power of two, that train at once in the free memory.

    local_world_size: ranks on this machine; on a CPU they share its memory.

    The memory is predicted by `gpt2.planning.costs` without allocating any. A tenth stays free, and a batch has at most
    half a million tokens. Raises InsufficientMemoryError when not even one row fits.
    """
    free = available_memory(device) // (local_world_size if device.type == "cpu" else 1)
    setup = replace(_step_setup(config, shape, device.type, dtype), buckets=local_world_size > 1)
    return _largest_batch_size(shape, setup, TargetDevice(str(device), device.type, device, None, free, 0))


def fits_full_model(
    config: TrainConfig,
    shape: GPTConfig,
    device: torch.device,
    dtype: torch.dtype,
    rows_per_rank: int,
    local_world_size: int,
) -> bool:
    """Return whether a rank on `device` can hold the whole model with gradients and optimizer, as DDP requires.

    rows_per_rank:    rows of the batch for each rank, in micro-batches as `config` has them.
    local_world_size: ranks on this machine. On a CPU they share its free memory, and one of them saves checkpoints.

    The memory is predicted by `gpt2.planning.costs` without allocating any; a tenth of the free memory stays free. Free
    memory changes: call this before anything large is allocated, and use one rank's result on all ranks.
    """
    setup = replace(_step_setup(config, shape, device.type, dtype), buckets=local_world_size > 1)
    memory = training_memory(shape, split_into_micro_batches(setup, rows_per_rank, config.micro_batch_size))
    sharing = local_world_size if device.type == "cpu" else 1
    return sharing * memory.step + (memory.peak - memory.step) <= MAX_MEMORY_FRACTION * available_memory(device)


def split_into_micro_batches(setup: StepSetup, rows_per_device: int, micro_batch_size: int | None) -> StepSetup:
    """Return `setup` for `rows_per_device` rows of the batch, at once or in micro-batches."""
    rows = min(rows_per_device, micro_batch_size or rows_per_device)
    return replace(setup, rows=rows, micro_batches=-(-rows_per_device // rows))


def suggest_micro_batch(
    shape: GPTConfig, setup: StepSetup, target: TargetDevice, rows_per_device: int
) -> dict[str, Any] | None:
    """Settings for the largest micro-batch that divides `rows_per_device` and fits, or None.

    Activation checkpointing is suggested only where nothing fits without it.
    """
    for activation_checkpointing in (True,) if setup.activation_checkpointing else (False, True):
        for rows in (rows for rows in range(rows_per_device, 0, -1) if rows_per_device % rows == 0):
            settings = replace(
                setup,
                rows=rows,
                micro_batches=rows_per_device // rows,
                activation_checkpointing=activation_checkpointing,
            )
            if target.fits(shape, settings):
                return {"micro_batch_size": rows, "activation_checkpointing": activation_checkpointing}
    return None


def model_shape(config: TrainConfig) -> GPTConfig:
    """The configuration of the model that `config` trains, from its settings and its tokenizer's name, not its data."""
    if config.init_from is not None:
        initial = OPENAI_CONFIGS.get(config.init_from) or read_config(find_model_folder(config.init_from))
        return replace(initial, dropout=config.dropout, embd_dropout=None, attn_dropout=None)
    return config.model_config(vocabulary_size(config))


def vocabulary_size(config: TrainConfig) -> int:
    """The vocabulary size of `config`'s tokenizer, trained or not; without one, that of the shards' tokenizer."""
    shards, spec = find_shards(config.data), config.tokenizer
    if spec is None and shards is not None:
        folder = shards.path if shards.path.is_dir() else shards.path.parent
        meta, tokenizer = ShardsMeta.load(folder), load_tokenizer(folder)
        if meta is not None:
            return meta.tokenizer.vocab_size
        if tokenizer is not None:
            return tokenizer.vocab_size
    if spec is None or spec == "gpt2":
        return OPENAI_CONFIGS["gpt2"].vocab_size  # known without loading the tokenizer, which may need a download
    size = bpe_vocab_size(spec)
    return get_tokenizer(spec).vocab_size if size is None else size


def _disk(config: TrainConfig) -> int | None:
    """The bytes of the shards of a corpus on the hub whose size is known; they are written where the run starts."""
    corpus = find_corpus(config.data)
    if corpus is None or not corpus.tokens:
        return None
    return corpus.tokens * token_format(vocabulary_size(config)).dtype.itemsize


def _dtype(config: TrainConfig, target: TargetDevice, width: int) -> torch.dtype:
    """The dtype of matrix products that `gpt2 train` would choose on `target`."""
    if target.device is None and target.datasheet is not None and config.dtype == "auto":
        return torch.bfloat16 if target.datasheet.bfloat16 else torch.float32
    return pick_training_dtype(config.dtype, target.device or torch.device(target.kind), width)


def _divide_batch(
    config: TrainConfig, shape: GPTConfig, target: TargetDevice, cluster: Cluster
) -> tuple[int, StepSetup]:
    """The global batch size, with "auto" resolved, and the step of each device."""
    setup = _step_setup(config, shape, target.kind, _dtype(config, target, shape.n_embd))
    if config.batch_size == AUTO_BATCH_SIZE:
        share = _largest_batch_size(shape, _auto_batch_setup(config, shape, setup, target, cluster), target)
        return share * cluster.num_devices, split_into_micro_batches(setup, share, None)
    share, remainder = divmod(config.batch_size, cluster.num_devices)
    rows = min(share, config.micro_batch_size or share)
    if remainder:
        divisor = f"--gpus ({cluster.devices_per_node})" if cluster.nodes == 1 else f"the {cluster.num_devices} devices"
        raise ConfigError(f"--batch-size ({config.batch_size}) must be a multiple of {divisor}", field="batch_size")
    if share % rows:
        reason = f"each device has {share} rows of the batch, which --micro-batch-size {rows} does not divide"
        raise ConfigError(reason, field="micro_batch_size")
    return config.batch_size, split_into_micro_batches(setup, share, config.micro_batch_size)


def _auto_batch_setup(
    config: TrainConfig, shape: GPTConfig, setup: StepSetup, target: TargetDevice, cluster: Cluster
) -> StepSetup:
    """`setup` of one row with the configured strategy; by default with FSDP only where DDP does not fit."""
    allowed = [way for way in _possible_strategies(config, cluster) if config.parallel in ("auto", way)]
    candidates = [per_device_setup(setup, cluster, way) for way in allowed] or [setup]
    return next((each for each in candidates if target.fits(shape, each)), candidates[-1])


def _matmul_rate_and_step_time(
    config: TrainConfig, shape: GPTConfig, setup: StepSetup, target: TargetDevice, compile: bool
) -> tuple[float, StepTime]:
    """FLOP/s of matrix products on one device, and the time of its step: measured here, assumed elsewhere."""
    tokens = setup.rows * setup.micro_batches * setup.length
    if target.device is not None:
        rate = measure_matmul(target.device, setup.dtype, 0.3)
        if can_time_step(shape, setup, rate, target.program, target.memory):
            return rate, time_step(config, shape, setup, target.device, rate, compile)
        return rate, StepTime(_flops_per_token(shape, setup) * tokens / (ASSUMED_MFU * rate), 0.0)
    assert target.datasheet is not None
    rate = target.datasheet.flops(setup.dtype, config.matmul_precision)
    second_forward = flops_per_token(shape, setup.length, backward=False) if setup.activation_checkpointing else 0
    passes = (_flops_per_token(shape, setup) + second_forward) * tokens / (ASSUMED_MFU * rate)
    return rate, StepTime(passes, update_seconds(shape, setup, target.datasheet))


def _flops_per_token(shape: GPTConfig, setup: StepSetup) -> float:
    return flops_per_token(shape, setup.length, lora=setup.lora, freeze=setup.freeze)


def _step_setup(config: TrainConfig, shape: GPTConfig, kind: str, dtype: torch.dtype) -> StepSetup:
    """The step of one row."""
    return StepSetup(
        rows=1,
        length=min(config.block_size, shape.block_size),
        dtype=dtype,
        activation_checkpointing=config.activation_checkpointing,
        optimizer=config.optimizer,
        device=kind,
        saves_midway=0 < config.save_every < config.max_steps,
        lora=config.lora_config() if config.lora_rank else None,
        freeze=config.freeze,
    )


def _largest_batch_size(shape: GPTConfig, setup: StepSetup, target: TargetDevice) -> int:
    if not target.fits(shape, setup):
        needed, there = training_memory(shape, setup, target.program).peak / 2**30, target.memory / 2**30
        raise InsufficientMemoryError(
            f"not even one row of the batch fits: it needs {needed:.1f} GiB of {there:.1f} on {target.name}",
            field="batch_size",
        )
    rows = 1
    while 2 * rows * setup.length <= MAX_AUTO_BATCH_TOKENS and target.fits(shape, replace(setup, rows=2 * rows)):
        rows *= 2
    return rows
