"""What a run will take, before it begins: memory from `gpt2.costs`, time from a few steps of a slice of the model."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gpt2.costs import Memory, Setup, flops_per_token, num_parameters, num_trainable, training_memory
from gpt2.data.prepare import bpe_size, named_shards
from gpt2.data.shards import ShardsMeta
from gpt2.errors import UserError
from gpt2.hardware import Accelerator, accelerator, available_memory, device_name, measure_matmul, resident_memory
from gpt2.lora import attach
from gpt2.model import GPT, OPENAI_SIZES, GPTConfig
from gpt2.runtime import (
    DTYPE_NAMES,
    autocast,
    compile_blocks,
    manage_freed_memory,
    pick_compile,
    pick_device,
    pick_training_dtype,
    recompute_blocks,
    synchronize,
)
from gpt2.tokenizer import get_tokenizer, load_tokenizer
from gpt2.train.config import AUTO, TrainConfig
from gpt2.train.optim import build_optimizers
from gpt2.train.start import lora_config
from gpt2.weights import find_model, read_config

ASSUMED_MFU = 0.45  # of the datasheet's peak, for a device that is not here to be measured
FULL = 0.9  # the share of free memory that a plan may fill
MOST_TOKENS = 2**19  # in a batch that nobody chose: that of GPT-3's small models, past which few runs gain
SLICE = 3  # layers that are timed, and one: the rest is their difference, many times
PASS_SECONDS = 1.5  # about how long a timed pass may take; long ones are timed with fewer rows


@dataclass(frozen=True)
class Plan:
    """What a run takes. Memory is of one device, time and rates are of all together.

    trainable:   how many of the parameters learn; of adapters, those beside them.
    measured:    was the time taken from this machine (and not assumed from a datasheet)?
    utilization: the share of the matmul rate (measured, or the datasheet's) that the step reaches.
    suggestion:  settings for the largest micro-batch that fits; None when nothing does.
    seconds:     of the training steps alone, without validation, samples and checkpoints.
    """

    device: str
    devices: int
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


def plan(
    config: TrainConfig,
    *,
    on: str = "here",
    devices: int = 1,
    tokens: int | None = None,
    price_per_hour: float | None = None,
) -> Plan:
    """What the run of `config` takes on `devices` devices called `on`: "here", or a name known to `gpt2.hardware`.

    tokens:         how many to train on; by default those of max_steps.
    price_per_hour: of all devices together, in any currency.

    Here the time is measured, on a slice of the model at its real width and precision; elsewhere it is the
    datasheet's rate at a utilization of 45%. Raises UserError for an unknown device, or a batch they cannot share.
    """
    place = _here(config) if on == "here" else _elsewhere(on)
    shape = model_shape(config)
    compiled = config.compile is not False
    if place.device is not None:
        compiled = pick_compile(config.compile, place.device, config.max_steps)
    batch_size, setup = _divided(config, shape, place, devices)
    memory = training_memory(shape, setup, place.program)
    rate, seconds = _rate_and_seconds(config, shape, setup, place, compiled)
    tokens_per_step = batch_size * setup.length
    steps = config.max_steps if tokens is None else max(1, -(-tokens // tokens_per_step))
    per_token = _flops(shape, setup)
    return Plan(
        device=place.name,
        devices=devices,
        measured=place.device is not None,
        dtype=DTYPE_NAMES[setup.dtype],
        compile=compiled,
        parameters=num_parameters(shape),
        trainable=num_trainable(shape, setup.lora, setup.freeze),
        vocab_size=shape.vocab_size,
        batch_size=batch_size,
        micro_batch_size=setup.rows,
        recompute=setup.recompute,
        flops_per_token=per_token,
        flops_per_step=per_token * tokens_per_step,
        flops=per_token * tokens_per_step * steps,
        memory=memory,
        device_memory=place.memory,
        fits=memory.peak <= FULL * place.memory,
        suggestion=suggest(shape, setup, place, batch_size // devices),
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=steps * tokens_per_step,
        seconds_per_step=seconds,
        seconds=seconds * steps,
        tokens_per_second=tokens_per_step / seconds,
        matmul_rate=rate,
        utilization=per_token * tokens_per_step / seconds / (devices * rate),
        cost=None if price_per_hour is None else seconds * steps / 3600 * price_per_hour,
    )


def largest_batch(config: TrainConfig, shape: GPTConfig, device: torch.device, dtype: torch.dtype) -> int:
    """What `--batch-size auto` means: the most rows, a power of two, whose training fits in the free memory at once.

    The memory is predicted by `gpt2.costs`, nothing is tried out; a tenth stays free, and a batch has half a million
    tokens at most. Raises UserError when not even one row fits.
    """
    place = Place(str(device), device.type, device, None, available_memory(device), 0)
    return _largest(shape, _setup(config, shape, device.type, dtype, rows=1), place)


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
        return replace(given, dropout=config.dropout)
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
    program = _program_memory(config) if device.type == "cpu" else 0
    return Place(device_name(device), device.type, device, None, available_memory(device) + program, program)


def _elsewhere(name: str) -> Place:
    datasheet = accelerator(name)
    return Place(datasheet.name, "cuda", None, datasheet, datasheet.memory, 0)


def _dtype(config: TrainConfig, place: Place, width: int) -> torch.dtype:
    """The dtype of matrix products, as `gpt2 train` would choose it there."""
    if place.datasheet is not None and config.dtype == "auto":
        return torch.bfloat16 if place.datasheet.bfloat16 else torch.float32
    return pick_training_dtype(config.dtype, place.device or torch.device(place.kind), width)


def _divided(config: TrainConfig, shape: GPTConfig, place: Place, devices: int) -> tuple[int, Setup]:
    """The batch, found out if it is to be, and how each device does its share of it."""
    setup = _setup(config, shape, place.kind, _dtype(config, place, shape.n_embd), rows=1)
    if config.batch_size == AUTO:
        share = rows = _largest(shape, setup, place)
    else:
        share = config.batch_size // devices
        rows = min(share, config.micro_batch_size or share)
        if config.batch_size % devices:
            raise UserError(f"--batch-size ({config.batch_size}) must be a multiple of --gpus ({devices})")
    return share * devices, replace(setup, rows=rows, micro_batches=-(-share // rows))


def _rate_and_seconds(
    config: TrainConfig, shape: GPTConfig, setup: Setup, place: Place, compiled: bool
) -> tuple[float, float]:
    """FLOP/s of matrix products on one device, and the seconds of a step: measured here, assumed elsewhere."""
    if place.device is not None:
        rate = measure_matmul(place.device, setup.dtype, 0.3)
        return rate, seconds_per_step(config, shape, setup, place, rate, compiled)
    assert place.datasheet is not None
    rate = place.datasheet.flops(setup.dtype, config.matmul_precision)
    again = flops_per_token(shape, setup.length, backward=False) if setup.recompute else 0  # a second forward pass
    flops = (_flops(shape, setup) + again) * setup.rows * setup.micro_batches * setup.length
    return rate, flops / (ASSUMED_MFU * rate)


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


def seconds_per_step(
    config: TrainConfig, shape: GPTConfig, setup: Setup, place: Place, rate: float, compiled: bool
) -> float:
    """Seconds of one optimizer step, from timing real passes and updates of a model with one layer and with three.

    What a layer adds is their difference; embeddings, head and loss are in both. A model of few layers is timed whole.
    Where first blocks are frozen, time is taken to shrink as FLOPs and learning parameters do.
    Where not even that fits in memory, the step is taken to run at `ASSUMED_MFU` of `rate`.
    """
    device = place.device
    assert device is not None
    counts = [shape.n_layer] if shape.n_layer <= SLICE else [1, SLICE]
    thin = replace(shape, n_layer=counts[-1])
    rows = _timed_rows(thin, setup, rate)
    timed = replace(setup, rows=rows, micro_batches=1, saves_midway=False, freeze=0)
    step_tokens = setup.rows * setup.micro_batches * setup.length
    if training_memory(thin, timed, place.program).peak > place.memory:
        return _flops(shape, setup) * step_tokens / (ASSUMED_MFU * rate)
    slices = [_Slice(config, replace(shape, n_layer=count), timed, device, compiled) for count in counts]
    passes = _alternating([each.forward_backward for each in slices], device)
    updates = _alternating([each.update for each in slices], device)
    one_pass, update = (_at_depth(seconds, counts, shape.n_layer) for seconds in (passes, updates))
    if setup.freeze:
        one_pass *= _flops(shape, setup) / flops_per_token(shape, setup.length)
        update *= num_trainable(shape, freeze=setup.freeze) / num_parameters(shape)
    return one_pass * setup.micro_batches * setup.rows / rows + update


def _timed_rows(thin: GPTConfig, setup: Setup, rate: float) -> int:
    """The micro-batch's rows, or as many (a power of two) as keep a timed pass short."""
    seconds_per_row = flops_per_token(thin, setup.length, lora=setup.lora) * setup.length / (0.5 * rate)
    rows = 1
    while 2 * rows * seconds_per_row <= PASS_SECONDS and 2 * rows <= setup.rows:
        rows *= 2
    return setup.rows if setup.rows * seconds_per_row <= PASS_SECONDS else rows


def _at_depth(seconds: list[float], counts: list[int], n_layer: int) -> float:
    """On the line through the times of two depths; with one depth, its time."""
    if len(counts) == 1:
        return seconds[0]
    per_layer = max(0.0, seconds[1] - seconds[0]) / (counts[1] - counts[0])
    return seconds[1] + (n_layer - counts[1]) * per_layer


class _Slice:
    """A model with some of the layers, and its optimizers: what can be timed of a step."""

    def __init__(
        self, config: TrainConfig, shape: GPTConfig, setup: Setup, device: torch.device, compiled: bool
    ) -> None:
        self.model = GPT(shape).to(device).train()
        if setup.lora is not None:
            attach(self.model, setup.lora)
        if setup.recompute:
            recompute_blocks(self.model.transformer.h)
        if compiled:
            compile_blocks(self.model.transformer.h)
        self.optimizers = build_optimizers(self.model, config)
        self.tokens = torch.randint(0, shape.vocab_size, (setup.rows, setup.length), device=device)  # (B, T)
        self.device, self.dtype, self.grad_clip = device, setup.dtype, config.grad_clip or torch.inf

    def forward_backward(self) -> None:
        with autocast(self.device, self.dtype):
            loss = self.model.loss(self.tokens, self.tokens, float(self.tokens.numel()))
        loss.backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()


def _alternating(works: list[Callable[[], None]], device: torch.device, rounds: int = 5) -> list[float]:
    """Median seconds of each, timed in turns, after two rounds to warm up."""
    times: list[list[float]] = [[] for _ in works]
    for round_number in range(rounds + 2):
        for work, seconds in zip(works, times, strict=True):
            synchronize(device)
            began = time.perf_counter()
            work()
            synchronize(device)
            if round_number >= 2:
                seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in times]


def _program_memory(config: TrainConfig) -> int:
    """Bytes that Python, torch and its kernels take in this process: after one step of the smallest of models."""
    tiny = GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=1, n_embd=16)
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        step = _Slice(config, tiny, Setup(rows=1, length=8, dtype=dtype), cpu, compiled=False)
        step.forward_backward()
        step.update()
    return resident_memory()
