"""Speculative decoding: several tokens from one call of the model, with the model's own distribution.

A draft guesses the next k tokens, and the model reads them all in one call, which takes hardly longer than reading
one. The guesses are gone through in order. One that the draft gave the probability q and the model p is kept with
probability min(1, p / q); the first that is not kept is redrawn from max(p - q, 0), and those after it are forgotten.
If all are kept, the model adds one of its own. Each token then has exactly the distribution p, whatever the draft:
Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", section 2.3 and appendix A; Chen
et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling".

p and q are what `gpt2.generation.sampling.probabilities` makes of the logits, with what was said up to each token, so
every setting of `Sampling` holds. At temperature 0 the tokens are those of plain decoding. (Reading several tokens at
once rounds otherwise than reading them one by one: where two tokens are equal to within rounding, in bfloat16 now and
then, either may come.)
"""

import secrets
from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gpt2.errors import UserError
from gpt2.generation.engine import (
    NON_FINITE_LOGITS,
    GenerationRequest,
    LanguageModel,
    Sequence,
    check_finite,
    common_prefix_length,
    eval_mode,
)
from gpt2.generation.filters import History
from gpt2.generation.sampling import Sampling, logits_to_probs, sample_from_probs
from gpt2.generation.search import check_prompt, encode_prompt
from gpt2.generation.text import TextStream
from gpt2.tokenizer import Tokenizer

INITIAL_DRAFT_LENGTH, MAX_DRAFT_LENGTH = 4, 16  # tokens in the first draft, and in any


@dataclass(frozen=True)
class Proposal:
    """What a draft guesses: k ids, and the distributions (k, V) that they were drawn from; None if it was certain."""

    tokens: list[int]
    probs: Tensor | None = None


