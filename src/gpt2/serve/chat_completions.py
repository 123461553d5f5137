"""POST /v1/chat/completions"""

from bisect import bisect_left
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import cache, partial
from typing import Any

from gpt2.errors import UserError
from gpt2.generation.defaults import MAX_NEW_TOKENS
from gpt2.serve import schema
from gpt2.serve.choices import format_token
from gpt2.serve.errors import APIError
from gpt2.serve.limits import Limits
from gpt2.serve.models import ServedModel
from gpt2.serve.prompt_logprobs import TokenLogprob
from gpt2.serve.response_stream import (
    ParsedRequest,
    ResponseStream,
    check_prompt_length,
    context_length_error,
    resolve_max_tokens,
    resolve_num_samples,
    resolve_sampling,
    response_header,
)
from gpt2.tokenizer import Tokenizer


def parse_request(body: schema.ChatRequest, served: ServedModel, limits: Limits) -> ParsedRequest:
    """The request with its defaults. Raises APIError and UserError for fields that are not supported."""
    n = resolve_num_samples(body, limits)
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs requires logprobs: true", "top_logprobs")
    prompt, num_dropped = encode_prompt(body, served)
    return ParsedRequest(
        served,
        [prompt],
        n,
        resolve_sampling(body, served),
        resolve_max_tokens(body, max(1, served.scheduler.context_length - len(prompt)), limits),
        [*body.stop_strings, *served.template.stop_strings],
        body.resolve_seed(),
        (body.top_logprobs or 0) if body.logprobs else None,
        stop_token_ids=body.stop_token_ids or (),
        skip_special_tokens=body.skip_special_tokens is not False,
        num_dropped_messages=num_dropped,
    )


def encode_prompt(body: schema.ChatRequest, served: ServedModel) -> tuple[list[int], int]:
    """(token ids of the conversation, number of messages that were dropped for it to fit the context)

    The oldest turns are dropped, as in `gpt2 chat`, until the rest and an answer fit. A turn is a message of the user
    and all up to the next one; system messages and the last turn stay. Special tokens in messages are encoded as plain
    text. Raises APIError.
    """
    starts = _turn_starts(body.messages) if body.truncate != "none" else [0]
    context = served.scheduler.context_length
    reserved = body.max_tokens or body.max_completion_tokens or body.max_new_tokens or MAX_NEW_TOKENS
    room = context - min(reserved, context // 2)

    @cache
    def encode_from(start: int) -> list[int] | None:
        """The tokens without the turns before this message; None for a text that cannot fit."""
        kept = [one for i, one in enumerate(body.messages) if i >= start or one.template_role == "system"]
        messages = [(one.template_role, one.text) for one in kept if one.text or not one.tool_calls]
        if sum(len(text) for _, text in messages) > served.max_prompt_characters:
            return None
        return _encode(messages, served)

    def fits(start: int) -> bool:
        tokens = encode_from(start)
        return tokens is not None and len(tokens) <= room

    start = 0
    if len(starts) > 1 and not fits(0):
        start = starts[bisect_left(starts, True, 1, len(starts) - 1, key=fits)]
    tokens = encode_from(start)
    if tokens is None:
        raise context_length_error(f"more than {context}", served, "messages")
    check_prompt_length(tokens, served, "messages")
    return tokens, sum(one.template_role != "system" for one in body.messages[:start])


def _turn_starts(messages: Sequence[schema.Message]) -> list[int]:
    """Where each turn starts; the first at 0."""
    first = next((i for i, one in enumerate(messages) if one.template_role != "system"), 0)
    return [0, *(i for i, one in enumerate(messages) if one.role == "user" and i > first)]


def _encode(messages: Sequence[tuple[str, str]], served: ServedModel) -> list[int]:
    try:
        return served.template.encode_prompt(served.tokenizer, messages) or [served.tokenizer.end_of_text]
    except UserError as error:
        raise APIError(400, str(error), "messages") from None


async def chat_completion(body: schema.ChatRequest, response: ResponseStream) -> schema.ChatCompletion:
    """The response without streaming."""
    await response.collect()
    served, choices = response.request.served, []
    for choice in response.choices:
        assert choice.finish_reason is not None
        message = schema.ChatMessage(role="assistant", content=strip_answer_prefix(choice.text, served), refusal=None)
        logprobs = format_logprobs(served.tokenizer, choice.token_logprobs) if body.logprobs else None
        choices.append(
            schema.ChatChoice(
                index=choice.index, message=message, logprobs=logprobs, finish_reason=choice.finish_reason
            )
        )
    header = _header(response)
    return schema.ChatCompletion(object="chat.completion", choices=choices, usage=response.usage, **header)


async def chat_completion_chunks(
    body: schema.ChatRequest, response: ResponseStream
) -> AsyncGenerator[schema.ChatCompletionChunk]:
    """The response as a stream: one chunk for each delta, and a last one with the usage if it was requested."""
    served = response.request.served
    header = _header(response) | ({"usage": None} if body.include_usage else {})
    new_chunk = partial(schema.ChatCompletionChunk, object="chat.completion.chunk", **header)
    started: set[int] = set()  # choices that have had a chunk
    with_text: set[int] = set()
    async with aclosing(response.deltas()) as deltas:
        async for delta in deltas:
            text = delta.text if delta.index in with_text else strip_answer_prefix(delta.text, served)
            if delta.text:
                with_text.add(delta.index)
            if delta.index not in started:
                message = schema.ChatDelta(role="assistant", content=text)
            else:
                message = schema.ChatDelta(content=text) if text else schema.ChatDelta()
            started.add(delta.index)
            with_logprobs = body.logprobs and delta.token_logprobs
            logprobs = format_logprobs(served.tokenizer, delta.token_logprobs) if with_logprobs else None
            choice = schema.ChatChunkChoice(
                index=delta.index, delta=message, logprobs=logprobs, finish_reason=delta.finish_reason
            )
            yield new_chunk(choices=[choice], **({"usage": response.usage} if body.usage_in_chunks else {}))
    if body.include_usage:
        yield new_chunk(choices=[], usage=response.usage)


def _header(response: ResponseStream) -> dict[str, Any]:
    request = response.request
    dropped = {"truncated_messages": request.num_dropped_messages} if request.num_dropped_messages else {}
    return response_header("chatcmpl", request.served) | dropped


def strip_answer_prefix(text: str, served: ServedModel) -> str:
    """The text without the template's answer prefix, such as the space after the colon of a plain transcript."""
    return text.removeprefix(served.template.answer_prefix)


def format_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> schema.ChatLogprobs:
    """The `logprobs` of a choice or chunk."""
    content = [
        schema.ChatTokenLogprob(
            **dict(_format_token_logprob(tokenizer, one.id, one.logprob or 0.0)),
            top_logprobs=[_format_token_logprob(tokenizer, token, logprob) for token, logprob in one.top_logprobs],
        )
        for one in tokens
    ]
    return schema.ChatLogprobs(content=content, refusal=None)


def _format_token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> schema.ChatTopLogprob:
    spelling = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
    return schema.ChatTopLogprob(token=format_token(tokenizer, token), logprob=logprob, bytes=list(spelling))
