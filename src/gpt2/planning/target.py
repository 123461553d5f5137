"""The device that a run is planned for: a local one, or a GPU known from its datasheet."""

from dataclasses import dataclass

import torch

from gpt2.config import TrainConfig
from gpt2.hardware import Accelerator, available_memory, device_name, find_accelerator, get_accelerator
from gpt2.model import GPTConfig
from gpt2.planning.cluster import Cluster, cpu_cluster, gpu_cluster
from gpt2.planning.costs import Memory, StepSetup, training_memory
from gpt2.planning.step_timing import process_memory
from gpt2.runtime import configure_malloc, pick_device

MAX_MEMORY_FRACTION = 0.9  # the share of the free memory that a plan may fill


@dataclass(frozen=True)
class TargetDevice:
    """The device that a run is planned for: a local one, or one known from its datasheet."""

    name: str
    kind: str  # "cpu", "cuda" or "mps"
    device: torch.device | None  # None for one that is not local
    datasheet: Accelerator | None
    memory: int  # bytes available to a run, including those this process already holds
    program: int  # bytes of it that Python and torch take

    def cluster(self, nodes: int, devices_per_node: int, network: float | None) -> Cluster:
        """Machines with such devices; network: bytes/s of a machine to the others, None for the usual value."""
        if self.datasheet is not None:
            return gpu_cluster(self.datasheet, nodes, devices_per_node, network)
        return cpu_cluster(nodes, devices_per_node, network)

    def can_hold(self, memory: Memory) -> bool:
        """Return whether the peak leaves the free share of the memory untouched."""
        return memory.peak <= MAX_MEMORY_FRACTION * self.memory

    def fits(self, shape: GPTConfig, setup: StepSetup) -> bool:
        """Return whether training with `setup` fits in the memory."""
        return self.can_hold(training_memory(shape, setup, self.program))


def setup_device(config: TrainConfig) -> torch.device:
    """The device to train on, after setting this process's allocator or matmul precision for it."""
    device = pick_device(config.device)
    if device.type == "cpu":
        configure_malloc(keep_freed=not config.activation_checkpointing)
    else:
        torch.set_float32_matmul_precision(config.matmul_precision)
    return device


def local_device(config: TrainConfig) -> TargetDevice:
    """The device of this machine that `config` would train on."""
    device = setup_device(config)
    program = process_memory(config) if device.type == "cpu" else 0
    name = device_name(device)
    datasheet = find_accelerator(name) if device.type == "cuda" else None
    return TargetDevice(name, device.type, device, datasheet, available_memory(device) + program, program)


def datasheet_device(name: str) -> TargetDevice:
    """A GPU known from its datasheet. Raises ConfigError for an unknown name."""
    datasheet = get_accelerator(name)
    return TargetDevice(datasheet.name, "cuda", None, datasheet, datasheet.memory, 0)
