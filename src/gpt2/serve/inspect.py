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
from gpt2.serve.inspected_text import LOGITS_CHUNK, InspectedText, score_targets
from gpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Candidate:
    """A possible next token.

    logit:       of the model, before any sampling parameter.
    probability: after the sampling parameters; 0 where they rule the token out.
    raw:         probability of the model, before any sampling parameter.
    bytes:       as in `partial_bytes`.
    """

    id: int
    text: str
    logit: float
    probability: float
    raw: float
    bytes: str | None = None


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
    bytes: str | None = None


@dataclass(frozen=True)
class LayerToken:
    """A token and its probability at one layer."""

    id: int
    text: str
    probability: float
    bytes: str | None = None


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


def partial_bytes(tokenizer: Tokenizer, token: int) -> str | None:
    """The bytes of a token that is not whole characters, such as "F0 9F"; None for any other."""
    if token >= tokenizer.vocab_size:
        return None
    spelled = tokenizer.token_bytes(token)
    try:
        spelled.decode()
    except UnicodeDecodeError:
        return spelled.hex(" ").upper()
    return None


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


def next_logits(model: GPT, tokens: Sequence[int], known: InspectedText | None = None) -> Tensor:
    """The logits after the last of `tokens`, (1, V) in float32, from as many of the last tokens as fit the context."""
    check_tokens(model, tokens)
    tokens = tokens[-model.config.block_size :]
    return (known or InspectedText(model)).update(tokens).logits(len(tokens) - 1, len(tokens))


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
        p, own = float(probs[i]), float(raw[i])
        return Candidate(i, token_text(tokenizer, i), float(logits[0, i]), p, own, partial_bytes(tokenizer, i))

    positive = probs[probs > 0]
    entropy = max(0.0, float(-(positive * positive.log2()).sum()))
    found = [candidate(i) for i in shown]
    if target_token is None:
        return NextTokenCandidates(found, len(positive), entropy)
    rank = int((raw > raw[target_token]).sum()) + 1
    return NextTokenCandidates(found, len(positive), entropy, candidate(target_token), rank)


@torch.inference_mode()
def score_tokens(
    model: GPT, tokenizer: Tokenizer, tokens: Sequence[int], known: InspectedText | None = None
) -> list[ScoredToken]:
    """The log-probability of each token of a text except the first, after the tokens before it.

    A text longer than the context is scored in windows that overlap by half, so every token after the first window
    has at least half a context before it. `known` is reused for the first window, and updated to it.
    """
    check_tokens(model, tokens)
    window = model.config.block_size
    known = known or InspectedText(model)
    logprobs, ranks = known.update(tokens[:window]).scores(min(window, len(tokens)))

    def add(found: tuple[list[float], list[int]]) -> None:
        logprobs.extend(found[0])
        ranks.extend(found[1])

    if len(tokens) > window:
        add(score_targets(known.logits(window - 1, window), tokens[window : window + 1]))
    stride = max(1, window // 2)
    for begin in range(stride, len(tokens) - 1, stride):
        if len(logprobs) == len(tokens) - 1:
            break
        inputs, skip = tokens[begin : begin + window], len(logprobs) - begin
        for found in _score_window(model, inputs, tokens[begin + 1 + skip : begin + window + 1], skip):
            add(found)
    rows = zip(tokens[1:], logprobs, ranks, strict=True)
    return [ScoredToken(i, token_text(tokenizer, i), p, rank, partial_bytes(tokenizer, i)) for i, p, rank in rows]


def _score_window(
    model: GPT, inputs: Sequence[int], targets: Sequence[int], skip: int
) -> Iterator[tuple[list[float], list[int]]]:
    """The log-probabilities and ranks of targets: the first one comes after `skip` + 1 of the inputs."""
    with eval_mode(model):
        hidden = model.hidden_states(torch.tensor([list(inputs)], device=model.device))[0, skip:]  # (t, C)
    for at in range(0, len(targets), LOGITS_CHUNK):
        wanted = targets[at : at + LOGITS_CHUNK]
        yield score_targets(model.lm_head(hidden[at : at + len(wanted)]).float(), wanted)


def perplexity(scored: Sequence[ScoredToken]) -> float | None:
    """exp of the mean negative log-probability of the tokens; None if there are none."""
    return math.exp(min(700.0, -sum(token.logprob for token in scored) / len(scored))) if scored else None


def attention_weights(model: GPT, tokens: Sequence[int], position: int, known: InspectedText | None = None) -> Tensor:
    """The attention weights of `position` over the positions up to itself: (layers, heads, position + 1).

    Each row sums to 1. Raises RequestError for a position outside the text or the context.
    """
    check_position(model, tokens, position)
    return (known or InspectedText(model)).update(tokens[: model.config.block_size]).attention_row(position)


@torch.inference_mode()
def logit_lens(
    model: GPT,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    position: int,
    top: int,
    target_token: int | None = None,
    known: InspectedText | None = None,
) -> list[LayerPrediction]:
    """The prediction of each layer after `position`: final norm and head, applied to the residual stream of each block.

    Layer 0 is the embedding, and the last layer is the model's own prediction. Source: nostalgebraist, "interpreting
    GPT: the logit lens" (2020). Raises RequestError for a position outside the text or the context.
    """
    check_position(model, tokens, position)
    text = (known or InspectedText(model)).update(tokens[: model.config.block_size])
    layers = []
    for i in range(model.config.n_layer + 1):
        probs = text.logits(position, position + 1, i).softmax(-1)  # (1, V)
        best = topk_indices(probs, min(top, probs.size(-1)))[0].tolist()
        likely = [
            LayerToken(token, token_text(tokenizer, token), float(probs[0, token]), partial_bytes(tokenizer, token))
            for token in best
        ]
        layers.append(LayerPrediction(i, None if target_token is None else float(probs[0, target_token]), likely))
    return layers


def check_position(model: GPT, tokens: Sequence[int], position: int) -> None:
    """Raises RequestError for a position outside the text or the context, and as `check_tokens`."""
    check_tokens(model, tokens)
    if not 0 <= position < len(tokens):
        raise RequestError(f"there is no position {position} in a text of {len(tokens)} tokens")
    if position >= model.config.block_size:
        raise RequestError(f"position {position} is beyond the model's context of {model.config.block_size}")
