"""What a model computed for the last inspected text, reused for the prefix that the next one shares."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.generation.engine import eval_mode
from gpt2.generation.filters import topk_indices
from gpt2.interpret import Trace
from gpt2.model import GPT

LOGITS_CHUNK = 64  # positions whose logits are in memory at the same time: (64, V)


class InspectedText:
    """The keys, values and residual streams of one text, and the log-probability and rank of its tokens.

    Takes about one and a half slots of the server for each model. T is the number of tokens, C = n_embd, L = n_layer.

    tokens:  the text, at most the context.
    streams: (L + 1, block_size, C): the residual stream before the first block and after each, up to position T.
    """

    def __init__(self, model: GPT) -> None:
        config = model.config
        self.model, self.tokens = model, list[int]()
        self.cache = model.make_cache(1)
        shape = (config.n_layer + 1, config.block_size, config.n_embd)
        self.streams = torch.zeros(shape, device=model.device, dtype=model.transformer.wte.weight.dtype)
        self._logprobs, self._ranks = list[float](), list[int]()  # of the tokens after the first
        self._patterns: dict[int, Tensor] = {}
        self._thumbnails: dict[tuple[int, int], Tensor] = {}
        self._lens: dict[int, tuple[int, tuple[list[int], list[float], list[float]]]] = {}  # position: target, cells

    @torch.inference_mode()
    def update(self, tokens: Sequence[int]) -> "InspectedText":
        """Compute the text, from the first token that differs on; what comes after a prefix is kept. Returns itself."""
        same = common_prefix(self.tokens, tokens)
        if same == len(tokens):
            return self
        self.tokens, self._patterns, self._thumbnails = list(tokens[:same]), {}, {}
        self._lens = {at: cells for at, cells in self._lens.items() if at < same}
        self.cache.lengths[0] = same
        del self._logprobs[max(0, same - 1) :], self._ranks[max(0, same - 1) :]
        self._append(tokens[same:], same, len(tokens))
        self.tokens = list(tokens)
        return self

    def _append(self, new: Sequence[int], start: int, end: int) -> None:
        transformer, extension = self.model.transformer, self.cache.extend(end - start)
        with eval_mode(self.model):
            row = torch.tensor([list(new)], device=self.model.device)  # (1, t)
            x = transformer.wte(row) + transformer.wpe(extension.positions)  # (1, t, C)
            self.streams[0, start:end] = x[0]
            for i, block in enumerate(transformer.h):
                x = block(x, extension.layer(i))
                self.streams[i + 1, start:end] = x[0]

    @torch.inference_mode()
    def logits(self, start: int, end: int, layer: int = -1) -> Tensor:
        """The logits (end - start, V) in float32 of some positions, from the residual stream after a layer."""
        hidden = self.model.transformer.ln_f(self.streams[layer, start:end])
        return self.model.lm_head(hidden).float()

    @torch.inference_mode()
    def scores(self, length: int) -> tuple[list[float], list[int]]:
        """The natural log-probability and the rank (from 1) of each of the first `length` tokens after the first."""
        for start in range(len(self._logprobs), length - 1, LOGITS_CHUNK):
            targets = self.tokens[start + 1 : min(start + 1 + LOGITS_CHUNK, length)]
            logprobs, ranks = score_targets(self.logits(start, start + len(targets)), targets)
            self._logprobs += logprobs
            self._ranks += ranks
        return self._logprobs[: length - 1], self._ranks[: length - 1]

    @torch.inference_mode()
    def top(self, count: int, length: int) -> list[list[tuple[int, float]]]:
        """The `count` most likely tokens, with probabilities, in place of each of `length` tokens but the first."""
        found: list[list[tuple[int, float]]] = []
        for start in range(0, length - 1, LOGITS_CHUNK):
            probs = self.logits(start, min(start + LOGITS_CHUNK, length - 1)).softmax(-1)  # (t, V)
            best = topk_indices(probs, min(count, probs.size(-1)))
            rows = zip(best.tolist(), probs.gather(-1, best).tolist(), strict=True)
            found += [list(zip(ids, values, strict=True)) for ids, values in rows]
        return found

    @torch.inference_mode()
    def attention_row(self, position: int) -> Tensor:
        """The attention weights of one position over those up to itself: (L, H, position + 1), float32."""
        rows = []
        for layer in range(self.model.config.n_layer):
            q = self._queries(layer, position, position + 1)  # (H, 1, D)
            rows.append(_softmax_scores(q, self._keys(layer, position + 1))[:, 0])
        return torch.stack(rows)

    @torch.inference_mode()
    def pattern(self, layer: int) -> Tensor:
        """The attention weights of all heads of a layer: (H, T, T), float32; kept for one layer."""
        if layer not in self._patterns:
            T = len(self.tokens)
            scores = self._queries(layer, 0, T) @ self._keys(layer, T).transpose(-2, -1)  # (H, T, T)
            future = torch.ones(T, T, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.mul_(self._scale).masked_fill_(future, float("-inf"))
            self._patterns = {layer: scores.softmax(-1)}
        return self._patterns[layer]

    @torch.inference_mode()
    def thumbnails(self, size: int, length: int) -> Tensor:
        """The attention patterns of all heads over the first `length` tokens, at most size x size fields each: uint8.

        (L, H, rows, columns): the largest weight of each field, where 255 is 1. The first column is one token.
        """
        key = (size, length)
        if key not in self._thumbnails:
            layers = range(self.model.config.n_layer)
            found = torch.stack([_shrink(self.pattern(layer)[:, :length, :length], size) for layer in layers])
            self._thumbnails = {key: found.mul_(255).round_().to(torch.uint8).cpu()}
        return self._thumbnails[key]

    @torch.inference_mode()
    def lens(self, position: int, target: int) -> tuple[list[int], list[float], list[float]]:
        """The logit lens at a position: of each of the L + 1 layers the top token, its probability and the target's."""
        if position not in self._lens or self._lens[position][0] != target:
            hidden = self.model.transformer.ln_f(self.streams[:, position])  # (L + 1, C)
            probs = self.model.lm_head(hidden).float().softmax(-1)  # (L + 1, V)
            most, best = probs.max(-1)
            self._lens[position] = target, (best.tolist(), most.tolist(), probs[:, target].tolist())
        return self._lens[position][1]

    @torch.inference_mode()
    def activations(self, position: int) -> Trace:
        """The activations of one position that `gpt2.interpret.attribute_logit` needs, and its logits (1, 1, V)."""
        transformer, config = self.model.transformer, self.model.config
        found = {
            "hook_embed": transformer.wte.weight[self.tokens[position]],
            "hook_pos_embed": transformer.wpe.weight[position],
            f"blocks.{config.n_layer - 1}.hook_resid_post": self.streams[-1, position],
        }
        weights = self.attention_row(position)  # (L, H, position + 1)
        for i, block in enumerate(transformer.h):
            values = self.cache.data[i, 1, 0, :, : position + 1]  # (H, position + 1, D)
            z = (weights[i, :, None].to(values.dtype) @ values)[:, 0]  # (H, D)
            with eval_mode(self.model):
                attention = block.get_submodule("attn.c_proj")(z.flatten())
            found[f"blocks.{i}.attn.hook_z"] = z
            found[f"blocks.{i}.hook_mlp_out"] = self.streams[i + 1, position] - self.streams[i, position] - attention
        rows = {name: value[None, None] for name, value in found.items()}
        return Trace(rows, self.logits(position, position + 1)[None])

    @property
    def _scale(self) -> float:
        return (self.model.config.n_embd // self.model.config.n_head) ** -0.5

    def _keys(self, layer: int, end: int) -> Tensor:
        return self.cache.data[layer, 0, 0, :, :end].float()  # (H, T, D)

    def _queries(self, layer: int, start: int, end: int) -> Tensor:
        block, config = self.model.transformer.h[layer], self.model.config
        with eval_mode(self.model):
            x = block.get_submodule("ln_1")(self.streams[layer, start:end])  # (t, C)
            q = block.get_submodule("attn.c_attn")(x)[:, : config.n_embd] * config.query_factor(layer)
        return q.reshape(end - start, config.n_head, -1).transpose(0, 1).float()  # (H, t, D)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens at the beginning that are the same."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def score_targets(logits: Tensor, targets: Sequence[int]) -> tuple[list[float], list[int]]:
    """The log-probability and rank of a target token at each position of logits (t, V)."""
    wanted = torch.tensor(targets, device=logits.device).unsqueeze(-1)  # (t, 1)
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, wanted)
    ranks = (logprobs > own).sum(-1) + 1
    return own[:, 0].tolist(), ranks.tolist()


def _softmax_scores(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights (H, t, T) of queries (H, t, D) that may attend to all keys (H, T, D)."""
    return (q @ k.transpose(-2, -1) * q.size(-1) ** -0.5).softmax(-1)


def _shrink(pattern: Tensor, size: int) -> Tensor:
    """(H, T, T) to at most (H, size, size), by the largest weight of each field; the first column stays alone."""
    rows = min(size, pattern.size(-1))
    first = F.adaptive_max_pool2d(pattern[..., :1], (rows, 1))
    if rows < 2:
        return first
    return torch.cat([first, F.adaptive_max_pool2d(pattern[..., 1:], (rows, rows - 1))], -1)
