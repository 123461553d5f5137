"""Looking inside: what a model would say next, what it thought of a text, where it looked, what each layer would say.

Pure functions of a plain `gpt2.model.GPT` and token ids; T is the number of tokens, V the vocabulary. They read the
model's own modules, so that what they show is what the model computes, in whatever precision it has.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.errors import UserError
from gpt2.generation.engine import evaluating
from gpt2.generation.filters import History, largest
from gpt2.generation.sampling import Sampling, probabilities
from gpt2.model import GPT
from gpt2.tokenizer import StreamDecoder, Tokenizer

LOGITS_AT_ONCE = 64  # positions whose logits are held together: (64, V)


@dataclass(frozen=True)
class Candidate:
    """A token that might come next.

    logit:       before any setting.
    probability: after the settings; 0 where they rule it out.
    raw:         the model's own.
    """

    id: int
    text: str
    logit: float
    probability: float
    raw: float


@dataclass(frozen=True)
class Next:
    """What might come next: the likeliest tokens, and of all of them how many have a chance and their entropy."""

    tokens: list[Candidate]
    kept: int
    entropy: float
    """In bits, after the settings."""
    asked: Candidate | None = None
    """The token that was asked for, wherever it ranks."""
    rank: int | None = None
    """Its rank by the model's own probability; the likeliest has 1."""


@dataclass(frozen=True)
class Scored:
    """A token of a text, and what the model thought of it there: natural logarithm, and rank from 1."""

    id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True)
class Layer:
    """What the model would say if its layers ended here: the likeliest tokens with their probabilities."""

    layer: int
    tokens: list[tuple[int, str, float]]
    asked: float | None = None
    """The probability here of the token that was asked for."""


