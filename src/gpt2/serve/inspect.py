"""Inspection of a model: next-token candidates, token log-probabilities, attention weights and the logit lens.

Pure functions of a plain `gpt2.model.GPT` and token ids; T is the number of tokens, V the size of the vocabulary. They
run the model's own modules, so they show what the model computes, in its own precision.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.errors import RequestError
from gpt2.generation.engine import eval_mode
from gpt2.generation.filters import History, topk_indices
from gpt2.generation.sampling import Sampling, logits_to_probs
from gpt2.generation.stream_decoder import StreamDecoder
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

LOGITS_CHUNK = 64  # positions whose logits are in memory at the same time: (64, V)


@dataclass(frozen=True)
class Candidate:
    """A possible next token.

    logit:       of the model, before any sampling parameter.
    probability: after the sampling parameters; 0 where they rule the token out.
    raw:         probability of the model, before any sampling parameter.
    """

    id: int
    text: str
    logit: float
    probability: float
    raw: float


@dataclass(frozen=True)
class NextTokenCandidates:
    """The distribution of the next token.

    tokens:  the most likely ones.
    kept:    how many tokens have a probability above 0 after the sampling parameters.
    entropy: in bits, after the sampling parameters.
    asked:   the target token, if one was given.
    rank:    its rank by the probability of the model; the most likely token has 1.
    """

    tokens: list[Candidate]
    kept: int
    entropy: float
    asked: Candidate | None = None
    rank: int | None = None


@dataclass(frozen=True)
class ScoredToken:
    """A token of a text with its log-probability (natural) after the tokens before it, and its rank from 1."""

    id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True)
class LayerToken:
    """A token and its probability at one layer."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class LayerPrediction:
    """The next-token prediction from the residual stream after a layer.

    asked:  the probability of the target token, if one was given.
    tokens: the most likely tokens.
    """

    layer: int
    asked: float | None
    tokens: list[LayerToken]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token: U+FFFD where it is not a whole character, ``<id>`` where the tokenizer has no text."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    return tokenizer.decode([token])


