"""Logits to a token: pure functions, one definition for every decoder.

The order is that of `transformers` (5.23, `GenerationMixin._get_logits_processor`), with OpenAI's settings put in:

    logit bias, repetition penalty, presence and frequency penalty, no-repeat n-grams, bad words, minimum length;
    temperature, top-k, top-p, min-p, typical, epsilon, eta.

Each works on what the one before it left; see `gpt2.generation.filters` for each. Greedy decoding (temperature 0)
takes the most likely token after the first line, the first in the vocabulary of those that are equal.

A token is drawn by one random number of its row's own stream: the first token in the order of the vocabulary at
which the cumulated probability exceeds the number. `choose` is `draw` of `probabilities`, done faster: it never
looks again at the tokens that top-k, top-p or min-p leave no chance.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gpt2.errors import UserError
from gpt2.generation.candidates import CandidateGroup, select_candidates
from gpt2.generation.filters import (
    BLOCK_SIZE,
    History,
    ban_early_end_tokens,
    ban_repeated_ngrams,
    ban_words,
    bias_logits,
    block_sums,
    gather_block,
    keep_epsilon,
    keep_eta,
    keep_min_p,
    keep_top_p,
    keep_typical,
    penalize_frequency,
    penalize_presence,
    penalize_repetition,
    stable_argmax,
    topk_indices,
    widest_float_dtype,
)

GREEDY_TEMPERATURE = (
    1e-20  # colder than this nothing but the most likely token has a chance, and a division could overflow
)
MAX_ABS_SETTING = 1e6  # of penalties, biases and temperatures: what they make of a logit fits float32
ROWS_PER_CHUNK = (
    8  # so many at once on a CPU: what is made on the way then stays in its cache, and in memory it has already
)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The defaults sample from the model's own distribution.

    temperature:          divides the logits; 0 takes the most likely token, always.
    top_k:                only the k most likely tokens; 0 for all.
    top_p:                only the smallest set of most likely tokens whose probabilities sum to p; 1 for all.
    min_p:                only tokens at least p times as likely as the most likely one; 0 for all.
    typical_p:            only the tokens of the most expected surprise, until they sum to p; 1 for all.
    epsilon_cutoff:       only tokens of at least this probability; 0 for all.
    eta_cutoff:           the same with a cut that follows the entropy; 0 for all.
    repetition_penalty:   divides the logits above 0 of what was said, prompt included, and multiplies those below.
    presence_penalty:     is subtracted from the logits of what the continuation holds.
    frequency_penalty:    the same, as many times as the continuation holds it.
    no_repeat_ngram_size: no run of so many tokens twice; 0 for no such rule.
    logit_bias:           {id: bias}, added to the logits; minus infinity rules a token out.
    bad_words:            sequences of ids that are never said.
    min_new_tokens:       no end of text before so many new tokens.

    Hashable: `logit_bias` is kept as pairs sorted by id, `bad_words` as tuples.
    Raises UserError for settings that make no sense or leave nothing to choose from.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
    bad_words: Iterable[Sequence[int]] = ()
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", _parse_logit_bias(self.logit_bias))
        object.__setattr__(self, "bad_words", _parse_bad_words(self.bad_words))
        for name in ("top_k", "no_repeat_ngram_size", "min_new_tokens"):
            value, label = getattr(self, name), name.replace("_", "-")
            if not isinstance(value, int) or value < 0:
                meaning = "0 (all)" if name == "top_k" else "0"
                raise UserError(f"{label} must be {meaning} or more, and whole, not {value}")
        fits = {
            "temperature": (0 <= self.temperature <= MAX_ABS_SETTING, f"0 or more and at most {MAX_ABS_SETTING:,.0f}"),
            "top_p": (0 < self.top_p <= 1, "over 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 or more and at most 1"),
            "typical_p": (0 < self.typical_p <= 1, "over 0 and at most 1"),
            "epsilon_cutoff": (0 <= self.epsilon_cutoff < 1, "0 or more and under 1"),
            "eta_cutoff": (0 <= self.eta_cutoff < 1, "0 or more and under 1"),
            "repetition_penalty": (
                1 / MAX_ABS_SETTING <= self.repetition_penalty <= MAX_ABS_SETTING,
                f"over 0 (at least {1 / MAX_ABS_SETTING}) and at most {MAX_ABS_SETTING:,.0f}",
            ),
            "presence_penalty": (
                abs(self.presence_penalty) <= MAX_ABS_SETTING,
                f"at most {MAX_ABS_SETTING:,.0f} either way",
            ),
            "frequency_penalty": (
                abs(self.frequency_penalty) <= MAX_ABS_SETTING,
                f"at most {MAX_ABS_SETTING:,.0f} either way",
            ),
        }
        for name, (fit, wanted) in fits.items():
            if not fit:
                raise UserError(f"{name.replace('_', '-')} must be {wanted}, not {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, and no random number."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def needs_history(self) -> bool:
        """Whether a token depends on the row's `History`."""
        penalties = (self.repetition_penalty != 1, self.presence_penalty != 0, self.frequency_penalty != 0)
        return any((*penalties, self.no_repeat_ngram_size, self.bad_words, self.min_new_tokens))

    def check_token_ids(self, vocab_size: int) -> None:
        """Raises UserError if `logit_bias` or `bad_words` name an id that a vocabulary of this size does not have."""
        words = cast("tuple[tuple[int, ...], ...]", self.bad_words)
        named = {"logit-bias": dict(self.logit_bias), "bad-words": [token for word in words for token in word]}
        for name, ids in named.items():
            if ids and max(ids) >= vocab_size:
                raise UserError(f"{name}: token {max(ids)} is not in the model's vocabulary of {vocab_size:,}")


