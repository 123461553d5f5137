"""Contrastive search: one token ahead, what is likely and yet unlike all that was said."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from gpt2.errors import UserError
from gpt2.generation.engine import LanguageModel, eval_mode
from gpt2.generation.filters import topk_indices
from gpt2.generation.sampling import History, Sampling, apply_penalties
from gpt2.generation.search import (
    NO_PENALTIES,
    check_prompt,
    encode_prompt,
    forward_hidden_states,
    last_logits,
    reorder_cache,
    stream_text,
)
from gpt2.tokenizer import Tokenizer


def contrastive_search(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    top_k: int,
    penalty_alpha: float,
    max_new_tokens: int,
    sampling: Sampling = NO_PENALTIES,
    end_tokens: Sequence[int] = (),
) -> Iterator[int]:
    """The next tokens one by one, each likely and yet unlike what was said: the end token, if one comes, is the last.

    Of the `top_k` most likely tokens v the one with the largest

        (1 - penalty_alpha) * p(v) - penalty_alpha * max_j cos(h_v, h_j)

    is taken, where h_v is the hidden state that the head would read after v, and h_j those of all tokens before it,
    prompt included. With `penalty_alpha` 0 or `top_k` 1 this is greedy decoding.

    sampling: biases, penalties and bans, on the logits; nothing else of it has a say.

    Works on any `LanguageModel` and device, in memory for `top_k` rows of a cache. Ends where the context is full,
    whatever `max_new_tokens`: a candidate is read before it is taken, and has to fit.
    Raises UserError for settings that cannot be, for a prompt that is empty or longer than the context, for a model
    that gives nan, and when the bans rule out every token.

    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", equation 5; Su and Collier 2022 use
    it with plain GPT-2, with top_k 4 to 10 and penalty_alpha 0.6.
    """
    if not 1 <= top_k <= model.config.vocab_size:
        size = model.config.vocab_size
        raise UserError(f"top-k must be at least 1 and at most the vocabulary's {size:,} to be searched, not {top_k}")
    if not 0 <= penalty_alpha <= 1:
        raise UserError(f"penalty-alpha must be between 0 and 1, not {penalty_alpha}")
    prompt = list(prompt_ids)
    limit = min(max_new_tokens, check_prompt(model, prompt, max_new_tokens, sampling))
    return _generate(model, History(prompt, len(prompt), end_tokens), limit, top_k, penalty_alpha, sampling)


def _generate(
    model: LanguageModel, history: History, max_new_tokens: int, top_k: int, penalty_alpha: float, sampling: Sampling
) -> Iterator[int]:
    if max_new_tokens:
        lookahead = _ContrastiveState(model, history, max_new_tokens, top_k, penalty_alpha)
        for _ in range(max_new_tokens):
            token = lookahead.next_token(sampling)
            history.tokens.append(token)
            yield token
            if token in history.end_tokens:
                return


class _ContrastiveState:
    """What contrastive search knows of its text: the cache, with a row for each candidate, and every hidden state."""

    @torch.inference_mode()
    def __init__(
        self, model: LanguageModel, history: History, max_new_tokens: int, top_k: int, penalty_alpha: float
    ) -> None:
        self.model, self.history, self.top_k, self.penalty_alpha = model, history, top_k, penalty_alpha
        length = len(history.tokens)
        self.cache = model.make_cache(top_k, length + max_new_tokens)
        with eval_mode(model):
            hidden = forward_hidden_states(model, [history.tokens], self.cache[:1])  # (1, T, C)
            self.logits = last_logits(model, hidden)  # (1, V)
        self.cache.reorder([0] * top_k)
        self.normalized_hidden = hidden.new_zeros(
            (length + max_new_tokens, hidden.size(-1)), dtype=torch.float32
        )  # each of length 1
        self.normalized_hidden[:length] = F.normalize(hidden[0].float(), dim=-1)

    @torch.inference_mode()
    def next_token(self, sampling: Sampling) -> int:
        """The next token."""
        length = self.cache.length
        logits = apply_penalties(self.logits, sampling, [self.history])
        ids = topk_indices(logits, self.top_k)  # (1, k)
        with eval_mode(self.model):
            hidden = forward_hidden_states(self.model, ids.view(-1, 1).tolist(), self.cache)  # (k, 1, C)
            directions = F.normalize(hidden[:, 0].float(), dim=-1)  # (k, C)
            likeness = (self.normalized_hidden[:length] @ directions.T).amax(0)  # (k,)
            values = (1 - self.penalty_alpha) * logits.softmax(-1).gather(-1, ids)[0] - self.penalty_alpha * likeness
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
    stop: Sequence[str] = (),
    sampling: Sampling = NO_PENALTIES,
) -> Iterator[str]:
    """The continuation of `prompt` that contrastive search finds, in pieces of whole characters, prompt not included.

        text = prompt + "".join(contrastive_stream(model, tokenizer, prompt))

    stop: the text ends before the first of these strings.

    The end-of-text token ends it, too. Raises what `contrastive_search` does, and UserError without a tokenizer.
    """
    tokenizer, ids = encode_prompt(tokenizer, prompt, stop)
    tokens = contrastive_search(
        model,
        ids,
        top_k=top_k,
        penalty_alpha=penalty_alpha,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        end_tokens=(tokenizer.end_of_text,),
    )
    yield from stream_text(tokenizer, tokens, stop)
