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
from gpt2.generation.sampling import History, Sampling, choose, log_probabilities, random_stream
from gpt2.model import GPTConfig

DAMAGED = "the model gives nan or inf: its weights are damaged, or too large for its dtype"
CHUNK = 256  # so many prompt tokens are read between two steps of those that already speak

Alternatives = tuple[tuple[int, float], ...]


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
class Request:
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
    sample: int = 0
    end_tokens: tuple[int, ...] = ()
    alternatives: int | None = None


class Continuation:
    """A request on its way. `tokens` grows; `finished` becomes "stop", "length", "cancelled" or "error"."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.finished: str | None = None
        self.error: UserError | None = None
        """Why the continuation could not go on, if it could not."""
        self.start = 0
        """Where in `tokens` the context begins: beyond 0 once the text has outgrown the context."""
        self.stream = random_stream(request.seed, request.sample)
        self.history = History(self.tokens, len(request.prompt), request.end_tokens)

    @property
    def new_tokens(self) -> list[int]:
        """The continuation alone."""
        return self.tokens[len(self.request.prompt) :]


@dataclass(frozen=True)
class Token:
    """One new token of one continuation."""

    continuation: Continuation
    id: int
    logprob: float | None = None
    """Natural logarithm of the model's own probability of it, before any setting."""
    alternatives: Alternatives = ()
    """The most likely ids with their log-probabilities, best first."""


