"""GPT-2: the model of the paper in one file.

"Language Models are Unsupervised Multitask Learners" (Radford et al., 2019): a decoder-only transformer with learned
positions, layer norm before each sub-block and once more at the end, tanh-GELU, and the output head tied to the
token embedding. Parameters have the names of `transformers`; every matrix is (out, in), as in `nn.Linear`.

Shapes: B rows, T positions, S positions with those in the cache, C = n_embd, V = vocab_size, H heads of D = C / H.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2.cache import CacheExtension, KVCache, LayerCacheExtension
from gpt2.checks import check_token_ids
from gpt2.errors import ConfigError, RequestError, did_you_mean
from gpt2.loss import IGNORE_INDEX, next_token_loss
from gpt2.packing import Packing

# OpenAI used the tanh approximation of GELU; the exact one gives other logits. The rest are for other GPT-2 models.
_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
MAX_LAYERS, MAX_PARAMETERS = 2**12, 2**40  # larger values are typing errors


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. The defaults are OpenAI's 124M model.

    Raises ConfigError for values that are not supported.
    """

    vocab_size: int = 50257
    block_size: int = 1024  # the context length (`n_positions` in transformers)
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None  # width of the MLP; None for 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    dropout: float = 0.0  # of residuals, and by default of embeddings and attention weights; in training only
    embd_dropout: float | None = None  # None for `dropout`
    attn_dropout: float | None = None  # None for `dropout`
    scale_attn_weights: bool = True  # divide the attention scores by sqrt(head size)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the layer number, from 1 (Mistral's GPT-2 models)
    attention: str = "sdpa"  # or "plain": the masked softmax written out

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value!r:.80}", field=name)
        if self.n_layer > MAX_LAYERS or self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd > MAX_PARAMETERS:
            raise ConfigError(f"{self.n_layer:,} layers of {self.n_embd:,} channels are more than any machine can hold")
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})", field="n_embd")
        for name in ("dropout", "embd_dropout", "attn_dropout"):
            if not 0 <= (getattr(self, name) or 0.0) < 1:
                raise ConfigError(f"{name} must be in [0, 1), not {getattr(self, name)}", field=name)
        for name, choices in (("activation_function", ACTIVATIONS), ("attention", ATTENTION_FUNCTIONS)):
            value = getattr(self, name)
            if value not in choices:
                message = f"{name} '{value}' is not one of {', '.join(choices)}{did_you_mean(value, choices)}"
                raise ConfigError(message, field=name)

    def query_factor(self, layer: int) -> float:
        """What layer `layer` (from 0) multiplies its queries with, beyond the usual 1 / sqrt(head size)."""
        factor = 1.0 if self.scale_attn_weights else math.sqrt(self.n_embd // self.n_head)
        return factor / (layer + 1) if self.scale_attn_by_inverse_layer_idx else factor


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Causal attention as in the paper: the reference for tests and the first step of the speed ladder."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    scores = scores.masked_fill(~(_causal_mask(q, k) if mask is None else mask), -math.inf)
    weights = F.dropout(scores.softmax(-1), dropout)
    return weights @ v  # (B, H, T, D)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The same by torch's fused kernels (flash attention where the device has it)."""
    is_causal = False
    if mask is None and q.size(2) == k.size(2):  # no cached positions; a branch, since lengths may be symbolic
        is_causal = True
    elif mask is None and q.size(2) > 1:  # a single token attends to all positions
        mask = _causal_mask(q, k)
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        q, k, v = q.float(), k.float(), v.float()  # on a CPU the backward pass in bfloat16 takes five times as long
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


def _causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """(T, S), True where position t may attend to s: a triangle aligned to the lower-right corner."""
    T, S = q.size(2), k.size(2)
    return torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)


ATTENTION_FUNCTIONS = {"sdpa": sdpa_attention, "plain": plain_attention}

