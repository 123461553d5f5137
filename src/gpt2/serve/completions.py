"""POST /v1/completions"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import cast

from gpt2.generation.defaults import MAX_NEW_TOKENS
from gpt2.serve.choices import Choice, format_token
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
    resolve_sampling,
    response_header,
)
from gpt2.serve.schema import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from gpt2.tokenizer import Tokenizer


def parse_request(body: CompletionRequest, served: ServedModel, limits: Limits) -> ParsedRequest:
    """The request with its defaults. Raises APIError and UserError for fields that are not supported."""
    if body.suffix:
        raise APIError(400, "suffix is not supported: GPT-2 continues a text, and cannot fill a gap in it", "suffix")
    n = resolve_num_samples(body, limits)
    best_of = _resolve_best_of(body, n, limits)
    return ParsedRequest(
        served,
        encode_prompts(body, served, limits),
        best_of,
        resolve_sampling(body, served),
        resolve_max_tokens(body, MAX_NEW_TOKENS, limits),
        body.stop_strings,
        body.resolve_seed(),
        body.top_logprobs if best_of == n or body.top_logprobs is not None else 0,
        bool(body.echo),
        body.stop_token_ids or (),
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def encode_prompts(body: CompletionRequest, served: ServedModel, limits: Limits) -> list[list[int]]:
    """The token ids of each prompt. Raises APIError."""
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
    size = served.model.config.vocab_size
    for prompt in prompts:
        if not prompt:
            raise APIError(400, "prompt has no tokens: an empty prompt is the empty string", "prompt")
        if max(prompt) >= size:
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
        raise APIError(400, "best_of cannot be streamed: the best choices are known only at the end", "best_of")
    return best_of


async def completion(body: CompletionRequest, response: ResponseStream) -> Completion:
    """The response without streaming."""
    await response.collect()
    request, n, best = response.request, body.n or 1, []
    for first in range(0, len(response.choices), request.num_samples):
        samples = response.choices[first : first + request.num_samples]
        best += sorted(samples, key=_mean_logprob, reverse=True)[:n] if request.num_samples > n else samples
    choices = [
        CompletionChoice(
            index=index,
            text=choice.text,
            logprobs=format_logprobs(request.served.tokenizer, choice.token_logprobs, body.top_logprobs),
            finish_reason=choice.finish_reason,
        )
        for index, choice in enumerate(best)
    ]
    header = response_header("cmpl", request.served)
    return Completion(object="text_completion", choices=choices, usage=response.usage, **header)


async def completion_chunks(body: CompletionRequest, response: ResponseStream) -> AsyncGenerator[Completion]:
    """The response as a stream: one chunk for each delta, and a last one with the usage if it was requested."""
    served = response.request.served
    header = response_header("cmpl", served) | ({"usage": None} if body.include_usage else {})
    new_chunk = partial(Completion, object="text_completion", **header)
    async with aclosing(response.deltas()) as deltas:
        async for delta in deltas:
            logprobs = format_logprobs(served.tokenizer, delta.token_logprobs, body.top_logprobs)
            choice = CompletionChoice(
                index=delta.index, text=delta.text, logprobs=logprobs, finish_reason=delta.finish_reason
            )
            yield new_chunk(choices=[choice], **({"usage": response.usage} if body.usage_in_chunks else {}))
    if body.include_usage:
        yield new_chunk(choices=[], usage=response.usage)


def _mean_logprob(choice: Choice) -> float:
    """The mean log-probability of the tokens of a choice, by which `best_of` ranks."""
    known = [one.logprob for one in choice.token_logprobs if one.logprob is not None]
    return sum(known) / len(known) if known else 0.0


def format_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[TokenLogprob], num_top_logprobs: int | None
) -> CompletionLogprobs | None:
    """The `logprobs` of a choice or chunk; None if they were not requested."""
    if num_top_logprobs is None:
        return None
    top_ids = [None if one.logprob is None else [token for token, _ in one.top_logprobs] for one in tokens]
    return CompletionLogprobs(
        tokens=[format_token(tokenizer, one.id) for one in tokens],
        token_logprobs=[one.logprob for one in tokens],
        top_logprobs=[_format_top_logprobs(tokenizer, one) for one in tokens] if num_top_logprobs else None,
        text_offset=[one.offset for one in tokens],
        token_ids=[one.id for one in tokens],
        top_token_ids=top_ids if num_top_logprobs else None,
    )


def _format_top_logprobs(tokenizer: Tokenizer, token: TokenLogprob) -> dict[str, float] | None:
    """The most likely tokens by their text, and the token itself where it is not among them."""
    if token.logprob is None:
        return None
    top: dict[str, float] = {}
    for i, logprob in [*token.top_logprobs, (token.id, token.logprob)]:
        top.setdefault(format_token(tokenizer, i), logprob)
    return top
