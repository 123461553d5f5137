"""The tokens that may have a chance: what makes sampling from a vocabulary of 50,257 cheap without changing a result.

Top-k, top-p and min-p leave a few hundred tokens. To find a set that surely holds them takes a look at each logit;
everything after that, sorting above all, is done for the few. The filters of `gpt2.generation.filters` then run on
those as they would on a vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt2.generation.filters import min_p_threshold, topk_indices, widest_float_dtype

MAX_TIES = 8  # so many tokens that equal the k-th are found without looking through the whole vocabulary again
NUCLEUS_SIZES = (256, 4096)  # on a GPU: how many tokens are tried for a nucleus before the whole vocabulary is sorted
HISTOGRAM_SHIFT = (
    18  # bits of a float32 that are left out where shares are counted by size: 32 steps from x to 2x remain
)
ROUNDING_MARGIN = 1e-4  # more than rounding makes of a sum of 50,257 shares in float32


@dataclass
class CandidateGroup:
    """Some rows of a batch, and the tokens that may have a chance in them, in the order of the vocabulary.

    Rows go together where they have equally many tokens, and how many depends on nothing but the row: a sum of
    another width rounds otherwise, and a row's numbers are to be the same in any batch.
    """

    rows: list[int]
    ids: Tensor | None  # (b, n); None for every row and the whole vocabulary
    logits: Tensor  # (b, n), divided by the temperature
    probs: Tensor | None = None  # (b, n), probabilities before top-p, where these are not the softmax of `logits`


def select_candidates(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> list[CandidateGroup]:
    """Logits (B, V) in float32 -> parts that hold each row once: divided by the temperature and cut to top-k.

    For top-p and min-p they hold at least what these keep; the filters are still to be applied.
    """
    if 0 < top_k < logits.size(-1):
        return _top_k_candidates(logits, temperature, top_k)
    logits = logits if temperature == 1 else logits / temperature
    if top_p == 1 and min_p == 0:
        return [CandidateGroup(list(range(len(logits))), None, logits)]
    shares = logits.softmax(-1) if top_p < 1 else None
    if logits.device.type == "cpu":
        return _cpu_candidates(logits, shares, top_p, min_p)
    return gpu_candidates(logits, shares, top_p, min_p)


def _top_k_candidates(logits: Tensor, temperature: float, k: int) -> list[CandidateGroup]:
    """Exactly what `keep_top_k` keeps. The temperature divides k logits rather than all."""
    size = logits.size(-1)
    ids = topk_indices(logits, min(k + MAX_TIES, size))  # (B, n)
    parts, widths = [], []
    for least, *next_ones in logits.gather(-1, ids[:, k - 1 :]).tolist():
        widths.append(k + next_ones.count(least) if least > -math.inf else k)  # of those ruled out, any will do
    for width in sorted(set(widths)):
        rows = [row for row, its in enumerate(widths) if its == width]
        if width < ids.size(-1) or width == size:
            in_order = _select_rows(ids, rows)[:, :width].sort(-1).values
            parts.append(CandidateGroup(rows, in_order, _select_rows(logits, rows).gather(-1, in_order) / temperature))
            continue
        for row in rows:  # perhaps more are equal than were looked at
            many = (logits[row] >= logits[row, ids[row, k - 1]]).nonzero().view(1, -1)
            parts.append(CandidateGroup([row], many, logits[row, many] / temperature))
    return parts


def _cpu_candidates(logits: Tensor, probs: Tensor | None, top_p: float, min_p: float) -> list[CandidateGroup]:
    """Each row for itself, the tokens above a bound that is just below what top-p and min-p keep."""
    above = (
        logits >= min_p_threshold(logits, min_p) if probs is None else probs >= _top_p_threshold(probs, top_p)
    )  # (B, V)
    if probs is not None and min_p > 0:
        above &= logits >= min_p_threshold(logits, min_p)
    parts = []
    for row, likely in enumerate(above.numpy()):
        ids = torch.from_numpy(np.flatnonzero(likely)).unsqueeze(0)  # (1, n); twice as fast as torch's nonzero
        parts.append(CandidateGroup([row], ids, logits[row, ids], None if probs is None else probs[row, ids]))
    return parts


def _top_p_threshold(probs: Tensor, p: float) -> Tensor:
    """(B, 1): a share such that those of this size and above sum to at least p.

    The first bits of a positive float are a logarithmic scale: shares are summed by those, and the sums from the top.
    """
    sizes = probs.view(torch.int32) >> HISTOGRAM_SHIFT  # (B, V)
    sums = probs.new_zeros(len(probs), (0x3F800000 >> HISTOGRAM_SHIFT) + 2).scatter_add_(-1, sizes.long(), probs)
    from_above = sums.flip(-1).cumsum(-1).flip(-1)
    size = (from_above >= p + ROUNDING_MARGIN).sum(-1, keepdim=True, dtype=torch.int32) - 1  # the last that is enough
    return (size.clamp_(min=0) << HISTOGRAM_SHIFT).view(torch.float32)


def gpu_candidates(logits: Tensor, probs: Tensor | None, top_p: float, min_p: float) -> list[CandidateGroup]:
    """For a GPU, which likes few and wide calls: the 256 most likely tokens, or 4096, or all."""
    parts, rows = [], list(range(len(logits)))
    for n in (*NUCLEUS_SIZES, logits.size(-1)):
        n = min(n, logits.size(-1))
        ids = topk_indices(_select_rows(logits, rows), n).sort(-1).values  # (b, n)
        values = _select_rows(logits, rows).gather(-1, ids)
        own = None if probs is None else _select_rows(probs, rows).gather(-1, ids)
        enough = _is_sufficient(values, own, top_p, min_p).logical_or_(torch.tensor(n == logits.size(-1))).tolist()
        if done := [i for i, settled in enumerate(enough) if settled]:
            own = None if own is None else own[done]
            parts.append(CandidateGroup([rows[i] for i in done], ids[done], values[done], own))
        rows = [row for row, settled in zip(rows, enough, strict=True) if not settled]
        if not rows:
            break
    return parts


def _is_sufficient(logits: Tensor, probs: Tensor | None, top_p: float, min_p: float) -> Tensor:
    """(b,): whether the least of these logits is dropped, and so are all that are not here, its equals among them."""
    least = logits.amin(-1, keepdim=True)
    settled = least < min_p_threshold(logits, min_p)
    if probs is not None:
        above = probs.masked_fill(logits <= least, 0.0).to(widest_float_dtype(logits)).cumsum(-1)[:, -1:]
        settled |= above >= top_p
    return settled.squeeze(-1)


def _select_rows(x: Tensor, rows: list[int]) -> Tensor:
    return x if len(rows) == len(x) else x[rows]
