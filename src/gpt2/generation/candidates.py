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

from gpt2.generation.filters import largest, least_of_min_p, precise

EQUALS = 8  # so many tokens that equal the k-th are found without looking through the whole vocabulary again
NUCLEI = (256, 4096)  # on a GPU: how many tokens are tried for a nucleus before the whole vocabulary is sorted
FINER = 18  # bits of a float32 that are left out where shares are counted by size: 32 steps from x to 2x remain
MARGIN = 1e-4  # more than rounding makes of a sum of 50,257 shares in float32


@dataclass
class Part:
    """Some rows of a batch, and the tokens that may have a chance in them, in the order of the vocabulary.

    Rows go together where they have equally many tokens, and how many depends on nothing but the row: a sum of
    another width rounds otherwise, and a row's numbers are to be the same in any batch.
    """

    rows: list[int]
    ids: Tensor | None  # (b, n); None for every row and the whole vocabulary
    logits: Tensor  # (b, n), divided by the temperature
    shares: Tensor | None = None  # (b, n), probabilities before top-p, where these are not the softmax of `logits`


def candidates(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> list[Part]:
    """Logits (B, V) in float32 -> parts that hold each row once: divided by the temperature and cut to top-k.

    For top-p and min-p they hold at least what these keep; the filters are still to be applied.
    """
    if 0 < top_k < logits.size(-1):
        return _most_likely(logits, temperature, top_k)
    logits = logits if temperature == 1 else logits / temperature
    if top_p == 1 and min_p == 0:
        return [Part(list(range(len(logits))), None, logits)]
    shares = logits.softmax(-1) if top_p < 1 else None
    if logits.device.type == "cpu":
        return _by_size(logits, shares, top_p, min_p)
    return by_rungs(logits, shares, top_p, min_p)


def _most_likely(logits: Tensor, temperature: float, k: int) -> list[Part]:
    """Exactly what `keep_top_k` keeps. The temperature divides k logits rather than all."""
    size = logits.size(-1)
    ids = largest(logits, min(k + EQUALS, size))  # (B, n)
    parts, widths = [], []
    for least, *next_ones in logits.gather(-1, ids[:, k - 1 :]).tolist():
        widths.append(k + next_ones.count(least) if least > -math.inf else k)  # of those ruled out, any will do
    for width in sorted(set(widths)):
        rows = [row for row, its in enumerate(widths) if its == width]
        if width < ids.size(-1) or width == size:
            in_order = _rows(ids, rows)[:, :width].sort(-1).values
            parts.append(Part(rows, in_order, _rows(logits, rows).gather(-1, in_order) / temperature))
            continue
        for row in rows:  # perhaps more are equal than were looked at
            many = (logits[row] >= logits[row, ids[row, k - 1]]).nonzero().view(1, -1)
            parts.append(Part([row], many, logits[row, many] / temperature))
    return parts


def _by_size(logits: Tensor, shares: Tensor | None, top_p: float, min_p: float) -> list[Part]:
    """Each row for itself, the tokens above a bound that is just below what top-p and min-p keep."""
    above = logits >= least_of_min_p(logits, min_p) if shares is None else shares >= _bound(shares, top_p)  # (B, V)
    if shares is not None and min_p > 0:
        above &= logits >= least_of_min_p(logits, min_p)
    parts = []
    for row, likely in enumerate(above.numpy()):
        ids = torch.from_numpy(np.flatnonzero(likely)).unsqueeze(0)  # (1, n); twice as fast as torch's nonzero
        parts.append(Part([row], ids, logits[row, ids], None if shares is None else shares[row, ids]))
    return parts


def _bound(shares: Tensor, p: float) -> Tensor:
    """(B, 1): a share such that those of this size and above sum to at least p.

    The first bits of a positive float are a logarithmic scale: shares are summed by those, and the sums from the top.
    """
    sizes = shares.view(torch.int32) >> FINER  # (B, V)
    sums = shares.new_zeros(len(shares), (0x3F800000 >> FINER) + 2).scatter_add_(-1, sizes.long(), shares)
    from_above = sums.flip(-1).cumsum(-1).flip(-1)
    size = (from_above >= p + MARGIN).sum(-1, keepdim=True, dtype=torch.int32) - 1  # the last that is enough
    return (size.clamp_(min=0) << FINER).view(torch.float32)


def by_rungs(logits: Tensor, shares: Tensor | None, top_p: float, min_p: float) -> list[Part]:
    """For a GPU, which likes few and wide calls: the 256 most likely tokens, or 4096, or all."""
    parts, rows = [], list(range(len(logits)))
    for n in (*NUCLEI, logits.size(-1)):
        n = min(n, logits.size(-1))
        ids = largest(_rows(logits, rows), n).sort(-1).values  # (b, n)
        values = _rows(logits, rows).gather(-1, ids)
        own = None if shares is None else _rows(shares, rows).gather(-1, ids)
        enough = _settled(values, own, top_p, min_p).logical_or_(torch.tensor(n == logits.size(-1))).tolist()
        if done := [i for i, settled in enumerate(enough) if settled]:
            own = None if own is None else own[done]
            parts.append(Part([rows[i] for i in done], ids[done], values[done], own))
        rows = [row for row, settled in zip(rows, enough, strict=True) if not settled]
        if not rows:
            break
    return parts


def _settled(values: Tensor, shares: Tensor | None, top_p: float, min_p: float) -> Tensor:
    """(b,): whether the least of these logits is dropped, and so are all that are not here, its equals among them."""
    least = values.amin(-1, keepdim=True)
    settled = least < least_of_min_p(values, min_p)
    if shares is not None:
        above = shares.masked_fill(values <= least, 0.0).to(precise(values)).cumsum(-1)[:, -1:]
        settled |= above >= top_p
    return settled.squeeze(-1)


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    return x if len(rows) == len(x) else x[rows]
