"""Parameter groups, optimizers, and the learning rate at each step."""

import math
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from gpt2.config import TrainConfig
from gpt2.muon import Muon


def build_optimizers(model: nn.Module, config: TrainConfig, group: dist.ProcessGroup | None = None) -> list[Optimizer]:
    """The optimizers of `config` for the trainable parameters; weight decay for matrices and embeddings only.

    One optimizer, except for Muon: it is for the matrices of the blocks, and AdamW trains the rest.

    group: the ranks of DDP, which share Muon's work.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if config.optimizer == "muon":
        hidden = {name: p for name, p in named.items() if p.dim() == 2 and ".h." in name}
        rest = [p for name, p in named.items() if name not in hidden]
        muon = Muon(hidden.values(), lr=config.lr, weight_decay=config.weight_decay, group=group)
        return [muon, _adamw(rest, config)]
    if config.optimizer == "sgd":
        groups = parameter_groups(named.values(), config.weight_decay)
        return [SGD(groups, lr=config.lr, momentum=config.beta1)]
    return [_adamw(named.values(), config)]


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for torch: matrices and embeddings with weight decay, biases and layer norms without."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> AdamW:
    groups = parameter_groups(parameters, config.weight_decay)
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of update `step`, counted from 1: linear warm-up, then decay by the schedule.

    The peak is reached at the last warm-up step, the minimum `min_lr` at the last step of the run.
    """
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    decay_steps = config.max_steps - config.warmup_steps
    if config.schedule == "wsd":
        requested = config.max_steps // 5 if config.decay_steps is None else config.decay_steps
        decay_steps = min(requested, decay_steps)
    fraction = min(1.0, (config.max_steps - step) / max(1, decay_steps))
    if config.schedule == "cosine":
        fraction = 0.5 * (1 - math.cos(math.pi * fraction))
    return low + (config.lr - low) * fraction
