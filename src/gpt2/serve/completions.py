"""POST /v1/completions"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, cast

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
from gpt2.serve.choices import Choice, Said, spelled
from gpt2.serve.errors import APIError
from gpt2.serve.limits import Limits
from gpt2.serve.models import ServedModel
from gpt2.serve.schema import CompletionRequest
from gpt2.tokenizer import Tokenizer

MAX_TOKENS = 16  # where a request does not say


def ask_of(body: CompletionRequest, served: ServedModel, limits: Limits) -> Ask:
    """What the request asks of the model. Raises APIError for what is not to be had."""
    if body.suffix:
        raise APIError(400, "suffix is not supported: GPT-2 continues a text, and cannot fill a gap in it", "suffix")
    n = check_samples(body, limits)
    best_of = _best_of(body, n, limits)
    alternatives = body.logprobs if best_of == n or body.logprobs is not None else 0
    return Ask(
        served,
        prompts_of(body, served, limits),
        best_of,
        sampling_of(body),
        max_tokens_of(body, MAX_TOKENS, limits),
        body.stops,
        seed_of(body),
        alternatives,
        bool(body.echo),
    )


def prompts_of(body: CompletionRequest, served: ServedModel, limits: Limits) -> list[list[int]]:
    """The token ids of every prompt."""
    given = body.prompt if body.prompt is not None else ""
    if isinstance(given, str):
        prompts = [_encode(given, served)]
    elif given and isinstance(given[0], int):
        prompts = [cast("list[int]", given)]
    else:
        if not 1 <= len(given) <= limits.max_prompts:
            raise APIError(400, f"prompt must hold 1 to {limits.max_prompts} prompts, not {len(given)}", "prompt")
        several = cast("list[str | list[int]]", given)
        prompts = [_encode(one, served) if isinstance(one, str) else one for one in several]
    for prompt in prompts:
        if not prompt:
            raise APIError(400, "prompt has no tokens: for an empty text, give an empty text", "prompt")
        if max(prompt) >= served.model.config.vocab_size:
            size = served.model.config.vocab_size
            raise APIError(400, f"prompt: token {max(prompt)} is not in the model's vocabulary of {size:,}", "prompt")
        check_length(prompt, served, "prompt")
    return prompts


def _encode(text: str, served: ServedModel) -> list[int]:
    check_text(len(text), served, "prompt")
    return served.encode(text)


def _best_of(body: CompletionRequest, n: int, limits: Limits) -> int:
    best_of = body.best_of or n
    if best_of < n:
        raise APIError(400, f"best_of must be at least n ({n}), not {best_of}", "best_of")
    if best_of > limits.max_n:
        raise APIError(400, f"best_of is at most {limits.max_n} on this server, not {best_of}", "best_of")
    if best_of > n and body.stream:
        raise APIError(400, "best_of does not go with stream: what is best is known at the end", "best_of")
    return best_of


async def completion(body: CompletionRequest, reply: Answer) -> dict[str, Any]:
    """The whole response."""
    await reply.all()
    ask, n, choices = reply.ask, body.n or 1, []
    for number in range(len(ask.prompts)):
        samples = reply.choices[number * ask.samples : (number + 1) * ask.samples]
        if ask.samples > n:
            samples = sorted(samples, key=_likelihood, reverse=True)[:n]
        for choice in samples:
            logprobs = logprobs_of(ask.served.tokenizer, choice.said, body.logprobs)
            choices.append(_choice(len(choices), choice.text, logprobs, choice.finish_reason))
    return heading("cmpl", "text_completion", ask.served) | {"choices": choices, "usage": reply.usage}


async def completion_chunks(body: CompletionRequest, reply: Answer) -> AsyncGenerator[dict[str, Any]]:
    """The response as a stream."""
    head = heading("cmpl", "text_completion", reply.ask.served)
    usage = {"usage": None} if body.tells_usage else {}
    async with aclosing(reply.pieces()) as pieces:
        async for piece in pieces:
            logprobs = logprobs_of(reply.ask.served.tokenizer, piece.said, body.logprobs)
            yield head | {"choices": [_choice(piece.index, piece.text, logprobs, piece.finish_reason)]} | usage
    if body.tells_usage:
        yield head | {"choices": [], "usage": reply.usage}


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _likelihood(choice: Choice) -> float:
    """The mean log-probability of a text's tokens."""
    known = [said.logprob for said in choice.said if said.logprob is not None]
    return sum(known) / len(known) if known else 0.0


def logprobs_of(tokenizer: Tokenizer, said: Sequence[Said], top: int | None) -> dict[str, Any] | None:
    """Parallel lists for all tokens; `top` is how many of the most likely were asked for."""
    if top is None:
        return None
    return {
        "tokens": [spelled(tokenizer, one.id) for one in said],
        "token_logprobs": [one.logprob for one in said],
        "top_logprobs": [_top(tokenizer, one) for one in said] if top else None,
        "text_offset": [one.offset for one in said],
        "token_ids": [one.id for one in said],
        "top_token_ids": [None if one.logprob is None else [i for i, _ in one.alternatives] for one in said]
        if top
        else None,
    }


def _top(tokenizer: Tokenizer, said: Said) -> dict[str, float] | None:
    """The most likely tokens by their text, and the one that was said, if it is not among them."""
    if said.logprob is None:
        return None
    pairs = [*said.alternatives, (said.id, said.logprob)]
    top: dict[str, float] = {}
    for token, logprob in pairs:
        top.setdefault(spelled(tokenizer, token), logprob)
    return top
