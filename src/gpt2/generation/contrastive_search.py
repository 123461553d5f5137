"""Contrastive search: the next token is likely and has a hidden state unlike those of all tokens before it."""

from collections import abc
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from gpt2.generation.engine import GenerationRequest, LanguageModel, Sequence, check_request, eval_mode
from gpt2.generation.filters import topk_indices
from gpt2.generation.sampling import Sampling, apply_penalties, check_setting
from gpt2.generation.search import (
    NO_PENALTIES,
    forward_hidden_states,
    last_logits,
    reorder_cache,
)
from gpt2.generation.text import check_stop_strings, encode_prompt, require_tokenizer, stream_text
from gpt2.tokenizer import Tokenizer


def contrastive_search(
    model: LanguageModel,
    prompt_ids: abc.Sequence[int],
    *,
    top_k: int,
    penalty_alpha: float,
    max_new_tokens: int,
    sampling: Sampling = NO_PENALTIES,
    end_tokens: abc.Sequence[int] = (),
) -> Iterator[int]:
    """Yield the new tokens; an end token is the last one.

    Each is the one of the `top_k` most likely tokens v with the largest

        (1 - penalty_alpha) * p(v) - penalty_alpha * max_j cos(h_v, h_j)

    where h_v is the last hidden state after v, and h_j are those of all tokens before it, prompt included. With
    `penalty_alpha` 0 or `top_k` 1 this is greedy decoding.

    sampling: its biases, penalties and bans apply to the logits; the rest is ignored.

    Works on any `LanguageModel` and device; the KV cache has `top_k` rows. Ends when the context is full, because the
    model must run on a candidate before it is chosen.
    Raises RequestError for settings that are not supported, for a prompt that is empty or longer than the context, and
    when the bans rule out every token; NonFiniteLogitsError if the model computes nan or inf.

    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", equation 5; Su and Collier 2022 use
    it with plain GPT-2, with top_k 4 to 10 and penalty_alpha 0.6.
    """
    vocab_size, context = model.config.vocab_size, model.config.block_size
    check_setting(
        "top_k",
        top_k,
        1 <= top_k <= vocab_size,
        f"be at least 1 and at most the vocabulary's {vocab_size:,} to be searched",
    )
    check_setting("penalty_alpha", penalty_alpha, 0 <= penalty_alpha <= 1, "be between 0 and 1")
    request = GenerationRequest(list(prompt_ids), sampling, max_new_tokens, end_tokens=tuple(end_tokens))
    check_request(request, vocab_size, context)
    max_new_tokens = min(max_new_tokens, context - len(request.prompt))
    return _generate(model, Sequence(request), max_new_tokens, top_k, penalty_alpha)


def _generate(
    model: LanguageModel, sequence: Sequence, max_new_tokens: int, top_k: int, penalty_alpha: float
) -> Iterator[int]:
    if max_new_tokens:
        state = _ContrastiveState(model, sequence, max_new_tokens, top_k, penalty_alpha)
        for _ in range(max_new_tokens):
            token = state.next_token()
            sequence.tokens.append(token)
            yield token
            if token in sequence.request.end_tokens:
                return


class _ContrastiveState:
    """The KV cache with a row for each candidate, the logits, and the normalized hidden states of all tokens."""

    @torch.inference_mode()
    def __init__(
        self, model: LanguageModel, sequence: Sequence, max_new_tokens: int, top_k: int, penalty_alpha: float
    ) -> None:
        self.model, self.sequence, self.top_k, self.penalty_alpha = model, sequence, top_k, penalty_alpha
        length = len(sequence.tokens)
        self.cache = model.make_cache(top_k, length + max_new_tokens)
        with eval_mode(model):
            hidden = forward_hidden_states(model, [sequence.tokens], self.cache[:1])  # (1, T, C)
            self.logits = last_logits(model, hidden)  # (1, V)
        self.cache.reorder([0] * top_k)
        self.normalized_hidden = hidden.new_zeros((length + max_new_tokens, hidden.size(-1)), dtype=torch.float32)
        self.normalized_hidden[:length] = F.normalize(hidden[0].float(), dim=-1)

    @torch.inference_mode()
    def next_token(self) -> int:
        """Choose the next token and bring its hidden state and its cache row into every row."""
        length = self.cache.length
        logits = apply_penalties(self.logits, self.sequence.request.sampling, [self.sequence.history])
        ids = topk_indices(logits, self.top_k)  # (1, k)
        with eval_mode(self.model):
            hidden = forward_hidden_states(self.model, ids.view(-1, 1).tolist(), self.cache)  # (k, 1, C)
            directions = F.normalize(hidden[:, 0].float(), dim=-1)  # (k, C)
            similarity = (self.normalized_hidden[:length] @ directions.T).amax(0)  # (k,)
            values = (1 - self.penalty_alpha) * logits.softmax(-1).gather(-1, ids)[0] - self.penalty_alpha * similarity
            values.masked_fill_(logits.gather(-1, ids)[0] == -torch.inf, -torch.inf)
            chosen = int(values.argmax())
            self.logits = last_logits(self.model, hidden[chosen : chosen + 1])
        self.normalized_hidden[length] = directions[chosen]
        reorder_cache(self.cache, [chosen] * self.top_k, length)
        return int(ids[0, chosen])


def contrastive_stream(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompt: str,
    *,
    top_k: int = 4,
    penalty_alpha: float = 0.6,
    max_new_tokens: int = 100,
    stop: abc.Sequence[str] = (),
    sampling: Sampling = NO_PENALTIES,
) -> Iterator[str]:
    """Continue `prompt` by contrastive search: yields the new text in pieces of whole characters.

        text = prompt + "".join(contrastive_stream(model, tokenizer, prompt))

    stop: stop strings: the text ends before the first of them, or at the end-of-text token.

    Raises what `contrastive_search` does, and ModelFilesError without a tokenizer.
    """
    tokenizer = require_tokenizer(tokenizer)
    check_stop_strings(stop)
    tokens = contrastive_search(
        model,
        encode_prompt(tokenizer, prompt),
        top_k=top_k,
        penalty_alpha=penalty_alpha,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        end_tokens=(tokenizer.end_of_text,),
    )
    yield from stream_text(tokenizer, tokens, stop)