OPENAI_CONFIGS = {  # the four models that OpenAI published, by their hub names
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.dropout = config.n_head, config.dropout
        self.attn_dropout = config.dropout if config.attn_dropout is None else config.attn_dropout
        self.query_factor = config.query_factor(layer)
        self.attention_fn = ATTENTION_FUNCTIONS[config.attention]

    def forward(self, x: Tensor, context: LayerCacheExtension | Packing | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        if self.query_factor != 1:
            q = q * self.query_factor
        mask = None  # causal
        if context is not None:
            k, v = context.append(k, v)  # (B, H, S, D)
            mask = context.mask
        y = self.attention_fn(q, k, v, mask, self.attn_dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)  # (B, T, C)


def scaled_queries(c_attn: Tensor, factor: float) -> Tensor:
    """A copy of c_attn's weight (3C, C) or bias (3C,) in which the queries' third is multiplied by `factor`."""
    scaled = c_attn.clone()
    scaled[: len(scaled) // 3] *= factor
    return scaled


class MLP(nn.Module):
    """Two linear layers with a GELU between them, at every position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.c_proj = nn.Linear(n_inner, config.n_embd)
        self.act = ACTIVATIONS[config.activation_function]
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(self.act(self.c_fc(x)))  # (B, T, C)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Attention, then the MLP, each with a layer norm before it (pre-norm) and a residual connection around it."""

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: LayerCacheExtension | Packing | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class Transformer(nn.Module):
    """Tokens to hidden states: embeddings, blocks, the final layer norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.dropout = config.dropout if config.embd_dropout is None else config.embd_dropout

    def forward(self, tokens: Tensor, context: CacheExtension | Packing | None = None) -> Tensor:
        """context: a cache that the tokens continue, or a packing of documents; by default each row is one sequence."""
        positions = torch.arange(tokens.size(1), device=tokens.device) if context is None else context.positions
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, None if context is None else context.layer(i))
        return self.ln_f(x)


class GPT(nn.Module):
    """GPT-2 with its language-model head.

        model = GPT(GPTConfig())                # random weights from torch's global random state
        logits = model(tokens)                  # int64 (B, T) -> (B, T, vocab_size)
        loss = model.loss(tokens, targets)      # mean next-token loss in nats

    Source: Radford et al. 2019, section 2.3; initialization as in OpenAI's code (N(0, 0.02), zero biases) with the
    residual projections scaled by 1/sqrt(2 * n_layer), so that the residual stream does not grow with depth.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(_init_weights)
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Use the token embedding as the head, if the config says so. Call it again after replacing parameters."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """The input of the head: int64 (B, T) -> (B, T, C).

        With a cache the tokens continue its rows, and their keys and values are added to it; there are no gradients.
        With `documents`, (B, T), adjacent positions with the same number form a document, and documents do not attend
        to each other. Raises RequestError for more positions than the context has, for a tensor of another type or
        shape, and on a CPU for ids outside the vocabulary.
        """
        check_token_ids("tokens", tokens, self.config.vocab_size)
        length = tokens.size(1) + (cache.length if cache is not None else 0)
        if length > self.config.block_size:
            raise RequestError(f"{length} tokens do not fit the model's context of {self.config.block_size}")
        if documents is not None:
            return self.transformer(tokens, Packing.of_documents(documents))
        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):
            return self.transformer(tokens, None if cache is None else cache.extend(tokens.size(1)))

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at every position: int64 (B, T) -> (B, T, vocab_size)."""
        return self.lm_head(self.hidden_states(tokens, cache))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        divisor: Tensor | float | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Mean next-token loss in nats over `targets`, int64 (B, T); -100 is ignored. See `gpt2.loss`."""
        check_token_ids("targets", targets, self.config.vocab_size, IGNORE_INDEX)
        hidden = self.hidden_states(tokens, documents=documents)
        return next_token_loss(hidden, self.lm_head.weight, targets, divisor)

    def make_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` positions (the whole context by default)."""
        c, weight = self.config, self.transformer.wte.weight
        shape = (batch_size, c.n_head, max_length or c.block_size, c.n_embd // c.n_head)
        return KVCache.allocate(c.n_layer, shape, weight.device, weight.dtype)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.transformer.wte.weight.device

    def num_parameters(self) -> int:
        """The number of parameters; a tied head counts once (124,439,808 for GPT-2 small)."""
        return sum(p.numel() for p in self.parameters())


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
