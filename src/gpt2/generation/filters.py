"""What may be said next: pure functions from logits (B, V) to logits (B, V), one for each setting of `Sampling`.

Those that look back (`penalize_*`, `ban_*`) take a `History` for each row. Those that look at the distribution alone
(`keep_*`) put what they drop at minus infinity and never drop the most likely token. Logits that are minus infinity
already are taken as ruled out, and stay so. Nothing here changes what it is given, unless `in_place` says so.

A row is treated alike whatever is beside it: sums over the vocabulary are made in one order (`row_sum`).
Each filter but presence, frequency and bias equals the class of `transformers` that its docstring names.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

BLOCK_SIZE = 256  # numbers of a row that are summed, or looked through for the largest, at once
RADIX_SORT_MIN_LENGTH = 2**15  # from here on torch sorts integers by radix
TOP_K_BLOCK_SIZE = 32  # the same where the largest few are wanted; torch is slow with blocks that are narrower


@dataclass
class History:
    """What a row has said so far.

    tokens:        the ids of the prompt and of the continuation so far.
    prompt_length: how many of them are the prompt's.
    end_tokens:    the ids that end a text; `min_new_tokens` rules them out.
    """

    tokens: list[int]
    prompt_length: int = 0
    end_tokens: Sequence[int] = ()


# What looks at ids and histories


def bias_logits(logits: Tensor, bias: Iterable[tuple[int, float]], *, in_place: bool = False) -> Tensor:
    """Add each bias to the logit of its id; minus infinity rules the token out. As OpenAI's `logit_bias`."""
    logits = logits if in_place else logits.clone()
    ids, values = zip(*bias, strict=True)
    where = torch.tensor(ids, device=logits.device)
    logits[:, where] += torch.tensor(values, dtype=logits.dtype, device=logits.device)
    return logits


def penalize_repetition(
    logits: Tensor, histories: Sequence[History], penalty: float, *, in_place: bool = False
) -> Tensor:
    """Divide the logits of what prompt and continuation hold by `penalty`, or multiply those below 0.

    Keskar et al. 2019 (CTRL), section 4.1, as `RepetitionPenaltyLogitsProcessor` corrects it for logits below 0.
    """
    logits = logits if in_place else logits.clone()
    rows, ids = _row_and_id_indices([set(history.tokens) for history in histories], logits.device)
    said = logits[rows, ids]
    logits[rows, ids] = torch.where(said < 0, said * penalty, said / penalty)
    return logits


def penalize_presence(
    logits: Tensor, histories: Sequence[History], penalty: float, *, in_place: bool = False
) -> Tensor:
    """Subtract `penalty` once from what the continuation holds, as OpenAI and vLLM do: the prompt does not count."""
    logits = logits if in_place else logits.clone()
    rows, ids = _row_and_id_indices(
        [set(history.tokens[history.prompt_length :]) for history in histories], logits.device
    )
    logits[rows, ids] -= penalty
    return logits


def penalize_frequency(
    logits: Tensor, histories: Sequence[History], penalty: float, *, in_place: bool = False
) -> Tensor:
    """Subtract `penalty` for each time that the continuation holds a token, as OpenAI and vLLM do."""
    logits = logits if in_place else logits.clone()
    counted = [Counter(history.tokens[history.prompt_length :]) for history in histories]
    rows, ids = _row_and_id_indices(counted, logits.device)
    times = torch.tensor([n for counts in counted for n in counts.values()], dtype=logits.dtype, device=logits.device)
    logits[rows, ids] -= penalty * times
    return logits


def ban_repeated_ngrams(logits: Tensor, histories: Sequence[History], size: int, *, in_place: bool = False) -> Tensor:
    """Rule out the tokens that would end a run of `size` tokens which the history holds already.

    Paulus et al. 2017, section 2.5; `NoRepeatNGramLogitsProcessor`.
    """
    return _ban(logits, [_banned_ngram_tokens(history.tokens, size) for history in histories], in_place)


def ban_words(
    logits: Tensor, histories: Sequence[History], words: Sequence[Sequence[int]], *, in_place: bool = False
) -> Tensor:
    """Rule out each word of one token, and the last token of a longer word where the others have just been said.

    `NoBadWordsLogitsProcessor`; but a word that is an end token is banned like any other.
    """
    longest = max(len(word) for word in words)
    ends = [history.tokens[-longest:] for history in histories]
    return _ban(logits, [{word[-1] for word in words if _ends_with(end, word[:-1])} for end in ends], in_place)


