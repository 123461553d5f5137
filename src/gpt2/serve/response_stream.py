"""From a request to the pieces of its texts: what completions and chat have in common."""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2.errors import UserError
from gpt2.generation.engine import GenerationRequest
from gpt2.generation.sampling import Sampling
from gpt2.serve.choices import Choice, TokenLogprob
from gpt2.serve.errors import APIError, to_api_error
from gpt2.serve.limits import Limits
from gpt2.serve.metrics import Metrics
from gpt2.serve.models import ServedModel
from gpt2.serve.scheduler import (
    SHUTTING_DOWN,
    PromptLogprobsRequest,
    RequestHandle,
    SequenceEvent,
    SequenceFinished,
    ShuttingDownError,
    TooManyRequestsError,
)
from gpt2.serve.schema import CommonRequestFields
from gpt2.tokenizer import StreamDecoder


@dataclass(frozen=True)
class ParsedRequest:
    """What a request wants of a model.

    prompts:      token ids of each.
    samples:      texts from each prompt; the texts are counted on from one prompt to the next.
    alternatives: the most likely tokens to tell with each token; None for no log-probabilities at all.
    echo:         the texts begin with their prompts.
    """

    served: ServedModel
    prompts: Sequence[list[int]]
    num_samples: int
    sampling: Sampling
    max_tokens: int
    stop_strings: Sequence[str]
    seed: int
    top_logprobs: int | None = None
    echo: bool = False

    def engine_requests(self) -> list[GenerationRequest | PromptLogprobsRequest]:
        """All texts, and after them the prompts that are to be scored."""
        end = (self.served.tokenizer.end_of_text,)
        texts = [
            GenerationRequest(prompt, self.sampling, self.max_tokens, self.seed, sample, end, self.top_logprobs)
            for prompt in self.prompts
            for sample in range(self.num_samples)
        ]
        scored = self.echo and self.top_logprobs is not None
        return [*texts, *(PromptLogprobsRequest(prompt, self.top_logprobs or 0) for prompt in self.prompts if scored)]


@dataclass(frozen=True)
class ResponseDelta:
    """What one text has more: characters that are certain, the tokens they come from; and why it ended, at its end."""

    index: int
    text: str
    token_logprobs: list[TokenLogprob]
    finish_reason: str | None = None


class ResponseStream:
    """The texts of one request, as they come: iterate over `pieces`, and read `choices` afterwards.

    Raises APIError for what cannot be served, here or on the way.
    """

    def __init__(self, request: ParsedRequest, client: str, limits: Limits, metrics: Metrics) -> None:
        self.request, self._scheduler, self._metrics = request, request.served.scheduler, metrics
        self.choices = [
            Choice(request.served.tokenizer, request.stop_strings)
            for _ in range(len(request.prompts) * request.num_samples)
        ]
        self._limits, self._start_time, self._last_token_times = limits, time.monotonic(), [0.0] * len(self.choices)
        try:
            self._handle: RequestHandle = self._scheduler.submit(client, request.engine_requests())
        except UserError as error:
            raise to_api_error(error) from None
        except TooManyRequestsError as busy:
            raise APIError(429, str(busy), retry_after=busy.retry_after) from None
        except ShuttingDownError as closing:
            raise APIError(503, str(closing), retry_after=5) from None
        metrics.prompt_tokens.labels(request.served.name).inc(self.prompt_tokens)

    @property
    def prompt_tokens(self) -> int:
        """In all prompts together, each counted once."""
        return sum(map(len, self.request.prompts))

    @property
    def new_tokens(self) -> int:
        """In all texts so far."""
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        """As OpenAI writes it."""
        prompt, new = self.prompt_tokens, self.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def deltas(self) -> AsyncGenerator[ResponseDelta]:
        """Everything that comes, until all texts have ended. Whoever stops reading cancels the rest."""
        try:
            events: deque[tuple[int, SequenceEvent]] = deque()
            if self.request.echo:
                async for piece in self._echo_prompts(events):
                    yield piece
            unfinished = len(self.choices)
            while unfinished:
                index, event = events.popleft() if events else await self._next_event()
                if piece := self._to_delta(index, event):
                    unfinished -= piece.finish_reason is not None
                    yield piece
        finally:
            self._scheduler.cancel(self._handle)
            self._metrics.new_tokens.labels(self.request.served.name).inc(self.new_tokens)

    async def collect(self) -> list[Choice]:
        """The whole texts."""
        async for _ in self.deltas():
            pass
        return self.choices

    async def _next_event(self) -> tuple[int, SequenceEvent]:
        """The next event. Raises APIError for one that is an error, and when the time is over."""
        events = self._handle.events
        try:
            if events.empty():
                left = self._start_time + self._limits.timeout - time.monotonic()
                async with asyncio.timeout(left):
                    index, event = await events.get()
            else:
                index, event = events.get_nowait()
        except TimeoutError:
            raise APIError(504, f"the request took longer than {self._limits.timeout:g} seconds") from None
        if isinstance(event, SequenceFinished) and event.error is not None:
            if str(event.error) == SHUTTING_DOWN:
                raise APIError(503, SHUTTING_DOWN, retry_after=5)
            raise to_api_error(event.error)
        return index, event

    async def _echo_prompts(self, pending_events: deque[tuple[int, SequenceEvent]]) -> AsyncIterator[ResponseDelta]:
        """The prompts; what comes before they are scored is put into `others`."""
        ask = self.request
        scores: dict[int, list[Any]] = {}
        while ask.top_logprobs is not None and len(scores) < len(ask.prompts):
            index, event = await self._next_event()
            if isinstance(event, list):
                scores[index - len(self.choices)] = event
            elif index < len(self.choices):
                pending_events.append((index, event))
        for number, prompt in enumerate(ask.prompts):
            text, offsets = _decode_prompt(ask.served, prompt)
            scored = scores.get(number)
            for index in range(number * ask.num_samples, (number + 1) * ask.num_samples):
                piece = self.choices[index].echo(text, scored or [], offsets if scored else [])
                yield ResponseDelta(index, *piece)

    def _to_delta(self, index: int, event: SequenceEvent) -> ResponseDelta | None:
        if index >= len(self.choices) or isinstance(event, list):
            return None
        choice = self.choices[index]
        if choice.finish_reason is not None:  # what was said after a stop string
            return None
        if isinstance(event, SequenceFinished):
            return ResponseDelta(index, *choice.finish(event.finish_reason), choice.finish_reason)
        self._record_token_latency(index)
        text, said = choice.push(event)
        if choice.stopped:
            self._scheduler.cancel(self._handle, index)
            more, others = choice.finish("stop")
            return ResponseDelta(index, text + more, said + others, "stop")
        return ResponseDelta(index, text, said) if text or said else None

    def _record_token_latency(self, index: int) -> None:
        """A token has come."""
        now, name = time.monotonic(), self.request.served.name
        if self._last_token_times[index]:
            self._metrics.inter_token_latency.labels(name).observe(now - self._last_token_times[index])
        elif not any(self._last_token_times):
            self._metrics.time_to_first_token.labels(name).observe(now - self._start_time)
        self._last_token_times[index] = now


def _decode_prompt(served: ServedModel, prompt: list[int]) -> tuple[str, list[int]]:
    """A prompt as text, and where each of its tokens begins in it."""
    decoder, text, offsets = StreamDecoder(served.tokenizer), "", []
    for token in prompt:
        offsets.append(len(text))
        text += decoder.push(token) if token < served.tokenizer.vocab_size else ""
    return text + decoder.flush(), offsets


def resolve_max_tokens(body: CommonRequestFields, default: int, limits: Limits) -> int:
    """How many new tokens are asked for. Raises APIError for more than there may be."""
    given = {name: getattr(body, name) for name in ("max_tokens", "max_completion_tokens")}
    named = {name: value for name, value in given.items() if value is not None}
    if len(set(named.values())) > 1:
        raise APIError(400, "max_tokens and max_completion_tokens say two things: give one", "max_tokens")
    for name, value in named.items():
        if value > limits.max_tokens:
            raise APIError(400, f"{name} is at most {limits.max_tokens:,} on this server, not {value:,}", name)
    return next(iter(named.values()), min(default, limits.max_tokens))


def resolve_num_samples(body: CommonRequestFields, limits: Limits) -> int:
    """How many texts are asked for. Raises APIError for more than there may be."""
    n = body.n or 1
    if n > limits.max_n:
        raise APIError(400, f"n is at most {limits.max_n} on this server, not {n}", "n")
    if body.stream_options is not None and not body.stream:
        raise APIError(400, "stream_options goes with stream", "stream_options")
    return n


def parse_sampling(body: CommonRequestFields) -> Sampling:
    """The settings. Raises APIError for those that make no sense."""
    try:
        return body.sampling()
    except UserError as error:
        raise to_api_error(error) from None


def resolve_seed(body: CommonRequestFields) -> int:
    """The seed that was given, or a new one."""
    return secrets.randbits(32) if body.seed is None else body.seed


def check_text_length(num_characters: int, served: ServedModel, param: str) -> None:
    """Raise APIError for a text of so many characters that it does not fit the context."""
    if num_characters > served.max_prompt_characters:
        message = f"{param} has more than the {served.scheduler.context_length:,} tokens of the model's context"
        raise APIError(400, message, param, "context_length_exceeded")


def check_prompt_length(tokens: Sequence[int], served: ServedModel, param: str) -> None:
    """Raise APIError for a prompt that does not fit the context."""
    context = served.scheduler.context_length
    if len(tokens) > context:
        message = f"{param} has {len(tokens):,} tokens, and the model's context is {context:,}"
        raise APIError(400, message, param, "context_length_exceeded")


def response_header(id_prefix: str, object_type: str, served: ServedModel) -> dict[str, Any]:
    """What every response begins with."""
    name = f"{id_prefix}-{secrets.token_hex(12)}"
    return {"id": name, "object": object_type, "created": int(time.time()), "model": served.name}
