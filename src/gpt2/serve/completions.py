"""POST /v1/completions"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, cast

from gpt2.serve.choices import Choice, TokenLogprob, format_token
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
from gpt2.serve.schema import CompletionRequest
from gpt2.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # where a request does not say


def parse_request(body: CompletionRequest, served: ServedModel, limits: Limits) -> ParsedRequest:
    """What the request asks of the model. Raises APIError for what is not to be had."""
    if body.suffix:
        raise APIError(400, "suffix is not supported: GPT-2 continues a text, and cannot fill a gap in it", "suffix")
    n = resolve_num_samples(body, limits)
    best_of = _resolve_best_of(body, n, limits)
    alternatives = body.logprobs if best_of == n or body.logprobs is not None else 0
    return ParsedRequest(
        served,
        encode_prompts(body, served, limits),
        best_of,
        parse_sampling(body),
        resolve_max_tokens(body, DEFAULT_MAX_TOKENS, limits),
        body.stop_strings,
        resolve_seed(body),
        alternatives,
        bool(body.echo),
    )


def encode_prompts(body: CompletionRequest, served: ServedModel, limits: Limits) -> list[list[int]]:
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
        check_prompt_length(prompt, served, "prompt")
    return prompts


def _encode(text: str, served: ServedModel) -> list[int]:
    check_text_length(len(text), served, "prompt")
    return served.encode(text)


def _resolve_best_of(body: CompletionRequest, n: int, limits: Limits) -> int:
    best_of = body.best_of or n
    if best_of < n:
        raise APIError(400, f"best_of must be at least n ({n}), not {best_of}", "best_of")
    if best_of > limits.max_n:
        raise APIError(400, f"best_of is at most {limits.max_n} on this server, not {best_of}", "best_of")
    if best_of > n and body.stream:
        raise APIError(400, "best_of does not go with stream: what is best is known at the end", "best_of")
    return best_of


async def completion(body: CompletionRequest, response: ResponseStream) -> dict[str, Any]:
    """The whole response."""
    await response.collect()
    ask, n, choices = response.request, body.n or 1, []
    for number in range(len(ask.prompts)):
        samples = response.choices[number * ask.num_samples : (number + 1) * ask.num_samples]
        if ask.num_samples > n:
            samples = sorted(samples, key=_mean_logprob, reverse=True)[:n]
        for choice in samples:
            logprobs = format_logprobs(ask.served.tokenizer, choice.token_logprobs, body.logprobs)
            choices.append(_format_choice(len(choices), choice.text, logprobs, choice.finish_reason))
    return response_header("cmpl", "text_completion", ask.served) | {"choices": choices, "usage": response.usage}


async def completion_chunks(body: CompletionRequest, response: ResponseStream) -> AsyncGenerator[dict[str, Any]]:
    """The response as a stream."""
    head = response_header("cmpl", "text_completion", response.request.served)
    usage = {"usage": None} if body.include_usage else {}
    async with aclosing(response.deltas()) as pieces:
        async for piece in pieces:
            logprobs = format_logprobs(response.request.served.tokenizer, piece.token_logprobs, body.logprobs)
            yield head | {"choices": [_format_choice(piece.index, piece.text, logprobs, piece.finish_reason)]} | usage
    if body.include_usage:
        yield head | {"choices": [], "usage": response.usage}


def _format_choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _mean_logprob(choice: Choice) -> float:
    """The mean log-probability of a text's tokens."""
    known = [said.logprob for said in choice.token_logprobs if said.logprob is not None]
    return sum(known) / len(known) if known else 0.0


def format_logprobs(
    tokenizer: Tokenizer, token_logprobs: Sequence[TokenLogprob], num_top_logprobs: int | None
) -> dict[str, Any] | None:
    """Parallel lists for all tokens; `top` is how many of the most likely were asked for."""
    if num_top_logprobs is None:
        return None
    return {
        "tokens": [format_token(tokenizer, one.id) for one in token_logprobs],
        "token_logprobs": [one.logprob for one in token_logprobs],
        "top_logprobs": [_format_top_logprobs(tokenizer, one) for one in token_logprobs] if num_top_logprobs else None,
        "text_offset": [one.offset for one in token_logprobs],
        "token_ids": [one.id for one in token_logprobs],
        "top_token_ids": [None if one.logprob is None else [i for i, _ in one.top_logprobs] for one in token_logprobs]
        if num_top_logprobs
        else None,
    }


def _format_top_logprobs(tokenizer: Tokenizer, token_logprob: TokenLogprob) -> dict[str, float] | None:
    """The most likely tokens by their text, and the one that was said, if it is not among them."""
    if token_logprob.logprob is None:
        return None
    pairs = [*token_logprob.top_logprobs, (token_logprob.id, token_logprob.logprob)]
    top: dict[str, float] = {}
    for token, logprob in pairs:
        top.setdefault(format_token(tokenizer, token), logprob)
    return top