def _parse_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs sorted by id; ids may be strings of digits, as JSON has them for keys."""
    try:
        pairs = {int(token): float(bias) for token, bias in (value.items() if isinstance(value, Mapping) else value)}
    except (TypeError, ValueError):
        raise UserError(f"logit-bias must give a number for each token id, not {value!r:.80}") from None
    for token, bias in pairs.items():
        if token < 0 or not (abs(bias) <= MAX_ABS_SETTING or bias == -math.inf):
            raise UserError(
                f"logit-bias must give ids of 0 or more a bias of at most {MAX_ABS_SETTING:,.0f} either way (-inf to ban), "
                f"not {token}: {bias}"
            )
    return tuple(sorted(pairs.items()))


def _parse_bad_words(value: Any) -> tuple[tuple[int, ...], ...]:
    try:
        words = tuple(tuple(word) for word in value)
    except TypeError:
        raise UserError(f"bad-words must be sequences of token ids, not {value!r:.80}") from None
    for word in words:
        if not word or not all(isinstance(token, int) and token >= 0 for token in word):
            raise UserError(f"bad-words must be sequences of one token id or more, each 0 or more, not {list(word)}")
    return words


def logits_to_probs(logits: Tensor, sampling: Sampling, histories: Sequence[History] | None = None) -> Tensor:
    """The distribution a token is drawn from: logits (B, V) -> probabilities (B, V) in float32.

    logits:    minus infinity rules a token out; no nan, and not all of a row ruled out (`engine.check_finite`).
    histories: one for each row; may be None if no setting looks back.

    A row's result does not depend on the other rows. Raises UserError if the settings rule out every token of a row.
    """
    logits = apply_penalties(logits, sampling, histories)
    probs = torch.zeros_like(logits)
    if sampling.greedy:
        return probs.scatter_(-1, stable_argmax(logits), 1.0)
    for part in select_candidates(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p):
        part_probs = _apply_filters(part, sampling).softmax(-1)
        if part.ids is None:
            return part_probs
        probs[torch.tensor(part.rows, device=probs.device).unsqueeze(-1), part.ids] = part_probs
    return probs


def sample_tokens(
    logits: Tensor, sampling: Sampling, histories: Sequence[History] | None, generators: Sequence[torch.Generator]
) -> Tensor:
    """The next token of each row, (B, V) -> (B,): `draw` of `probabilities`, done faster.

    Greedy decoding takes no number from the streams, anything else takes one of each.
    Raises what `probabilities` does, and then no number was taken from any stream.
    """
    if sampling.greedy:
        return stable_argmax(apply_penalties(logits, sampling, histories)).squeeze(-1)
    if logits.device.type != "cpu" or len(logits) <= ROWS_PER_CHUNK:
        return _sample_candidates(apply_penalties(logits, sampling, histories), sampling, generators)
    chunks = []
    for i in range(0, len(logits), ROWS_PER_CHUNK):
        past = None if histories is None else histories[i : i + ROWS_PER_CHUNK]
        chunks.append(
            (apply_penalties(logits[i : i + ROWS_PER_CHUNK], sampling, past), generators[i : i + ROWS_PER_CHUNK])
        )
    return torch.cat([_sample_candidates(chunk, sampling, own) for chunk, own in chunks])


def _sample_candidates(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    chosen = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for part in select_candidates(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p):
        drawn = sample_from_probs(_apply_filters(part, sampling).softmax(-1), [generators[row] for row in part.rows])
        if part.ids is None:
            return drawn
        chosen[part.rows] = part.ids.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    return chosen


def apply_penalties(logits: Tensor, sampling: Sampling, histories: Sequence[History] | None = None) -> Tensor:
    """Biases, penalties and bans, which greedy decoding and search follow too: logits (B, V) -> (B, V) in float32."""
    given, logits = logits, logits.float()
    biases = cast("tuple[tuple[int, float], ...]", sampling.logit_bias)
    if not (biases or sampling.needs_history):
        return logits
    if histories is None and sampling.needs_history:
        raise ValueError("these settings look back: they need the histories")
    logits = logits.clone() if logits is given else logits
    if biases:
        bias_logits(logits, biases, in_place=True)
    if histories is not None:
        _apply_history_penalties(logits, sampling, histories)
    if (logits.amax(-1) == -torch.inf).any():
        raise UserError("logit-bias, bad-words, no-repeat-ngram-size and min-new-tokens together rule out every token")
    return logits


def _apply_history_penalties(logits: Tensor, sampling: Sampling, histories: Sequence[History]) -> None:
    """In place."""
    words = cast("tuple[tuple[int, ...], ...]", sampling.bad_words)
    if sampling.repetition_penalty != 1:
        penalize_repetition(logits, histories, sampling.repetition_penalty, in_place=True)
    if sampling.presence_penalty:
        penalize_presence(logits, histories, sampling.presence_penalty, in_place=True)
    if sampling.frequency_penalty:
        penalize_frequency(logits, histories, sampling.frequency_penalty, in_place=True)
    if sampling.no_repeat_ngram_size:
        ban_repeated_ngrams(logits, histories, sampling.no_repeat_ngram_size, in_place=True)
    if words:
        ban_words(logits, histories, words, in_place=True)
    if sampling.min_new_tokens:
        ban_early_end_tokens(logits, histories, sampling.min_new_tokens, in_place=True)


def _apply_filters(group: CandidateGroup, sampling: Sampling) -> Tensor:
    """Top-p and what comes after it."""
    logits = group.logits
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p, group.probs)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    if sampling.typical_p < 1:
        logits = keep_typical(logits, sampling.typical_p)
    if sampling.epsilon_cutoff > 0:
        logits = keep_epsilon(logits, sampling.epsilon_cutoff)
    if sampling.eta_cutoff > 0:
        logits = keep_eta(logits, sampling.eta_cutoff)
    return logits


def make_generator(seed: int, sample_index: int) -> torch.Generator:
    """The random stream of one sample of one request: its text does not depend on what runs beside it."""
    digest = hashlib.sha256(f"{seed}/{sample_index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def sample_from_probs(probs: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row, (B, V) -> (B,), each row by one number of its own stream (inverse transform sampling).

    `probs` need not sum to 1. What has none is never drawn.
    """
    u = torch.stack([torch.rand((), generator=stream, dtype=torch.float64) for stream in generators]).unsqueeze(-1)
    u = u.to(probs.device, widest_float_dtype(probs))  # (B, 1)
    if probs.size(-1) <= BLOCK_SIZE:
        cdf = probs.to(u.dtype).cumsum(-1)  # (B, V)
        return _first_above(cdf, u * cdf[:, -1:]).squeeze(-1)
    cdf = block_sums(probs, u.dtype).cumsum(-1)  # (B, blocks): first the block, then the token in it
    at = u * cdf[:, -1:]
    block = _first_above(cdf, at)  # (B, 1)
    before = torch.cat((torch.zeros_like(u), cdf), -1).gather(-1, block)
    within, ids = gather_block(probs, block, 0.0)  # (B, BLOCK)
    return ids.gather(-1, _first_above(within.to(u.dtype).cumsum(-1), at - before)).squeeze(-1)


def _first_above(cdf: Tensor, threshold: Tensor) -> Tensor:
    """(B, 1): where `cdf` (B, n) first exceeds `at` (B, 1), or where it last rises if rounding put `at` too high."""
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())
    return torch.searchsorted(cdf, threshold, right=True).minimum(last).clamp_(max=cdf.size(-1) - 1)


def gather_logprobs(logits: Tensor, ids: Tensor, num_top: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What the model itself thinks, before any setting: natural logarithms of probabilities, as OpenAI's API gives.

    logits (B, V), ids (B,) -> of the ids (B,); the `top` most likely tokens (B, top) and theirs (B, top), best first.
    """
    logprobs = logits.float().log_softmax(-1)
    best = topk_indices(logprobs, min(num_top, logits.size(-1))) if num_top else ids.new_empty(len(logits), 0)
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), best, logprobs.gather(-1, best)
