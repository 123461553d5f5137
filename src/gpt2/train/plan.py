"""What a run will take, before it begins: memory from `gpt2.costs`, time from a few steps of a slice of the model."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gpt2.costs import Memory, Setup, flops_per_token, num_parameters, num_trainable, training_memory
from gpt2.data.prepare import bpe_size, named_shards
from gpt2.data.shards import ShardsMeta
from gpt2.errors import UserError
from gpt2.hardware import Accelerator, accelerator, available_memory, device_name, known_accelerator, measure_matmul
from gpt2.model import OPENAI_SIZES, GPTConfig
from gpt2.runtime import DTYPE_NAMES, manage_freed_memory, pick_compile, pick_device, pick_training_dtype
from gpt2.tokenizer import get_tokenizer, load_tokenizer
from gpt2.train.cluster import Cluster, cpu_cluster, gpu_cluster
from gpt2.train.config import AUTO, TrainConfig
from gpt2.train.scaling import ASSUMED_MFU, Step, divided_work, predict, update_seconds
from gpt2.train.slices import Timed, can_time, program_memory, time_step
from gpt2.train.start import lora_config
from gpt2.weights import find_model, read_config

PARALLEL = ("ddp", "fsdp")
FULL = 0.9  # the share of free memory that a plan may fill
MOST_TOKENS = 2**19  # in a batch that nobody chose: that of GPT-3's small models, past which few runs gain


@dataclass(frozen=True)
class Way:
    """A run by DDP or by FSDP: the memory of a device, whether that fits, and a step with what is sent in it."""

    memory: Memory
    fits: bool
    step: Step


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
    ways: dict[str, Way]
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
class Place:
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
    place, shape = _here(config) if on == "here" else _elsewhere(on), model_shape(config)
    cluster, compiled = place.cluster(nodes, devices, network), _compiles(config, place)
    batch_size, setup = _divided(config, shape, place, cluster)
    rate, timed = _rate_and_times(config, shape, setup, place, compiled)
    ways, chosen = _ways(config, shape, setup, place, cluster, timed)
    tokens_per_step, seconds = batch_size * setup.length, chosen.step.seconds
    steps = config.max_steps if tokens is None else max(1, -(-tokens // tokens_per_step))
    flops = _flops(shape, setup) * tokens_per_step
    return Plan(
        device=place.name,
        devices=cluster.devices,
        nodes=nodes,
        parallel=chosen.step.parallel,
        network=cluster.network,
        ways=ways,
        measured=place.device is not None,
        dtype=DTYPE_NAMES[setup.dtype],
        compile=compiled,
        parameters=num_parameters(shape),
        trainable=num_trainable(shape, setup.lora, setup.freeze),
        vocab_size=shape.vocab_size,
        batch_size=batch_size,
        micro_batch_size=setup.rows,
        recompute=setup.recompute,
        flops_per_token=_flops(shape, setup),
        flops_per_step=flops,
        flops=flops * steps,
        memory=chosen.memory,
        device_memory=place.memory,
        fits=chosen.fits,
        suggestion=suggest(shape, shared(setup, cluster, chosen.step.parallel), place, batch_size // cluster.devices),
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=steps * tokens_per_step,
        seconds_per_step=seconds,
        seconds=seconds * steps,
        tokens_per_second=tokens_per_step / seconds,
        matmul_rate=rate,
        utilization=flops / seconds / (cluster.devices * rate),
        cost=None if price_per_hour is None else seconds * steps / 3600 * price_per_hour,
    )


def _compiles(config: TrainConfig, place: Place) -> bool:
    if place.device is None:
        return config.compile is not False
    return pick_compile(config.compile, place.device, config.max_steps)


def shared(setup: Setup, cluster: Cluster, parallel: str) -> Setup:
    """`setup` on one of the devices of `cluster`: what DDP or FSDP adds to its memory, and what they take off it."""
    if parallel == "fsdp":
        return replace(setup, shards=cluster.shards)
    return replace(setup, buckets=parallel == "ddp")


def _possible(config: TrainConfig, cluster: Cluster) -> tuple[str, ...]:
    """The ways to run `config` on several devices."""
    if cluster.devices == 1:
        return ()
    return ("ddp",) if config.keeps_whole else PARALLEL


def _ways(
    config: TrainConfig, shape: GPTConfig, setup: Setup, place: Place, cluster: Cluster, timed: Timed
) -> tuple[dict[str, Way], Way]:
    """What each way takes, and the one to go: as asked for; by default FSDP where DDP does not fit."""
    work = divided_work(shape, setup, *timed)

    def way(parallel: str) -> Way:
        memory = training_memory(shape, shared(setup, cluster, parallel), place.program)
        return Way(memory, memory.peak <= FULL * place.memory, predict(work, cluster, parallel))

    ways = {parallel: way(parallel) for parallel in _possible(config, cluster)}
    if not ways:
        return {}, way("none")
    whole_fits = ways["ddp"].fits or "fsdp" not in ways
    return ways, ways.get(config.parallel) or ways["ddp" if whole_fits else "fsdp"]


def largest_batch(
    config: TrainConfig, shape: GPTConfig, device: torch.device, dtype: torch.dtype, ranks_here: int = 1
) -> int:
    """What `--batch-size auto` means: the most rows, a power of two, whose training fits in the free memory at once.

    ranks_here: how many ranks this machine has; on a CPU they divide its memory.

    The memory is predicted by `gpt2.costs`, nothing is tried out; a tenth stays free, and a batch has half a million
    tokens at most. Raises UserError when not even one row fits.
    """
    free = available_memory(device) // (ranks_here if device.type == "cpu" else 1)
    setup = replace(_setup(config, shape, device.type, dtype, rows=1), buckets=ranks_here > 1)
    return _largest(shape, setup, Place(str(device), device.type, device, None, free, 0))


def fits_whole(
    config: TrainConfig, shape: GPTConfig, device: torch.device, dtype: torch.dtype, share: int, ranks_here: int
) -> bool:
    """Can a rank on `device` hold all of the model, its gradients and its optimizer, as DDP wants it?

    share:      rows of the batch that are this rank's, done in micro-batches as `config` says.
    ranks_here: how many ranks this machine has. On a CPU they divide its free memory, and one of them saves.

    The memory is predicted by `gpt2.costs`, nothing is tried out; a tenth of what is free stays free. What is free
    changes: ask before anything large is made, and let one rank's answer be that of all.
    """
    setup = replace(_setup(config, shape, device.type, dtype, rows=1), buckets=ranks_here > 1)
    setup = in_micro_batches(setup, share, config.micro_batch_size)
    memory = training_memory(shape, setup)
    sharing = ranks_here if device.type == "cpu" else 1
    return sharing * memory.step + (memory.peak - memory.step) <= FULL * available_memory(device)


def in_micro_batches(setup: Setup, share: int, micro_batch_size: int | None) -> Setup:
    """`setup` with a device's `share` of the batch, at once or in micro-batches."""
    rows = min(share, micro_batch_size or share)
    return replace(setup, rows=rows, micro_batches=-(-share // rows))


def suggest(shape: GPTConfig, setup: Setup, place: Place, share: int) -> dict[str, Any] | None:
    """The largest micro-batch that divides a device's `share` of the batch and fits; recomputing only where it must."""
    for recompute in (setup.recompute,) if setup.recompute else (False, True):
        for rows in (rows for rows in range(share, 0, -1) if share % rows == 0):
            tried = replace(setup, rows=rows, micro_batches=share // rows, recompute=recompute)
            if training_memory(shape, tried, place.program).peak <= FULL * place.memory:
                return {"micro_batch_size": rows, "recompute": recompute}
    return None


def model_shape(config: TrainConfig) -> GPTConfig:
    """The model that `config` trains, from its settings and its tokenizer's name; no data is read."""
    if config.init_from is not None:
        given = OPENAI_SIZES.get(config.init_from) or read_config(find_model(config.init_from))
        return replace(given, dropout=config.dropout, embd_dropout=None, attn_dropout=None)
    return config.model_config(vocabulary_size(config))


def vocabulary_size(config: TrainConfig) -> int:
    """How many tokens `config`'s tokenizer has, or will have; for shards without one asked for, their own."""
    path, spec = named_shards(config.data), config.tokenizer
    if spec is None and path is not None:
        folder = path if path.is_dir() else path.parent
        meta, own = ShardsMeta.load(folder), load_tokenizer(folder)
        if meta is not None:
            return meta.tokenizer.vocab_size
        if own is not None:
            return own.vocab_size
    if spec is None or spec == "gpt2":
        return OPENAI_SIZES["gpt2"].vocab_size  # that model's; the tokenizer itself would be downloaded
    size = bpe_size(spec)
    return get_tokenizer(spec).vocab_size if size is None else size


def ready_device(config: TrainConfig) -> torch.device:
    """The device to train on, with this process set up for it as `config` asks."""
    device = pick_device(config.device)
    if device.type == "cpu":
        manage_freed_memory(keep=not config.recompute)
    else:
        torch.set_float32_matmul_precision(config.matmul_precision)
    return device


def _here(config: TrainConfig) -> Place:
    device = ready_device(config)
    program = program_memory(config) if device.type == "cpu" else 0
    name = device_name(device)
    datasheet = known_accelerator(name) if device.type == "cuda" else None
    return Place(name, device.type, device, datasheet, available_memory(device) + program, program)


def _elsewhere(name: str) -> Place:
    datasheet = accelerator(name)
    return Place(datasheet.name, "cuda", None, datasheet, datasheet.memory, 0)


def _dtype(config: TrainConfig, place: Place, width: int) -> torch.dtype:
    """The dtype of matrix products, as `gpt2 train` would choose it there."""
    if place.device is None and place.datasheet is not None and config.dtype == "auto":
        return torch.bfloat16 if place.datasheet.bfloat16 else torch.float32
    return pick_training_dtype(config.dtype, place.device or torch.device(place.kind), width)


def _divided(config: TrainConfig, shape: GPTConfig, place: Place, cluster: Cluster) -> tuple[int, Setup]:
    """The batch, found out if it is to be, and how each device does its share of it."""
    setup = _setup(config, shape, place.kind, _dtype(config, place, shape.n_embd), rows=1)
    if config.batch_size == AUTO:
        share = _largest(shape, _roomiest(config, shape, setup, place, cluster), place)
        return share * cluster.devices, in_micro_batches(setup, share, None)
    share, left = divmod(config.batch_size, cluster.devices)
    rows = min(share, config.micro_batch_size or share)
    if left:
        asked = f"--gpus ({cluster.gpus})" if cluster.nodes == 1 else f"the {cluster.devices} devices"
        raise UserError(f"--batch-size ({config.batch_size}) must be a multiple of {asked}")
    if share % rows:
        raise UserError(f"each device has {share} rows of the batch, which --micro-batch-size {rows} does not divide")
    return config.batch_size, in_micro_batches(setup, share, config.micro_batch_size)


def _roomiest(config: TrainConfig, shape: GPTConfig, setup: Setup, place: Place, cluster: Cluster) -> Setup:
    """One row, the way it is to be run; by default with FSDP only where it would not fit without."""
    tried = [shared(setup, cluster, way) for way in _possible(config, cluster) if config.parallel in ("auto", way)]
    fitting = (each for each in tried if training_memory(shape, each, place.program).peak <= FULL * place.memory)
    return next(fitting, tried[-1] if tried else setup)


def _rate_and_times(
    config: TrainConfig, shape: GPTConfig, setup: Setup, place: Place, compiled: bool
) -> tuple[float, Timed]:
    """FLOP/s of matrix products on one device, and its seconds of a step: measured here, assumed elsewhere."""
    tokens = setup.rows * setup.micro_batches * setup.length
    if place.device is not None:
        rate = measure_matmul(place.device, setup.dtype, 0.3)
        if can_time(shape, setup, rate, place.program, place.memory):
            return rate, time_step(config, shape, setup, place.device, rate, compiled)
        return rate, Timed(_flops(shape, setup) * tokens / (ASSUMED_MFU * rate), 0.0)
    assert place.datasheet is not None
    rate = place.datasheet.flops(setup.dtype, config.matmul_precision)
    again = flops_per_token(shape, setup.length, backward=False) if setup.recompute else 0  # a second forward pass
    passes = (_flops(shape, setup) + again) * tokens / (ASSUMED_MFU * rate)
    return rate, Timed(passes, update_seconds(shape, setup, place.datasheet))


def _flops(shape: GPTConfig, setup: Setup) -> float:
    return flops_per_token(shape, setup.length, lora=setup.lora, freeze=setup.freeze)


def _setup(config: TrainConfig, shape: GPTConfig, kind: str, dtype: torch.dtype, rows: int) -> Setup:
    return Setup(
        rows=rows,
        length=min(config.block_size, shape.block_size),
        dtype=dtype,
        recompute=config.recompute,
        optimizer=config.optimizer,
        device=kind,
        saves_midway=0 < config.save_every < config.max_steps,
        lora=lora_config(config) if config.lora_rank else None,
        freeze=config.freeze,
    )


def _largest(shape: GPTConfig, setup: Setup, place: Place) -> int:
    def fits(rows: int) -> bool:
        return training_memory(shape, replace(setup, rows=rows), place.program).peak <= FULL * place.memory

    if not fits(1):
        needed, there = training_memory(shape, setup, place.program).peak / 2**30, place.memory / 2**30
        raise UserError(f"not even one row of the batch fits: it needs {needed:.1f} GiB of {there:.1f} on {place.name}")
    rows = 1
    while 2 * rows * setup.length <= MOST_TOKENS and fits(2 * rows):
        rows *= 2
    return rows
