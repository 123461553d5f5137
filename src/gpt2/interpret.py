"""A look inside a model: activations, patching, ablation and direct logit attribution, over forward hooks.

    found = trace(model, tokens)                      # every activation by its name
    found["blocks.0.attn.hook_pattern"]               # (B, H, T, T)
    logits = patch(model, tokens, {"blocks.3.hook_resid_pre": lambda x: x + vector})
    logits = ablate(model, tokens, heads=[(0, 3)], mlps=[5], mode="mean")
    parts = logit_attribution(model, tokens, target, alternative)
    head_scores(model).induction                      # (L, H)

Hooks are registered for one call and removed after it. Names and shapes are those of TransformerLens (Nanda and Bloom,
2022). B rows, T positions, C = n_embd, H heads of D, L layers, V = vocab_size.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.errors import RequestError, did_you_mean
from gpt2.model import GPT

Replacement = Tensor | Callable[[Tensor], Tensor]

_MODEL_NAMES = ("hook_embed", "hook_pos_embed")
_BLOCK_NAMES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
_ATTENTION_NAMES = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "attn.hook_z")
_MLP_NAMES = ("mlp.hook_pre", "mlp.hook_post")
_DERIVED_NAMES = ("attn.hook_attn_scores", "attn.hook_result")  # can be read, not patched


@dataclass(frozen=True)
class Trace:
    """The activations of one forward pass, by name, and its logits (B, T, V)."""

    activations: dict[str, Tensor]
    logits: Tensor

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.activations:
            raise RequestError(f"there is no activation '{name}'{did_you_mean(name, self.activations)}")
        return self.activations[name]


@dataclass(frozen=True)
class LogitAttribution:
    """Direct contributions to a logit, or to the difference of two, with the scale of the final layer norm fixed.

    All parts sum to `total`, which is the logit (or the difference) itself.

    heads:     (L, H): each attention head, without the bias of its layer's output projection.
    attn_bias: (L,): the bias of the output projection of each layer.
    mlps:      (L,).
    embed, pos_embed, bias: the token embedding, the position embedding, and the bias of the final layer norm.
    """

    heads: Tensor
    attn_bias: Tensor
    mlps: Tensor
    embed: float
    pos_embed: float
    bias: float
    total: float


@dataclass(frozen=True)
class HeadScores:
    """The attention of each head, (L, H) between 0 and 1, to three positions of a repeated random text.

    previous:  to the token before.
    duplicate: from a token of the repetition to the same token in the first part.
    induction: from a token of the repetition to the token after that.
    """

    previous: Tensor
    duplicate: Tensor
    induction: Tensor


def activation_names(model: GPT) -> list[str]:
    """The names of all activations of a model, in the order of the computation."""
    block = (_BLOCK_NAMES[0], *_ATTENTION_NAMES, *_DERIVED_NAMES, *_BLOCK_NAMES[1:3], *_MLP_NAMES, *_BLOCK_NAMES[3:])
    return [*_MODEL_NAMES, *(f"blocks.{i}.{name}" for i in range(model.config.n_layer) for name in block)]


def trace(model: GPT, tokens: Tensor, names: Collection[str] | None = None) -> Trace:
    """Run the model on int64 tokens (B, T), and keep activations: those with these names, or all.

    Residual streams and outputs are (B, T, C); hook_q, hook_k, hook_v and hook_z (B, T, H, D); hook_attn_scores and
    hook_pattern (B, H, T, T), with -inf and 0 for later positions; hook_result (B, T, H, C); hook_pre and hook_post
    (B, T, n_inner). Raises RequestError for a name that does not exist, and for more tokens than the context.
    """
    wanted = activation_names(model) if names is None else list(names)
    _check_names(wanted, activation_names(model))
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def take(value: Tensor) -> Tensor:
            found[name] = value.detach().clone()
            return value

        return take

    direct = [name for name in wanted if not name.endswith(_DERIVED_NAMES)]
    sources = {source for name in wanted for source in _sources_of(name)}
    logits = patch(model, tokens, {name: keep(name) for name in {*direct, *sources}})
    for name in wanted:
        if name.endswith("hook_attn_scores"):
            factor = model.config.query_factor(int(name.split(".")[1]))
            found[name] = _attention_scores(found[_sibling(name, "hook_q")], found[_sibling(name, "hook_k")], factor)
        elif name.endswith("hook_result"):
            found[name] = _head_results(model, int(name.split(".")[1]), found[_sibling(name, "hook_z")])
    return Trace({name: found[name] for name in wanted}, logits)


def patch(
    model: GPT,
    tokens: Tensor,
    replacements: Mapping[str, Replacement],
    last_only: bool = False,
    resume: tuple[int, Tensor] | None = None,
) -> Tensor:
    """The logits (B, T, V) of a run in which activations are replaced: by a tensor, or by a function of the activation.

    last_only: only those after the last position, (B, 1, V), which takes less time and memory.
    resume:    (layer, hook_resid_pre of it (B, T, C)), known from another run: earlier layers are not run again.

    Takes every name of `trace` except hook_attn_scores and hook_result. Raises RequestError for other names, and for a
    replacement of another shape.
    """
    _check_names(replacements, [name for name in activation_names(model) if not name.endswith(_DERIVED_NAMES)])
    with torch.no_grad(), _eval_mode(model), ExitStack() as hooks:
        for i, block in enumerate(model.transformer.h):
            prefix = f"blocks.{i}."
            own = {name.removeprefix(prefix): value for name, value in replacements.items() if name.startswith(prefix)}
            if own:
                _hook_block(model, block, prefix, own, hooks)
        for name, module in (("hook_embed", model.transformer.wte), ("hook_pos_embed", model.transformer.wpe)):
            if name in replacements:
                apply = partial(_apply, name, replacements[name])  # of (T, C) or (B, T, C), as (B, T, C)
                _on_output(module, lambda x, f=apply: f(x.expand(len(tokens), *x.shape[-2:])), hooks)
        hidden = model.hidden_states(tokens) if resume is None else _run_from(model, *resume)
        return model.lm_head(hidden[:, -1:] if last_only else hidden)


def ablate(
    model: GPT,
    tokens: Tensor,
    heads: Sequence[tuple[int, int]] = (),
    mlps: Sequence[int] = (),
    mode: str = "zero",
    last_only: bool = False,
    resume: tuple[int, Tensor] | None = None,
) -> Tensor:
    """The logits (B, T, V) without some heads, (layer, head) each from 0, and the MLPs of some layers.

    last_only, resume: as for `patch`.

    mode: "zero" replaces an output by zeros; "mean" by its mean over all rows and positions of these tokens. Raises
    RequestError for layers, heads and modes that do not exist.
    """
    config = model.config
    if mode not in ("zero", "mean"):
        raise RequestError(f"mode must be 'zero' or 'mean', not '{mode}'")
    for layer, head in [*heads, *((layer, 0) for layer in mlps)]:
        if not (0 <= layer < config.n_layer and 0 <= head < config.n_head):
            there = f"there are {config.n_layer} layers of {config.n_head} heads"
            raise RequestError(f"there is no head {head} in layer {layer}: {there}")

    def without(part: Tensor) -> Tensor:
        return torch.zeros_like(part) if mode == "zero" else part.mean((0, 1), keepdim=True).expand_as(part)

    def without_heads(own: list[int], z: Tensor) -> Tensor:
        z = z.clone()
        z[:, :, own] = without(z[:, :, own])
        return z

    replacements: dict[str, Replacement] = {f"blocks.{layer}.hook_mlp_out": without for layer in mlps}
    for layer in {layer for layer, _ in heads}:
        own = sorted({head for at, head in heads if at == layer})
        replacements[f"blocks.{layer}.attn.hook_z"] = partial(without_heads, own)
    return patch(model, tokens, replacements, last_only, resume)


def head_scores(model: GPT, length: int = 50, rows: int = 4, seed: int = 0) -> HeadScores:
    """How much each head attends to the previous token, to a duplicate, and by induction.

    Each is a mean over `rows` texts of `length` random tokens that are repeated once; both are shorter in a smaller
    context. Source: Olsson et al. 2022, "In-context learning and induction heads", with the diagonals of the attention
    pattern that TransformerLens's demonstration reads. Raises RequestError for a context of fewer than 4 tokens.
    """
    config = model.config
    n = min(length, config.block_size // 2)
    if n < 2:
        raise RequestError(f"head scores need a context of at least 4 tokens, not {config.block_size}")
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(config.vocab_size, (rows, n), generator=generator)
    tokens = torch.cat([once, once], 1).to(model.device)  # (rows, 2n)
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(config.n_layer)]
    patterns = trace(model, tokens, names).activations.values()  # (rows, H, 2n, 2n) each

    def mean_of_diagonal(offset: int) -> Tensor:
        """Of the last n positions, which repeat the first n."""
        found = [pattern[..., n:, :].diagonal(n + offset, -2, -1).float().mean((0, -1)) for pattern in patterns]
        return torch.stack(found).cpu()

    return HeadScores(mean_of_diagonal(-1), mean_of_diagonal(-n), mean_of_diagonal(1 - n))


def logit_attribution(
    model: GPT, tokens: Tensor, target: int, alternative: int | None = None, position: int = -1
) -> LogitAttribution:
    """What each head and MLP adds directly to the logit of a target token after a position of tokens (1, T).

    With an alternative, to the difference of both logits. Source: direct logit attribution, Elhage et al. 2021, "A
    mathematical framework for transformer circuits". Raises RequestError for tokens outside the vocabulary.
    """
    if len(tokens) != 1:
        raise RequestError(f"logit attribution takes one row of tokens, not {len(tokens)}")
    return attribute_logit(model, trace(model, tokens, attribution_names(model)), target, alternative, position)


def attribution_names(model: GPT) -> list[str]:
    """The activations that `attribute_logit` needs."""
    layers = range(model.config.n_layer)
    outputs = [f"blocks.{i}.{name}" for i in layers for name in ("attn.hook_z", "hook_mlp_out")]
    return [*_MODEL_NAMES, *outputs, f"blocks.{layers[-1]}.hook_resid_post"]


@torch.no_grad()
def attribute_logit(
    model: GPT, run: Trace, target: int, alternative: int | None = None, position: int = -1
) -> LogitAttribution:
    """`logit_attribution` of a run that is known already, whose activations have one row."""
    config = model.config
    for token in (target, *([] if alternative is None else [alternative])):
        if not 0 <= token < config.vocab_size:
            raise RequestError(f"token {token} is not in the model's vocabulary of {config.vocab_size:,}")
    layers = range(config.n_layer)
    last = f"blocks.{config.n_layer - 1}.hook_resid_post"
    norm, unembed = model.transformer.ln_f, model.lm_head.weight.float()
    direction = unembed[target] - (0 if alternative is None else unembed[alternative])  # (C,)
    residual = run[last][0, position].float()
    scale = (residual.var(correction=0) + norm.eps).sqrt()
    weight = direction if norm.weight is None else direction * norm.weight.float()

    def contribution(parts: Tensor) -> Tensor:
        """Of vectors (..., C) of the residual stream."""
        parts = parts.float()
        return (parts - parts.mean(-1, keepdim=True)) @ weight / scale

    projections: list[Any] = [model.transformer.h[i].get_submodule("attn.c_proj") for i in layers]
    biases = [torch.zeros_like(residual) if each.bias is None else each.bias for each in projections]
    heads = [_head_results(model, i, run[f"blocks.{i}.attn.hook_z"][:, [position]])[0, 0] for i in layers]  # (H, C)
    bias = 0.0 if norm.bias is None else float(direction @ norm.bias.float())
    parts = {
        "heads": contribution(torch.stack(heads)),
        "attn_bias": contribution(torch.stack(biases)),
        "mlps": contribution(torch.stack([run[f"blocks.{i}.hook_mlp_out"][0, position] for i in layers])),
        "embed": float(contribution(run["hook_embed"][0, position])),
        "pos_embed": float(contribution(run["hook_pos_embed"][0, position])),
    }
    return LogitAttribution(**parts, bias=bias, total=float(contribution(residual)) + bias)


def _run_from(model: GPT, layer: int, x: Tensor) -> Tensor:
    """The input of the head, from the residual stream before a layer."""
    for block in model.transformer.h[layer:]:
        x = block(x)
    return model.transformer.ln_f(x)


def _sources_of(name: str) -> list[str]:
    """The activations from which a derived one is computed."""
    if name.endswith("hook_attn_scores"):
        return [_sibling(name, "hook_q"), _sibling(name, "hook_k")]
    return [_sibling(name, "hook_z")] if name.endswith("hook_result") else []


def _sibling(name: str, last: str) -> str:
    return f"{name.rpartition('.')[0]}.{last}"


def _check_names(names: Collection[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise RequestError(f"there is no activation '{name}' to use here{did_you_mean(name, known)}")


def _apply(name: str, replacement: Replacement, value: Tensor) -> Tensor:
    new = replacement(value) if callable(replacement) else replacement
    if new.shape != value.shape:
        raise RequestError(f"{name} has the shape {tuple(value.shape)}, and its replacement {tuple(new.shape)}")
    return new.to(value.dtype)


def _on_output(module: nn.Module, apply: Callable[[Tensor], Tensor], hooks: ExitStack) -> None:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return apply(output)

    hooks.callback(module.register_forward_hook(hook).remove)


def _on_input(module: nn.Module, apply: Callable[[Tensor], Tensor], hooks: ExitStack) -> None:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (apply(inputs[0]), *inputs[1:])

    hooks.callback(module.register_forward_pre_hook(hook).remove)


def _hook_block(model: GPT, block: Any, prefix: str, own: Mapping[str, Replacement], hooks: ExitStack) -> None:
    """Register the hooks of one block, in the order of its computation."""
    seen: dict[str, Tensor] = {}
    apply: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(_apply, prefix + name, value) for name, value in own.items()
    }

    def remember_input(x: Tensor) -> Tensor:
        seen["x"] = apply["hook_resid_pre"](x) if "hook_resid_pre" in apply else x
        return seen["x"]

    _on_input(block, remember_input, hooks)
    if any(name in apply for name in _ATTENTION_NAMES):
        _hook_attention(model, block.attn, apply, seen, hooks)
    if "hook_attn_out" in apply:
        _on_output(block.attn, apply["hook_attn_out"], hooks)
    if "hook_resid_mid" in apply:
        _on_output(block.attn, lambda out: apply["hook_resid_mid"](seen["x"] + out) - seen["x"], hooks)
    if "mlp.hook_pre" in apply:
        _on_output(block.mlp.c_fc, apply["mlp.hook_pre"], hooks)
    if "mlp.hook_post" in apply:
        _on_input(block.mlp.c_proj, apply["mlp.hook_post"], hooks)
    if "hook_mlp_out" in apply:
        _on_output(block.mlp, apply["hook_mlp_out"], hooks)
    if "hook_resid_post" in apply:
        _on_output(block, apply["hook_resid_post"], hooks)


def _hook_attention(
    model: GPT,
    attention: Any,
    apply: Mapping[str, Callable[[Tensor], Tensor]],
    seen: dict[str, Tensor],
    hooks: ExitStack,
) -> None:
    H = model.config.n_head

    def on_qkv(qkv: Tensor) -> Tensor:
        B, T, _ = qkv.shape
        parts = dict(
            zip(("attn.hook_q", "attn.hook_k", "attn.hook_v"), qkv.view(B, T, 3, H, -1).unbind(2), strict=True)
        )
        for name, part in parts.items():
            seen[name] = apply[name](part) if name in apply else part  # (B, T, H, D)
        return torch.stack([seen[name] for name in parts], 2).view(B, T, -1)

    def on_z(z: Tensor) -> Tensor:
        B, T, C = z.shape
        z = z.view(B, T, H, -1)
        if "attn.hook_pattern" in apply:
            scores = _attention_scores(seen["attn.hook_q"], seen["attn.hook_k"], attention.query_factor)
            own = scores.softmax(-1)  # (B, H, T, T)
            new = apply["attn.hook_pattern"](own)
            if new is not own:
                z = torch.einsum("bhts,bshd->bthd", new, seen["attn.hook_v"])
        return (apply["attn.hook_z"](z) if "attn.hook_z" in apply else z).reshape(B, T, C)

    _on_output(attention.c_attn, on_qkv, hooks)
    _on_input(attention.c_proj, on_z, hooks)


def _attention_scores(q: Tensor, k: Tensor, factor: float) -> Tensor:
    """(B, H, T, T) of queries and keys (B, T, H, D), with -inf for later positions."""
    T = q.size(1)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * factor * q.size(-1) ** -0.5
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), float("-inf"))


def _head_results(model: GPT, layer: int, z: Tensor) -> Tensor:
    """What each head adds to the residual stream, (B, T, H, C), of its values z (B, T, H, D)."""
    projection: Any = model.transformer.h[layer].get_submodule("attn.c_proj")
    weight = projection.weight  # (C, H * D)
    return torch.einsum("bthd,chd->bthc", z, weight.view(weight.size(0), z.size(2), z.size(3)))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block, and restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
