"""The log-likelihood scorer: log-probabilities of given tokens after given contexts.

Sequences with a common prefix share its computation (`gpt2.evaluation.tree`). Batches hold groups of similar length, so
that there is little padding. Logits are computed only at positions where a token is scored.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt2.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from gpt2.errors import DataError
from gpt2.evaluation.tree import Query, Tree, build_tree, tree_attention
from gpt2.generation.engine import LanguageModel, check_finite, eval_mode
from gpt2.model import GPT, GPTConfig

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # positions in a batch, padding included
HEAD_ROWS = {"cpu": 128, "cuda": 4096}  # positions whose logits are held at a time; on a CPU more are slower
CACHE_ELEMENTS = 2**21  # logits that a CPU processes at once, so that they stay in its cache
FULL_TOKENS = {"cpu": 512, "cuda": 8192}  # from this size on, a batch does not take much shorter rows
MAX_PADDING = 0.1
SHUFFLE_SEED = 20190214  # batches are visited in a fixed random order, so that a running score is representative


@dataclass(frozen=True)
class Scored:
    """The scores of one query.

    logprobs: float32 (scored,): log-probabilities of the scored tokens, in nats.
    greedy:   bool (scored,): whether each is the most likely token at its position.
    """

    logprobs: np.ndarray
    greedy: np.ndarray

    @property
    def log_likelihood(self) -> float:
        """The log-likelihood of the scored tokens: the sum of their log-probabilities, summed in float64."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would produce all of the scored tokens."""
        return bool(self.greedy.all())


def check_queries(queries: Sequence[Query], config: GPTConfig, where: str) -> None:
    """Raises DataError for a query that the model cannot score; `where` names the row."""
    for query in queries:
        if query.scored < 1:
            raise DataError(f"{where}: there are no tokens to score")
        if query.scored > config.block_size or len(query.tokens) > config.block_size + 1:
            raise DataError(
                f"{where}: {query.scored} tokens to score do not fit the model's context of {config.block_size}"
            )


def score(
    model: LanguageModel,
    groups: Sequence[Sequence[Query]],
    ranks: ProcessGroup = SINGLE_PROCESS,
    batch_tokens: int | None = None,
) -> Iterator[list[tuple[int, list[Scored]]]]:
    """Score groups of queries, batch after batch: yields (index of the group, its queries' scores) for each batch.

    groups:       queries that are scored together; their common prefix is computed once.
    ranks:        the processes that share the batches, which are the same for any number of ranks; each takes its own.
    batch_tokens: positions in a batch, padding included; by default chosen by device type.

    Every query must pass `check_queries`. Raises NonFiniteLogitsError when the model computes nan or inf.
    """
    kind = model.device.type
    trees = [build_tree(group) for group in groups]
    budget = batch_tokens or BATCH_TOKENS.get(kind, 8192)
    batches = _batches([len(tree) for tree in trees], budget, min(budget, FULL_TOKENS.get(kind, 2048)))
    rows = HEAD_ROWS.get(kind, 1024)
    for batch in batches[ranks.rank :: ranks.world_size]:
        with torch.inference_mode(), eval_mode(model):
            chosen = [trees[i] for i in batch]
            hidden = _hidden_of_trees(model, chosen) if isinstance(model, GPT) else _hidden_through_cache(model, chosen)
            found = _score_hidden(model, hidden, chosen, [groups[i] for i in batch], rows)
        yield list(zip(batch, found, strict=True))


def _batches(lengths: Sequence[int], budget: int, full: int) -> list[list[int]]:
    """Indices of groups, about equal lengths together, at most `budget` positions or one group in a batch.

    full: a batch with this many positions takes no much shorter row: padding would cost more than another batch.
    """
    batches: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = len(batches[-1]) if batches else 0
        shorter = lengths[i] < (1 - MAX_PADDING) * width and size * width >= full
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
    return model.transformer(tokens, tree_attention(trees, width, model.device))


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
    check_finite(total[:, None])
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