def piece(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token: U+FFFD where it is no whole character, its number where the tokenizer has none."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    return tokenizer.decode([token])


def starts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Where each token's text begins in the text of them all, in characters; a part of a character where that does."""
    decoder, length, found = StreamDecoder(tokenizer), 0, []
    for token in tokens:
        found.append(length)
        length += len(decoder.push(token)) if token < tokenizer.vocab_size else 0
    return found


def check_tokens(model: GPT, tokens: Sequence[int]) -> None:
    """Raises UserError for no tokens, or one that the model's vocabulary does not have."""
    if not tokens:
        raise UserError("there is nothing to look at: the text has no tokens")
    if not all(0 <= token < model.config.vocab_size for token in tokens):
        raise UserError(f"the text has a token outside the model's vocabulary of {model.config.vocab_size}")


@torch.inference_mode()
def next_logits(model: GPT, tokens: Sequence[int]) -> Tensor:
    """The logits after the last of `tokens`, (1, V) in float32; where they outgrow the context, their end is read."""
    check_tokens(model, tokens)
    row = torch.tensor([list(tokens[-model.config.block_size :])], device=model.device)  # (1, T)
    with evaluating(model):
        return model.lm_head(model.hidden_states(row)[:, -1]).float()


@torch.inference_mode()
def candidates_of(
    logits: Tensor,
    tokenizer: Tokenizer,
    sampling: Sampling,
    history: History,
    top: int,
    asked: int | None = None,
) -> Next:
    """The `top` tokens that follow logits (1, V), the likeliest after the settings first, then by the model's own.

    Raises UserError if the settings rule out every token.
    """
    probs, raw = probabilities(logits, sampling, [history])[0], logits.softmax(-1)[0]  # (V,) each
    shown = largest(probs[None], min(top, probs.numel()))[0].tolist()
    shown = [i for i in shown if probs[i] > 0]
    own = largest(raw[None], min(top, raw.numel()))[0].tolist()
    shown += [i for i in own if i not in set(shown)][: max(0, top - len(shown))]

    def candidate(i: int) -> Candidate:
        return Candidate(i, piece(tokenizer, i), float(logits[0, i]), float(probs[i]), float(raw[i]))

    positive = probs[probs > 0]
    entropy = max(0.0, float(-(positive * positive.log2()).sum()))
    found = [candidate(i) for i in shown]
    if asked is None:
        return Next(found, len(positive), entropy)
    return Next(found, len(positive), entropy, candidate(asked), int((raw > raw[asked]).sum()) + 1)


@torch.inference_mode()
def score(model: GPT, tokenizer: Tokenizer, tokens: Sequence[int]) -> list[Scored]:
    """What the model thought of each token of a text but the first, when it had read those before it.

    A text that outgrows the context is read in windows that overlap by half, so that every token has at least half
    a context before it, but for those of the beginning.
    """
    check_tokens(model, tokens)
    text = list(tokens)
    window, scored = model.config.block_size, []
    stride = max(1, window // 2)
    done = 0  # how many of the text's tokens were scored or need not be: text[0] is only read
    for begin in range(0, max(1, len(text) - 1), stride):
        inputs, targets = text[begin : begin + window], text[begin + 1 : begin + window + 1]
        skip = done - begin
        scored += _scores(model, tokenizer, inputs, targets, skip)
        done = begin + len(targets)
        if done >= len(text) - 1:
            break
    return scored


def _scores(model: GPT, tokenizer: Tokenizer, inputs: list[int], targets: list[int], skip: int) -> Iterator[Scored]:
    """Those of the targets beyond the first `skip`."""
    with evaluating(model):
        hidden = model.hidden_states(torch.tensor([inputs], device=model.device))[0]  # (T, C)
    for at in range(skip, len(targets), LOGITS_AT_ONCE):
        wanted = torch.tensor(targets[at : at + LOGITS_AT_ONCE], device=model.device).unsqueeze(-1)  # (t, 1)
        logprobs = model.lm_head(hidden[at : at + len(wanted)]).float().log_softmax(-1)  # (t, V)
        own = logprobs.gather(-1, wanted)
        ranks = (logprobs > own).sum(-1) + 1
        for token, logprob, rank in zip(wanted[:, 0].tolist(), own[:, 0].tolist(), ranks.tolist(), strict=True):
            yield Scored(token, piece(tokenizer, token), logprob, rank)


def perplexity(scored: Sequence[Scored]) -> float | None:
    """The exponential of the mean surprise of the tokens; None for none."""
    return math.exp(min(700.0, -sum(token.logprob for token in scored) / len(scored))) if scored else None


@torch.inference_mode()
def attention(model: GPT, tokens: Sequence[int], position: int) -> Tensor:
    """How much the token at `position` looks at each up to itself: (layers, heads, position + 1), rows that sum to 1.

    Raises UserError for a position that the text or the context does not have.
    """
    row = _up_to(model, tokens, position)
    weights = []
    with evaluating(model):
        for x, block in zip(_streams(model, row), model.transformer.h, strict=False):  # x (1, T, C)
            qkv = block.get_submodule("attn.c_attn")(block.get_submodule("ln_1")(x))  # (1, T, 3C)
            qkv = qkv.view(1, x.size(1), 3, model.config.n_head, -1)  # (1, T, 3, H, D)
            q, k, _ = qkv[0].permute(1, 2, 0, 3).float()  # (H, T, D) each
            q = q * model.config.query_factor(len(weights))
            scores = q[:, -1:] @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (H, 1, T)
            weights.append(scores.softmax(-1)[:, 0])
    return torch.stack(weights)  # (L, H, T)


@torch.inference_mode()
def lens(
    model: GPT, tokenizer: Tokenizer, tokens: Sequence[int], position: int, top: int, asked: int | None = None
) -> list[Layer]:
    """What each layer would say after `position`: the final norm and the head on the residual stream after each block.

    Layer 0 is the embedding itself, the last one the model's own answer. Source: nostalgebraist, "interpreting GPT:
    the logit lens" (2020). Raises UserError for a position that the text or the context does not have.
    """
    row = _up_to(model, tokens, position)
    layers = []
    with evaluating(model):
        for i, x in enumerate(_streams(model, row)):
            probs = model.lm_head(model.transformer.ln_f(x[:, -1])).float().softmax(-1)  # (1, V)
            best = largest(probs, min(top, probs.size(-1)))[0].tolist()
            told = [(token, piece(tokenizer, token), float(probs[0, token])) for token in best]
            layers.append(Layer(i, told, None if asked is None else float(probs[0, asked])))
    return layers


def _up_to(model: GPT, tokens: Sequence[int], position: int) -> Tensor:
    """The tokens that the one at `position` sees, itself included: (1, T)."""
    check_tokens(model, tokens)
    if not 0 <= position < len(tokens):
        raise UserError(f"there is no position {position} in a text of {len(tokens)} tokens")
    if position >= model.config.block_size:
        raise UserError(f"position {position} is beyond the model's context of {model.config.block_size}")
    return torch.tensor([list(tokens[: position + 1])], device=model.device)


def _streams(model: GPT, row: Tensor) -> Iterator[Tensor]:
    """The residual stream before the first block and after each: (1, T, C), n_layer + 1 times."""
    transformer = model.transformer
    x = transformer.wte(row) + transformer.wpe(torch.arange(row.size(1), device=row.device))
    yield x
    for block in transformer.h:
        x = block(x)
        yield x
