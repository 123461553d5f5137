"""The engine: many texts continued at once, each as if it were alone.

A request waits until a row of the cache is free, its prompt is read (in chunks, so that the others go on meanwhile),
and from then on every step gives it one token, until it is finished and leaves its row to the next. What a row that
reads a prompt finds already read in another row, it copies.

When the context is full, the later half of it is read again into the empty row and the text goes on from there: half
a context of tokens costs one prefill, and none is ever an index error.
"""

from collections import abc, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt2.cache import KVCache
from gpt2.errors import UserError
from gpt2.generation.sampling import History, Sampling, gather_logprobs, make_generator, sample_tokens
from gpt2.model import GPTConfig

NON_FINITE_LOGITS = "the model gives nan or inf: its weights are damaged, or too large for its dtype"
PREFILL_CHUNK = 256  # so many prompt tokens are read between two steps of those that already speak

TopLogprobs = tuple[tuple[int, float], ...]


class LanguageModel(Protocol):
    """What the engine runs: a `gpt2.model.GPT`, or anything that reads like one."""

    config: GPTConfig

    @property
    def device(self) -> torch.device:
        """Where tokens are to be put."""
        ...

    def make_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache."""
        ...

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """int64 (B, T) -> (B, T, C), continuing the rows of the cache."""
        ...

    @property
    def lm_head(self) -> Any:
        """A function: (..., C) -> logits (..., V)."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """What is to be continued, and how.

    prompt:     token ids, at least one.
    end_tokens: ids that end the continuation; they are reported, and not before `sampling.min_new_tokens`.
    alternatives: how many of the most likely tokens are told with each token, with the log-probabilities; None for
                neither.
    """

    prompt: abc.Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 100
    seed: int = 0
    sample_index: int = 0
    end_tokens: tuple[int, ...] = ()
    top_logprobs: int | None = None


class Sequence:
    """A request on its way. `tokens` grows; `finished` becomes "stop", "length", "cancelled" or "error"."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.finish_reason: str | None = None
        self.error: UserError | None = None
        """Why the continuation could not go on, if it could not."""
        self.context_start = 0
        """Where in `tokens` the context begins: beyond 0 once the text has outgrown the context."""
        self.generator = make_generator(request.seed, request.sample_index)
        self.history = History(self.tokens, len(request.prompt), request.end_tokens)

    @property
    def new_tokens(self) -> list[int]:
        """The continuation alone."""
        return self.tokens[len(self.request.prompt) :]


@dataclass(frozen=True)
class SampledToken:
    """One new token of one continuation."""

    sequence: Sequence
    id: int
    logprob: float | None = None
    """Natural logarithm of the model's own probability of it, before any setting."""
    top_logprobs: TopLogprobs = ()
    """The most likely ids with their log-probabilities, best first."""


