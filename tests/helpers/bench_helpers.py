"""For the tests of the benchmarks: a tiny model and workload, and a stand-in for nanoGPT."""

import torch
from torch import Tensor

from gpt2.bench.common import Workload
from gpt2.bench.ladder import full_logits_loss
from gpt2.model import GPT, GPTConfig

TINY_CONFIG = GPTConfig(vocab_size=301, block_size=1024, n_layer=2, n_head=2, n_embd=32)
TINY_WORKLOAD = Workload("cpu", TINY_CONFIG, batch_size=2, block_size=16, steps=3, warmup=2, lr=3e-3)
TINY_FLAGS = "--device cpu --n-layer 2 --n-head 2 --n-embd 32 --vocab-size 301 --batch-size 2 --block-size 16 --steps 2"
BENCH_TRAIN_ARGS = ["bench", "train", *TINY_FLAGS.split()]

FAKE_NANOGPT = '''
"""A stand-in with the interface of nanoGPT's model.py."""
from dataclasses import dataclass
from torch.nn import functional as F
import gpt2.model

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.5
    bias: bool = False

class GPT(gpt2.model.GPT):
    def __init__(self, config):
        assert config.bias and config.dropout == 0
        shape = {name: getattr(config, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
        super().__init__(gpt2.model.GPTConfig(**shape))
        print("number of parameters: many")

    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
'''


def scaled_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    return 1.001 * full_logits_loss(model, tokens, targets)


def nan_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    return full_logits_loss(model, tokens, targets) * torch.nan
