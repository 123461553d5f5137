"""From logits to a token: pure functions that every decoder uses.

The order is that of `transformers` (5.23, `GenerationMixin._get_logits_processor`), extended by OpenAI's settings:

    logit bias, repetition penalty, presence and frequency penalty, no-repeat n-grams, bad words, minimum length;
    temperature, top-k, top-p, min-p, typical, epsilon, eta.

Each applies to the result of the one before it; see `gpt2.generation.filters`. Greedy decoding (temperature 0) takes
the most likely token after the first line; of equal ones the first in the vocabulary.

A token is sampled with one random number of its row's own stream (inverse transform sampling): the first token in the
order of the vocabulary at which the cumulative probability exceeds the number. `sample_tokens` equals
`sample_from_probs` of `logits_to_probs`, but is faster: it skips tokens that top-k, top-p or min-p exclude.
"""

import hashlib
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gpt2.checks import check_integer, check_number
from gpt2.errors import RequestError
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

GREEDY_TEMPERATURE = 1e-20  # below this, dividing by the temperature could overflow: greedy decoding
MAX_ABS_SETTING = 1e6  # of penalties, biases and temperatures: the resulting logits are finite in float32
ROWS_PER_CHUNK = 8  # on a CPU: intermediate results of this many rows stay in the cache


