"""The time of a training step on this machine, extrapolated from timed passes and updates of a few layers."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from gpt2.config import TrainConfig
from gpt2.hardware import resident_memory
from gpt2.lora import add_adapter
from gpt2.model import GPT, GPTConfig
from gpt2.optimizers import build_optimizers
from gpt2.planning.costs import StepSetup, flops_per_token, num_parameters, num_trainable_parameters, training_memory
from gpt2.runtime import apply_activation_checkpointing, autocast, compile_blocks, synchronize

TIMED_LAYERS = 3  # models of one and of this many layers are timed; deeper ones are extrapolated
MAX_PASS_SECONDS = 1.5  # estimated; a longer pass is timed with fewer rows


class StepTime(NamedTuple):
    """Seconds of one step on one device: all forward and backward passes, and the optimizer's update."""

    passes: float
    update: float


def time_step(
    config: TrainConfig, shape: GPTConfig, setup: StepSetup, device: torch.device, rate: float, compiled: bool
) -> StepTime:
    """The seconds of one optimizer step on `device`, extrapolated from timed steps of models of one and three layers.

    rate: FLOP/s of matrix products, to estimate the time of a pass beforehand.

    Models of up to three layers are timed whole. With frozen blocks, the times are scaled by FLOPs and by the number of
    trainable parameters.
    """
    counts = [shape.n_layer] if shape.n_layer <= TIMED_LAYERS else [1, TIMED_LAYERS]
    timed = timed_setup(shape, setup, rate)
    slices = [_TimedModel(config, replace(shape, n_layer=count), timed, device, compiled) for count in counts]
    passes = _time_interleaved([each.forward_backward for each in slices], device)
    updates = _time_interleaved([each.update for each in slices], device)
    one_pass, update = (_extrapolate_layers(seconds, counts, shape.n_layer) for seconds in (passes, updates))
    if setup.freeze:
        flops = flops_per_token(shape, setup.length, freeze=setup.freeze)
        one_pass *= flops / flops_per_token(shape, setup.length)
        update *= num_trainable_parameters(shape, freeze=setup.freeze) / num_parameters(shape)
    return StepTime(one_pass * setup.micro_batches * setup.rows / timed.rows, update)


def can_time_step(shape: GPTConfig, setup: StepSetup, rate: float, program: int, memory: int) -> bool:
    """Return whether the models that `time_step` runs fit in `memory` bytes, of which `program` are in use."""
    timed = timed_setup(shape, setup, rate)
    return training_memory(_shallow(shape), timed, program).peak <= memory


def timed_setup(shape: GPTConfig, setup: StepSetup, rate: float) -> StepSetup:
    """The step to time: one micro-batch, or fewer of its rows (a power of two) if that would take too long."""
    flops = flops_per_token(_shallow(shape), setup.length, lora=setup.lora)
    seconds_per_row = flops * setup.length / (0.5 * rate)
    rows = setup.rows
    if rows * seconds_per_row > MAX_PASS_SECONDS:
        rows = 1
        while 2 * rows * seconds_per_row <= MAX_PASS_SECONDS and 2 * rows <= setup.rows:
            rows *= 2
    return replace(setup, rows=rows, micro_batches=1, saves_midway=False, freeze=0, shards=1, buckets=False)


def _shallow(shape: GPTConfig) -> GPTConfig:
    return replace(shape, n_layer=min(TIMED_LAYERS, shape.n_layer))


def _extrapolate_layers(seconds: list[float], counts: list[int], n_layer: int) -> float:
    """Linear extrapolation from the times at two depths; with one depth, its time."""
    if len(counts) == 1:
        return seconds[0]
    per_layer = max(0.0, seconds[1] - seconds[0]) / (counts[1] - counts[0])
    return seconds[1] + (n_layer - counts[1]) * per_layer


class _TimedModel:
    """A model with some of the layers, and its optimizers."""

    def __init__(
        self, config: TrainConfig, shape: GPTConfig, setup: StepSetup, device: torch.device, compiled: bool
    ) -> None:
        self.model = GPT(shape).to(device).train()
        if setup.lora is not None:
            add_adapter(self.model, setup.lora)
        if setup.activation_checkpointing:
            apply_activation_checkpointing(self.model.transformer.h)
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


def _time_interleaved(functions: list[Callable[[], None]], device: torch.device, rounds: int = 5) -> list[float]:
    """Median seconds of each function, timed alternately, after two warm-up rounds."""
    times: list[list[float]] = [[] for _ in functions]
    for round_number in range(rounds + 2):
        for work, seconds in zip(functions, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if round_number >= 2:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def process_memory(config: TrainConfig) -> int:
    """Resident bytes of Python, torch and its kernels in this process, after one step of a tiny model."""
    tiny = GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=1, n_embd=16)
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        step = _TimedModel(config, tiny, StepSetup(rows=1, length=8, dtype=dtype), cpu, compiled=False)
        step.forward_backward()
        step.update()
    return resident_memory()
