"""Logit filters: pure functions from logits (B, V) to logits (B, V), one for each setting of `Sampling`.

Those that depend on earlier tokens (`penalize_*`, `ban_*`) take a `History` for each row. Those that depend on the
distribution alone (`keep_*`) set excluded tokens to minus infinity and never exclude the most likely one. A logit of
minus infinity stays so. The input is unchanged, unless `in_place` is set.

Batch invariant: sums over the vocabulary have one order whatever the batch (`row_sum`).
Each filter except presence, frequency and bias equals the class of `transformers` that its docstring names.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

BLOCK_SIZE = 256  # numbers of a row that are summed, or searched for the largest, at a time
RADIX_SORT_MIN_LENGTH = 2**15  # torch uses radix sort for integers from this length on
TOP_K_BLOCK_SIZE = 32  # the same for top-k; narrower blocks are slow in torch


@dataclass
class History:
    """The tokens of a row so far.

    tokens:        prompt tokens and new tokens.
    prompt_length: how many of them are prompt tokens.
    end_tokens:    ids that end the sequence; `min_new_tokens` bans them.
    """

    tokens: list[int]
    prompt_length: int = 0
    end_tokens: Sequence[int] = ()


# Filters that depend on ids and histories


def bias_logits(logits: Tensor, bias: Iterable[tuple[int, float]], *, in_place: bool = False) -> Tensor:
    """Add each bias to the logit of its id; minus infinity bans the token. As OpenAI's `logit_bias`."""
    logits = logits if in_place else logits.clone()
    ids, values = zip(*bias, strict=True)
    columns = torch.tensor(ids, device=logits.device)
    logits[:, columns] += torch.tensor(values, dtype=logits.dtype, device=logits.device)
    return logits


def penalize_repetition(
    logits: Tensor, histories: Sequence[History], penalty: float, *, in_place: bool = False
) -> Tensor:
    """Divide the logits of tokens in the history by `penalty`, or multiply those below 0.

    Keskar et al. 2019 (CTRL), section 4.1, as `RepetitionPenaltyLogitsProcessor` corrects it for logits below 0.
    """
    logits = logits if in_place else logits.clone()
    rows, ids = _row_and_id_indices([set(history.tokens) for history in histories], logits.device)
    values = logits[rows, ids]
    logits[rows, ids] = torch.where(values < 0, values * penalty, values / penalty)
    return logits


def penalize_presence(
    logits: Tensor, histories: Sequence[History], penalty: float, *, in_place: bool = False
) -> Tensor:
    """Subtract `penalty` once from each of the new tokens, as OpenAI and vLLM do: the prompt does not count."""
    logits = logits if in_place else logits.clone()
    new_tokens = [set(history.tokens[history.prompt_length :]) for history in histories]
    rows, ids = _row_and_id_indices(new_tokens, logits.device)
    logits[rows, ids] -= penalty
    return logits


def penalize_frequency(
    logits: Tensor, histories: Sequence[History], penalty: float, *, in_place: bool = False
) -> Tensor:
    """Subtract `penalty` for each occurrence of a token among the new tokens, as OpenAI and vLLM do."""
    logits = logits if in_place else logits.clone()
    counters = [Counter(history.tokens[history.prompt_length :]) for history in histories]
    rows, ids = _row_and_id_indices(counters, logits.device)
    counts = torch.tensor(
        [n for counter in counters for n in counter.values()], dtype=logits.dtype, device=logits.device
    )
    logits[rows, ids] -= penalty * counts
    return logits


def ban_repeated_ngrams(logits: Tensor, histories: Sequence[History], size: int, *, in_place: bool = False) -> Tensor:
    """Ban the tokens that would complete an n-gram of `size` tokens which is in the history already.

    Paulus et al. 2017, section 2.5; `NoRepeatNGramLogitsProcessor`.
    """
    return _ban(logits, [_banned_ngram_tokens(history.tokens, size) for history in histories], in_place)


def ban_words(
    logits: Tensor, histories: Sequence[History], words: Sequence[Sequence[int]], *, in_place: bool = False
) -> Tensor:
    """Ban each word of one token, and the last token of a longer word where the others are the latest tokens.

    `NoBadWordsLogitsProcessor`; but a word that is an end token is banned like any other.
    """
    longest = max(len(word) for word in words)
    ends = [history.tokens[-longest:] for history in histories]
    return _ban(logits, [{word[-1] for word in words if _ends_with(end, word[:-1])} for end in ends], in_place)