class Drafter(Protocol):
    """What guesses the next tokens: a `ModelDraft` or a `PromptLookup`. It serves one text after the other."""

    def check(self, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        """Raise UserError if its ids are not those of a model with this vocabulary and tokenizer."""
        ...

    def propose(self, history: History, max_tokens: int, sampling: Sampling, generator: torch.Generator) -> Proposal:
        """Up to `count` tokens that may follow, drawn with `stream`; none is an answer too."""
        ...


class CachedModel:
    """A model with a cache for one text, which may change: only what differs from what was read before is read.

    A text that outgrows the context is seen through the window that `Engine` gives it: when the context is full, its
    later half begins the next one.
    """

    def __init__(self, model: LanguageModel, max_length: int | None = None) -> None:
        self.model = model
        self._cache = model.make_cache(1, max_length)
        self._cached_tokens: list[int] = []  # what the cache remembers

    def remaining_context(self, length: int) -> int:
        """How many tokens may follow a text of `length` tokens before its context is full."""
        return self._cache.max_length - (length - self._window_start(length))

    def logits(self, tokens: list[int], count: int) -> Tensor:
        """What may follow each of the last `count` tokens, which lie in one window: (count, V)."""
        window = tokens[self._window_start(len(tokens)) :]
        kept = common_prefix_length(self._cached_tokens, window[:-count])
        self._cached_tokens = window[:kept]  # should the reading be broken off
        self._cache.lengths[0] = kept
        new = torch.tensor([window[kept:]], device=self.model.device)
        hidden = self.model.hidden_states(new, self._cache)  # (1, T, C)
        self._cached_tokens = window
        return self.model.lm_head(hidden[0, -count:])

    def _window_start(self, length: int) -> int:
        """Where the window of a text of `length` tokens begins."""
        context = self._cache.max_length
        step = context + 1 - max(1, context // 2)
        return step * -(-max(0, length - context) // step)


class DraftModel:
    """A smaller model of the same vocabulary guesses, under the same settings.

    tokenizer: the model's own, if it has one, to be compared with that of the large model.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._cached_model = CachedModel(model)

    def check(self, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        """Raise UserError for a model of another vocabulary, or with another tokenizer."""
        own = self.model.config.vocab_size
        if own != vocab_size:
            raise UserError(f"the draft has a vocabulary of {own:,} tokens, the model one of {vocab_size:,}")
        if tokenizer and self.tokenizer and tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise UserError("the draft has another tokenizer than the model: its ids mean other words")

    @torch.inference_mode()
    def propose(self, history: History, max_tokens: int, sampling: Sampling, generator: torch.Generator) -> Proposal:
        """Up to `count` tokens, fewer where the context or the settings leave no more. Raises UserError for nan."""
        max_tokens = min(
            max_tokens, self._cached_model.remaining_context(len(history.tokens)) + 1
        )  # the last one need not be read
        tokens, probs = list(history.tokens), []
        past = History(tokens, history.prompt_length, history.end_tokens)  # grows with the tokens
        with eval_mode(self.model):
            for _ in range(max_tokens):
                logits = self._cached_model.logits(tokens, 1)
                if not logits.amax().isfinite():
                    raise UserError(f"the draft is of no use: {NON_FINITE_LOGITS}")
                try:
                    q = logits_to_probs(logits, sampling, [past])
                except UserError:  # nothing may follow this guess; if it comes to it, the model will say so
                    break
                tokens.append(int(sample_from_probs(q, [generator])))
                probs.append(q)
        return Proposal(tokens[len(history.tokens) :], torch.cat(probs) if probs else None)


class PromptLookup:
    """What followed the last time that the text ran like this: no second model, and no time to speak of.

    The latest earlier occurrence of the last `ngram` tokens is looked for, then that of one less, down to a single
    token, and what follows it is copied; a copy that reaches the end of the text goes on with itself. Saxena 2023,
    "Prompt Lookup Decoding". Good where a text repeats its prompt or itself.
    """

    def __init__(self, ngram: int = 3) -> None:
        if ngram < 1:
            raise UserError(f"prompt lookup needs at least 1 token to look for, not {ngram}")
        self.ngram = ngram

    def check(self, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        """Its ids are the text's own."""

    def propose(self, history: History, max_tokens: int, sampling: Sampling, generator: torch.Generator) -> Proposal:
        """`count` tokens, or none where nothing is repeated."""
        tokens, length = list(history.tokens), len(history.tokens)
        ids = np.array(tokens)
        for n in range(min(self.ngram, length - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], n)  # (length - n, n)
            found = np.flatnonzero((windows == ids[-n:]).all(-1))
            if len(found):
                for at in range(found[-1] + n, found[-1] + n + max_tokens):
                    tokens.append(tokens[at])
                break
        return Proposal(tokens[length:])


class SpeculativeDecoder:
    """One continuation of a request, in lists of new tokens: one list for each call of the model.

        speculation = Speculation(model, PromptLookup(), Request(prompt, Sampling(temperature=0)))
        for tokens in speculation:
            ...
        print(speculation.acceptance_rate, speculation.tokens_per_call)

    longest: tokens in a draft at most. A draft that was kept whole makes the next one a token longer, and one of which
             less than half was kept makes it a token shorter.

    `continuation` holds the text so far and how it finished. A request's tokens depend on nothing but the request, the
    model and the draft; its `alternatives` are not told. Raises UserError for a request that cannot be served, for a
    draft of another vocabulary, and, when it is iterated, for a model that gives nan or settings that leave nothing.
    """

    def __init__(
        self,
        model: LanguageModel,
        drafter: Drafter,
        request: GenerationRequest,
        max_draft_length: int = MAX_DRAFT_LENGTH,
    ) -> None:
        check_prompt(model, list(request.prompt), request.max_new_tokens, request.sampling)
        drafter.check(model.config.vocab_size)
        if max_draft_length < 1:
            raise UserError(f"a draft has at least 1 token, not {max_draft_length}")
        self.drafter, self.sequence = drafter, Sequence(request)
        self._model = model
        self._cached_model = CachedModel(
            model, min(len(request.prompt) + request.max_new_tokens, model.config.block_size)
        )
        self._max_draft_length, self._draft_length = max_draft_length, min(INITIAL_DRAFT_LENGTH, max_draft_length)
        self.drafted = 0
        """How many tokens were guessed."""
        self.accepted = 0
        """How many of them were kept."""
        self.calls = 0
        """How often the model was called."""
        if request.max_new_tokens == 0:
            self.sequence.finish_reason = "length"

    @property
    def acceptance_rate(self) -> float:
        """The part of the drafted tokens that was kept; 0 if none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_call(self) -> float:
        """New tokens for each call of the model; 1 is plain decoding."""
        return len(self.sequence.new_tokens) / self.calls if self.calls else 0.0

    def __iter__(self) -> Iterator[list[int]]:
        return self

    @torch.inference_mode()
    def __next__(self) -> list[int]:
        """The tokens of the next call: one or more, an end token last of all."""
        said = self.sequence
        if said.finish_reason:
            raise StopIteration
        left = said.request.max_new_tokens - len(said.new_tokens)
        count = min(self._draft_length, left - 1, self._cached_model.remaining_context(len(said.tokens)))
        proposal = Proposal([])
        if count > 0:
            proposal = self.drafter.propose(said.history, count, said.request.sampling, said.generator)
        with eval_mode(self._model):
            logits = self._cached_model.logits(said.tokens + proposal.tokens, len(proposal.tokens) + 1)  # (k + 1, V)
        check_finite(logits)
        new, accepted = self._verify(proposal, logits)
        said.tokens += new
        self.calls += 1
        self.drafted += len(proposal.tokens)
        self.accepted += accepted
        if len(proposal.tokens) == self._draft_length:
            self._draft_length = next_draft_length(self._draft_length, accepted, self._max_draft_length)
        if new[-1] in said.request.end_tokens:
            said.finish_reason = "stop"
        elif len(new) == left:
            said.finish_reason = "length"
        return new

    def _verify(self, proposal: Proposal, logits: Tensor) -> tuple[list[int], int]:
        """The guesses that are kept and one token of the model's, up to an end token; how many are guesses."""
        stream, ends = self.sequence.generator, self.sequence.request.end_tokens
        new: list[int] = []
        for i, p in enumerate(self._target_probs(proposal.tokens, logits)):
            if i == len(proposal.tokens):
                return [*new, int(sample_from_probs(p.unsqueeze(0), [stream]))], i
            guess = proposal.tokens[i]
            new.append(accept_or_resample(guess, p, None if proposal.probs is None else proposal.probs[i], stream))
            if new[-1] != guess:
                return new, i
            if guess in ends:
                break
        return new, len(new)

    def _target_probs(self, draft_tokens: list[int], logits: Tensor) -> Iterator[Tensor]:
        """What may follow the text, (V,), then what may follow it with the first guess, with the first two, ..."""
        request = self.sequence.request
        if not request.sampling.needs_history:
            yield from logits_to_probs(logits, request.sampling)
            return
        for i in range(len(logits)):  # only as far as they are wanted: settings may leave nothing after a wrong guess
            past = History(self.sequence.tokens + draft_tokens[:i], len(request.prompt), request.end_tokens)
            yield logits_to_probs(logits[i : i + 1], request.sampling, [past])[0]


def accept_or_resample(draft_token: int, p: Tensor, q: Tensor | None, generator: torch.Generator) -> int:
    """A token distributed as p (V,), given a guess distributed as q (V,), which it is as often as can be.

    q: None for a guess that was certain. Two numbers of the stream at most: Leviathan et al. 2023, section 2.3.
    """
    number = float(torch.rand((), generator=generator, dtype=torch.float64))
    if number * (1.0 if q is None else float(q[draft_token])) < float(p[draft_token]):
        return draft_token
    if q is None:
        rest = p.index_fill(0, torch.tensor(draft_token, device=p.device), 0.0)
    else:
        rest = (p - q.to(p.device)).clamp_min(0.0)
    return (
        int(sample_from_probs(rest.unsqueeze(0), [generator])) if rest.any() else draft_token
    )  # no rest: p is q to within rounding


def next_draft_length(length: int, accepted: int, max_length: int) -> int:
    """How long the next draft is, after one of `length` tokens of which `accepted` were kept."""
    if accepted == length:
        return min(length + 1, max_length)
    return max(length - 1, 1) if 2 * accepted < length else length


class SpeculativeTextStream:
    """The pieces of a text as they come; its `speculation` has the numbers."""

    def __init__(self, decoder: SpeculativeDecoder, text: TextStream) -> None:
        self.decoder = decoder
        self._pieces = _stream_text(decoder, text)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)


def _stream_text(decoder: SpeculativeDecoder, text: TextStream) -> Iterator[str]:
    for tokens in decoder:
        if piece := "".join(map(text.push, tokens)):
            yield piece
        if text.finish_reason:
            return
    if piece := text.flush():
        yield piece


def speculate(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompt: str,
    drafter: Drafter,
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int = 100,
    stop: abc.Sequence[str] = (),
    seed: int | None = None,
    sample_index: int = 0,
) -> SpeculativeTextStream:
    """Continue `prompt` as `gpt2.stream` does, with a draft: yields the continuation in pieces of whole characters.

        text = speculate(model, tokenizer, "Hello", ModelDraft(*gpt2.load("gpt2")), Sampling(temperature=0))
        for piece in text:
            print(piece, end="", flush=True)
        print(text.speculation.acceptance_rate, text.speculation.tokens_per_call)

    stop:   the text ends before the first of these strings.
    seed:   the same seed and sample give the same text; None draws a new seed. The text is another than that of
            plain decoding with this seed, though from the same distribution; at temperature 0 it is the same.

    A draft may serve one text after the other, and does not read again what they have in common. Raises UserError as
    `Speculation` does, and for a draft with another tokenizer.
    """
    tokenizer, ids = encode_prompt(tokenizer, prompt, stop)
    drafter.check(model.config.vocab_size, tokenizer)
    seed = secrets.randbits(32) if seed is None else seed
    request = GenerationRequest(
        ids, sampling or Sampling(), max_new_tokens, seed, sample_index, (tokenizer.end_of_text,)
    )
    return SpeculativeTextStream(SpeculativeDecoder(model, drafter, request), TextStream(tokenizer, stop))