class Engine:
    """Runs a model over up to `slots` continuations at a time. `submit`, then `step` until `idle`.

    max_length: the context, when it is to be shorter than the model's own (memory is taken for all of it at once).
    """

    def __init__(
        self, model: LanguageModel, slots: int = 8, max_length: int | None = None, prefill_chunk: int = PREFILL_CHUNK
    ) -> None:
        if slots < 1 or prefill_chunk < 1:
            raise UserError(
                f"an engine has at least one slot and reads at least one token, not {min(slots, prefill_chunk)}"
            )
        self.model, self.slots, self.prefill_chunk = model, slots, prefill_chunk
        self._cache = model.make_cache(slots, min(max_length or model.config.block_size, model.config.block_size))
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # row i of the cache is _rows[i]; those that read a prompt come last
        self._num_decoding = 0  # so many rows have but their last token to read
        self._cached_tokens: list[list[int]] = [
            [] for _ in range(slots)
        ]  # the tokens that each row of the cache has read

    @property
    def idle(self) -> bool:
        """Is there nothing to do?"""
        return not self._running and not self._waiting

    @property
    def num_running(self) -> int:
        """How many continuations have a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """How many wait for one."""
        return len(self._waiting)

    def submit(self, request: GenerationRequest) -> Sequence:
        """Take a request; its tokens come with the next steps. Raises UserError for one that cannot be served."""
        self.check_request(request)
        continuation = Sequence(request)
        if request.max_new_tokens == 0:
            continuation.finish_reason = "length"
        else:
            self._waiting.append(continuation)
        return continuation

    def cancel(self, sequence: Sequence) -> None:
        """Let it go at once, wherever it is; its row is free for the next step."""
        if sequence.finish_reason is None:
            self._finish(sequence, "cancelled")

    @torch.inference_mode()
    def step(self) -> list[SampledToken]:
        """Go on by one token wherever a prompt has been read.

        What goes wrong with one continuation ends that one only, and is told in its `error`.
        """
        while self._waiting and len(self._running) < self.slots:
            self._running.append(self._waiting.popleft())
            self._cache.lengths[len(self._running) - 1] = 0
        speaking = self._num_decoding
        with eval_mode(self.model):
            read = self._prefill(self.prefill_chunk)
            hidden = [self._decode(speaking)] if speaking else []
            logits = self.model.lm_head(torch.cat(hidden + read)) if hidden or read else None  # (rows, V)
        return [] if logits is None else self._sample(logits)

    def check_request(self, request: GenerationRequest) -> None:
        """Raise UserError for a request that cannot be served; any thread may ask."""
        vocab_size, context = self.model.config.vocab_size, self._cache.max_length
        if not request.prompt:
            raise UserError("there is nothing to continue: the prompt has no tokens")
        if len(request.prompt) > context:
            raise UserError(f"{len(request.prompt)} tokens do not fit the model's context of {context}")
        if not all(0 <= token < vocab_size for token in request.prompt):
            raise UserError(f"the prompt has a token outside the model's vocabulary of {vocab_size}")
        if request.max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be 0 or more, not {request.max_new_tokens}")
        request.sampling.check_token_ids(vocab_size)

    def _prefill(self, max_tokens: int) -> list[Tensor]:
        """Read on in the prompts, `budget` tokens in all; the last hidden states (1, C) of those that are through."""
        through: list[Tensor] = []
        while self._num_decoding < len(self._running) and max_tokens > 0:
            row = self._num_decoding
            tokens, cache = self._running[row].tokens, self._cache[row : row + 1]
            if cache.lengths[0] == 0:
                self._copy_shared_prefix(row, tokens)
            read = int(cache.lengths[0])
            chunk = tokens[read : read + max_tokens]
            hidden = self._forward(row, [chunk])
            max_tokens -= len(chunk)
            if read + len(chunk) == len(tokens):
                through.append(hidden[:, -1])
                self._num_decoding += 1
        return through

    def _copy_shared_prefix(self, row: int, tokens: list[int]) -> None:
        """All but the last token may come from another row; a few tokens are not worth the search."""
        shared = [common_prefix_length(tokens[:-1], remembered) for remembered in self._cached_tokens]
        donor = max(range(self.slots), key=shared.__getitem__)
        self._cache.copy_row(donor, row, shared[donor])
        self._cached_tokens[row] = tokens[: shared[donor]]

    def _decode(self, count: int) -> Tensor:
        """Read the last token of the first `count` rows: (count, C)."""
        for row in range(count):
            if self._cache.lengths[row] == self._cache.max_length:
                self._shift_context(row)
        return self._forward(0, [self._running[row].tokens[-1:] for row in range(count)])[:, -1]

    def _shift_context(self, row: int) -> None:
        """The context is full: forget it, and read the later half of it again, all but the last token."""
        continuation = self._running[row]
        continuation.context_start = len(continuation.tokens) - max(1, self._cache.max_length // 2)
        self._cache.lengths[row] = 0
        self._cached_tokens[row] = []
        if again := continuation.tokens[continuation.context_start : -1]:
            self._forward(row, [again])

    def _forward(self, row: int, tokens: list[list[int]]) -> Tensor:
        """The model on the next tokens (B, T) of the rows from `row` on: (B, T, C)."""
        for i, new in enumerate(tokens, row):
            self._cached_tokens[i] += new
        rows = torch.tensor(tokens, device=self.model.device)
        return self.model.hidden_states(rows, self._cache[row : row + len(tokens)])

    def _sample(self, logits: Tensor) -> list[SampledToken]:
        """One token for each of the first rows, by its own settings and its own random stream."""
        rows = self._running[: len(logits)]
        sound = logits.amax(-1).isfinite().tolist()
        groups: dict[Sampling, list[int]] = {}
        for i, continuation in enumerate(rows):
            if sound[i]:
                groups.setdefault(continuation.request.sampling, []).append(i)
            else:
                continuation.error = UserError(NON_FINITE_LOGITS)
        for members in groups.values():
            same = logits if len(members) == len(logits) else logits[members]
            _sample_and_append(same, [rows[i] for i in members])
        told = _requested_logprobs(logits, rows)
        tokens = []
        for i, continuation in enumerate(rows):
            if continuation.error is None:
                tokens.append(SampledToken(continuation, continuation.tokens[-1], *told.get(i, (None, ()))))
            if reason := _finish_reason(continuation):
                self._finish(continuation, reason)
        return tokens

    def _finish(self, sequence: Sequence, reason: str) -> None:
        """Take it out; the last of those who speak comes to its row, and the last of all to that one's."""
        sequence.finish_reason = reason
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return
        hole = self._running.index(sequence)
        if hole < self._num_decoding:
            self._num_decoding -= 1
            self._move_row(self._num_decoding, hole)
            hole = self._num_decoding
        self._move_row(len(self._running) - 1, hole)
        self._running.pop()

    def _move_row(self, source: int, target: int) -> None:
        if source != target:
            self._running[target] = self._running[source]
            self._cached_tokens[target] = list(self._cached_tokens[source])
            self._cache.copy_row(source, target, int(self._cache.lengths[source]))


