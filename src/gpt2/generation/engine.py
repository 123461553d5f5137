"""The generation engine: continuous batching over a static KV cache, batch invariant.

A request waits in the queue until a slot, which is a row of the KV cache, is free. Its prompt is prefilled in chunks
(chunked prefill), so that the other sequences keep decoding meanwhile. Then every step decodes one token, until the
sequence finishes and frees its slot. A prefix that another row has cached already is copied, not computed again
(prefix cache).

When the context is full, its later half is prefilled again into the emptied row and decoding continues from there:
half a context of tokens costs one prefill.
"""

from collections import abc, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt2.cache import KVCache
from gpt2.errors import NonFiniteLogitsError, RequestError, UserError
from gpt2.generation.defaults import MAX_NEW_TOKENS
from gpt2.generation.sampling import History, Sampling, gather_logprobs, make_generator, sample_tokens
from gpt2.model import GPTConfig

_NON_FINITE_LOGITS = "the model gives nan or inf: its weights are damaged, or too large for its dtype"
PREFILL_CHUNK = 256  # prompt tokens that are prefilled between two decoding steps

TopLogprobs = tuple[tuple[int, float], ...]


class LanguageModel(Protocol):
    """The interface of a model that the engine can run: `gpt2.model.GPT`, `NativeGPT`, `GraphedGPT`."""

    config: GPTConfig

    @property
    def device(self) -> torch.device:
        """The device that tokens must be on."""
        ...

    def make_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache."""
        ...

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """int64 (B, T) -> (B, T, C). The tokens continue the rows of the cache."""
        ...

    @property
    def lm_head(self) -> Any:
        """A function: (..., C) -> logits (..., V)."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how to continue it.

    prompt:         token ids, at least one.
    seed, sample_index: they select the random stream, so that a result does not depend on the batch.
    end_tokens:     ids that end the sequence. They are part of `new_tokens`.
    top_logprobs:   how many of the most likely tokens to return with each new token; None for no log-probabilities.
    """

    prompt: abc.Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0
    sample_index: int = 0
    end_tokens: tuple[int, ...] = ()
    top_logprobs: int | None = None


class Sequence:
    """The state of one request: `tokens` is the prompt and the new tokens so far.

    finish_reason: None while it runs, then "stop", "length", "cancelled" or "error".
    error:         why it cannot continue, if `finish_reason` is "error".
    context_start: index in `tokens` of the first token in the context; above 0 once the context was full.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.finish_reason: str | None = None
        self.error: UserError | None = None
        self.context_start = 0
        self.generator = make_generator(request.seed, request.sample_index)
        self.history = History(self.tokens, len(request.prompt), request.end_tokens)

    @property
    def new_tokens(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def context_tokens(self) -> list[int]:
        """The tokens in the context."""
        return self.tokens[self.context_start :]


@dataclass(frozen=True)
class SampledToken:
    """One new token of one sequence.

    logprob:      the natural logarithm of the model's probability of it, before penalties and temperature.
    top_logprobs: the most likely ids with their log-probabilities, most likely first.
    """

    sequence: Sequence
    id: int
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()


class Engine:
    """Runs a model on up to `slots` sequences at a time: `submit` requests, then `step` until `idle`.

    max_length:    a context shorter than the model's own. The KV cache for all slots is allocated at once.
    prefill_chunk: prompt tokens that are prefilled in one step.
    """

    def __init__(
        self, model: LanguageModel, slots: int = 8, max_length: int | None = None, prefill_chunk: int = PREFILL_CHUNK
    ) -> None:
        if slots < 1 or prefill_chunk < 1:
            raise UserError(f"slots and prefill_chunk must be at least 1, not {min(slots, prefill_chunk)}")
        self.model, self.slots, self.prefill_chunk = model, slots, prefill_chunk
        self._kv_cache = model.make_cache(slots, min(max_length or model.config.block_size, model.config.block_size))
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by row of the cache; those in prefill come last
        self._num_decoding = 0  # the first rows, whose tokens are all cached but the last
        self._cached_tokens: list[list[int]] = [[] for _ in range(slots)]  # by row of the cache

    @property
    def idle(self) -> bool:
        """Whether no sequence is running or waiting."""
        return not self._running and not self._waiting

    @property
    def num_running(self) -> int:
        """The number of sequences that have a slot."""
        return len(self._running)

    def submit(self, request: GenerationRequest) -> Sequence:
        """Add a request to the queue. Raises RequestError for one that cannot be served."""
        self.check_request(request)
        sequence = Sequence(request)
        if request.max_new_tokens == 0:
            sequence.finish_reason = "length"
        else:
            self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Finish a sequence early; its slot is free for the next step."""
        if sequence.finish_reason is None:
            self._finish(sequence, "cancelled")

    def pause(self, sequence: Sequence) -> None:
        """Take a sequence out of its slot or the queue. `resume` prefills it again, and its result is the same."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._free_row(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Add a paused sequence to the queue."""
        self._waiting.append(sequence)

    def num_unfilled(self, sequence: Sequence) -> int:
        """How many tokens of a sequence are still to be prefilled; 0 for one that is decoding."""
        tokens, row = sequence.context_tokens, self._running.index(sequence) if sequence in self._running else None
        if row is not None and row < self._num_decoding:
            return 0
        if row is not None and self._kv_cache.lengths[row] > 0:
            return len(tokens) - int(self._kv_cache.lengths[row])
        return len(tokens) - self._longest_cached_prefix(tokens)[1]

    @torch.inference_mode()
    def step(self) -> list[SampledToken]:
        """Prefill up to `prefill_chunk` prompt tokens, then decode one token where the prompt is complete.

        An error in one sequence ends that sequence alone: see `Sequence.error`.
        """
        while self._waiting and len(self._running) < self.slots:
            self._running.append(self._waiting.popleft())
            self._kv_cache.lengths[len(self._running) - 1] = 0
        decoding = self._num_decoding
        with eval_mode(self.model):
            prefilled = self._prefill(self.prefill_chunk)
            hidden = [self._decode(decoding)] if decoding else []
            logits = self.model.lm_head(torch.cat(hidden + prefilled)) if hidden or prefilled else None  # (rows, V)
        return [] if logits is None else self._sample(logits)

    def check_request(self, request: GenerationRequest) -> None:
        """Raise RequestError for a request that cannot be served. Thread safe."""
        check_request(request, self.model.config.vocab_size, self._kv_cache.max_length)

    def _prefill(self, max_tokens: int) -> list[Tensor]:
        """Prefill at most `max_tokens` tokens; the last hidden states (1, C) of the prompts that are complete."""
        complete: list[Tensor] = []
        while self._num_decoding < len(self._running) and max_tokens > 0:
            row = self._num_decoding
            self._shift_full_context(self._running[row])
            tokens, cache = self._running[row].context_tokens, self._kv_cache[row : row + 1]
            if cache.lengths[0] == 0:
                self._copy_shared_prefix(row, tokens)
            start = int(cache.lengths[0])
            chunk = tokens[start : start + max_tokens]
            hidden = self._forward(row, [chunk])
            max_tokens -= len(chunk)
            if start + len(chunk) == len(tokens):
                complete.append(hidden[:, -1])
                self._num_decoding += 1
        return complete

    def _copy_shared_prefix(self, row: int, tokens: list[int]) -> None:
        """Prefix cache: copy the longest prefix, the last token excluded, that any row of the cache holds."""
        donor, length = self._longest_cached_prefix(tokens)
        self._kv_cache.copy_row(donor, row, length)
        self._cached_tokens[row] = tokens[:length]

    def _longest_cached_prefix(self, tokens: list[int]) -> tuple[int, int]:
        """The row that has cached the longest prefix of the tokens, the last one excluded, and that length."""
        shared = [common_prefix_length(tokens[:-1], cached) for cached in self._cached_tokens]
        donor = max(range(self.slots), key=shared.__getitem__)
        return donor, shared[donor]

    def _decode(self, count: int) -> Tensor:
        """Run the model on the last token of the first `count` rows: (count, C)."""
        for row in range(count):
            if self._kv_cache.lengths[row] == self._kv_cache.max_length:
                self._refill_row(row)
        return self._forward(0, [self._running[row].tokens[-1:] for row in range(count)])[:, -1]

    def _refill_row(self, row: int) -> None:
        """The context is full: empty the row and prefill its later half again, the last token excluded."""
        self._shift_full_context(self._running[row])
        self._kv_cache.lengths[row] = 0
        self._cached_tokens[row] = []
        if kept := self._running[row].context_tokens[:-1]:
            self._forward(row, [kept])

    def _shift_full_context(self, sequence: Sequence) -> None:
        """If the tokens in the context are more than fit, keep their later half."""
        if len(sequence.tokens) - sequence.context_start > self._kv_cache.max_length:
            sequence.context_start = len(sequence.tokens) - max(1, self._kv_cache.max_length // 2)

    def _forward(self, row: int, tokens: list[list[int]]) -> Tensor:
        """Run the model on the next tokens (B, T) of B rows from `row` on: (B, T, C)."""
        for i, new in enumerate(tokens, row):
            self._cached_tokens[i] += new
        rows = torch.tensor(tokens, device=self.model.device)
        return self.model.hidden_states(rows, self._kv_cache[row : row + len(tokens)])

    def _sample(self, logits: Tensor) -> list[SampledToken]:
        """One token for each row of `logits`, with its own settings and its own random stream."""
        rows = self._running[: len(logits)]
        finite = logits.amax(-1).isfinite().tolist()
        groups: dict[Sampling, list[int]] = {}
        for i, sequence in enumerate(rows):
            if finite[i]:
                groups.setdefault(sequence.request.sampling, []).append(i)
            else:
                sequence.error = NonFiniteLogitsError(_NON_FINITE_LOGITS)
        for members in groups.values():
            group_logits = logits if len(members) == len(logits) else logits[members]
            _sample_and_append(group_logits, [rows[i] for i in members])
        logprobs = _requested_logprobs(logits, rows)
        tokens = []
        for i, sequence in enumerate(rows):
            if sequence.error is None:
                tokens.append(SampledToken(sequence, sequence.tokens[-1], *logprobs.get(i, (None, ()))))
            if reason := _finish_reason(sequence):
                self._finish(sequence, reason)
        return tokens

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:  # and not paused
            self._free_row(sequence)

    def _free_row(self, sequence: Sequence) -> None:
        """Free its row. The last decoding row moves into it, and those in prefill move up in their order."""
        freed_row = self._running.index(sequence)
        if freed_row < self._num_decoding:
            self._num_decoding -= 1
            self._move_row(self._num_decoding, freed_row)
            freed_row = self._num_decoding
        for row in range(freed_row + 1, len(self._running)):  # only the first of them can have cached tokens
            self._move_row(row, row - 1)
        self._running.pop()

    def _move_row(self, source: int, target: int) -> None:
        if source == target:
            return
        length = int(self._kv_cache.lengths[source])
        self._running[target] = self._running[source]
        self._kv_cache.copy_row(source, target, length)
        if length:  # otherwise the target still holds what it held, for the prefix cache
            self._cached_tokens[target] = list(self._cached_tokens[source])


def _sample_and_append(logits: Tensor, sequences: list[Sequence]) -> None:
    """Sample one token for each sequence, all with the same settings; set `error` where every token is ruled out."""
    try:
        histories, generators = [row.history for row in sequences], [row.generator for row in sequences]
        ids = sample_tokens(logits, sequences[0].request.sampling, histories, generators).tolist()
    except UserError as error:  # every token is ruled out in at least one row
        if len(sequences) == 1:
            sequences[0].error = error
            return
        for i, row in enumerate(sequences):
            _sample_and_append(logits[i : i + 1], [row])
        return
    for row, token in zip(sequences, ids, strict=True):
        row.tokens.append(token)


def _finish_reason(sequence: Sequence) -> str | None:
    if sequence.error is not None:
        return "error"
    if sequence.tokens[-1] in sequence.request.end_tokens:
        return "stop"
    num_new = len(sequence.tokens) - len(sequence.request.prompt)
    return "length" if num_new == sequence.request.max_new_tokens else None


def _requested_logprobs(logits: Tensor, sequences: list[Sequence]) -> dict[int, tuple[float, TopLogprobs]]:
    """By row, where requested: the log-probability of the token just sampled, and the most likely tokens."""
    counts = {i: row.request.top_logprobs for i, row in enumerate(sequences) if row.error is None}
    counts = {i: count for i, count in counts.items() if count is not None}
    if not counts:
        return {}
    sampled = torch.tensor([sequences[i].tokens[-1] for i in counts], device=logits.device)
    logprobs, ids, values = gather_logprobs(logits[list(counts)], sampled, max(counts.values()))
    rows = zip(logprobs.tolist(), ids.tolist(), values.tolist(), strict=True)
    return {
        i: (logprob, tuple(zip(top_ids[:count], top_values[:count], strict=True)))
        for (i, count), (logprob, top_ids, top_values) in zip(counts.items(), rows, strict=True)
    }


def check_request(request: GenerationRequest, vocab_size: int, context: int) -> None:
    """Raise RequestError for a request that a model with this vocabulary and context cannot serve."""
    if not request.prompt:
        raise RequestError("there is nothing to continue: the prompt has no tokens", field="prompt")
    if len(request.prompt) > context:
        message = f"{len(request.prompt)} tokens do not fit the model's context of {context}"
        raise RequestError(message, field="prompt", code="context_length_exceeded")
    if not all(0 <= token < vocab_size for token in request.prompt):
        wrong = next(token for token in request.prompt if not 0 <= token < vocab_size)
        message = f"the prompt has token id {wrong}, which is outside the model's vocabulary of {vocab_size}"
        raise RequestError(message, field="prompt")
    if (count := request.max_new_tokens) < 0:
        raise RequestError(f"max_new_tokens must be 0 or more, not {count}", field="max_new_tokens")
    request.sampling.check_token_ids(vocab_size)


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """The length of the longest common prefix of two token lists."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def check_finite(logits: Tensor) -> None:
    """Raise NonFiniteLogitsError if the largest logit of any row of (B, V) is nan or inf."""
    if not logits.amax(-1).isfinite().all():
        raise NonFiniteLogitsError(_NON_FINITE_LOGITS)


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Switch dropout off inside the block, and restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
