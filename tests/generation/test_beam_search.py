"""Beam search equals transformers; diverse groups equal the algorithm of their paper."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.errors import UserError
from gpt2.generation.beam_search import Hypothesis, beam_search
from gpt2.generation.contrastive_search import contrastive_search
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from tests.helpers.search_helpers import (
    CONFIGS,
    assert_same_hypotheses,
    greedy_decode,
    model_pair,
    peaked_model,
    transformers_beam_search,
)
from tests.helpers.transformers_reference import random_model, to_transformers

# Beam search equals transformers

PENALTIES = [
    ({}, {}),
    ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ({"bad_words": [(3,), (5, 8)], "min_new_tokens": 4}, {"bad_words_ids": [[3], [5, 8]], "min_new_tokens": 4}),
    (
        {"logit_bias": {4: 2.0, 9: -3.0}, "no_repeat_ngram_size": 3},
        {"sequence_bias": [[[4], 2.0], [[9], -3.0]], "no_repeat_ngram_size": 3},
    ),
]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    which=st.integers(0, 1),
    seed=st.integers(0, 3),
    prompt=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    ends=st.sampled_from([[], [20], [11, 25], [*range(10, 18)]]),
    num_beams=st.integers(2, 6),
    max_new_tokens=st.integers(4, 14),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.5]),
    early_stopping=st.sampled_from([False, True, "never"]),
    penalties=st.sampled_from(PENALTIES),
)
def test_beam_search_equals_transformers_in_tokens_and_scores(
    which: int,
    seed: int,
    prompt: list[int],
    ends: list[int],
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: Any,
    penalties: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    model, reference = model_pair(which, seed)
    common: dict[str, Any] = {
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
    }
    sampling = Sampling(temperature=0.3, top_k=1, **penalties[0])  # the first two are ignored
    ours = beam_search(model, prompt, **common, num_return=num_beams, sampling=sampling, end_tokens=ends)
    assert_same_hypotheses(
        ours,
        transformers_beam_search(reference, prompt, ends, **common, **penalties[1], num_return_sequences=num_beams),
    )
    few = beam_search(model, prompt, **common, num_return=1, sampling=sampling, end_tokens=ends)
    assert few == ours[:1]


@pytest.mark.parametrize(("seed", "ends", "power"), [(3, [*range(10, 18)], 1.0), (0, [11, 25], 2.0)])
def test_the_three_early_stopping_modes_differ_and_equal_transformers(seed: int, ends: list[int], power: float) -> None:
    """Shows that searches of the test above do end before the last token."""
    model, reference = model_pair(0, seed)
    lengths = set()
    for early_stopping in (False, True, "never"):
        rules: dict[str, Any] = {"early_stopping": early_stopping, "length_penalty": power, "num_beams": 4}
        ours = beam_search(model, [1, 2], max_new_tokens=20, num_return=4, end_tokens=ends, **rules)
        assert_same_hypotheses(
            ours, transformers_beam_search(reference, [1, 2], ends, 20, num_return_sequences=4, **rules)
        )
        lengths.add(tuple(len(hypothesis.tokens) for hypothesis in ours))
    assert len(lengths) == 3


def test_beam_search_in_float32_at_odd_sizes_equals_transformers() -> None:
    model = random_model(GPTConfig(vocab_size=500, block_size=40, n_layer=3, n_head=7, n_embd=49, n_inner=50))
    common: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 15}
    ours = beam_search(model, [3, 1, 4], **common, num_return=3)
    assert_same_hypotheses(
        ours, transformers_beam_search(to_transformers(model), [3, 1, 4], [], **common, num_return_sequences=3)
    )


def test_with_a_beam_for_every_token_the_search_is_exhaustive() -> None:
    model = peaked_model(replace(CONFIGS[0], vocab_size=11))
    texts = list(product(range(11), repeat=2))
    with torch.no_grad():
        logprobs = model(torch.tensor([[7, *text] for text in texts])).log_softmax(-1).tolist()
    scores = {text: (row[0][text[0]] + row[1][text[1]]) / 2 for text, row in zip(texts, logprobs, strict=True)}
    best = sorted(scores, key=lambda text: -scores[text])[:11]
    found = beam_search(model, [7], num_beams=11, max_new_tokens=2, num_return=11)
    assert_same_hypotheses(found, [Hypothesis(list(text), scores[text]) for text in best])


def test_one_beam_is_greedy_decoding() -> None:
    model, _ = model_pair(0, 0)
    (found,) = beam_search(model, [5, 6], num_beams=1, max_new_tokens=20)
    assert found.tokens == greedy_decode(model, [5, 6], 20)


# Diverse groups


def reference_diverse_beam_search(
    model: GPT, prompt: list[int], beams: int, groups: int, strength: float, length: int, ends: Sequence[int]
) -> list[Hypothesis]:
    """Algorithm 1 of Vijayakumar et al. 2016 with Hamming diversity, without a KV cache.

    A group with as many finished hypotheses as beams is done.
    """
    size = beams // groups
    kept = [[(0.0, list[int]())] for _ in range(groups)]
    finished: list[list[Hypothesis]] = [[] for _ in range(groups)]
    for step in range(1, length + 1):
        chosen: list[int] = []  # by earlier groups, at this step
        for g in range(groups):
            extended = []
            for score, text in kept[g]:
                with torch.no_grad():
                    logprobs = model(torch.tensor([prompt + text]))[0, -1].log_softmax(-1).tolist()
                for token, logprob in enumerate(logprobs):
                    extended.append((score + logprob - strength * chosen.count(token), [*text, token]))
            extended.sort(reverse=True)
            kept[g] = [found for found in extended if found[1][-1] not in ends][:size]
            chosen += [text[-1] for _, text in kept[g]]
            for score, text in extended[:size]:
                if step == length or text[-1] in ends:
                    finished[g].append(Hypothesis(text, score / step))
            finished[g] = sorted(finished[g], key=lambda found: -found.score)[:size]
            if len(finished[g]) == size:
                kept[g] = []
    return sorted((found for group in finished for found in group), key=lambda found: -found.score)


@pytest.mark.parametrize(("beams", "groups", "strength"), [(4, 2, 1.0), (3, 3, 0.3), (6, 2, 5.0), (6, 3, 0.7)])
@pytest.mark.parametrize(("length", "ends"), [(1, []), (9, []), (12, [0, 1, 2, 3, 4]), (12, [20, 21, 22, 23])])
def test_diverse_groups_equal_the_algorithm_of_the_paper(
    beams: int, groups: int, strength: float, length: int, ends: list[int]
) -> None:
    model, _ = model_pair(0, 2)
    found = beam_search(
        model,
        [9, 4, 1],
        num_beams=beams,
        num_beam_groups=groups,
        diversity_penalty=strength,
        num_return=beams,
        max_new_tokens=length,
        end_tokens=ends,
        early_stopping=True,
    )
    assert_same_hypotheses(
        found, reference_diverse_beam_search(model, [9, 4, 1], beams, groups, strength, length, ends)
    )
    if ends:
        assert len({len(hypothesis.tokens) for hypothesis in found}) > 1


def test_groups_without_a_penalty_find_the_same_hypotheses() -> None:
    model, _ = model_pair(1, 0)
    rules: dict[str, Any] = {"max_new_tokens": 12, "end_tokens": [12, 13]}
    alone = beam_search(model, [9], num_beams=2, num_return=2, **rules)
    found = beam_search(model, [9], num_beams=6, num_beam_groups=3, num_return=6, **rules)
    assert_same_hypotheses(found, [hypothesis for hypothesis in alone for _ in range(3)])


@pytest.mark.parametrize(
    ("seed", "ends", "lasts_longer"), [(0, [21], 1), (1, [15], 1), (2, [30], 1), (0, [0, 1, 2], 0), (3, [0, 1, 2], 0)]
)
def test_one_group_may_finish_long_before_the_other(seed: int, ends: list[int], lasts_longer: int) -> None:
    """Its cache rows are then used by the other group."""
    model, _ = model_pair(0, seed)
    found = beam_search(
        model,
        [1],
        num_beams=4,
        num_return=4,
        num_beam_groups=2,
        diversity_penalty=2.0,
        max_new_tokens=20,
        early_stopping=True,
        end_tokens=ends,
    )
    assert_same_hypotheses(found, reference_diverse_beam_search(model, [1], 4, 2, 2.0, 20, ends))
    first = beam_search(
        model, [1], num_beams=2, num_return=2, max_new_tokens=20, early_stopping=True, end_tokens=ends
    )  # the first group has no penalty
    second = list(found)
    for hypothesis in first:
        second.remove(hypothesis)
    lengths = [max(len(hypothesis.tokens) for hypothesis in group) for group in (first, second)]
    assert lengths[lasts_longer] > lengths[1 - lasts_longer] + 4


# Dead ends and the end of the context


def test_a_beam_with_every_token_banned_ends_and_the_others_continue() -> None:
    model, _ = model_pair(0, 0)
    first = beam_search(model, [1], num_beams=1, max_new_tokens=1)[0].tokens[0]
    after_first = Sampling(temperature=0, bad_words=[(first, token) for token in range(31)])
    found = beam_search(model, [1], num_beams=3, max_new_tokens=8, num_return=3, sampling=after_first)
    assert len(found) == 3
    assert all(first not in hypothesis.tokens[:-1] and len(hypothesis.tokens) == 8 for hypothesis in found)


def test_the_number_of_beams_may_drop_and_recover() -> None:
    model, _ = model_pair(0, 0)
    rules: dict[str, Any] = {
        "num_beams": 4,
        "num_return": 4,
        "length_penalty": 0.0,
        "sampling": Sampling(temperature=0, bad_words=[(1, token) for token in range(31) if token != 2]),
    }
    found = beam_search(model, [1], max_new_tokens=8, **rules)
    only = beam_search(model, [1], max_new_tokens=1, **rules)
    assert [hypothesis.tokens for hypothesis in only] == [[2]]
    rest = beam_search(model, [1, 2], max_new_tokens=7, **rules)
    assert_same_hypotheses(
        found, [Hypothesis([2, *hypothesis.tokens], only[0].score + hypothesis.score) for hypothesis in rest]
    )


def test_when_every_beam_is_at_a_dead_end_finished_hypotheses_are_returned_or_an_error_is_raised() -> None:
    model = peaked_model(replace(CONFIGS[0], vocab_size=9))
    once_each = Sampling(temperature=0, no_repeat_ngram_size=1)
    with pytest.raises(UserError, match="rule out every token"):
        beam_search(model, [1], num_beams=3, max_new_tokens=20, sampling=once_each)
    found = beam_search(model, [1], num_beams=3, max_new_tokens=20, num_return=3, sampling=once_each, end_tokens=[4])
    assert found
    assert all(found.tokens[-1] == 4 and len(set(found.tokens)) == len(found.tokens) for found in found)


def test_a_search_ends_when_the_context_is_full() -> None:
    model, reference = model_pair(0, 0)
    prompt = [3] * 25
    ours = beam_search(model, prompt, num_beams=3, max_new_tokens=100, num_return=3)
    assert_same_hypotheses(
        ours, transformers_beam_search(reference, prompt, [], num_beams=3, max_new_tokens=6, num_return_sequences=3)
    )
    assert len(list(contrastive_search(model, prompt, top_k=3, penalty_alpha=0.5, max_new_tokens=100))) == 5
    full = [3] * 30
    assert len(beam_search(model, full, num_beams=3, max_new_tokens=100)[0].tokens) == 1
    assert list(contrastive_search(model, full, top_k=3, penalty_alpha=0.5, max_new_tokens=100)) == []


def test_max_new_tokens_of_zero() -> None:
    model, _ = model_pair(0, 0)
    assert beam_search(model, [1], num_beams=3, max_new_tokens=0) == [Hypothesis([], 0.0)]
    assert list(contrastive_search(model, [1], top_k=3, penalty_alpha=0.5, max_new_tokens=0)) == []
