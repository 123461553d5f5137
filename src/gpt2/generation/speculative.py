"""Speculative decoding: several tokens from one forward pass of the model, with the model's own distribution.

A drafter proposes the next k tokens, and the model verifies them in one forward pass, which takes hardly longer than
decoding one token. The draft tokens are checked in order. One with probability q under the drafter and p under the
model is accepted with probability min(1, p / q); the first rejected one is resampled from max(p - q, 0), and the rest
of the draft is dropped. If all are accepted, one more token is sampled from the model. Each token then has exactly the
distribution p, whatever the drafter: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
Decoding", section 2.3 and appendix A; Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative
Sampling".

p and q are `gpt2.generation.sampling.logits_to_probs` of the logits with the history up to each token, so every setting
of `Sampling` applies. At temperature 0 the tokens are those of plain greedy decoding, except for ties: a forward pass
over several tokens rounds differently, so where two logits are equal to within rounding (in bfloat16 now and then),
either token may be chosen.
"""

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gpt2.errors import ConfigError, ModelFilesError, NonFiniteLogitsError, RequestError
from gpt2.generation.defaults import MAX_NEW_TOKENS
from gpt2.generation.engine import (
    GenerationRequest,
    LanguageModel,
    Sequence,
    check_finite,
    check_request,
    common_prefix_length,
    eval_mode,
)
from gpt2.generation.filters import History
from gpt2.generation.sampling import Sampling, logits_to_probs, resolve_seed, sample_from_probs
from gpt2.generation.text import check_stop_strings, encode_prompt, make_sampling, require_tokenizer, stream_text
from gpt2.tokenizer import Tokenizer

INITIAL_DRAFT_LENGTH, MAX_DRAFT_LENGTH = 4, 16  # tokens


@dataclass(frozen=True)
class Proposal:
    """A draft: k token ids, and the distributions (k, V) they were sampled from; None for a deterministic draft."""

    tokens: list[int]
    probs: Tensor | None = None