def _sample_and_append(logits: Tensor, sequences: list[Sequence]) -> None:
    """Choose a token for each of the rows, which have the same settings; one that cannot go on is told why."""
    try:
        histories, streams = [row.history for row in sequences], [row.generator for row in sequences]
        ids = sample_tokens(logits, sequences[0].request.sampling, histories, streams).tolist()
    except UserError as error:  # every token is ruled out: in one of them at least
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
    written = len(sequence.tokens) - len(sequence.request.prompt)
    return "length" if written == sequence.request.max_new_tokens else None


def _requested_logprobs(logits: Tensor, sequences: list[Sequence]) -> dict[int, tuple[float, TopLogprobs]]:
    """By row, for those who asked: the log-probability of the token just chosen, and the most likely tokens."""
    asked = {i: row.request.top_logprobs for i, row in enumerate(sequences) if row.error is None}
    wanted = {i: count for i, count in asked.items() if count is not None}
    if not wanted:
        return {}
    chosen = torch.tensor([sequences[i].tokens[-1] for i in wanted], device=logits.device)
    own, ids, values = gather_logprobs(logits[list(wanted)], chosen, max(wanted.values()))
    told = zip(own.tolist(), ids.tolist(), values.tolist(), strict=True)
    return {
        i: (logprob, tuple(zip(best[:count], theirs[:count], strict=True)))
        for (i, count), (logprob, best, theirs) in zip(wanted.items(), told, strict=True)
    }


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def check_finite(logits: Tensor) -> None:
    """Raise UserError where a model's logits (B, V) have nan or inf as their largest."""
    if not logits.amax(-1).isfinite().all():
        raise UserError(NON_FINITE_LOGITS)


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """No dropout within, and each module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
