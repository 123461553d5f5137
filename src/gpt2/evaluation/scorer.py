"""The log-likelihood scorer: log-probabilities of given tokens after given contexts.

Three things make it fast. Sequences with a common beginning share its computation (`gpt2.evaluation.tree`); batches
hold groups of about equal length, so that little is padding; and logits are computed only where a token is scored.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gpt2.cache import KVCache
from gpt2.errors import UserError
from gpt2.evaluation.share import Share
from gpt2.evaluation.tree import Query, Tree, TreeAttention, build_tree
from gpt2.model import GPT, GPTConfig

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # positions in a batch, padding included
HEAD_ROWS = {"cpu": 512, "cuda": 4096}  # positions whose logits are held at a time
CACHE_ELEMENTS = 2**21  # of those, what a CPU works on at once, so that it stays in the cache
FULL_TOKENS = {"cpu": 512, "cuda": 8192}  # a batch that has so many may end, rather than take much shorter rows
MOST_PADDING = 0.1
SHUFFLE_SEED = 20190214  # batches are visited in a fixed random order, so that a running score is representative


class LanguageModel(Protocol):
    """What can be scored: a `gpt2.model.GPT`, or the CPU kernel's stand-in for it."""

    config: GPTConfig

    @property
    def device(self) -> torch.device:
        """Where tokens are put."""
        ...

    def make_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache."""
        ...

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """int64 (B, T) -> (B, T, C), continuing the rows of the cache."""
        ...

    @property
    def lm_head(self) -> Any:
        """A function: (..., C) -> logits (..., V)."""
        ...


@dataclass(frozen=True)
class Scored:
    """What the model gives one query.

    logprobs: float32 (scored,): log-probabilities of the scored tokens, in nats.
    greedy:   bool (scored,): whether each is the most likely token at its place.
    """

    logprobs: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> float:
        """The sum of the log-probabilities, summed in float64."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would produce all of the scored tokens."""
        return bool(self.greedy.all())


def check_queries(queries: Sequence[Query], config: GPTConfig, where: str) -> None:
    """Raise UserError for a query that the model cannot score; `where` names the row."""
    for query in queries:
        if query.scored < 1:
            raise UserError(f"{where}: the text to score has no tokens")
        if query.scored > config.block_size or len(query.tokens) > config.block_size + 1:
            raise UserError(
                f"{where}: {query.scored} tokens to score do not fit the model's context of {config.block_size}"
            )


def score(
    model: LanguageModel,
    groups: Sequence[Sequence[Query]],
    share: Share | None = None,
    batch_tokens: int | None = None,
) -> Iterator[list[tuple[int, list[Scored]]]]:
    """Score groups of queries, batch after batch: yields (index of the group, its queries' scores) for each batch.

    groups:       queries that are scored together; what they have in common at the beginning is computed once.
    share:        this rank's place. The batches are the same for any number of ranks; each rank takes its own.
    batch_tokens: positions in a batch, padding included; by default as many as suit the device.

    Every query must pass `check_queries`. Raises UserError when the model gives nan or inf.
    """
    share = share or Share()
    kind = model.device.type
    trees = [build_tree(group) for group in groups]
    budget = batch_tokens or BATCH_TOKENS.get(kind, 8192)
    batches = _batches([len(tree) for tree in trees], budget, min(budget, FULL_TOKENS.get(kind, 2048)))
    rows = HEAD_ROWS.get(kind, 1024)
    for batch in batches[share.rank :: share.size]:
        with torch.inference_mode(), evaluating(model):
            chosen = [trees[i] for i in batch]
            hidden = _hidden_of_trees(model, chosen) if isinstance(model, GPT) else _hidden_through_cache(model, chosen)
            found = _score_hidden(model, hidden, chosen, [groups[i] for i in batch], rows)
        yield list(zip(batch, found, strict=True))


def _batches(lengths: Sequence[int], budget: int, full: int) -> list[list[int]]:
    """Indices of groups, about equal lengths together, at most `budget` positions or one group in a batch.

    full: a batch of so many positions takes no row that is mostly shorter: padding costs more than another batch.
    """
    batches: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = len(batches[-1]) if batches else 0
        shorter = lengths[i] < (1 - MOST_PADDING) * width and size * width >= full
        if not batches or (size + 1) * width > budget or shorter:
            batches.append([])
            width = lengths[i]
        batches[-1].append(i)
    random.Random(SHUFFLE_SEED).shuffle(batches)
    return batches


