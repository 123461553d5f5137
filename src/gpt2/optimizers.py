"""Parameter groups, optimizers, and the learning rate at each step."""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from gpt2.config import TrainConfig


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """The optimizers of `config` over `model`, with weight decay on matrices and embeddings only.

    One, but for Muon, which is made for the matrices of the blocks; there AdamW takes all the rest.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if config.optimizer == "muon":
        hidden = {name: p for name, p in named.items() if p.dim() == 2 and ".h." in name}
        rest = [p for name, p in named.items() if name not in hidden]
        return [_muon(list(hidden.values()), config), _adamw(rest, config)]
    if config.optimizer == "sgd":
        groups = parameter_groups(named.values(), config.weight_decay)
        return [SGD(groups, lr=config.lr, momentum=config.beta1)]
    return [_adamw(named.values(), config)]


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """What torch's optimizers take: the matrices and embeddings with weight decay, biases and layer norms without."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> AdamW:
    groups = parameter_groups(parameters, config.weight_decay)
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def _muon(matrices: list[nn.Parameter], config: TrainConfig) -> Muon:
    """Muon (Jordan et al. 2024), its steps scaled to the size of AdamW's so that one --lr serves both.

    The scaling is that of "Muon is Scalable for LLM Training" (Liu et al. 2025), section 2.2.
    """
    return Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of update number `step`, counted from 1: a linear warm-up, then the schedule.

    The peak is reached at the last warm-up step and the end, `min_lr`, at the last step of the run.
    """
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    falling = config.max_steps - config.warmup_steps  # how many of the last steps the rate falls in
    if config.schedule == "wsd":
        falling = config.max_steps // 5 if config.decay_steps is None else config.decay_steps
        falling = min(falling, config.max_steps - config.warmup_steps)
    left = min(1.0, (config.max_steps - step) / max(1, falling))
    if config.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return low + (config.lr - low) * left
