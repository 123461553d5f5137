"""Prefill and decode: a prompt is read once, then every new token costs one position."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt2.cache import KVCache
from gpt2.errors import UserError
from gpt2.generation.sampling import Sampling, draw, probabilities, random_stream
from gpt2.model import GPT
from gpt2.tokenizer import StreamDecoder, Tokenizer

MAX_SAMPLES = 10_000  # in one batch


def generate(
    model: GPT,
    tokenizer: Tokenizer | None,
    prompt: str,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[str]:
    """Continue `prompt` in `num_samples` ways. Returns the texts, the prompt included.

    seed: the same seed gives the same texts; None draws a new one. Sample i is the same for any `num_samples` > i.

    A sample ends at the end-of-text token (not shown) or after `max_new_tokens`. A model in training mode is asked
    without its dropout, and stays in training mode. Raises UserError for settings that make no sense, for a prompt
    that is longer than the context, and for a model that gives nan. See `Sampling` for the other settings.
    """
    texts: dict[int, str] = {}
    sampling = Sampling(temperature, top_k, top_p)
    for sample, piece in stream(
        model, tokenizer, prompt, sampling, num_samples=num_samples, max_new_tokens=max_new_tokens, seed=seed
    ):
        texts[sample] = texts.get(sample, prompt) + piece
    return [texts.get(sample, prompt) for sample in range(num_samples)]


def stream(
    model: GPT,
    tokenizer: Tokenizer | None,
    prompt: str,
    sampling: Sampling | None = None,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 100,
    seed: int | None = None,
) -> Iterator[tuple[int, str]]:
    """`generate` as it happens: yields (sample, text) for every new piece of text, always whole characters."""
    if tokenizer is None:
        raise UserError("this model folder has no tokenizer: text needs one")
    if not 1 <= num_samples <= MAX_SAMPLES or max_new_tokens < 0:
        raise UserError(f"num_samples must be at least 1 and at most {MAX_SAMPLES:,}, max_new_tokens at least 0")
    ids = tokenizer.encode(prompt, allow_special=True) or [tokenizer.end_of_text]  # as if a text began
    seed = secrets.randbits(32) if seed is None else seed
    decoders = [StreamDecoder(tokenizer) for _ in range(num_samples)]
    running = set(range(num_samples))
    for tokens in continuations(model, ids, sampling or Sampling(), num_samples, max_new_tokens, seed):
        for sample in sorted(running):
            if tokens[sample] == tokenizer.end_of_text or tokens[sample] >= tokenizer.vocab_size:
                running.remove(sample)
            elif piece := decoders[sample].push(tokens[sample]):
                yield sample, piece
        if not running:
            break
    for sample, decoder in enumerate(decoders):
        if piece := decoder.flush():
            yield sample, piece


@torch.inference_mode()
def continuations(
    model: GPT, prompt: list[int], sampling: Sampling, num_samples: int, max_new_tokens: int, seed: int
) -> Iterator[list[int]]:
    """The token loop: yields one new token of every sample at a time, as a list of `num_samples` ids.

    When the context is full, the later half of it is read again into an empty cache and the text goes on from
    there: half a context of tokens costs one prefill, and none is ever an index error.
    """
    block_size = model.config.block_size
    streams = [random_stream(seed, sample) for sample in range(num_samples)]
    rows = torch.tensor([prompt], device=model.device)  # (1, T)
    cache = model.make_cache(1, min(len(prompt) + max_new_tokens, max(block_size, 1)))
    logits = _next_logits(model, rows, cache).expand(num_samples, -1)  # (num_samples, V)
    rows, cache = rows.expand(num_samples, -1), cache.repeat(num_samples)
    for _ in range(max_new_tokens):
        drawn = draw(probabilities(logits, sampling), streams)  # (num_samples,)
        ids = drawn.where(logits.amax(-1).isfinite(), -1).tolist()  # one wait for the device, not two
        if -1 in ids:
            raise UserError("the model gives nan or inf: its weights are damaged, or too large for its dtype")
        yield ids
        new = drawn.unsqueeze(1)  # (num_samples, 1)
        rows = torch.cat((rows, new), 1)
        if cache.length == block_size:
            cache = model.make_cache(num_samples)
            new = rows[:, -max(1, block_size // 2) :]
        logits = _next_logits(model, new, cache)


def _next_logits(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Read `tokens` (B, T) after what the cache holds; the logits (B, V) of what comes next."""
    with _evaluating(model):
        return model.lm_head(model.hidden_states(tokens, cache)[:, -1])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout within, and each module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
