"""Each logit filter equals its counterpart in transformers, or its formula."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2.generation import filters
from tests.helpers.sampling_inputs import histories, make_histories, random_logits, seeds, tokens

NO_TOKENS: Any = torch.empty(0, dtype=torch.long)
INF = math.inf

sizes = st.integers(2, 60)
REFERENCES: dict[str, tuple[Callable[[Tensor, Any], Tensor], str, st.SearchStrategy[float]]] = {
    "top_p": (filters.keep_top_p, "TopPLogitsWarper", st.floats(0.05, 0.99)),
    "min_p": (filters.keep_min_p, "MinPLogitsWarper", st.floats(0.001, 0.99)),
    "typical": (filters.keep_typical, "TypicalLogitsWarper", st.floats(0.05, 0.99)),
    "epsilon": (filters.keep_epsilon, "EpsilonLogitsWarper", st.floats(1e-4, 0.5)),
    "eta": (filters.keep_eta, "EtaLogitsWarper", st.floats(1e-4, 0.5)),
}


@pytest.mark.parametrize("name", REFERENCES)
@settings(deadline=None, max_examples=150)
@given(data=st.data(), seed=seeds, size=sizes, spread=st.sampled_from([0.3, 2.0, 10.0]), out=st.sampled_from([0, 0.3]))
def test_distribution_filters_equal_transformers(
    name: str, data: st.DataObject, seed: int, size: int, spread: float, out: float
) -> None:
    import transformers

    ours, reference, values = REFERENCES[name]
    value = data.draw(values)
    logits = random_logits(seed, 3, size, spread, out)
    below, theirs, above = [
        getattr(transformers, reference)(value * x)(NO_TOKENS, logits) for x in (0.9999, 1.0, 1.0001)
    ]
    assume(torch.equal(below, above))  # a tie within rounding may go either way
    given = logits.clone()
    assert torch.equal(ours(logits, value), theirs)
    assert torch.equal(logits, given)


@settings(deadline=None)
@given(seeds, sizes, st.integers(1, 70), st.booleans())
def test_top_k_equals_transformers(seed: int, size: int, k: int, coarse: bool) -> None:
    from transformers import TopKLogitsWarper

    logits = random_logits(seed, 3, size, masked_fraction=0.2)
    logits = logits.round() if coarse else logits  # many are equal then, and the equals of the last stay
    assert torch.equal(filters.keep_top_k(logits, k), TopKLogitsWarper(k)(NO_TOKENS, logits))


def test_top_p_keeps_at_least_one_token_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.9, 0.05, 0.05]]).log()
    assert filters.keep_top_p(logits, 0.5).isfinite().tolist() == [[True, False, False]]
    assert filters.keep_top_p(logits, 1e-9).isfinite().sum() == 1
    assert filters.keep_top_p(torch.zeros(1, 4), 0.5).isfinite().tolist() == [[True, True, False, False]]


def assert_equal_to_processor(ours: Tensor, processor: Any, rows: list[list[int]], logits: Tensor) -> None:
    assert torch.equal(ours, processor(torch.tensor(rows), logits.clone()))


@settings(deadline=None)
@given(seeds, histories, st.floats(0.1, 5))
def test_repetition_penalty_equals_transformers(seed: int, rows: list[list[int]], penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(seed, len(rows), 9, masked_fraction=0.2)
    ours = filters.penalize_repetition(logits, make_histories(rows, prompt_length=3), penalty)
    assert_equal_to_processor(ours, RepetitionPenaltyLogitsProcessor(penalty), rows, logits)


@settings(deadline=None, max_examples=150)
@given(seeds, histories, st.integers(1, 5))
def test_repeated_ngrams_equal_transformers(seed: int, rows: list[list[int]], size: int) -> None:
    from transformers import NoRepeatNGramLogitsProcessor

    rows = [[token % 3 for token in row] for row in rows] if seed % 2 else rows
    logits = random_logits(seed, len(rows), 9)
    assert_equal_to_processor(
        filters.ban_repeated_ngrams(logits, make_histories(rows), size),
        NoRepeatNGramLogitsProcessor(size),
        rows,
        logits,
    )


@settings(deadline=None, max_examples=150)
@given(seeds, histories, st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=6))
def test_bad_words_equal_transformers(seed: int, rows: list[list[int]], words: list[list[int]]) -> None:
    from transformers import NoBadWordsLogitsProcessor

    rows = [[token % 4 for token in row] for row in rows]
    logits = random_logits(seed, len(rows), 9)
    assert_equal_to_processor(
        filters.ban_words(logits, make_histories(rows), words), NoBadWordsLogitsProcessor(words), rows, logits
    )


@settings(deadline=None)
@given(seeds, histories, st.integers(0, 30), st.integers(0, 30), st.lists(tokens, min_size=1, max_size=3))
def test_min_new_tokens_equals_transformers(
    seed: int, rows: list[list[int]], prompt_length: int, least: int, ends: list[int]
) -> None:
    from transformers import MinNewTokensLengthLogitsProcessor

    logits, prompt_length = random_logits(seed, len(rows), 9), min(prompt_length, len(rows[0]))
    ours = filters.ban_early_end_tokens(logits, make_histories(rows, prompt_length, tuple(ends)), least)
    assert_equal_to_processor(ours, MinNewTokensLengthLogitsProcessor(prompt_length, least, ends), rows, logits)


@settings(deadline=None)
@given(seeds, histories, st.integers(0, 30), st.floats(-2, 2, width=32), st.floats(-2, 2, width=32))
def test_presence_and_frequency_follow_the_formula_of_openai(
    seed: int, rows: list[list[int]], prompt_length: int, presence: float, frequency: float
) -> None:
    logits = random_logits(seed, len(rows), 9)
    expected = logits.clone()
    for row, history in enumerate(rows):
        for token in range(9):
            count = history[prompt_length:].count(token)
            expected[row, token] -= (count > 0) * presence
            expected[row, token] -= count * frequency
    given, past = logits.clone(), make_histories(rows, prompt_length)
    ours = filters.penalize_frequency(filters.penalize_presence(logits, past, presence), past, frequency)
    assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits, given)


# Long rows


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000, 50257])
def test_argmax_and_topk_in_blocks_equal_torch(size: int) -> None:
    for logits in (random_logits(0, 2, size), random_logits(1, 1, size).round(), torch.full((1, size), -INF)):
        assert torch.equal(filters.stable_argmax(logits), logits.argmax(-1, keepdim=True))
        for n in {min(size, n) for n in (1, 5, 50, 256, 700)}:
            ids = filters.topk_indices(logits, n)
            assert torch.equal(logits.gather(-1, ids), logits.topk(n).values)
            assert all(len(set(row)) == n for row in ids.tolist())
    at_the_end = torch.full((1, size), -2.0)
    at_the_end[0, -1] = -1
    assert filters.stable_argmax(at_the_end).item() == filters.topk_indices(at_the_end, 1).item() == size - 1


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("size", [100, 40_000])
def test_stable_argsort_equals_a_stable_sort(size: int, descending: bool) -> None:
    logits = random_logits(0, 2, size, masked_fraction=0.1)
    logits[1] = logits[1].round()  # with both zeros
    expected = logits.sort(dim=-1, descending=descending, stable=True).indices
    assert torch.equal(filters.stable_argsort(logits, descending), expected)


def test_row_sums_are_batch_invariant() -> None:
    x = random_logits(0, 4, 50257)
    assert torch.allclose(filters.row_sum(x).double(), x.double().sum(-1, keepdim=True), atol=1e-2)
    assert all(torch.equal(filters.row_sum(x[i : i + 1]), filters.row_sum(x)[i : i + 1]) for i in range(4))
