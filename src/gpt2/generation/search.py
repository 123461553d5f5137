"""What beam search and contrastive search share: candidates that are rows of one cache, and their texts.

Neither draws. Of a `Sampling` they follow the biases, penalties and bans (`sampling.adjusted`); temperature, top-k,
top-p and their kin have no say.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gpt2.cache import KVCache
from gpt2.errors import UserError
from gpt2.generation.engine import LanguageModel, check_finite
from gpt2.generation.sampling import Sampling
from gpt2.generation.text import TextStream, check_stop_strings
from gpt2.tokenizer import Tokenizer

NO_PENALTIES = Sampling(temperature=0)  # no bias, penalty or ban


def check_prompt(model: LanguageModel, prompt: list[int], max_new_tokens: int, sampling: Sampling) -> int:
    """How many tokens can still be read after the prompt. Raises UserError for one that cannot be continued."""
    vocab_size, context = model.config.vocab_size, model.config.block_size
    if not prompt:
        raise UserError("there is nothing to continue: the prompt has no tokens")
    if len(prompt) > context:
        raise UserError(f"{len(prompt)} tokens do not fit the model's context of {context}")
    if not all(0 <= token < vocab_size for token in prompt):
        raise UserError(f"the prompt has a token outside the model's vocabulary of {vocab_size}")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    sampling.check_token_ids(vocab_size)
    return context - len(prompt)


def forward_hidden_states(model: LanguageModel, tokens: list[list[int]], cache: KVCache) -> Tensor:
    """(B, T) -> hidden states (B, T, C)."""
    return model.hidden_states(torch.tensor(tokens, device=model.device), cache)


def last_logits(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Of the last position: (B, T, C) -> (B, V) in float32."""
    logits = model.lm_head(hidden[:, -1]).float()
    check_finite(logits)
    return logits


def reorder_cache(cache: KVCache, rows: list[int], prefix_length: int) -> None:
    """`cache.reorder`, where all rows, equally long, have their first `shared` positions in common."""
    KVCache(cache.data[:, :, :, :, prefix_length:], cache.lengths - prefix_length).reorder(rows)
    cache.lengths[: len(rows)] = cache.lengths[rows]


def encode_prompt(tokenizer: Tokenizer | None, prompt: str, stop: Sequence[str]) -> tuple[Tokenizer, list[int]]:
    """The tokenizer, and the prompt in its tokens. Raises UserError if there is none, or a stop string is empty."""
    if tokenizer is None:
        raise UserError("this model folder has no tokenizer: text needs one")
    check_stop_strings(stop)
    # an empty prompt begins a text, which is what follows the end of another
    return tokenizer, tokenizer.encode(prompt, allow_special=True) or [tokenizer.end_of_text]


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int], stop: Sequence[str]) -> Iterator[str]:
    """The text of the tokens up to its end; no more tokens are asked for than that takes."""
    text = TextStream(tokenizer, stop)
    for token in tokens:
        if piece := text.push(token):
            yield piece
        if text.finish_reason:
            return
    if piece := text.flush():
        yield piece
