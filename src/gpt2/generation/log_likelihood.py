"""The log-likelihood of given tokens under a model: the one scorer for evaluation, perplexity and the server.

Logits are computed for a few positions at a time: never for all of them in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gpt2.generation.engine import LanguageModel, check_finite, eval_mode
from gpt2.generation.sampling import gather_logprobs

LOGITS_CHUNK = 64  # positions whose logits, (64, V), are held at a time


@dataclass(frozen=True)
class TokenLogLikelihoods:
    """N scored tokens. All logarithms are natural and before any sampling setting.

    logprobs:     float32 (N,), the log-probability of each token.
    ranks:        int64 (N,), 1 plus the number of tokens that are more likely; 1 where greedy decoding gives the token.
    top_ids:      int64 (N, num_top), the most likely tokens, most likely first.
    top_logprobs: float32 (N, num_top).
    """

    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@torch.inference_mode()
def hidden_log_likelihoods(
    model: LanguageModel, hidden: Tensor, targets: Tensor, num_top: int = 0
) -> TokenLogLikelihoods:
    """Score `targets` (N,) by the head on `hidden` (N, C), the hidden states of the positions before them.

    Raises NonFiniteLogitsError if the model computes nan or inf.
    """
    parts = []
    for h, ids in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True):
        logits = model.lm_head(h).float()  # (n, V)
        check_finite(logits)
        logprobs, top_ids, top_logprobs = gather_logprobs(logits, ids, num_top)
        ranks = (logits > logits.gather(-1, ids.unsqueeze(-1))).sum(-1) + 1
        parts.append(TokenLogLikelihoods(logprobs, ranks, top_ids, top_logprobs))
    return _concatenate(parts)


def _concatenate(parts: list[TokenLogLikelihoods]) -> TokenLogLikelihoods:
    return TokenLogLikelihoods(
        *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(TokenLogLikelihoods))
    )


@torch.inference_mode()
def token_log_likelihoods(
    model: LanguageModel, tokens: Sequence[int], *, stride: int | None = None, num_top: int = 0
) -> TokenLogLikelihoods:
    """Score every token but the first, given those before it: N = len(tokens) - 1.

    stride: tokens longer than the context are read in windows of the context that begin `stride` tokens apart; a token
            is scored in the first window that has it. By default windows do not overlap. Half a context gives every
            token, except those of the first window, at least half a context before it.

    Runs without dropout. Raises NonFiniteLogitsError if the model computes nan or inf, ValueError for a stride outside
    1..context and for fewer than two tokens.
    """
    context, total = model.config.block_size, len(tokens) - 1
    stride = context if stride is None else stride
    if not 1 <= stride <= context or total < 1:
        raise ValueError(f"cannot score {len(tokens)} tokens with a stride of {stride} in a context of {context}")
    ids = torch.tensor(tokens, device=model.device)
    parts, done = [], 0  # tokens[1 : done + 1] are scored
    with eval_mode(model):
        for start in range(0, total, stride):
            end = min(start + context, total)
            hidden = model.hidden_states(ids[None, start:end])[0]  # (T, C)
            parts.append(hidden_log_likelihoods(model, hidden[done - start :], ids[done + 1 : end + 1], num_top))
            done = end
            if done == total:
                break
    return _concatenate(parts)