def _hidden_of_trees(model: GPT, trees: Sequence[Tree]) -> Tensor:
    """Hidden states (B, T, C) of trees, one per row."""
    width = max(map(len, trees))
    tokens = np.zeros((len(trees), width), np.int64)
    for row, tree in enumerate(trees):
        tokens[row, : len(tree)] = tree.tokens
    tokens = torch.from_numpy(tokens).to(model.device)
    if all(tree.is_chain for tree in trees):
        return model.hidden_states(tokens)
    return model.transformer(tokens, TreeAttention.of(trees, width, model.device))  # pyright: ignore[reportArgumentType]


def _hidden_through_cache(model: LanguageModel, trees: Sequence[Tree]) -> Tensor:
    """The same for a model without tree attention: each segment continues a cache that holds its path."""
    width = max(map(len, trees))
    hidden = torch.zeros(len(trees), width, model.config.n_embd, device=model.device)
    for row, tree in enumerate(trees):
        cache = model.make_cache(1, int(tree.positions.max()) + 1)
        for start, stop, before in tree.segments:  # depth first: the cache begins with this segment's path
            cache.lengths[0] = len(before)
            tokens = torch.from_numpy(tree.tokens[None, start:stop]).to(model.device)
            hidden[row, start:stop] = model.hidden_states(tokens, cache)[0].float()
    return hidden


def _score_hidden(
    model: LanguageModel, hidden: Tensor, trees: Sequence[Tree], groups: Sequence[Sequence[Query]], head_rows: int
) -> list[list[Scored]]:
    """Scores from hidden states (B, T, C): the head runs once for each position that scores anything."""
    width = hidden.size(1)
    places = [row * width + path for row, tree in enumerate(trees) for path in tree.paths]
    queries = [query for group in groups for query in group]
    targets = np.array([token for query in queries for token in query.tokens[len(query.tokens) - query.scored :]])
    unique, index = np.unique(np.concatenate(places), return_inverse=True)
    order = np.argsort(index, kind="stable")  # targets in the order of their positions
    flat = hidden.reshape(-1, hidden.size(-1))[torch.from_numpy(unique).to(hidden.device)]
    logprobs, greedy = np.empty(len(targets), np.float32), np.empty(len(targets), dtype=bool)
    begin = 0
    for start in range(0, len(unique), head_rows):
        end = int(np.searchsorted(index[order], start + head_rows))
        chosen = order[begin:end]
        begin = end
        logprobs[chosen], greedy[chosen] = _score_rows(
            model, flat[start : start + head_rows], index[chosen] - start, targets[chosen]
        )
    ends = np.cumsum([query.scored for query in queries])[:-1]
    scored = iter(map(Scored, np.split(logprobs, ends), np.split(greedy, ends)))
    return [[next(scored) for _ in group] for group in groups]


def _score_rows(
    model: LanguageModel, hidden: Tensor, rows: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each target at its row of `hidden` (n, C), and whether it is the most likely token."""
    logits = model.lm_head(hidden).float()  # (n, V)
    device = logits.device
    at, ids = torch.from_numpy(rows).to(device), torch.from_numpy(targets).to(device)
    own = logits[at, ids]
    best, total = _max_and_logsumexp(logits)
    if not total.isfinite().all():
        raise UserError("the model gives nan or inf: its weights are damaged, or too large for its dtype")
    return (own - total[at]).cpu().numpy(), _is_first_best(logits, best, at, ids, own).cpu().numpy()


def _max_and_logsumexp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of (n, V), and the logarithm of the sum of exponentials."""
    step = len(logits) if logits.is_cuda else max(1, CACHE_ELEMENTS // logits.size(1))
    best, total = [], []
    for part in logits.split(step):
        most = part.amax(-1, keepdim=True)
        best.append(most.squeeze(1))
        total.append((part - most).exp_().sum(-1).log_() + best[-1])
    return torch.cat(best), torch.cat(total)


def _is_first_best(logits: Tensor, best: Tensor, at: Tensor, ids: Tensor, own: Tensor) -> Tensor:
    """Whether each target is what argmax would give: the largest of its row, and the first of equal ones."""
    greedy = own == best[at]
    candidates = greedy.nonzero().squeeze(1)  # few: argmax over all rows would take as long as the softmax
    for some in candidates.split(64):
        greedy[some] = logits[at[some]].argmax(-1) == ids[some]
    return greedy


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout within; every module's mode is restored afterwards."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
