"""POST /v1/chat/completions"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from gpt2.errors import UserError
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
    check_text_length,
    resolve_max_tokens,
    resolve_num_samples,
    response_header,
)
from gpt2.tokenizer import Tokenizer


def parse_request(body: schema.ChatRequest, served: ServedModel, limits: Limits) -> ParsedRequest:
    """The request with its defaults. Raises APIError and UserError for fields that are not supported."""
    n = resolve_num_samples(body, limits)
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs requires logprobs: true", "top_logprobs")
    prompt = encode_prompt(body, served)
    return ParsedRequest(
        served,
        [prompt],
        n,
        body.sampling(),
        resolve_max_tokens(body, max(1, served.scheduler.context_length - len(prompt)), limits),
        [*body.stop_strings, *served.template.stop_strings],
        body.resolve_seed(),
        (body.top_logprobs or 0) if body.logprobs else None,
    )


def encode_prompt(body: schema.ChatRequest, served: ServedModel) -> list[int]:
    """The token ids of the conversation. Special tokens in messages are encoded as plain text. Raises APIError."""
    messages = [(message.role, message.text) for message in body.messages]
    check_text_length(sum(len(text) for _, text in messages), served, "messages")
    try:
        tokens = served.template.encode_prompt(served.tokenizer, messages) or [served.tokenizer.end_of_text]
    except UserError as error:
        raise APIError(400, str(error), "messages") from None
    check_prompt_length(tokens, served, "messages")
    return tokens


async def chat_completion(body: schema.ChatRequest, response: ResponseStream) -> schema.ChatCompletion:
    """The response without streaming."""
    await response.collect()
    served, choices = response.request.served, []
    for choice in response.choices:
        assert choice.finish_reason is not None
        message = schema.ChatMessage(role="assistant", content=_strip_answer_prefix(choice.text, served), refusal=None)
        logprobs = format_logprobs(served.tokenizer, choice.token_logprobs) if body.logprobs else None
        choices.append(
            schema.ChatChoice(
                index=choice.index, message=message, logprobs=logprobs, finish_reason=choice.finish_reason
            )
        )
    header = response_header("chatcmpl", served)
    return schema.ChatCompletion(object="chat.completion", choices=choices, usage=response.usage, **header)


async def chat_completion_chunks(
    body: schema.ChatRequest, response: ResponseStream
) -> AsyncGenerator[schema.ChatCompletionChunk]:
    """The response as a stream: one chunk for each delta, and a last one with the usage if it was requested."""
    served = response.request.served
    header = response_header("chatcmpl", served) | ({"usage": None} if body.include_usage else {})
    new_chunk = partial(schema.ChatCompletionChunk, object="chat.completion.chunk", **header)
    started: set[int] = set()  # choices that have had a chunk
    with_text: set[int] = set()
    async with aclosing(response.deltas()) as deltas:
        async for delta in deltas:
            text = delta.text if delta.index in with_text else _strip_answer_prefix(delta.text, served)
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
            yield new_chunk(choices=[choice])
    if body.include_usage:
        yield new_chunk(choices=[], usage=response.usage)


def _strip_answer_prefix(text: str, served: ServedModel) -> str:
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
