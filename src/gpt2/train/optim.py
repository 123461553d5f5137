"""Parameter groups, optimizers, and the learning rate at each step."""

import math

import torch
from torch import nn

from gpt2.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over `model`, with weight decay on matrices and embeddings only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of update number `step`, counted from 1: a linear warm-up, then the schedule.

    The peak is reached at the last warm-up step and the end, `min_lr`, at the last step of the run.
    """
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return low + (config.lr - low) * left
