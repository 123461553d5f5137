"""POST /v1/chat/completions"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from gpt2.errors import UserError
from gpt2.serve.choices import TokenLogprob, format_token
from gpt2.serve.errors import APIError
from gpt2.serve.limits import Limits
from gpt2.serve.models import ServedModel
from gpt2.serve.response_stream import (
    ParsedRequest,
    ResponseStream,
    check_prompt_length,
    check_text_length,
    parse_sampling,
    resolve_max_tokens,
    resolve_num_samples,
    resolve_seed,
    response_header,
)
from gpt2.serve.schema import ChatRequest
from gpt2.tokenizer import Tokenizer


def parse_request(body: ChatRequest, served: ServedModel, limits: Limits) -> ParsedRequest:
    """What the request asks of the model. Raises APIError for what is not to be had."""
    n = resolve_num_samples(body, limits)
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs goes with logprobs: true", "top_logprobs")
    prompt = encode_prompt(body, served)
    room = max(1, served.scheduler.context_length - len(prompt))
    return ParsedRequest(
        served,
        [prompt],
        n,
        parse_sampling(body),
        resolve_max_tokens(body, room, limits),
        [*body.stop_strings, *served.template.stop_strings],
        resolve_seed(body),
        (body.top_logprobs or 0) if body.logprobs else None,
    )


def encode_prompt(body: ChatRequest, served: ServedModel) -> list[int]:
    """The conversation as tokens; nobody can say ``<|endoftext|>`` or another mark of the template's."""
    messages = [(message.role, message.text) for message in body.messages]
    check_text_length(sum(len(text) for _, text in messages), served, "messages")
    try:
        tokens = served.template.encode_prompt(served.tokenizer, messages) or [served.tokenizer.end_of_text]
    except UserError as error:
        raise APIError(400, str(error), "messages") from None
    check_prompt_length(tokens, served, "messages")
    return tokens


async def chat_completion(body: ChatRequest, response: ResponseStream) -> dict[str, Any]:
    """The whole response."""
    await response.collect()
    served, choices = response.request.served, []
    for index, choice in enumerate(response.choices):
        message = {"role": "assistant", "content": _strip_opening(choice.text, served), "refusal": None}
        logprobs = format_logprobs(served.tokenizer, choice.token_logprobs) if body.logprobs else None
        choices.append(
            {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        )
    return response_header("chatcmpl", "chat.completion", served) | {"choices": choices, "usage": response.usage}


async def chat_completion_chunks(body: ChatRequest, response: ResponseStream) -> AsyncGenerator[dict[str, Any]]:
    """The response as a stream."""
    served = response.request.served
    head = response_header("chatcmpl", "chat.completion.chunk", served)
    usage = {"usage": None} if body.include_usage else {}
    begun: set[int] = set()  # those that have said something
    named: set[int] = set()
    async with aclosing(response.deltas()) as pieces:
        async for piece in pieces:
            delta: dict[str, Any] = {} if piece.index in named else {"role": "assistant"}
            text = piece.text if piece.index in begun else _strip_opening(piece.text, served)
            if piece.text:
                begun.add(piece.index)
            if text or piece.index not in named:
                delta["content"] = text
            named.add(piece.index)
            logprobs = (
                format_logprobs(served.tokenizer, piece.token_logprobs)
                if body.logprobs and piece.token_logprobs
                else None
            )
            choice = {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}
            yield head | {"choices": [choice]} | usage
    if body.include_usage:
        yield head | {"choices": [], "usage": response.usage}


def _strip_opening(text: str, served: ServedModel) -> str:
    """Without the space that follows the colon of the plain transcript, or what else opens an answer."""
    return text.removeprefix(served.template.answer_prefix)


def format_logprobs(tokenizer: Tokenizer, token_logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As OpenAI's chat has them."""
    content = [
        _format_token_logprob(tokenizer, one.id, one.logprob or 0.0)
        | {"top_logprobs": [_format_token_logprob(tokenizer, i, logprob) for i, logprob in one.top_logprobs]}
        for one in token_logprobs
    ]
    return {"content": content, "refusal": None}


def _format_token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    spelling = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
    return {"token": format_token(tokenizer, token), "logprob": logprob, "bytes": list(spelling)}
