"""GPT-2 in one file: the model, its loss, and generation. It needs nothing but PyTorch.

The chapters in this folder explain every line. `tests/docs/test_from_scratch.py` checks that its logits, gradients
and greedy tokens equal those of `gpt2.model`.

Shapes: B rows, T positions, C channels, H heads of D = C / H channels, V tokens in the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Config:
    """The shape of the model. The defaults are GPT-2 small."""

    vocab_size: int = 50257
    block_size: int = 1024  # the context length
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class Attention(nn.Module):
    """Every position takes a weighted mean of the values of the positions up to itself."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one matrix
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """A small network at every position by itself."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention moves information between positions, the MLP works on it; both add to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Tokens to hidden states."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # what the token is
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))  # (B, T, C)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT(nn.Module):
    """Hidden states to the logits of the next token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one table for input and output
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # the two layers of a block that write to the residual stream
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.transformer(tokens))  # (B, T) -> (B, T, V)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean of -ln p(target) in nats."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, temperature: float = 1.0, top_k: int = 0) -> Tensor:
        """Append `count` tokens to every row. Temperature 0 takes the most likely token each time."""
        for _ in range(count):
            logits = self(tokens[:, -self.config.block_size :])[:, -1]  # (B, V)
            if temperature == 0:
                chosen = logits.argmax(-1, keepdim=True)
            else:
                if top_k:
                    smallest = logits.topk(top_k).values[:, -1:]
                    logits = logits.masked_fill(logits < smallest, -math.inf)
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1)
            tokens = torch.cat([tokens, chosen], dim=1)
        return tokens


def train(model: GPT, data: Tensor, steps: int, batch_size: int, lr: float) -> list[float]:
    """Train on random windows of `data`, a vector of tokens. Returns the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    length, losses = model.config.block_size, []
    for step in range(steps):
        for group in optimizer.param_groups:  # warm up for a tenth of the run, then fall along a cosine
            warmup = min(1, (step + 1) / (0.1 * steps))
            group["lr"] = lr * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        starts = torch.randint(len(data) - length - 1, (batch_size,))
        rows = torch.stack([data[i : i + length + 1] for i in starts])
        loss = model.loss(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses
