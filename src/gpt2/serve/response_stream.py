"""What completions and chat share: from a parsed request to the deltas of its choices."""

import asyncio
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpt2.generation.engine import GenerationRequest
from gpt2.generation.sampling import Sampling
from gpt2.generation.stream_decoder import StreamDecoder
from gpt2.serve.choices import Choice, ChoiceDelta
from gpt2.serve.errors import APIError, to_api_error
from gpt2.serve.limits import Limits
from gpt2.serve.metrics import Metrics
from gpt2.serve.models import ServedModel
from gpt2.serve.prompt_logprobs import TokenLogprob
from gpt2.serve.scheduler import PromptLogprobsRequest, SequenceEvent, SequenceFinished
from gpt2.serve.schema import CommonRequestFields, Usage


@dataclass(frozen=True)
class ParsedRequest:
    """A request with its defaults filled in and its limits checked.

    prompts:      token ids of each prompt.
    num_samples:  choices for each prompt; choice s of prompt p has index p * num_samples + s.
    top_logprobs: the number of most likely tokens to report for each token; None for no log-probabilities.
    echo:         whether the choices begin with their prompts.
    stop_token_ids: further tokens that end a choice; they have no text.
    num_dropped_messages: messages of the conversation that are not part of the prompt.
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
    stop_token_ids: Sequence[int] = ()
    skip_special_tokens: bool = True
    num_dropped_messages: int = 0

    def engine_requests(self) -> list[GenerationRequest | PromptLogprobsRequest]:
        """One request for each choice, and after them one for each prompt whose log-probabilities are needed."""
        end = (*self.served.tokenizer.end_tokens, *self.stop_token_ids)
        sequences = [
            GenerationRequest(prompt, self.sampling, self.max_tokens, self.seed, sample, end, self.top_logprobs)
            for prompt in self.prompts
            for sample in range(self.num_samples)
        ]
        scored = self.prompts if self.echo and self.top_logprobs is not None else []
        return [*sequences, *(PromptLogprobsRequest(prompt, self.top_logprobs or 0) for prompt in scored)]


class ResponseStream:
    """The choices of one request while they are generated: iterate over `deltas`, and read `choices` afterwards.

    Raises UserError when the scheduler refuses the request, and APIError when it fails later.
    """

    def __init__(self, request: ParsedRequest, client: str, limits: Limits, metrics: Metrics) -> None:
        self.request, self._scheduler, self._metrics = request, request.served.scheduler, metrics
        self.choices = [
            Choice(
                index,
                request.served.tokenizer,
                request.stop_strings,
                min_tokens=request.sampling.min_new_tokens,
                skip_special_tokens=request.skip_special_tokens,
                stop_token_ids=request.stop_token_ids,
            )
            for index in range(len(request.prompts) * request.num_samples)
        ]
        self._limits, self._start_time, self._last_token_times = limits, time.monotonic(), [0.0] * len(self.choices)
        self._handle = self._scheduler.submit(client, request.engine_requests())
        metrics.prompt_tokens.labels(request.served.name).inc(self.prompt_tokens)

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of all prompts, each counted once."""
        return sum(map(len, self.request.prompts))

    @property
    def new_tokens(self) -> int:
        """The number of new tokens of all choices so far."""
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def usage(self) -> Usage:
        """The token counts of the response."""
        prompt, new = self.prompt_tokens, self.new_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)

    async def deltas(self) -> AsyncGenerator[ChoiceDelta]:
        """All deltas, until every choice has finished. Closing the generator cancels the rest."""
        try:
            events: deque[tuple[int, SequenceEvent]] = deque()
            if self.request.echo:
                async for delta in self._echo_prompts(events):
                    yield delta
            unfinished = len(self.choices)
            while unfinished:
                index, event = events.popleft() if events else await self._next_event()
                if delta := self._to_delta(index, event):
                    unfinished -= delta.finish_reason is not None
                    if delta.text and delta.finish_reason:  # some clients ignore the text of a last chunk
                        yield replace(delta, finish_reason=None)
                        delta = replace(delta, text="", token_logprobs=[])
                    yield delta
        finally:
            self._scheduler.cancel(self._handle)
            self._metrics.new_tokens.labels(self.request.served.name).inc(self.new_tokens)

    async def collect(self) -> list[Choice]:
        """The choices, after all of them have finished."""
        async for _ in self.deltas():
            pass
        return self.choices

    async def _next_event(self) -> tuple[int, SequenceEvent]:
        """The next event of the scheduler. Raises APIError if it is an error, and after `limits.timeout`."""
        events = self._handle.events
        try:
            if events.empty():
                async with asyncio.timeout(self._start_time + self._limits.timeout - time.monotonic()):
                    index, event = await events.get()
            else:
                index, event = events.get_nowait()
        except TimeoutError:
            raise APIError(504, f"the request took longer than {self._limits.timeout:g} seconds") from None
        if isinstance(event, SequenceFinished) and event.error is not None:
            raise to_api_error(event.error)
        return index, event

    async def _echo_prompts(self, events: deque[tuple[int, SequenceEvent]]) -> AsyncIterator[ChoiceDelta]:
        """The deltas of the prompts. Events of choices that arrive before the log-probabilities go to `events`."""
        request = self.request
        scores: dict[int, list[TokenLogprob]] = {}
        while request.top_logprobs is not None and len(scores) < len(request.prompts):
            index, event = await self._next_event()
            if isinstance(event, list):
                scores[index - len(self.choices)] = event
            elif index < len(self.choices):
                events.append((index, event))
        for number, prompt in enumerate(request.prompts):
            text, offsets = _decode_prompt(request.served, prompt)
            scored = scores.get(number, [])
            for choice in self.choices[number * request.num_samples : (number + 1) * request.num_samples]:
                yield choice.echo(text, scored, offsets if scored else [])

    def _to_delta(self, index: int, event: SequenceEvent) -> ChoiceDelta | None:
        """The delta of an event; None if it adds nothing, or belongs to a choice that has finished."""
        if index >= len(self.choices) or isinstance(event, list) or self.choices[index].finish_reason is not None:
            return None
        if isinstance(event, SequenceFinished):
            return self.choices[index].finish()
        self._record_token_latency(index)
        delta = self.choices[index].push(event)
        if delta.finish_reason is not None:
            self._scheduler.cancel(self._handle, index)
        return delta if delta.text or delta.token_logprobs or delta.finish_reason else None

    def _record_token_latency(self, index: int) -> None:
        """Record the time to first token of the request, or the inter-token latency of the choice."""
        now, name = time.monotonic(), self.request.served.name
        if self._last_token_times[index]:
            self._metrics.inter_token_latency.labels(name).observe(now - self._last_token_times[index])
        elif not any(self._last_token_times):
            self._metrics.time_to_first_token.labels(name).observe(now - self._start_time)
        self._last_token_times[index] = now


def _decode_prompt(served: ServedModel, prompt: list[int]) -> tuple[str, list[int]]:
    """The text of a prompt, and where each token begins in it."""
    decoder, text, offsets = StreamDecoder(served.tokenizer), "", []
    for token in prompt:
        offsets.append(len(text))
        text += decoder.push(token) if token < served.tokenizer.vocab_size else ""
    return text + decoder.flush(), offsets


def resolve_max_tokens(body: CommonRequestFields, default: int, limits: Limits) -> int:
    """The maximum number of new tokens. Raises APIError if it is over the limit or given as two different numbers."""
    given = {name: getattr(body, name) for name in ("max_tokens", "max_completion_tokens", "max_new_tokens")}
    named = {name: value for name, value in given.items() if value is not None}
    if len(set(named.values())) > 1:
        raise APIError(400, f"{' and '.join(named)} differ: give one of them", "max_tokens")
    for name, value in named.items():
        if value > limits.max_tokens:
            raise APIError(400, f"{name} is at most {limits.max_tokens:,} on this server, not {value:,}", name)
    return next(iter(named.values()), min(default, limits.max_tokens))


def resolve_num_samples(body: CommonRequestFields, limits: Limits) -> int:
    """The number of choices for each prompt. Raises APIError if it is over the limit."""
    n = body.n or 1
    if n > limits.max_n:
        raise APIError(400, f"n is at most {limits.max_n} on this server, not {n}", "n")
    if body.stream_options is not None and not body.stream:
        raise APIError(400, "stream_options requires stream: true", "stream_options")
    return n


def resolve_sampling(body: CommonRequestFields, served: ServedModel) -> Sampling:
    """The sampling parameters. `ignore_eos` bans every token that would end the text."""
    sampling = body.sampling()
    if not body.ignore_eos:
        return sampling
    tokenizer = served.tokenizer
    banned = [*tokenizer.end_tokens, *range(tokenizer.vocab_size, served.model.config.vocab_size)]
    return replace(sampling, logit_bias=dict(sampling.logit_bias) | dict.fromkeys(banned, -math.inf))


def check_text_length(num_characters: int, served: ServedModel, param: str) -> None:
    """Raise APIError for a text with so many characters that it cannot fit the context."""
    if num_characters > served.max_prompt_characters:
        raise context_length_error(f"more than {served.scheduler.context_length}", served, param)


def check_prompt_length(tokens: Sequence[int], served: ServedModel, param: str) -> None:
    """Raise APIError for a prompt that does not fit the context."""
    if len(tokens) > served.scheduler.context_length:
        raise context_length_error(len(tokens), served, param)


def context_length_error(num_tokens: int | str, served: ServedModel, param: str) -> APIError:
    """The error for a prompt that is too long, in the words that clients look for."""
    context = served.scheduler.context_length
    message = f"This model's maximum context length is {context} tokens, but {param} has {num_tokens} tokens"
    return APIError(400, message, param, "context_length_exceeded")


def response_header(id_prefix: str, served: ServedModel) -> dict[str, Any]:
    """The fields that a response and all its chunks share: a new id, the time, and the model."""
    return {"id": f"{id_prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": served.name}
