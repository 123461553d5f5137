"""Contrastive search: one token ahead, what is likely and yet unlike all that was said."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from gpt2.errors import UserError
from gpt2.generation.engine import LanguageModel, evaluating
from gpt2.generation.filters import largest
from gpt2.generation.sampling import History, Sampling, adjusted
from gpt2.generation.search import PLAIN, check_prompt, encoded, last_logits, pieces, read, reorder
from gpt2.tokenizer import Tokenizer


def contrastive_search(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    top_k: int,
    penalty_alpha: float,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
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
    return _continue(model, History(prompt, len(prompt), end_tokens), limit, top_k, penalty_alpha, sampling)


def _continue(
    model: LanguageModel, history: History, limit: int, top_k: int, alpha: float, sampling: Sampling
) -> Iterator[int]:
    if limit:
        lookahead = _Lookahead(model, history, limit, top_k, alpha)
        for _ in range(limit):
            token = lookahead.choose(sampling)
            history.tokens.append(token)
            yield token
            if token in history.end_tokens:
                return


class _Lookahead:
    """What contrastive search knows of its text: the cache, with a row for each candidate, and every hidden state."""

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, history: History, limit: int, top_k: int, alpha: float) -> None:
        self.model, self.history, self.top_k, self.alpha = model, history, top_k, alpha
        length = len(history.tokens)
        self.cache = model.make_cache(top_k, length + limit)
        with evaluating(model):
            hidden = read(model, [history.tokens], self.cache[:1])  # (1, T, C)
            self.logits = last_logits(model, hidden)  # (1, V)
        self.cache.reorder([0] * top_k)
        self.seen = hidden.new_zeros((length + limit, hidden.size(-1)), dtype=torch.float32)  # each of length 1
        self.seen[:length] = F.normalize(hidden[0].float(), dim=-1)

    @torch.inference_mode()
    def choose(self, sampling: Sampling) -> int:
        """The next token."""
        length = self.cache.length
        logits = adjusted(self.logits, sampling, [self.history])
        ids = largest(logits, self.top_k)  # (1, k)
        with evaluating(self.model):
            hidden = read(self.model, ids.view(-1, 1).tolist(), self.cache)  # (k, 1, C)
            directions = F.normalize(hidden[:, 0].float(), dim=-1)  # (k, C)
            likeness = (self.seen[:length] @ directions.T).amax(0)  # (k,)
            values = (1 - self.alpha) * logits.softmax(-1).gather(-1, ids)[0] - self.alpha * likeness
            values.masked_fill_(logits.gather(-1, ids)[0] == -torch.inf, -torch.inf)
            chosen = int(values.argmax())
            self.logits = last_logits(self.model, hidden[chosen : chosen + 1])
        self.seen[length] = directions[chosen]
        reorder(self.cache, [chosen] * self.top_k, length)
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
    sampling: Sampling = PLAIN,
) -> Iterator[str]:
    """The continuation of `prompt` that contrastive search finds, in pieces of whole characters, prompt not included.

        text = prompt + "".join(contrastive_stream(model, tokenizer, prompt))

    stop: the text ends before the first of these strings.

    The end-of-text token ends it, too. Raises what `contrastive_search` does, and UserError without a tokenizer.
    """
    tokenizer, ids = encoded(tokenizer, prompt, stop)
    tokens = contrastive_search(
        model,
        ids,
        top_k=top_k,
        penalty_alpha=penalty_alpha,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        end_tokens=(tokenizer.end_of_text,),
    )
    yield from pieces(tokenizer, tokens, stop)
