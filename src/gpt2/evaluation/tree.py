"""Sequences with common beginnings as one packed row: every shared prefix is computed once.

The tokens of a group of sequences become the nodes of a trie, written depth first. A node attends to itself and to
its ancestors, and its position is its depth, so each sequence is computed as if it stood alone (tree attention, as in
SpecInfer, Miao et al. 2023, and Medusa, Cai et al. 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpt2.generation.engine import common_prefix_length
from gpt2.packing import Packing


@dataclass(frozen=True)
class Query:
    """One sequence to score.

    tokens: the context and then the continuation, at least scored + 1 tokens.
    scored: how many tokens at the end are scored.
    """

    tokens: Sequence[int]
    scored: int


@dataclass(frozen=True)
class Tree:
    """A group of queries as a trie of n nodes.

    tokens:    int64 (n,): the inputs of the model. The last token of a query is never one: nothing follows it.
    positions: int64 (n,): the depth of each node.
    segments:  (first node, past-the-end node, indices of the nodes before it on its path), depth first.
    paths:     for each query, int64 (scored,): the nodes whose next-token distributions score it.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: list[tuple[int, int, np.ndarray]]
    paths: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether plain causal attention is the right attention: there is only one path."""
        return len(self.segments) <= 1

    def mask(self) -> np.ndarray:
        """bool (n, n): True where node i attends to node j."""
        mask = np.zeros((len(self), len(self)), dtype=bool)
        for start, stop, before in self.segments:
            mask[start:stop, before] = True
            mask[start:stop, start:stop] = np.tri(stop - start, dtype=bool)
        return mask


def build_tree(queries: Sequence[Query]) -> Tree:
    """The trie of a group of queries. Queries may be equal, or prefixes of each other, and in any order."""
    order = sorted(range(len(queries)), key=lambda i: list(queries[i].tokens[:-1]))
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, int, np.ndarray]] = []
    paths: list[np.ndarray] = [np.empty(0, np.int64)] * len(queries)
    previous, path = [], np.empty(0, np.int64)  # the inputs of the query before this one, and their nodes
    for i in order:
        inputs = list(queries[i].tokens[:-1])
        shared = common_prefix_length(previous, inputs)
        start = len(tokens)
        tokens += inputs[shared:]
        positions += range(shared, len(inputs))
        if len(tokens) > start:
            segments.append((start, len(tokens), path[:shared]))
        path = np.concatenate([path[:shared], np.arange(start, len(tokens))])
        paths[i] = path[len(inputs) - queries[i].scored :]
        previous = inputs
    return Tree(np.array(tokens, np.int64), np.array(positions, np.int64), segments, paths)


def tree_attention(trees: Sequence[Tree], width: int, device: torch.device) -> Packing:
    """What the model needs to compute trees as rows of `width` nodes; a padding node attends to itself alone."""
    positions = np.zeros((len(trees), width), np.int64)
    mask = np.zeros((len(trees), 1, width, width), dtype=bool)
    mask[:, 0, np.arange(width), np.arange(width)] = True
    for row, tree in enumerate(trees):
        positions[row, : len(tree)] = tree.positions
        mask[row, 0, : len(tree), : len(tree)] = tree.mask()
    return Packing(torch.from_numpy(positions).to(device), torch.from_numpy(mask).to(device))
