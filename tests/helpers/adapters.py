"""Random adapters, and their files."""

from pathlib import Path

from torch import nn

from gpt2.lora import LoRAConfig, adapter_state_dict, add_adapter, base_fingerprint, save_adapter
from gpt2.model import GPT, GPTConfig
from tests.helpers.transformers_reference import random_model

ADAPTER_SHAPE = GPTConfig(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=24, n_inner=40)
ADAPTER_CONFIG = LoRAConfig(rank=3, alpha=5.0)


def with_adapter(shape: GPTConfig = ADAPTER_SHAPE, config: LoRAConfig = ADAPTER_CONFIG, seed: int = 0) -> GPT:
    """A model with an adapter that changes its outputs: a random B."""
    model = random_model(shape, seed)
    add_adapter(model, config)
    for name, tensor in adapter_state_dict(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(tensor, std=0.1)
    return model


def write_adapter(folder: Path, model: GPT, config: LoRAConfig = ADAPTER_CONFIG) -> Path:
    return save_adapter(folder, config, adapter_state_dict(model), "somewhere/base", base_fingerprint(model))