def check_setting(name: str, value: Any, valid: bool, rule: str) -> None:
    """Raise RequestError "NAME must RULE, not VALUE" unless `valid`."""
    if not valid:
        raise RequestError(f"{name.replace('_', '-')} must {rule}, not {value}", field=name)


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. The defaults sample from the model's own distribution.

    temperature:          divides the logits; 0 for greedy decoding.
    top_k:                keep the k most likely tokens; 0 for all.
    top_p:                keep the smallest set of most likely tokens whose probabilities sum to p; 1 for all.
    min_p:                keep tokens at least p times as likely as the most likely one; 0 for all.
    typical_p:            locally typical sampling: keep the tokens closest to the expected surprise, until their
                          probabilities sum to p; 1 for all.
    epsilon_cutoff:       keep tokens of at least this probability; 0 for all.
    eta_cutoff:           the same with a threshold that depends on the entropy; 0 for all.
    repetition_penalty:   divides the positive logits of tokens in prompt and new tokens, multiplies the negative ones.
    presence_penalty:     subtracted from the logits of tokens among the new tokens.
    frequency_penalty:    the same, times the number of occurrences.
    no_repeat_ngram_size: no n-gram of this size occurs twice; 0 to allow all.
    logit_bias:           {id: bias}, added to the logits; minus infinity bans a token.
    bad_words:            sequences of token ids that are never generated.
    min_new_tokens:       ban the end tokens before this many new tokens.

    Hashable: `logit_bias` is kept as pairs sorted by id, `bad_words` as tuples.
    Raises RequestError for values that are not supported.
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
        for name in self.__dataclass_fields__:
            if name not in ("logit_bias", "bad_words"):
                check_number(name, getattr(self, name))
        for name in ("top_k", "no_repeat_ngram_size", "min_new_tokens"):
            value, least = getattr(self, name), "0 (all)" if name == "top_k" else "0"
            check_setting(name, value, isinstance(value, int) and value >= 0, f"be {least} or more, and whole")
        largest, smallest = f"{MAX_ABS_SETTING:,.0f}", 1 / MAX_ABS_SETTING
        penalty = self.repetition_penalty
        ranges = {
            "temperature": (0 <= self.temperature <= MAX_ABS_SETTING, f"0 or more and at most {largest}"),
            "top_p": (0 < self.top_p <= 1, "over 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 or more and at most 1"),
            "typical_p": (0 < self.typical_p <= 1, "over 0 and at most 1"),
            "epsilon_cutoff": (0 <= self.epsilon_cutoff < 1, "0 or more and under 1"),
            "eta_cutoff": (0 <= self.eta_cutoff < 1, "0 or more and under 1"),
            "repetition_penalty": (
                smallest <= penalty <= MAX_ABS_SETTING,
                f"over 0 (at least {smallest}) and at most {largest}",
            ),
            "presence_penalty": (abs(self.presence_penalty) <= MAX_ABS_SETTING, f"at most {largest} either way"),
            "frequency_penalty": (abs(self.frequency_penalty) <= MAX_ABS_SETTING, f"at most {largest} either way"),
        }
        for name, (valid, description) in ranges.items():
            check_setting(name, getattr(self, name), valid, f"be {description}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a random number."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def needs_history(self) -> bool:
        """Whether a setting depends on the row's `History`."""
        penalties = (self.repetition_penalty != 1, self.presence_penalty != 0, self.frequency_penalty != 0)
        return any((*penalties, self.no_repeat_ngram_size, self.bad_words, self.min_new_tokens))

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise RequestError if `logit_bias` or `bad_words` name an id outside a vocabulary of this size."""
        words = cast("tuple[tuple[int, ...], ...]", self.bad_words)
        ids_of = {"logit_bias": dict(self.logit_bias), "bad_words": [token for word in words for token in word]}
        for name, ids in ids_of.items():
            if ids and max(ids) >= vocab_size:
                message = f"token {max(ids)} is not in the model's vocabulary of {vocab_size:,}"
                raise RequestError(f"{name.replace('_', '-')}: {message}", field=name)


def _parse_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs sorted by id; ids may be strings of digits, as in JSON keys."""
    try:
        pairs = {int(token): float(bias) for token, bias in (value.items() if isinstance(value, Mapping) else value)}
    except (TypeError, ValueError):
        message = f"logit-bias must give a number for each token id, not {value!r:.80}"
        raise RequestError(message, field="logit_bias") from None
    for token, bias in pairs.items():
        if token < 0 or not (abs(bias) <= MAX_ABS_SETTING or bias == -math.inf):
            raise RequestError(
                f"logit-bias must give ids of 0 or more a bias of at most {MAX_ABS_SETTING:,.0f} either way (-inf to "
                f"ban), not {token}: {bias}",
                field="logit_bias",
            )
    return tuple(sorted(pairs.items()))


def _parse_bad_words(value: Any) -> tuple[tuple[int, ...], ...]:
    try:
        words = tuple(tuple(word) for word in value)
    except TypeError:
        message = f"bad-words must be sequences of token ids, not {value!r:.80}"
        raise RequestError(message, field="bad_words") from None
    for word in words:
        if not word or not all(isinstance(token, int) and token >= 0 for token in word):
            message = f"bad-words must be sequences of one token id or more, each 0 or more, not {list(word)}"
            raise RequestError(message, field="bad_words")
    return words


def logits_to_probs(logits: Tensor, sampling: Sampling, histories: Sequence[History] | None = None) -> Tensor:
    """The distribution that a token is sampled from: logits (B, V) -> probabilities (B, V) in float32.

    logits:    minus infinity excludes a token; no nan, and not a whole row of minus infinity (`engine.check_finite`).
    histories: one for each row; may be None unless `sampling.needs_history`.

    Batch invariant: a row's result does not depend on the other rows. Raises RequestError if the settings rule out
    every token of a row.
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
    """Sample the next token of each row, (B, V) -> (B,): as `sample_from_probs` of `logits_to_probs`, but faster.

    Takes one random number from each generator, none for greedy decoding. Raises what `logits_to_probs` does; then no
    random number has been taken.
    """
    if sampling.greedy:
        return stable_argmax(apply_penalties(logits, sampling, histories)).squeeze(-1)
    if logits.device.type != "cpu" or len(logits) <= ROWS_PER_CHUNK:
        return _sample_candidates(apply_penalties(logits, sampling, histories), sampling, generators)
    chunks = []
    for i in range(0, len(logits), ROWS_PER_CHUNK):
        rows = slice(i, i + ROWS_PER_CHUNK)
        chunk = apply_penalties(logits[rows], sampling, None if histories is None else histories[rows])
        chunks.append((chunk, generators[rows]))
    return torch.cat([_sample_candidates(chunk, sampling, streams) for chunk, streams in chunks])


def _sample_candidates(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    sampled = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for part in select_candidates(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p):
        index = sample_from_probs(_apply_filters(part, sampling).softmax(-1), [generators[row] for row in part.rows])
        if part.ids is None:
            return index
        sampled[part.rows] = part.ids.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return sampled


def apply_penalties(logits: Tensor, sampling: Sampling, histories: Sequence[History] | None = None) -> Tensor:
    """Biases, penalties and bans, for sampling, greedy decoding and search: logits (B, V) -> (B, V) in float32."""
    original, logits = logits, logits.float()
    biases = cast("tuple[tuple[int, float], ...]", sampling.logit_bias)
    if not (biases or sampling.needs_history):
        return logits
    if histories is None and sampling.needs_history:
        raise ValueError("these settings need the histories")
    logits = logits.clone() if logits is original else logits
    if biases:
        bias_logits(logits, biases, in_place=True)
    if histories is not None:
        _apply_history_penalties(logits, sampling, histories)
    if (logits.amax(-1) == -torch.inf).any():
        message = "logit-bias, bad-words, no-repeat-ngram-size and min-new-tokens together rule out every token"
        raise RequestError(message)
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
    """The filters from top-p on."""
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


def resolve_seed(seed: int | None) -> int:
    """The seed; a new random one for None and for -1, which other programs use for "random".

    Raises RequestError for anything but an integer.
    """
    if seed is not None:
        check_integer("seed", seed)
    return secrets.randbits(32) if seed is None or seed == -1 else seed


def make_generator(seed: int, sample_index: int) -> torch.Generator:
    """The random stream of one sample of one request: independent of the batch that it runs in."""
    digest = hashlib.sha256(f"{seed}/{sample_index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def sample_from_probs(probs: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Inverse transform sampling: one token per row, (B, V) -> (B,), with one random number of each generator.

    `probs` need not sum to 1. A token of probability 0 is never sampled.
    """
    u = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]).unsqueeze(
        -1
    )
    u = u.to(probs.device, widest_float_dtype(probs))  # (B, 1)
    if probs.size(-1) <= BLOCK_SIZE:
        cdf = probs.to(u.dtype).cumsum(-1)  # (B, V)
        return _first_above(cdf, u * cdf[:, -1:]).squeeze(-1)
    cdf = block_sums(probs, u.dtype).cumsum(-1)  # (B, blocks): first the block, then the token in it
    threshold = u * cdf[:, -1:]
    block = _first_above(cdf, threshold)  # (B, 1)
    before = torch.cat((torch.zeros_like(u), cdf), -1).gather(-1, block)
    within, ids = gather_block(probs, block, 0.0)  # (B, BLOCK)
    return ids.gather(-1, _first_above(within.to(u.dtype).cumsum(-1), threshold - before)).squeeze(-1)


def _first_above(cdf: Tensor, threshold: Tensor) -> Tensor:
    """(B, 1): where `cdf` (B, n) first exceeds `threshold` (B, 1), or where it last rises if rounding leaves none."""
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())
    return torch.searchsorted(cdf, threshold, right=True).minimum(last).clamp_(max=cdf.size(-1) - 1)


def gather_logprobs(logits: Tensor, ids: Tensor, num_top: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Natural log-probabilities before any sampling setting, as in OpenAI's API.

    logits (B, V), ids (B,) -> log-probabilities of the ids (B,); ids of the most likely tokens (B, num_top) and their
    log-probabilities (B, num_top), most likely first.
    """
    logprobs = logits.float().log_softmax(-1)
    top_ids = topk_indices(logprobs, min(num_top, logits.size(-1))) if num_top else ids.new_empty(len(logits), 0)
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), top_ids, logprobs.gather(-1, top_ids)
