"""Candidate tokens: makes sampling from a vocabulary of 50,257 cheap without changing the result.

Top-k, top-p and min-p keep a few hundred tokens. One pass over the logits finds a superset of them; everything after
that, above all sorting, is done for this small set. The filters of `gpt2.generation.filters` then run on it as they
would on the whole vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt2.generation.filters import min_p_threshold, topk_indices, widest_float_dtype

MAX_TIES = 8  # tokens equal to the k-th that are found without a second pass over the vocabulary
NUCLEUS_SIZES = (256, 4096)  # on a GPU: candidate counts to try before the whole vocabulary is sorted
HISTOGRAM_SHIFT = 18  # low bits of a float32 that the histogram ignores: 32 bins from x to 2x remain
ROUNDING_MARGIN = 1e-4  # more than the rounding error of a sum of 50,257 probabilities in float32


@dataclass
class CandidateGroup:
    """Some rows of a batch with their candidate tokens, in the order of the vocabulary.

    Rows with the same number of candidates form a group, and that number depends on the row alone: a sum over another
    width rounds differently, and a row's result must be batch invariant.
    """

    rows: list[int]
    ids: Tensor | None  # (b, n); None for every row and the whole vocabulary
    logits: Tensor  # (b, n), divided by the temperature
    probs: Tensor | None = None  # (b, n), probabilities before top-p, where these are not the softmax of `logits`


def select_candidates(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> list[CandidateGroup]:
    """Logits (B, V) in float32 -> groups that contain each row once, with temperature and top-k applied.

    For top-p and min-p the candidates are a superset of what these keep: the filters still have to be applied.
    """
    if 0 < top_k < logits.size(-1):
        return _top_k_candidates(logits, temperature, top_k)
    logits = logits if temperature == 1 else logits / temperature
    if top_p == 1 and min_p == 0:
        return [CandidateGroup(list(range(len(logits))), None, logits)]
    probs = logits.softmax(-1) if top_p < 1 else None
    if logits.device.type == "cpu":
        return _cpu_candidates(logits, probs, top_p, min_p)
    return gpu_candidates(logits, probs, top_p, min_p)


def _top_k_candidates(logits: Tensor, temperature: float, k: int) -> list[CandidateGroup]:
    """Exactly what `keep_top_k` keeps. Only k logits are divided by the temperature."""
    size = logits.size(-1)
    ids = topk_indices(logits, min(k + MAX_TIES, size))  # (B, n)
    parts, widths = [], []
    for kth, *following in logits.gather(-1, ids[:, k - 1 :]).tolist():
        widths.append(k + following.count(kth) if kth > -math.inf else k)  # excluded tokens are all alike
    for width in sorted(set(widths)):
        rows = [row for row, row_width in enumerate(widths) if row_width == width]
        if width < ids.size(-1) or width == size:
            kept = _select_rows(ids, rows)[:, :width].sort(-1).values
            parts.append(CandidateGroup(rows, kept, _select_rows(logits, rows).gather(-1, kept) / temperature))
            continue
        for row in rows:  # there may be more ties than MAX_TIES
            kept = (logits[row] >= logits[row, ids[row, k - 1]]).nonzero().view(1, -1)
            parts.append(CandidateGroup([row], kept, logits[row, kept] / temperature))
    return parts


def _cpu_candidates(logits: Tensor, probs: Tensor | None, top_p: float, min_p: float) -> list[CandidateGroup]:
    """One group per row: the tokens above a threshold just below that of top-p and min-p."""
    above = None if probs is None else probs >= _top_p_threshold(probs, top_p)  # (B, V)
    if above is None or min_p > 0:
        likely = logits >= min_p_threshold(logits, min_p)
        above = likely if above is None else above & likely
    parts = []
    for row, mask in enumerate(above.numpy()):
        ids = torch.from_numpy(np.flatnonzero(mask)).unsqueeze(0)  # (1, n); twice as fast as torch's nonzero
        parts.append(CandidateGroup([row], ids, logits[row, ids], None if probs is None else probs[row, ids]))
    return parts


def _top_p_threshold(probs: Tensor, p: float) -> Tensor:
    """(B, 1): a probability such that those at or above it sum to at least p.

    The high bits of a positive float are a logarithmic scale: a histogram over them, summed from the top.
    """
    bins = probs.view(torch.int32) >> HISTOGRAM_SHIFT  # (B, V)
    sums = probs.new_zeros(len(probs), (0x3F800000 >> HISTOGRAM_SHIFT) + 2).scatter_add_(-1, bins.long(), probs)
    from_above = sums.flip(-1).cumsum(-1).flip(-1)
    last = (from_above >= p + ROUNDING_MARGIN).sum(-1, keepdim=True, dtype=torch.int32) - 1  # the last sufficient bin
    return (last.clamp_(min=0) << HISTOGRAM_SHIFT).view(torch.float32)


def gpu_candidates(logits: Tensor, probs: Tensor | None, top_p: float, min_p: float) -> list[CandidateGroup]:
    """For a GPU, where few wide operations are fast: the 256 most likely tokens, or 4096, or all."""
    parts, rows = [], list(range(len(logits)))
    for n in (*NUCLEUS_SIZES, logits.size(-1)):
        n = min(n, logits.size(-1))
        ids = topk_indices(_select_rows(logits, rows), n).sort(-1).values  # (b, n)
        values = _select_rows(logits, rows).gather(-1, ids)
        row_probs = None if probs is None else _select_rows(probs, rows).gather(-1, ids)
        whole = torch.tensor(n == logits.size(-1))
        sufficient = _is_sufficient(values, row_probs, top_p, min_p).logical_or_(whole).tolist()
        if done := [i for i, enough in enumerate(sufficient) if enough]:
            row_probs = None if row_probs is None else row_probs[done]
            parts.append(CandidateGroup([rows[i] for i in done], ids[done], values[done], row_probs))
        rows = [row for row, enough in zip(rows, sufficient, strict=True) if not enough]
        if not rows:
            break
    return parts


def _is_sufficient(logits: Tensor, probs: Tensor | None, top_p: float, min_p: float) -> Tensor:
    """(b,): whether top-p or min-p excludes the smallest of these logits, and thus all tokens outside the group."""
    least = logits.amin(-1, keepdim=True)
    sufficient = least < min_p_threshold(logits, min_p)
    if probs is not None:
        above = probs.masked_fill(logits <= least, 0.0).to(widest_float_dtype(logits)).cumsum(-1)[:, -1:]
        sufficient |= above >= top_p
    return sufficient.squeeze(-1)


def _select_rows(x: Tensor, rows: list[int]) -> Tensor:
    return x if len(rows) == len(x) else x[rows]