def ban_early_end_tokens(
    logits: Tensor, histories: Sequence[History], min_new_tokens: int, *, in_place: bool = False
) -> Tensor:
    """Ban the end tokens until there are `min_new_tokens` new ones; `MinNewTokensLengthLogitsProcessor`."""
    too_short = [len(history.tokens) - history.prompt_length < min_new_tokens for history in histories]
    banned = [history.end_tokens if short else () for history, short in zip(histories, too_short, strict=True)]
    return _ban(logits, banned, in_place)


def _ban(logits: Tensor, banned: Sequence[Iterable[int]], in_place: bool) -> Tensor:
    logits = logits if in_place else logits.clone()
    logits[_row_and_id_indices(banned, logits.device)] = -torch.inf
    return logits


def _row_and_id_indices(ids_of_rows: Sequence[Iterable[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Index tensors (rows, ids) with a pair for each id of each row."""
    lists = [list(ids) for ids in ids_of_rows]
    rows = np.repeat(np.arange(len(lists)), [len(ids) for ids in lists])
    ids = np.fromiter(chain.from_iterable(lists), np.int64, len(rows))  # a third of the time of torch.tensor
    return torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device)


def _banned_ngram_tokens(tokens: list[int], size: int) -> set[int]:
    """The tokens that followed earlier occurrences of the last `size - 1` tokens."""
    if size == 1 or len(tokens) < size:
        return set(tokens) if size == 1 else set()
    prefix, last = tokens[len(tokens) - size + 1 :], tokens[-1]
    banned, end = set(), size - 2  # `end`: the last index of an occurrence of `prefix`
    while True:
        try:
            end = tokens.index(last, end, len(tokens) - 1)
        except ValueError:
            return banned
        if tokens[end - size + 2 : end + 1] == prefix:
            banned.add(tokens[end + 1])
        end += 1


def _ends_with(tokens: list[int], end: Sequence[int]) -> bool:
    return not end or tokens[-len(end) :] == list(end)


# Filters that depend on the distribution


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row, and those equal to the k-th. `TopKLogitsWarper`."""
    smallest_kept = logits.topk(min(k, logits.size(-1)), -1, sorted=False).values.amin(-1, keepdim=True)
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float, probs: Tensor | None = None) -> Tensor:
    """Nucleus sampling: keep a token while the more likely ones sum to less than `p`.

    Equal tokens are in the order of the vocabulary. probs (B, V): the probabilities to sum, if they are not the
    softmax of `logits`: when `logits` are a part of the vocabulary.
    Holtzman et al. 2020, section 3.1; `TopPLogitsWarper`.
    """
    probs = logits.softmax(-1) if probs is None else probs
    order = stable_argsort(logits, descending=True)
    ordered = probs.gather(-1, order).to(widest_float_dtype(logits))
    dropped = ordered.cumsum(-1) - ordered >= p
    dropped[..., 0] = False  # the most likely token stays, however the sum is rounded
    return logits.masked_fill(torch.empty_like(dropped).scatter_(-1, order, dropped), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least `p` times as likely as the most likely one. Nguyen et al. 2024; `MinPLogitsWarper`."""
    return logits.masked_fill(logits < min_p_threshold(logits, p), -torch.inf)


def min_p_threshold(logits: Tensor, p: float) -> Tensor:
    """(B, 1): the smallest logit that `keep_min_p` keeps."""
    return logits.amax(-1, keepdim=True) + (math.log(p) if p > 0 else -torch.inf)


def keep_typical(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprise is closest to the expected one, until their probabilities sum to `mass`.

    Meister et al. 2022, section 3; `TypicalLogitsWarper`.
    """
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    deviation = (-logprobs - _entropy(logprobs, probs)).abs()  # (B, V), infinite for excluded tokens
    order = stable_argsort(deviation)
    cumulative = probs.gather(-1, order).to(widest_float_dtype(logits)).cumsum(-1)
    last = (cumulative < mass).sum(-1, keepdim=True).clamp_(max=logits.size(-1) - 1)
    return logits.masked_fill(deviation > deviation.gather(-1, order.gather(-1, last)), -torch.inf)


def keep_epsilon(logits: Tensor, epsilon: float) -> Tensor:
    """Keep tokens with a probability of at least `epsilon`. Hewitt et al. 2022; `EpsilonLogitsWarper`."""
    return _keep_above(logits, logits.softmax(-1), epsilon)


def keep_eta(logits: Tensor, epsilon: float) -> Tensor:
    """As `keep_epsilon`, with a threshold that is lower for flat distributions: min(e, sqrt(e) * exp(-entropy)).

    Hewitt et al. 2022, section 3.3; `EtaLogitsWarper`.
    """
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    threshold = (math.sqrt(epsilon) * (-_entropy(logprobs, probs)).exp()).clamp_(max=epsilon)  # (B, 1)
    return _keep_above(logits, probs, threshold)


def _keep_above(logits: Tensor, probs: Tensor, threshold: float | Tensor) -> Tensor:
    dropped = (probs < threshold) & (logits < logits.amax(-1, keepdim=True))
    return logits.masked_fill(dropped, -torch.inf)


def _entropy(logprobs: Tensor, probs: Tensor) -> Tensor:
    """(B, 1), in nats."""
    return -row_sum((logprobs * probs).nan_to_num_(0.0))  # 0 * log 0 is nan, and counts as 0


# Operations on long rows in blocks: faster than torch's own on a CPU, and batch invariant


def row_sum(x: Tensor) -> Tensor:
    """(B, V) -> (B, 1). torch splits the sum of a single long row among threads, which changes its rounding."""
    return block_sums(x).sum(-1, keepdim=True)


def block_sums(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of every `BLOCK_SIZE` numbers of each row, then of the remainder: (B, V) -> (B, blocks)."""
    blocks, rest = _split_blocks(x, BLOCK_SIZE)
    return torch.cat((blocks.sum(-1, dtype=dtype), rest.sum(-1, keepdim=True, dtype=dtype)), -1)


def gather_block(x: Tensor, block: Tensor, pad_value: float) -> tuple[Tensor, Tensor]:
    """Values and indices of one block of each row: (B, V), (B, 1) -> (B, BLOCK_SIZE) each; padded after the end."""
    ids = block * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=x.device)
    return x.gather(-1, ids.clamp(max=x.size(-1) - 1)).masked_fill(ids >= x.size(-1), pad_value), ids


def stable_argmax(logits: Tensor) -> Tensor:
    """`argmax`, (B, V) -> (B, 1): the first of equal values."""
    if logits.device.type != "cpu" or logits.size(-1) <= BLOCK_SIZE:
        return logits.argmax(-1, keepdim=True)
    blocks, rest = _split_blocks(logits, BLOCK_SIZE)
    maxima = blocks.amax(-1)
    if rest.size(-1):
        maxima = torch.cat((maxima, rest.amax(-1, keepdim=True)), -1)
    within, ids = gather_block(logits, maxima.argmax(-1, keepdim=True), -torch.inf)
    return ids.gather(-1, within.argmax(-1, keepdim=True))


def topk_indices(logits: Tensor, k: int) -> Tensor:
    """`topk(k).indices`, (B, V) -> (B, k), largest first: only the k blocks with the largest maxima are sorted."""
    if logits.device.type != "cpu" or k * TOP_K_BLOCK_SIZE * 4 > logits.size(-1):
        return logits.topk(k, -1).indices
    blocks, rest = _split_blocks(logits, TOP_K_BLOCK_SIZE)
    best = blocks.amax(-1).topk(k, -1, sorted=False).indices  # (B, k)
    values = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, TOP_K_BLOCK_SIZE)).flatten(
        1
    )  # (B, k * TOP_K_BLOCK_SIZE)
    index = torch.cat((values, rest), -1).topk(k, -1).indices
    block_ids = torch.cat((best, torch.full_like(best[:, :1], blocks.size(1))), -1)  # last: remainder
    return block_ids.gather(-1, index // TOP_K_BLOCK_SIZE) * TOP_K_BLOCK_SIZE + index % TOP_K_BLOCK_SIZE


def stable_argsort(x: Tensor, descending: bool = False) -> Tensor:
    """Stable `argsort`, (B, V) -> (B, V).

    On a CPU, torch sorts a long row of integers ten times as fast as one of floats. The bits of floats, read as
    integers, have the same order once those of negative numbers are inverted.
    """
    if x.device.type != "cpu" or x.size(-1) < RADIX_SORT_MIN_LENGTH:
        return x.sort(dim=-1, descending=descending, stable=True).indices
    bits = (x + 0.0).view(torch.int32)  # -0.0 is 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return torch.stack([row.sort(stable=True).indices for row in (~bits if descending else bits)])


def _split_blocks(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Views (B, V // block_size, block_size) and (B, V % block_size)."""
    count = x.size(-1) // block_size
    return x[:, : count * block_size].unflatten(-1, (count, block_size)), x[:, count * block_size :]


def widest_float_dtype(x: Tensor) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64