class Engine:
    """Runs a model over up to `slots` continuations at a time. `submit`, then `step` until `idle`.

    max_length: the context, when it is to be shorter than the model's own (memory is taken for all of it at once).
    """

    def __init__(self, model: LanguageModel, slots: int = 8, max_length: int | None = None, chunk: int = CHUNK) -> None:
        if slots < 1 or chunk < 1:
            raise UserError(f"an engine has at least one slot and reads at least one token, not {min(slots, chunk)}")
        self.model, self.slots, self.chunk = model, slots, chunk
        self._cache = model.make_cache(slots, min(max_length or model.config.block_size, model.config.block_size))
        self._waiting: deque[Continuation] = deque()
        self._rows: list[Continuation] = []  # row i of the cache is _rows[i]; those that read a prompt come last
        self._speaking = 0  # so many rows have but their last token to read
        self._remembered: list[list[int]] = [[] for _ in range(slots)]  # the tokens that each row of the cache has read

    @property
    def idle(self) -> bool:
        """Is there nothing to do?"""
        return not self._rows and not self._waiting

    @property
    def running(self) -> int:
        """How many continuations have a row."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        return len(self._waiting)

    def submit(self, request: Request) -> Continuation:
        """Take a request; its tokens come with the next steps. Raises UserError for one that cannot be served."""
        self.check(request)
        continuation = Continuation(request)
        if request.max_new_tokens == 0:
            continuation.finished = "length"
        else:
            self._waiting.append(continuation)
        return continuation

    def cancel(self, continuation: Continuation) -> None:
        """Let it go at once, wherever it is; its row is free for the next step."""
        if continuation.finished is None:
            self._finish(continuation, "cancelled")

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Go on by one token wherever a prompt has been read.

        What goes wrong with one continuation ends that one only, and is told in its `error`.
        """
        while self._waiting and len(self._rows) < self.slots:
            self._rows.append(self._waiting.popleft())
            self._cache.lengths[len(self._rows) - 1] = 0
        speaking = self._speaking
        with evaluating(self.model):
            read = self._read_prompts(self.chunk)
            hidden = [self._decode(speaking)] if speaking else []
            logits = self.model.lm_head(torch.cat(hidden + read)) if hidden or read else None  # (rows, V)
        return [] if logits is None else self._choose(logits)

    def check(self, request: Request) -> None:
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
        request.sampling.check_ids(vocab_size)

    def _read_prompts(self, budget: int) -> list[Tensor]:
        """Read on in the prompts, `budget` tokens in all; the last hidden states (1, C) of those that are through."""
        through: list[Tensor] = []
        while self._speaking < len(self._rows) and budget > 0:
            row = self._speaking
            tokens, cache = self._rows[row].tokens, self._cache[row : row + 1]
            if cache.lengths[0] == 0:
                self._copy_what_others_read(row, tokens)
            read = int(cache.lengths[0])
            chunk = tokens[read : read + budget]
            hidden = self._run(row, [chunk])
            budget -= len(chunk)
            if read + len(chunk) == len(tokens):
                through.append(hidden[:, -1])
                self._speaking += 1
        return through

    def _copy_what_others_read(self, row: int, tokens: list[int]) -> None:
        """All but the last token may come from another row; a few tokens are not worth the search."""
        shared = [common_prefix(tokens[:-1], remembered) for remembered in self._remembered]
        donor = max(range(self.slots), key=shared.__getitem__)
        self._cache.copy_row(donor, row, shared[donor])
        self._remembered[row] = tokens[: shared[donor]]

    def _decode(self, count: int) -> Tensor:
        """Read the last token of the first `count` rows: (count, C)."""
        for row in range(count):
            if self._cache.lengths[row] == self._cache.max_length:
                self._begin_again(row)
        return self._run(0, [self._rows[row].tokens[-1:] for row in range(count)])[:, -1]

    def _begin_again(self, row: int) -> None:
        """The context is full: forget it, and read the later half of it again, all but the last token."""
        continuation = self._rows[row]
        continuation.start = len(continuation.tokens) - max(1, self._cache.max_length // 2)
        self._cache.lengths[row] = 0
        self._remembered[row] = []
        if again := continuation.tokens[continuation.start : -1]:
            self._run(row, [again])

    def _run(self, row: int, tokens: list[list[int]]) -> Tensor:
        """The model on the next tokens (B, T) of the rows from `row` on: (B, T, C)."""
        for i, new in enumerate(tokens, row):
            self._remembered[i] += new
        rows = torch.tensor(tokens, device=self.model.device)
        return self.model.hidden_states(rows, self._cache[row : row + len(tokens)])

    def _choose(self, logits: Tensor) -> list[Token]:
        """One token for each of the first rows, by its own settings and its own random stream."""
        rows = self._rows[: len(logits)]
        sound = logits.amax(-1).isfinite().tolist()
        groups: dict[Sampling, list[int]] = {}
        for i, continuation in enumerate(rows):
            if sound[i]:
                groups.setdefault(continuation.request.sampling, []).append(i)
            else:
                continuation.error = UserError(DAMAGED)
        for members in groups.values():
            same = logits if len(members) == len(logits) else logits[members]
            _append_chosen(same, [rows[i] for i in members])
        told = _log_probabilities(logits, rows)
        tokens = []
        for i, continuation in enumerate(rows):
            if continuation.error is None:
                tokens.append(Token(continuation, continuation.tokens[-1], *told.get(i, (None, ()))))
            if reason := _reason_to_finish(continuation):
                self._finish(continuation, reason)
        return tokens

    def _finish(self, continuation: Continuation, reason: str) -> None:
        """Take it out; the last of those who speak comes to its row, and the last of all to that one's."""
        continuation.finished = reason
        if continuation in self._waiting:
            self._waiting.remove(continuation)
            return
        hole = self._rows.index(continuation)
        if hole < self._speaking:
            self._speaking -= 1
            self._move(self._speaking, hole)
            hole = self._speaking
        self._move(len(self._rows) - 1, hole)
        self._rows.pop()

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._rows[target] = self._rows[source]
            self._remembered[target] = list(self._remembered[source])
            self._cache.copy_row(source, target, int(self._cache.lengths[source]))


def _append_chosen(logits: Tensor, rows: list[Continuation]) -> None:
    """Choose a token for each of the rows, which have the same settings; one that cannot go on is told why."""
    try:
        histories, streams = [row.history for row in rows], [row.stream for row in rows]
        ids = choose(logits, rows[0].request.sampling, histories, streams).tolist()
    except UserError as error:  # every token is ruled out: in one of them at least
        if len(rows) == 1:
            rows[0].error = error
            return
        for i, row in enumerate(rows):
            _append_chosen(logits[i : i + 1], [row])
        return
    for row, token in zip(rows, ids, strict=True):
        row.tokens.append(token)


def _reason_to_finish(continuation: Continuation) -> str | None:
    if continuation.error is not None:
        return "error"
    if continuation.tokens[-1] in continuation.request.end_tokens:
        return "stop"
    written = len(continuation.tokens) - len(continuation.request.prompt)
    return "length" if written == continuation.request.max_new_tokens else None


def _log_probabilities(logits: Tensor, rows: list[Continuation]) -> dict[int, tuple[float, Alternatives]]:
    """By row, for those who asked: the log-probability of the token just chosen, and the most likely tokens."""
    asked = {i: row.request.alternatives for i, row in enumerate(rows) if row.error is None}
    wanted = {i: count for i, count in asked.items() if count is not None}
    if not wanted:
        return {}
    chosen = torch.tensor([rows[i].tokens[-1] for i in wanted], device=logits.device)
    own, ids, values = log_probabilities(logits[list(wanted)], chosen, max(wanted.values()))
    told = zip(own.tolist(), ids.tolist(), values.tolist(), strict=True)
    return {
        i: (logprob, tuple(zip(best[:count], theirs[:count], strict=True)))
        for (i, count), (logprob, best, theirs) in zip(wanted.items(), told, strict=True)
    }


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def check_finite(logits: Tensor) -> None:
    """Raise UserError where a model's logits (B, V) have nan or inf as their largest."""
    if not logits.amax(-1).isfinite().all():
        raise UserError(DAMAGED)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout within, and each module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