def token_offsets(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Where each token begins in the decoded text, in characters; a part of a character begins where that begins."""
    decoder, length, found = StreamDecoder(tokenizer), 0, []
    for token in tokens:
        found.append(length)
        length += len(decoder.push(token)) if token < tokenizer.vocab_size else 0
    return found


def check_tokens(model: GPT, tokens: Sequence[int]) -> None:
    """Raises RequestError if there are no tokens, or one is not in the model's vocabulary."""
    if not tokens:
        raise RequestError("the text has no tokens")
    if not all(0 <= token < model.config.vocab_size for token in tokens):
        raise RequestError(f"the text has a token outside the model's vocabulary of {model.config.vocab_size}")


@torch.inference_mode()
def next_logits(model: GPT, tokens: Sequence[int]) -> Tensor:
    """The logits after the last of `tokens`, (1, V) in float32, from as many of the last tokens as fit the context."""
    check_tokens(model, tokens)
    row = torch.tensor([list(tokens[-model.config.block_size :])], device=model.device)  # (1, T)
    with eval_mode(model):
        return model.lm_head(model.hidden_states(row)[:, -1]).float()


@torch.inference_mode()
def top_candidates(
    logits: Tensor,
    tokenizer: Tokenizer,
    sampling: Sampling,
    history: History,
    top: int,
    target_token: int | None = None,
) -> NextTokenCandidates:
    """The `top` next tokens of logits (1, V), by probability after the sampling parameters, then by the model's own.

    Raises UserError if the sampling parameters rule out every token.
    """
    probs, raw = logits_to_probs(logits, sampling, [history])[0], logits.softmax(-1)[0]  # (V,) each
    shown = topk_indices(probs[None], min(top, probs.numel()))[0].tolist()
    shown = [i for i in shown if probs[i] > 0]
    own = topk_indices(raw[None], min(top, raw.numel()))[0].tolist()
    shown += [i for i in own if i not in set(shown)][: max(0, top - len(shown))]

    def candidate(i: int) -> Candidate:
        return Candidate(i, token_text(tokenizer, i), float(logits[0, i]), float(probs[i]), float(raw[i]))

    positive = probs[probs > 0]
    entropy = max(0.0, float(-(positive * positive.log2()).sum()))
    found = [candidate(i) for i in shown]
    if target_token is None:
        return NextTokenCandidates(found, len(positive), entropy)
    rank = int((raw > raw[target_token]).sum()) + 1
    return NextTokenCandidates(found, len(positive), entropy, candidate(target_token), rank)


@torch.inference_mode()
def score_tokens(model: GPT, tokenizer: Tokenizer, tokens: Sequence[int]) -> list[ScoredToken]:
    """The log-probability of each token of a text except the first, after the tokens before it.

    A text longer than the context is scored in windows that overlap by half, so every token after the first window
    has at least half a context before it.
    """
    check_tokens(model, tokens)
    text = list(tokens)
    window, scored = model.config.block_size, []
    stride = max(1, window // 2)
    done = 0  # targets that have been scored
    for begin in range(0, max(1, len(text) - 1), stride):
        inputs, targets = text[begin : begin + window], text[begin + 1 : begin + window + 1]
        skip = done - begin
        scored += _score_targets(model, tokenizer, inputs, targets, skip)
        done = begin + len(targets)
        if done >= len(text) - 1:
            break
    return scored


def _score_targets(
    model: GPT, tokenizer: Tokenizer, inputs: list[int], targets: list[int], skip: int
) -> Iterator[ScoredToken]:
    """Score the targets after the first `skip`."""
    with eval_mode(model):
        hidden = model.hidden_states(torch.tensor([inputs], device=model.device))[0]  # (T, C)
    for at in range(skip, len(targets), LOGITS_CHUNK):
        wanted = torch.tensor(targets[at : at + LOGITS_CHUNK], device=model.device).unsqueeze(-1)  # (t, 1)
        logprobs = model.lm_head(hidden[at : at + len(wanted)]).float().log_softmax(-1)  # (t, V)
        own = logprobs.gather(-1, wanted)
        ranks = (logprobs > own).sum(-1) + 1
        for token, logprob, rank in zip(wanted[:, 0].tolist(), own[:, 0].tolist(), ranks.tolist(), strict=True):
            yield ScoredToken(token, token_text(tokenizer, token), logprob, rank)


def perplexity(scored: Sequence[ScoredToken]) -> float | None:
    """exp of the mean negative log-probability of the tokens; None if there are none."""
    return math.exp(min(700.0, -sum(token.logprob for token in scored) / len(scored))) if scored else None


@torch.inference_mode()
def attention_weights(model: GPT, tokens: Sequence[int], position: int) -> Tensor:
    """The attention weights of `position` over the positions up to itself: (layers, heads, position + 1).

    Each row sums to 1. Raises RequestError for a position outside the text or the context.
    """
    row = _prefix_tensor(model, tokens, position)
    weights = []
    with eval_mode(model):
        for x, block in zip(_residual_streams(model, row), model.transformer.h, strict=False):  # x (1, T, C)
            qkv = block.get_submodule("attn.c_attn")(block.get_submodule("ln_1")(x))  # (1, T, 3C)
            qkv = qkv.view(1, x.size(1), 3, model.config.n_head, -1)  # (1, T, 3, H, D)
            q, k, _ = qkv[0].permute(1, 2, 0, 3).float()  # (H, T, D) each
            q = q * model.config.query_factor(len(weights))
            scores = q[:, -1:] @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (H, 1, T)
            weights.append(scores.softmax(-1)[:, 0])
    return torch.stack(weights)  # (L, H, T)


@torch.inference_mode()
def logit_lens(
    model: GPT, tokenizer: Tokenizer, tokens: Sequence[int], position: int, top: int, target_token: int | None = None
) -> list[LayerPrediction]:
    """The prediction of each layer after `position`: final norm and head, applied to the residual stream of each block.

    Layer 0 is the embedding, and the last layer is the model's own prediction. Source: nostalgebraist, "interpreting
    GPT: the logit lens" (2020). Raises RequestError for a position outside the text or the context.
    """
    row = _prefix_tensor(model, tokens, position)
    layers = []
    with eval_mode(model):
        for i, x in enumerate(_residual_streams(model, row)):
            probs = model.lm_head(model.transformer.ln_f(x[:, -1])).float().softmax(-1)  # (1, V)
            best = topk_indices(probs, min(top, probs.size(-1)))[0].tolist()
            likely = [LayerToken(token, token_text(tokenizer, token), float(probs[0, token])) for token in best]
            layers.append(LayerPrediction(i, None if target_token is None else float(probs[0, target_token]), likely))
    return layers


def _prefix_tensor(model: GPT, tokens: Sequence[int], position: int) -> Tensor:
    """The tokens up to `position`, which is included: (1, T)."""
    check_tokens(model, tokens)
    if not 0 <= position < len(tokens):
        raise RequestError(f"there is no position {position} in a text of {len(tokens)} tokens")
    if position >= model.config.block_size:
        raise RequestError(f"position {position} is beyond the model's context of {model.config.block_size}")
    return torch.tensor([list(tokens[: position + 1])], device=model.device)


def _residual_streams(model: GPT, input_ids: Tensor) -> Iterator[Tensor]:
    """The residual stream before the first block and after each: (1, T, C), n_layer + 1 times."""
    transformer = model.transformer
    x = transformer.wte(input_ids) + transformer.wpe(torch.arange(input_ids.size(1), device=input_ids.device))
    yield x
    for block in transformer.h:
        x = block(x)
        yield x
