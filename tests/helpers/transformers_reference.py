"""Models, batches and error measures for comparisons with `transformers`."""

from typing import Any

import torch
from torch import Tensor, nn

from gpt2.model import GPT, GPTConfig
from gpt2.weights import CONV1D_WEIGHTS

# unusual shapes, where an off-by-one error shows
ODD_CONFIGS = [
    GPTConfig(vocab_size=101, block_size=17, n_layer=1, n_head=5, n_embd=40),
    GPTConfig(vocab_size=257, block_size=33, n_layer=3, n_head=1, n_embd=24, n_inner=50),
    GPTConfig(vocab_size=130, block_size=8, n_layer=2, n_head=7, n_embd=49, layer_norm_epsilon=1e-3),
    GPTConfig(vocab_size=64, block_size=20, n_layer=2, n_head=2, n_embd=16, tie_word_embeddings=False),
    GPTConfig(vocab_size=99, block_size=12, n_layer=2, n_head=3, n_embd=30, activation_function="gelu"),
]


def to_transformers(model: GPT) -> Any:
    """A `GPT2LMHeadModel` of the same shape with the same weights, in evaluation mode without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.block_size,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            n_inner=c.n_inner,
            activation_function=c.activation_function,
            layer_norm_epsilon=c.layer_norm_epsilon,
            tie_word_embeddings=c.tie_word_embeddings,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    weights = {name: as_conv1d(name, tensor) for name, tensor in model.state_dict().items()}
    reference.load_state_dict(weights)
    reference.tie_weights()
    return reference.eval()


def as_conv1d(name: str, tensor: Tensor) -> Tensor:
    """A tensor of this program in the layout of `transformers`."""
    return tensor.t().contiguous() if name.endswith(CONV1D_WEIGHTS) else tensor


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose every parameter is random, biases and layer norms too, so that leaving one out shows."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(
                parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2 if parameter.dim() == 1 else 0.05
            )
    return model.eval()


def random_batch(config: GPTConfig, rows: int = 3, length: int | None = None, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and targets, (rows, length) each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rows, length or config.block_size)
    tokens, targets = torch.randint(config.vocab_size, shape, generator=generator)
    return tokens, targets


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