def ban_early_end_tokens(
    logits: Tensor, histories: Sequence[History], min_new_tokens: int, *, in_place: bool = False
) -> Tensor:
    """Rule out the end tokens until there are `min_new_tokens` new ones; `MinNewTokensLengthLogitsProcessor`."""
    early = [len(history.tokens) - history.prompt_length < min_new_tokens for history in histories]
    banned = [set(history.end_tokens) if soon else set() for history, soon in zip(histories, early, strict=True)]
    return _ban(logits, banned, in_place)


def _ban(logits: Tensor, banned: Sequence[Iterable[int]], in_place: bool) -> Tensor:
    logits = logits if in_place else logits.clone()
    logits[_row_and_id_indices(banned, logits.device)] = -torch.inf
    return logits


def _row_and_id_indices(ids_of_rows: Sequence[Iterable[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, ids), a pair for each id of each row."""
    lists = [list(ids) for ids in ids_of_rows]
    rows = np.repeat(np.arange(len(lists)), [len(ids) for ids in lists])
    ids = np.fromiter(chain.from_iterable(lists), np.int64, len(rows))  # a third of the time of torch.tensor
    return torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device)


def _banned_ngram_tokens(tokens: list[int], size: int) -> set[int]:
    """The tokens that followed wherever the last `size - 1` tokens had stood before."""
    if size == 1 or len(tokens) < size:
        return set(tokens) if size == 1 else set()
    begin, last = tokens[len(tokens) - size + 1 :], tokens[-1]
    ends, at = set(), size - 2  # `at`: where a run like `begin` ends
    while True:
        try:
            at = tokens.index(last, at, len(tokens) - 1)
        except ValueError:
            return ends
        if tokens[at - size + 2 : at + 1] == begin:
            ends.add(tokens[at + 1])
        at += 1


def _ends_with(tokens: list[int], end: Sequence[int]) -> bool:
    return not end or tokens[-len(end) :] == list(end)


# What looks at the distribution


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row, and what equals the last of them. `TopKLogitsWarper`."""
    smallest_kept = logits.topk(min(k, logits.size(-1)), -1, sorted=False).values.amin(-1, keepdim=True)
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float, probs: Tensor | None = None) -> Tensor:
    """The nucleus: a token stays while those more likely than it sum to less than `p`.

    Of tokens that are equal the first in the vocabulary comes first. `shares` (B, V) are the probabilities to sum,
    if not those of `logits`: when `logits` are a part of a vocabulary.
    Holtzman et al. 2020, section 3.1; `TopPLogitsWarper`.
    """
    probs = logits.softmax(-1) if probs is None else probs
    order = stable_argsort(logits, descending=True)
    ordered = probs.gather(-1, order).to(widest_float_dtype(logits))
    dropped = ordered.cumsum(-1) - ordered >= p
    dropped[..., 0] = False  # whatever the rounding, the most likely token stays
    return logits.masked_fill(torch.empty_like(dropped).scatter_(-1, order, dropped), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """What is at least `p` times as likely as the most likely token. Nguyen et al. 2024; `MinPLogitsWarper`."""
    return logits.masked_fill(logits < min_p_threshold(logits, p), -torch.inf)


def min_p_threshold(logits: Tensor, p: float) -> Tensor:
    """(B, 1): the smallest logit that `keep_min_p` keeps."""
    return logits.amax(-1, keepdim=True) + (math.log(p) if p > 0 else -torch.inf)


def keep_typical(logits: Tensor, mass: float) -> Tensor:
    """The tokens whose surprise is closest to the one expected, until their probabilities sum to `mass`.

    Meister et al. 2022, section 3; `TypicalLogitsWarper`.
    """
    logprobs = logits.log_softmax(-1)
    shares = logprobs.exp()
    oddness = (-logprobs - _entropy(logprobs, shares)).abs()  # (B, V), infinite for what is ruled out
    order = stable_argsort(oddness)
    cumulated = shares.gather(-1, order).to(widest_float_dtype(logits)).cumsum(-1)
    last = (cumulated < mass).sum(-1, keepdim=True).clamp_(max=logits.size(-1) - 1)
    return logits.masked_fill(oddness > oddness.gather(-1, order.gather(-1, last)), -torch.inf)


def keep_epsilon(logits: Tensor, epsilon: float) -> Tensor:
    """What has a probability of at least `epsilon`, and the most likely. Hewitt et al. 2022; `EpsilonLogitsWarper`."""
    return _keep_above(logits, logits.softmax(-1), epsilon)


def keep_eta(logits: Tensor, epsilon: float) -> Tensor:
    """As `keep_epsilon`, with a cut that sinks where the distribution is flat: min(e, sqrt(e) * exp(-entropy)).

    Hewitt et al. 2022, section 3.3; `EtaLogitsWarper`.
    """
    logprobs = logits.log_softmax(-1)
    shares = logprobs.exp()
    cut = (math.sqrt(epsilon) * (-_entropy(logprobs, shares)).exp()).clamp_(max=epsilon)  # (B, 1)
    return _keep_above(logits, shares, cut)


def _keep_above(logits: Tensor, probs: Tensor, threshold: float | Tensor) -> Tensor:
    dropped = (probs < threshold) & (logits < logits.amax(-1, keepdim=True))
    return logits.masked_fill(dropped, -torch.inf)


def _entropy(logprobs: Tensor, probs: Tensor) -> Tensor:
    """(B, 1), in nats."""
    return -row_sum((logprobs * probs).nan_to_num_(0.0))  # 0 * log 0 is nan, and counts as 0


# Long rows, in blocks: quicker than torch's own on a CPU, and the same in any batch


def row_sum(x: Tensor) -> Tensor:
    """(B, V) -> (B, 1). torch splits the sum of a single long row among threads, and then it rounds otherwise."""
    return block_sums(x).sum(-1, keepdim=True)


def block_sums(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of every `BLOCK` numbers of each row, and last of what is left over: (B, V) -> (B, blocks)."""
    blocks, rest = _split_blocks(x, BLOCK_SIZE)
    return torch.cat((blocks.sum(-1, dtype=dtype), rest.sum(-1, keepdim=True, dtype=dtype)), -1)


def gather_block(x: Tensor, block: Tensor, pad_value: float) -> tuple[Tensor, Tensor]:
    """The numbers and places of one block of each row: (B, V), (B, 1) -> (B, BLOCK) each; `beyond` after the end."""
    ids = block * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=x.device)
    return x.gather(-1, ids.clamp(max=x.size(-1) - 1)).masked_fill(ids >= x.size(-1), pad_value), ids


def stable_argmax(logits: Tensor) -> Tensor:
    """`argmax`, (B, V) -> (B, 1): the first of those that are equal."""
    if logits.device.type != "cpu" or logits.size(-1) <= BLOCK_SIZE:
        return logits.argmax(-1, keepdim=True)
    blocks, rest = _split_blocks(logits, BLOCK_SIZE)
    maxima = blocks.amax(-1)
    if rest.size(-1):
        maxima = torch.cat((maxima, rest.amax(-1, keepdim=True)), -1)
    within, ids = gather_block(logits, maxima.argmax(-1, keepdim=True), -torch.inf)
    return ids.gather(-1, within.argmax(-1, keepdim=True))


def topk_indices(logits: Tensor, k: int) -> Tensor:
    """`topk(n).indices`, (B, V) -> (B, n), the largest first: only the n blocks with the largest maxima are sorted."""
    if logits.device.type != "cpu" or k * TOP_K_BLOCK_SIZE * 4 > logits.size(-1):
        return logits.topk(k, -1).indices
    blocks, rest = _split_blocks(logits, TOP_K_BLOCK_SIZE)
    best = blocks.amax(-1).topk(k, -1, sorted=False).indices  # (B, n)
    near = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, TOP_K_BLOCK_SIZE)).flatten(1)  # (B, n * NARROW)
    at = torch.cat((near, rest), -1).topk(k, -1).indices
    start = (
        torch.cat((best, torch.full_like(best[:, :1], blocks.size(1))), -1) * TOP_K_BLOCK_SIZE
    )  # the rest as one more block
    return start.gather(-1, at // TOP_K_BLOCK_SIZE) + at % TOP_K_BLOCK_SIZE


def stable_argsort(x: Tensor, descending: bool = False) -> Tensor:
    """`argsort`, (B, V) -> (B, V), the first of equals first.

    On a CPU, torch sorts a long row of integers ten times as fast as one of floats, whose bits are in the same order
    once those of negative numbers are turned over.
    """
    if x.device.type != "cpu" or x.size(-1) < RADIX_SORT_MIN_LENGTH:
        return x.sort(dim=-1, descending=descending, stable=True).indices
    bits = (x + 0.0).view(torch.int32)  # -0.0 is 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return torch.stack([row.sort(stable=True).indices for row in (~bits if descending else bits)])


def _split_blocks(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Views (B, V // size, size) and (B, V % size)."""
    count = x.size(-1) // block_size
    return x[:, : count * block_size].unflatten(-1, (count, block_size)), x[:, count * block_size :]


def widest_float_dtype(x: Tensor) -> torch.dtype:
    """The finest dtype of the device: Apple's GPUs have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64
