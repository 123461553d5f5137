"""POST /v1/chat/completions"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from gpt2.errors import UserError
from gpt2.serve.answers import (
    Answer,
    Ask,
    check_length,
    check_samples,
    check_text,
    heading,
    max_tokens_of,
    sampling_of,
    seed_of,
)
from gpt2.serve.choices import Said, spelled
from gpt2.serve.errors import APIError
from gpt2.serve.limits import Limits
from gpt2.serve.models import ServedModel
from gpt2.serve.schema import ChatRequest
from gpt2.tokenizer import Tokenizer


def ask_of(body: ChatRequest, served: ServedModel, limits: Limits) -> Ask:
    """What the request asks of the model. Raises APIError for what is not to be had."""
    n = check_samples(body, limits)
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs goes with logprobs: true", "top_logprobs")
    prompt = prompt_of(body, served)
    room = max(1, served.scheduler.context - len(prompt))
    return Ask(
        served,
        [prompt],
        n,
        sampling_of(body),
        max_tokens_of(body, room, limits),
        [*body.stops, *served.template.stops],
        seed_of(body),
        (body.top_logprobs or 0) if body.logprobs else None,
    )


def prompt_of(body: ChatRequest, served: ServedModel) -> list[int]:
    """The conversation as tokens; nobody can say ``<|endoftext|>`` or another mark of the template's."""
    messages = [(message.role, message.text) for message in body.messages]
    check_text(sum(len(text) for _, text in messages), served, "messages")
    try:
        tokens = served.template.encode_prompt(served.tokenizer, messages) or [served.tokenizer.end_of_text]
    except UserError as error:
        raise APIError(400, str(error), "messages") from None
    check_length(tokens, served, "messages")
    return tokens


async def chat(body: ChatRequest, reply: Answer) -> dict[str, Any]:
    """The whole response."""
    await reply.all()
    served, choices = reply.ask.served, []
    for index, choice in enumerate(reply.choices):
        message = {"role": "assistant", "content": _trimmed(choice.text, served), "refusal": None}
        logprobs = logprobs_of(served.tokenizer, choice.said) if body.logprobs else None
        choices.append(
            {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        )
    return heading("chatcmpl", "chat.completion", served) | {"choices": choices, "usage": reply.usage}


async def chat_chunks(body: ChatRequest, reply: Answer) -> AsyncGenerator[dict[str, Any]]:
    """The response as a stream."""
    served = reply.ask.served
    head = heading("chatcmpl", "chat.completion.chunk", served)
    usage = {"usage": None} if body.tells_usage else {}
    begun: set[int] = set()  # those that have said something
    named: set[int] = set()
    async with aclosing(reply.pieces()) as pieces:
        async for piece in pieces:
            delta: dict[str, Any] = {} if piece.index in named else {"role": "assistant"}
            text = piece.text if piece.index in begun else _trimmed(piece.text, served)
            if piece.text:
                begun.add(piece.index)
            if text or piece.index not in named:
                delta["content"] = text
            named.add(piece.index)
            logprobs = logprobs_of(served.tokenizer, piece.said) if body.logprobs and piece.said else None
            choice = {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}
            yield head | {"choices": [choice]} | usage
    if body.tells_usage:
        yield head | {"choices": [], "usage": reply.usage}


def _trimmed(text: str, served: ServedModel) -> str:
    """Without the space that follows the colon of the plain transcript, or what else opens an answer."""
    return text.removeprefix(served.template.opening)


def logprobs_of(tokenizer: Tokenizer, said: Sequence[Said]) -> dict[str, Any]:
    """As OpenAI's chat has them."""
    content = [
        _token(tokenizer, one.id, one.logprob or 0.0)
        | {"top_logprobs": [_token(tokenizer, i, logprob) for i, logprob in one.alternatives]}
        for one in said
    ]
    return {"content": content, "refusal": None}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    spelling = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
    return {"token": spelled(tokenizer, token), "logprob": logprob, "bytes": list(spelling)}
