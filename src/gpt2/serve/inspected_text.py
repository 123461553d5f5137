"""What a model computed for the last inspected text, reused for the prefix that the next one shares."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2.generation.engine import eval_mode
from gpt2.generation.filters import topk_indices
from gpt2.interpret import Trace
from gpt2.model import GPT

LensCells = tuple[list[int], list[float], list[float]]  # of each layer: top token, its probability, the target's
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
        self._lens: dict[int, tuple[int, LensCells]] = {}  # position: target, cells

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
            found = torch.stack([self._thumbnail(layer, size, length) for layer in layers])
            self._thumbnails = {key: found.mul_(255).round_().to(torch.uint8).cpu()}
        return self._thumbnails[key]

    @torch.inference_mode()
    def lens(self, targets: dict[int, int]) -> list[LensCells]:
        """The logit lens at positions, {position: target}: of each of the L + 1 layers the top token, its probability
        and the target's."""
        missing = [at for at, target in targets.items() if at not in self._lens or self._lens[at][0] != target]
        layers = len(self.streams)
        for start in range(0, len(missing), max(1, LOGITS_CHUNK // layers)):
            chunk = missing[start : start + max(1, LOGITS_CHUNK // layers)]
            hidden = self.model.transformer.ln_f(self.streams[:, chunk])  # (L + 1, positions, C)
            probs = self.model.lm_head(hidden).float().softmax(-1)  # (L + 1, positions, V)
            most, best = probs.max(-1)
            for i, at in enumerate(chunk):
                cells = best[:, i].tolist(), most[:, i].tolist(), probs[:, i, targets[at]].tolist()
                self._lens[at] = targets[at], cells
        return [self._lens[at][1] for at in targets]

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

    def _thumbnail(self, layer: int, size: int, length: int) -> Tensor:
        """The largest weight of each field: (H, rows, columns). The rows of a field are computed up to the diagonal."""
        rows, keys = min(size, length), self._keys(layer, length).transpose(-2, -1).contiguous()  # (H, D, T)
        queries = self._queries(layer, 0, length) * self._scale
        found = keys.new_zeros(len(keys), rows, length)  # by rows
        for i, (start, end) in enumerate(_bins(0, length, rows)):
            scores = queries[:, start:end] @ keys[..., :end]  # (H, t, end)
            future = torch.ones(end - start, end - start, dtype=torch.bool, device=scores.device).triu(1)
            scores[..., start:].masked_fill_(future, float("-inf"))
            found[:, i, :end] = scores.softmax(-1).amax(-2)
        columns = [found[..., start:end].amax(-1) for start, end in _bins(1, length, rows - 1)]
        return torch.stack([found[..., 0], *columns], -1)

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
    own = logits.gather(-1, wanted)
    ranks = (logits > own).sum(-1) + 1
    return (own[:, 0] - logits.logsumexp(-1)).tolist(), ranks.tolist()


def _softmax_scores(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights (H, t, T) of queries (H, t, D) that may attend to all keys (H, T, D)."""
    return (q @ k.transpose(-2, -1) * q.size(-1) ** -0.5).softmax(-1)


def _bins(start: int, end: int, count: int) -> list[tuple[int, int]]:
    """start to end in so many parts of nearly the same size."""
    edges = [start + (end - start) * i // count for i in range(count + 1)] if count else []
    return list(itertools.pairwise(edges))