class Drafter(Protocol):
    """Proposes the next tokens: a `DraftModel` or a `PromptLookup`. It serves one sequence after the other."""

    def check(self, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        """Raise ModelFilesError if its token ids are not those of a model with this vocabulary and tokenizer."""
        ...

    def propose(self, history: History, max_tokens: int, sampling: Sampling, generator: torch.Generator) -> Proposal:
        """Up to `max_tokens` next tokens, sampled with `generator`; may be none."""
        ...


class CachedModel:
    """A model with a KV cache for one token list that may change: only tokens after the common prefix are computed.

    Beyond the context it uses the windows of `Engine`: when the context is full, its later half begins the next window.
    """

    def __init__(self, model: LanguageModel, max_length: int | None = None) -> None:
        self.model = model
        self._cache = model.make_cache(1, max_length)
        self._cached_tokens: list[int] = []

    def remaining_context(self, length: int) -> int:
        """How many tokens fit into the context after `length` tokens."""
        return self._cache.max_length - (length - self._window_start(length))

    def logits(self, tokens: list[int], count: int) -> Tensor:
        """The logits after each of the last `count` tokens, which must lie in one window: (count, V)."""
        window = tokens[self._window_start(len(tokens)) :]
        kept = common_prefix_length(self._cached_tokens, window[:-count])
        self._cached_tokens = window[:kept]  # still right if the model is interrupted
        self._cache.lengths[0] = kept
        new = torch.tensor([window[kept:]], device=self.model.device)
        hidden = self.model.hidden_states(new, self._cache)  # (1, T, C)
        self._cached_tokens = window
        return self.model.lm_head(hidden[0, -count:])

    def _window_start(self, length: int) -> int:
        """The index of the first token of the window, for `length` tokens."""
        context = self._cache.max_length
        step = context + 1 - max(1, context // 2)
        return step * -(-max(0, length - context) // step)


class DraftModel:
    """A smaller model with the same vocabulary proposes, with the same sampling settings.

    tokenizer: of the draft model, if it has one; `check` compares it with that of the target model.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._cached_model = CachedModel(model)

    def check(self, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        """Raise ModelFilesError if the target model has another vocabulary size or another tokenizer."""
        own = self.model.config.vocab_size
        if own != vocab_size:
            raise ModelFilesError(f"the draft has a vocabulary of {own:,} tokens, the model one of {vocab_size:,}")
        if tokenizer and self.tokenizer and tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise ModelFilesError("the draft has another tokenizer than the model: their token ids do not match")

    @torch.inference_mode()
    def propose(self, history: History, max_tokens: int, sampling: Sampling, generator: torch.Generator) -> Proposal:
        """Up to `max_tokens` tokens, fewer at the end of the context or where the settings rule out every token.

        Raises NonFiniteLogitsError if the draft model computes nan or inf.
        """
        room = self._cached_model.remaining_context(len(history.tokens)) + 1  # the model need not run on the last one
        tokens, probs = list(history.tokens), []
        draft_history = History(tokens, history.prompt_length, history.end_tokens)  # grows with `tokens`
        with eval_mode(self.model):
            for _ in range(min(max_tokens, room)):
                logits = self._cached_model.logits(tokens, 1)
                try:
                    check_finite(logits)
                except NonFiniteLogitsError as error:
                    raise NonFiniteLogitsError(f"the draft model cannot be used: {error}") from None
                try:
                    q = logits_to_probs(logits, sampling, [draft_history])
                except RequestError:  # every token is ruled out after this draft; the target model decides
                    break
                tokens.append(int(sample_from_probs(q, [generator])))
                probs.append(q)
        return Proposal(tokens[len(history.tokens) :], torch.cat(probs) if probs else None)


class PromptLookup:
    """Prompt lookup decoding (Saxena 2023): copy what followed an earlier occurrence of the last tokens. No model.

    Looks for the latest earlier occurrence of the last `ngram` tokens, then of one less, down to a single token, and
    copies what follows it; a copy that reaches the end continues with its own tokens. Useful where a text repeats its
    prompt or itself.
    """

    def __init__(self, ngram: int = 3) -> None:
        if ngram < 1:
            raise ConfigError(f"prompt lookup needs at least 1 token to look for, not {ngram}", field="ngram")
        self.ngram = ngram

    def check(self, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        """Always passes: the ids are those of the sequence."""

    def propose(self, history: History, max_tokens: int, sampling: Sampling, generator: torch.Generator) -> Proposal:
        """`max_tokens` tokens, or none if the last token has not occurred before."""
        tokens, length = list(history.tokens), len(history.tokens)
        ids = np.array(tokens)
        for n in range(min(self.ngram, length - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], n)  # (length - n, n)
            matches = np.flatnonzero((windows == ids[-n:]).all(-1))
            if len(matches):
                for i in range(matches[-1] + n, matches[-1] + n + max_tokens):
                    tokens.append(tokens[i])
                break
        return Proposal(tokens[length:])


class SpeculativeDecoder:
    """Decodes one request: iterates over lists of new tokens, one list for each forward pass of the model.

        decoder = SpeculativeDecoder(model, PromptLookup(), GenerationRequest(prompt, Sampling(temperature=0)))
        for tokens in decoder:
            ...
        print(decoder.acceptance_rate, decoder.tokens_per_call)

    max_draft_length: tokens in a draft, at most. A draft that is accepted whole makes the next one a token longer, and
                      one of which less than half is accepted makes it a token shorter.
    drafted, accepted, calls: draft tokens proposed, draft tokens accepted, and forward passes of the model, so far.

    `sequence` holds the tokens so far and the finish reason. The tokens depend on nothing but the request, the model
    and the drafter; `top_logprobs` is ignored. Raises RequestError for a request that cannot be served and
    ModelFilesError for a draft with another vocabulary; iteration raises NonFiniteLogitsError if the model computes nan
    or inf, and RequestError if the settings rule out every token.
    """

    def __init__(
        self,
        model: LanguageModel,
        drafter: Drafter,
        request: GenerationRequest,
        max_draft_length: int = MAX_DRAFT_LENGTH,
    ) -> None:
        check_request(request, model.config.vocab_size, model.config.block_size)
        drafter.check(model.config.vocab_size)
        if max_draft_length < 1:
            raise ConfigError(f"a draft has at least 1 token, not {max_draft_length}", field="max_draft_length")
        self.drafter, self.sequence = drafter, Sequence(request)
        self._model = model
        self._cached_model = CachedModel(
            model, min(len(request.prompt) + request.max_new_tokens, model.config.block_size)
        )
        self._max_draft_length, self._draft_length = max_draft_length, min(INITIAL_DRAFT_LENGTH, max_draft_length)
        self.drafted = self.accepted = self.calls = 0
        if request.max_new_tokens == 0:
            self.sequence.finish_reason = "length"

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 if none were drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_call(self) -> float:
        """New tokens per forward pass of the model; 1 for plain decoding."""
        return len(self.sequence.new_tokens) / self.calls if self.calls else 0.0

    def __iter__(self) -> Iterator[list[int]]:
        return self

    @torch.inference_mode()
    def __next__(self) -> list[int]:
        """The tokens of the next forward pass: one or more; an end token is the last one."""
        sequence = self.sequence
        if sequence.finish_reason:
            raise StopIteration
        left = sequence.request.max_new_tokens - len(sequence.new_tokens)
        count = min(self._draft_length, left - 1, self._cached_model.remaining_context(len(sequence.tokens)))
        proposal = Proposal([])
        if count > 0:
            proposal = self.drafter.propose(sequence.history, count, sequence.request.sampling, sequence.generator)
        with eval_mode(self._model):
            logits = self._cached_model.logits(  # (k + 1, V)
                sequence.tokens + proposal.tokens, len(proposal.tokens) + 1
            )  # (k + 1, V)
        check_finite(logits)
        new, accepted = self._verify(proposal, logits)
        sequence.tokens += new
        self.calls += 1
        self.drafted += len(proposal.tokens)
        self.accepted += accepted
        if len(proposal.tokens) == self._draft_length:
            self._draft_length = next_draft_length(self._draft_length, accepted, self._max_draft_length)
        if new[-1] in sequence.request.end_tokens:
            sequence.finish_reason = "stop"
        elif len(new) == left:
            sequence.finish_reason = "length"
        return new

    def _verify(self, proposal: Proposal, logits: Tensor) -> tuple[list[int], int]:
        """(accepted draft tokens and one token of the model, up to an end token; the number of accepted ones)"""
        generator, end_tokens = self.sequence.generator, self.sequence.request.end_tokens
        new: list[int] = []
        for i, p in enumerate(self._target_probs(proposal.tokens, logits)):
            if i == len(proposal.tokens):
                return [*new, int(sample_from_probs(p.unsqueeze(0), [generator]))], i
            token, q = proposal.tokens[i], None if proposal.probs is None else proposal.probs[i]
            new.append(accept_or_resample(token, p, q, generator))
            if new[-1] != token:
                return new, i
            if token in end_tokens:
                break
        return new, len(new)

    def _target_probs(self, draft_tokens: list[int], logits: Tensor) -> Iterator[Tensor]:
        """The distribution (V,) after the sequence, then after it and one draft token, after it and two, ..."""
        request = self.sequence.request
        if not request.sampling.needs_history:
            yield from logits_to_probs(logits, request.sampling)
            return
        for i in range(len(logits)):  # lazily: the settings may rule out every token after a rejected draft token
            history = History(self.sequence.tokens + draft_tokens[:i], len(request.prompt), request.end_tokens)
            yield logits_to_probs(logits[i : i + 1], request.sampling, [history])[0]


def accept_or_resample(draft_token: int, p: Tensor, q: Tensor | None, generator: torch.Generator) -> int:
    """Speculative sampling of one token: distributed as p (V,) if `draft_token` is distributed as q (V,).

    q: None for a deterministic draft. Takes at most two random numbers. Leviathan et al. 2023, section 2.3.
    """
    u = float(torch.rand((), generator=generator, dtype=torch.float64))
    if u * (1.0 if q is None else float(q[draft_token])) < float(p[draft_token]):
        return draft_token
    if q is None:
        residual = p.index_fill(0, torch.tensor(draft_token, device=p.device), 0.0)
    else:
        residual = (p - q.to(p.device)).clamp_min(0.0)
    if not residual.any():  # p equals q to within rounding
        return draft_token
    return int(sample_from_probs(residual.unsqueeze(0), [generator]))


def next_draft_length(length: int, accepted: int, max_length: int) -> int:
    """The length of the next draft, after one of `length` tokens of which `accepted` were accepted."""
    if accepted == length:
        return min(length + 1, max_length)
    return max(length - 1, 1) if 2 * accepted < length else length


class SpeculativeTextStream:
    """An iterator over pieces of text; its `decoder` has the statistics."""

    def __init__(
        self, decoder: SpeculativeDecoder, tokenizer: Tokenizer, stop: abc.Sequence[str], **settings: Any
    ) -> None:
        """settings: those of `stream_text`."""
        self.decoder = decoder
        self._pieces = stream_text(tokenizer, chain.from_iterable(decoder), stop, **settings)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)


def speculate(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompt: str,
    drafter: Drafter,
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: abc.Sequence[str] = (),
    seed: int | None = None,
    sample_index: int = 0,
    skip_special_tokens: bool = True,
) -> SpeculativeTextStream:
    """Continue `prompt` by speculative decoding: yields the new text in pieces of whole characters.

        text = speculate(model, tokenizer, "Hello", DraftModel(*gpt2.load("gpt2")), Sampling(temperature=0))
        for piece in text:
            print(piece, end="", flush=True)
        print(text.decoder.acceptance_rate, text.decoder.tokens_per_call)

    stop: stop strings: the text ends before the first of them, or at the end-of-text token.
    seed: the same seed and sample index give the same text; None or -1 draws a new one. The text differs from that of
          plain decoding with the same seed, but has the same distribution; at temperature 0 it is the same text.

    A drafter may serve one text after the other; its cache keeps their common prefix. Raises what `SpeculativeDecoder`
    does, and ModelFilesError for a draft with another tokenizer.
    """
    tokenizer = require_tokenizer(tokenizer)
    check_stop_strings(stop)
    drafter.check(model.config.vocab_size, tokenizer)
    sampling, seed = make_sampling({}, sampling), resolve_seed(seed)
    ids, end_tokens = encode_prompt(tokenizer, prompt), tokenizer.end_tokens
    request = GenerationRequest(ids, sampling, max_new_tokens, seed, sample_index, end_tokens)
    settings = {"min_tokens": sampling.min_new_tokens, "skip_special_tokens": skip_special_tokens}
    return SpeculativeTextStream(SpeculativeDecoder(model, drafter, request), tokenizer, stop, **settings)
