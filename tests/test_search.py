"""Beam search says what transformers says; groups and contrastive search, what their papers say, written out."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import random_model, transformers_twin
from torch.nn import functional as F

from gpt2.errors import UserError
from gpt2.generation.beam import Hypothesis, beam_search, beam_texts
from gpt2.generation.contrastive import contrastive_search, contrastive_stream
from gpt2.generation.engine import Engine, Request
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import get_tokenizer

CONFIGS = [
    GPTConfig(vocab_size=31, block_size=30, n_layer=2, n_head=2, n_embd=16, tie_word_embeddings=False),
    GPTConfig(vocab_size=60, block_size=30, n_layer=1, n_head=5, n_embd=40, tie_word_embeddings=False),
]
WRITER = replace(CONFIGS[0], vocab_size=257, block_size=64)  # speaks in bytes


def decided_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A random model that clearly prefers some tokens, others at each place; in float64, so that two roundings do
    not swap two candidates."""
    model = random_model(config, seed)
    with torch.no_grad():
        for embedding in (model.transformer.wte, model.transformer.wpe):
            embedding.weight *= 20
        model.transformer.ln_f.bias.zero_()
        model.lm_head.weight *= 10
    return model.double()


@cache
def pair(which: int, seed: int) -> tuple[GPT, Any]:
    """A model and its twin in transformers."""
    model = decided_model(CONFIGS[which], seed)
    return model, transformers_twin(model).double()


def theirs(twin: Any, prompt: list[int], ends: Sequence[int], max_new_tokens: int, **given: Any) -> list[Hypothesis]:
    ids = torch.tensor([prompt])
    found = twin.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(ends) or None,
        return_dict_in_generate=True,
        output_scores=True,
        **given,
    )
    rows = found.sequences[:, len(prompt) :].tolist()
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    return [Hypothesis(row, score) for row, score in zip(rows, found.sequences_scores.tolist(), strict=True)]


def assert_same(ours: list[Hypothesis], others: list[Hypothesis]) -> None:
    assert [found.tokens for found in ours] == [found.tokens for found in others]
    assert [found.score for found in ours] == pytest.approx([found.score for found in others], rel=1e-5, abs=1e-6)


# Beam search beside transformers

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
    model, twin = pair(which, seed)
    common: dict[str, Any] = {
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
    }
    sampling = Sampling(temperature=0.3, top_k=1, **penalties[0])  # the first two have no say
    ours = beam_search(model, prompt, **common, num_return=num_beams, sampling=sampling, end_tokens=ends)
    assert_same(ours, theirs(twin, prompt, ends, **common, **penalties[1], num_return_sequences=num_beams))
    few = beam_search(model, prompt, **common, num_return=1, sampling=sampling, end_tokens=ends)
    assert few == ours[:1]


@pytest.mark.parametrize(("seed", "ends", "power"), [(3, [*range(10, 18)], 1.0), (0, [11, 25], 2.0)])
def test_the_three_kinds_of_early_stopping_find_three_things(seed: int, ends: list[int], power: float) -> None:
    """What the test above could not show if no search were decided before its last token."""
    model, twin = pair(0, seed)
    lengths = set()
    for early_stopping in (False, True, "never"):
        rules: dict[str, Any] = {"early_stopping": early_stopping, "length_penalty": power, "num_beams": 4}
        ours = beam_search(model, [1, 2], max_new_tokens=20, num_return=4, end_tokens=ends, **rules)
        assert_same(ours, theirs(twin, [1, 2], ends, 20, num_return_sequences=4, **rules))
        lengths.add(tuple(len(hypothesis.tokens) for hypothesis in ours))
    assert len(lengths) == 3


def test_beam_search_in_float32_at_odd_sizes_equals_transformers() -> None:
    model = random_model(GPTConfig(vocab_size=500, block_size=40, n_layer=3, n_head=7, n_embd=49, n_inner=50))
    common: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 15}
    ours = beam_search(model, [3, 1, 4], **common, num_return=3)
    assert_same(ours, theirs(transformers_twin(model), [3, 1, 4], [], **common, num_return_sequences=3))


def test_with_a_beam_for_every_token_two_tokens_are_searched_exhaustively() -> None:
    model = decided_model(replace(CONFIGS[0], vocab_size=11))
    texts = list(product(range(11), repeat=2))
    with torch.no_grad():
        logprobs = model(torch.tensor([[7, *text] for text in texts])).log_softmax(-1).tolist()
    scores = {text: (row[0][text[0]] + row[1][text[1]]) / 2 for text, row in zip(texts, logprobs, strict=True)}
    best = sorted(scores, key=lambda text: -scores[text])[:11]
    found = beam_search(model, [7], num_beams=11, max_new_tokens=2, num_return=11)
    assert_same(found, [Hypothesis(list(text), scores[text]) for text in best])


def test_one_beam_is_greedy_decoding() -> None:
    model, _ = pair(0, 0)
    (found,) = beam_search(model, [5, 6], num_beams=1, max_new_tokens=20)
    assert found.tokens == greedy(model, [5, 6], 20)


def greedy(model: GPT, prompt: list[int], count: int, **given: Any) -> list[int]:
    engine = Engine(model, 1)
    continuation = engine.submit(Request(prompt, Sampling(temperature=0, **given), count))
    while not engine.idle:
        engine.step()
    return continuation.new_tokens


# Diverse groups


def diverse_by_the_paper(
    model: GPT, prompt: list[int], beams: int, groups: int, strength: float, length: int, ends: Sequence[int]
) -> list[Hypothesis]:
    """Algorithm 1 of Vijayakumar et al. 2016 with Hamming diversity; every text is read from its beginning.

    A group that has as many finished texts as beams is done.
    """
    size = beams // groups
    kept = [[(0.0, list[int]())] for _ in range(groups)]
    finished: list[list[Hypothesis]] = [[] for _ in range(groups)]
    for step in range(1, length + 1):
        spoken: list[int] = []  # by the groups before, at this step
        for g in range(groups):
            extended = []
            for score, text in kept[g]:
                with torch.no_grad():
                    logprobs = model(torch.tensor([prompt + text]))[0, -1].log_softmax(-1).tolist()
                for token, logprob in enumerate(logprobs):
                    extended.append((score + logprob - strength * spoken.count(token), [*text, token]))
            extended.sort(reverse=True)
            kept[g] = [found for found in extended if found[1][-1] not in ends][:size]
            spoken += [text[-1] for _, text in kept[g]]
            for score, text in extended[:size]:
                if step == length or text[-1] in ends:
                    finished[g].append(Hypothesis(text, score / step))
            finished[g] = sorted(finished[g], key=lambda found: -found.score)[:size]
            if len(finished[g]) == size:
                kept[g] = []
    return sorted((found for group in finished for found in group), key=lambda found: -found.score)


@pytest.mark.parametrize(("beams", "groups", "strength"), [(4, 2, 1.0), (3, 3, 0.3), (6, 2, 5.0), (6, 3, 0.7)])
@pytest.mark.parametrize(("length", "ends"), [(1, []), (9, []), (12, [0, 1, 2, 3, 4]), (12, [20, 21, 22, 23])])
def test_groups_equal_the_algorithm_of_the_paper(
    beams: int, groups: int, strength: float, length: int, ends: list[int]
) -> None:
    model, _ = pair(0, 2)
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
    assert_same(found, diverse_by_the_paper(model, [9, 4, 1], beams, groups, strength, length, ends))
    if ends:
        assert len({len(hypothesis.tokens) for hypothesis in found}) > 1


def test_groups_without_a_penalty_all_find_what_one_of_their_size_finds() -> None:
    model, _ = pair(1, 0)
    rules: dict[str, Any] = {"max_new_tokens": 12, "end_tokens": [12, 13]}
    alone = beam_search(model, [9], num_beams=2, num_return=2, **rules)
    found = beam_search(model, [9], num_beams=6, num_beam_groups=3, num_return=6, **rules)
    assert_same(found, [hypothesis for hypothesis in alone for _ in range(3)])


@pytest.mark.parametrize(
    ("seed", "ends", "lasts_longer"), [(0, [21], 1), (1, [15], 1), (2, [30], 1), (0, [0, 1, 2], 0), (3, [0, 1, 2], 0)]
)
def test_one_group_may_be_done_long_before_the_other(seed: int, ends: list[int], lasts_longer: int) -> None:
    """Its rows of the cache go to the other then, whichever it is."""
    model, _ = pair(0, seed)
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
    assert_same(found, diverse_by_the_paper(model, [1], 4, 2, 2.0, 20, ends))
    first = beam_search(
        model, [1], num_beams=2, num_return=2, max_new_tokens=20, early_stopping=True, end_tokens=ends
    )  # nothing comes before it
    second = list(found)
    for hypothesis in first:
        second.remove(hypothesis)
    lengths = [max(len(hypothesis.tokens) for hypothesis in group) for group in (first, second)]
    assert lengths[lasts_longer] > lengths[1 - lasts_longer] + 4


# Dead ends and the end of the context


def test_a_beam_for_which_every_token_is_ruled_out_ends_and_the_others_go_on() -> None:
    model, _ = pair(0, 0)
    first = beam_search(model, [1], num_beams=1, max_new_tokens=1)[0].tokens[0]
    after_first = Sampling(temperature=0, bad_words=[(first, token) for token in range(31)])
    found = beam_search(model, [1], num_beams=3, max_new_tokens=8, num_return=3, sampling=after_first)
    assert len(found) == 3
    assert all(first not in hypothesis.tokens[:-1] and len(hypothesis.tokens) == 8 for hypothesis in found)


def test_there_may_be_fewer_beams_for_a_while() -> None:
    model, _ = pair(0, 0)
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
    assert_same(found, [Hypothesis([2, *hypothesis.tokens], only[0].score + hypothesis.score) for hypothesis in rest])


def test_when_every_beam_is_at_a_dead_end_what_has_finished_is_returned_or_it_is_an_error() -> None:
    model = decided_model(replace(CONFIGS[0], vocab_size=9))
    once_each = Sampling(temperature=0, no_repeat_ngram_size=1)
    with pytest.raises(UserError, match="rule out every token"):
        beam_search(model, [1], num_beams=3, max_new_tokens=20, sampling=once_each)
    found = beam_search(model, [1], num_beams=3, max_new_tokens=20, num_return=3, sampling=once_each, end_tokens=[4])
    assert found
    assert all(found.tokens[-1] == 4 and len(set(found.tokens)) == len(found.tokens) for found in found)


def test_a_search_ends_where_the_context_is_full() -> None:
    model, twin = pair(0, 0)
    prompt = [3] * 25
    ours = beam_search(model, prompt, num_beams=3, max_new_tokens=100, num_return=3)
    assert_same(ours, theirs(twin, prompt, [], num_beams=3, max_new_tokens=6, num_return_sequences=3))
    assert len(list(contrastive_search(model, prompt, top_k=3, penalty_alpha=0.5, max_new_tokens=100))) == 5
    full = [3] * 30
    assert len(beam_search(model, full, num_beams=3, max_new_tokens=100)[0].tokens) == 1
    assert list(contrastive_search(model, full, top_k=3, penalty_alpha=0.5, max_new_tokens=100)) == []


def test_no_new_tokens_are_no_tokens() -> None:
    model, _ = pair(0, 0)
    assert beam_search(model, [1], num_beams=3, max_new_tokens=0) == [Hypothesis([], 0.0)]
    assert list(contrastive_search(model, [1], top_k=3, penalty_alpha=0.5, max_new_tokens=0)) == []


# Contrastive search


def contrastive_by_the_paper(model: GPT, prompt: list[int], k: int, alpha: float, length: int) -> list[int]:
    """Equation 5 of Su et al. 2022; every text is read from its beginning, once for each candidate."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            likely = model(torch.tensor([text]))[0, -1].softmax(-1).topk(k)
            read = model.hidden_states(torch.tensor([[*text, token] for token in likely.indices.tolist()]))
            values = []
            for p, hidden in zip(likely.values.tolist(), read, strict=True):
                alike = [float(F.cosine_similarity(hidden[-1], state, dim=0)) for state in hidden[:-1]]
                values.append((1 - alpha) * p - alpha * max(alike))
            text.append(int(likely.indices[values.index(max(values))]))
    return text[len(prompt) :]


@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("k", [2, 5])
def test_contrastive_search_equals_the_equation_of_the_paper(k: int, alpha: float) -> None:
    for which, prompt in ((0, [3]), (1, [7, 7, 8])):
        model, _ = pair(which, 1)
        found = list(contrastive_search(model, prompt, top_k=k, penalty_alpha=alpha, max_new_tokens=12))
        assert found == contrastive_by_the_paper(model, prompt, k, alpha, 12)


def test_its_hidden_states_are_the_last_ones_of_transformers() -> None:
    model, twin = pair(0, 0)
    tokens = torch.tensor([[1, 2, 3, 4]])
    last = twin(tokens, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.hidden_states(tokens), last)


@pytest.mark.parametrize("rules", [{"top_k": 1, "penalty_alpha": 0.6}, {"top_k": 5, "penalty_alpha": 0.0}])
def test_contrastive_search_with_nothing_to_choose_from_is_greedy(rules: dict[str, Any]) -> None:
    model, _ = pair(0, 1)
    assert list(contrastive_search(model, [5, 6], max_new_tokens=20, **rules)) == greedy(model, [5, 6], 20)
    bans = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5}
    found = contrastive_search(model, [5, 6], max_new_tokens=20, sampling=Sampling(temperature=0, **bans), **rules)
    assert list(found) == greedy(model, [5, 6], 20, **bans)


def test_contrastive_search_ends_with_an_end_token_and_never_takes_what_is_ruled_out() -> None:
    model, _ = pair(0, 1)
    rules: dict[str, Any] = {"top_k": 5, "penalty_alpha": 0.9, "max_new_tokens": 20}
    free = list(contrastive_search(model, [5], **rules))
    end = free.index(free[7])
    assert list(contrastive_search(model, [5], **rules, end_tokens=[free[7]])) == free[: end + 1]
    all_but_two = Sampling(temperature=0, bad_words=[(token,) for token in range(2, 31)])
    assert set(contrastive_search(model, [5], **rules, sampling=all_but_two)) <= {0, 1}


# What both do


def test_dropout_is_out_while_searching_and_the_model_stays_as_it_was() -> None:
    model = decided_model(replace(CONFIGS[0], dropout=0.5))
    beams = beam_search(model, [1], num_beams=3, max_new_tokens=10)
    words = list(contrastive_search(model, [1], top_k=3, penalty_alpha=0.5, max_new_tokens=10))
    model.train()
    assert beam_search(model, [1], num_beams=3, max_new_tokens=10) == beams
    assert list(contrastive_search(model, [1], top_k=3, penalty_alpha=0.5, max_new_tokens=10)) == words
    assert model.training


def test_the_prompt_is_not_changed() -> None:
    model, _ = pair(0, 0)
    prompt = [1, 2]
    beam_search(model, prompt, num_beams=3, max_new_tokens=4)
    list(contrastive_search(model, prompt, top_k=3, penalty_alpha=0.5, max_new_tokens=4))
    assert prompt == [1, 2]


BEAMS: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 5}
CONTRAST: dict[str, Any] = {"top_k": 4, "penalty_alpha": 0.6, "max_new_tokens": 5}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_beams": 0}, "num-beams must be at least 1"),
        ({"num_beams": 32}, "at most the vocabulary's 31, not 32"),
        ({"num_return": 5}, r"at most num-beams \(4\), not 5"),
        ({"num_return": 0}, "num-return must be at least 1"),
        ({"num_beam_groups": 3}, r"must divide num-beams \(4\) evenly, not 3"),
        ({"num_beam_groups": 0}, "must divide num-beams"),
        ({"length_penalty": float("nan")}, "length-penalty must be at most 100"),
        ({"length_penalty": 1e9}, "length-penalty must be at most 100"),
        ({"early_stopping": "soon"}, "early-stopping must be True, False or 'never', not 'soon'"),
        ({"diversity_penalty": -1.0, "num_beam_groups": 2}, "diversity-penalty must be 0 or more"),
        ({"diversity_penalty": 1.0}, "needs num-beam-groups of 2 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, not -1"),
        ({"sampling": Sampling(logit_bias={99: 1.0})}, "token 99 is not in the model's vocabulary"),
        ({"prompt_ids": []}, "the prompt has no tokens"),
        ({"prompt_ids": [1] * 31}, "31 tokens do not fit the model's context of 30"),
        ({"prompt_ids": [31]}, "outside the model's vocabulary of 31"),
    ],
)
def test_what_beam_search_cannot_do_is_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        beam_search(pair(0, 0)[0], **{"prompt_ids": [1, 2], **BEAMS, **wrong})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": 0}, "top-k must be at least 1"),
        ({"top_k": 32}, "at most the vocabulary's 31 to be searched, not 32"),
        ({"penalty_alpha": 1.1}, "penalty-alpha must be between 0 and 1, not 1.1"),
        ({"penalty_alpha": float("nan")}, "penalty-alpha must be between 0 and 1"),
        ({"prompt_ids": []}, "the prompt has no tokens"),
        ({"prompt_ids": [1] * 31}, "31 tokens do not fit"),
        ({"sampling": Sampling(bad_words=[(99,)])}, "token 99 is not in the model's vocabulary"),
    ],
)
def test_what_contrastive_search_cannot_do_is_one_line_at_once(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        contrastive_search(pair(0, 0)[0], **{"prompt_ids": [1, 2], **CONTRAST, **wrong})
    assert "\n" not in str(error.value)


def test_a_model_that_gives_nan_is_an_error() -> None:
    model = random_model(CONFIGS[0])
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="nan or inf"):
        beam_search(model, [1], **BEAMS)
    with pytest.raises(UserError, match="nan or inf"):
        list(contrastive_search(model, [1], **CONTRAST))


def test_bans_that_leave_nothing_to_say_are_an_error() -> None:
    model, nothing = pair(0, 0)[0], Sampling(bad_words=[(token,) for token in range(31)])
    with pytest.raises(UserError, match="rule out every token"):
        beam_search(model, [1], **BEAMS, sampling=nothing)
    with pytest.raises(UserError, match="rule out every token"):
        list(contrastive_search(model, [1], **CONTRAST, sampling=nothing))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_a_cpu_finds() -> None:
    model, _ = pair(0, 0)
    there = decided_model(CONFIGS[0], 0).cuda()
    groups: dict[str, Any] = {"num_beam_groups": 2, "diversity_penalty": 1.0, "num_return": 4, "end_tokens": range(4)}
    penalized = Sampling(temperature=0, repetition_penalty=1.2, no_repeat_ngram_size=3)
    assert_same(
        beam_search(there, [1, 2], **BEAMS, **groups, sampling=penalized),
        beam_search(model, [1, 2], **BEAMS, **groups, sampling=penalized),
    )
    assert list(contrastive_search(there, [1, 2], **CONTRAST)) == list(contrastive_search(model, [1, 2], **CONTRAST))


# As text


def letters(text: str) -> GPT:
    """A model that speaks in the letters of `text` only."""
    model, allowed = decided_model(WRITER), list(text.encode())
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 50
        model.lm_head.weight[:, 0] = torch.tensor([float(token in allowed) for token in range(257)])
    return model


def test_texts_hold_the_prompt_and_come_best_first() -> None:
    model, tokenizer = letters("abcdefgh"), get_tokenizer("bytes")
    texts = beam_texts(model, tokenizer, "Hello", num_beams=4, num_return=3, max_new_tokens=10)
    found = beam_search(
        model, list(b"Hello"), num_beams=4, num_return=3, max_new_tokens=10, end_tokens=[tokenizer.end_of_text]
    )
    assert texts == ["Hello" + tokenizer.decode(x for x in f.tokens if x != tokenizer.end_of_text) for f in found]
    assert len(set(texts)) == 3
    tokens = contrastive_search(model, list(b"Hello"), top_k=4, penalty_alpha=0.6, max_new_tokens=10)
    assert "".join(contrastive_stream(model, tokenizer, "Hello", max_new_tokens=10)) == tokenizer.decode(tokens)


def test_an_empty_prompt_begins_a_text() -> None:
    model, tokenizer = decided_model(WRITER), get_tokenizer("bytes")
    (text,) = beam_texts(model, tokenizer, "", num_beams=2, max_new_tokens=5)
    assert text == beam_texts(model, tokenizer, "<|endoftext|>", num_beams=2, max_new_tokens=5)[0][13:]
    assert "".join(contrastive_stream(model, tokenizer, "", max_new_tokens=5))


def test_a_stop_string_ends_a_beam_as_an_end_token_does_and_is_not_shown() -> None:
    model, tokenizer = letters("abcdefgh"), get_tokenizer("bytes")
    rules: dict[str, Any] = {"num_beams": 4, "num_return": 4, "max_new_tokens": 20, "length_penalty": 0.5}
    found = beam_search(model, list(b"abc"), **rules, end_tokens=[ord("e")])
    texts = beam_texts(model, tokenizer, "abc", **rules, stop=["e"])
    assert texts == ["abc" + tokenizer.decode(f.tokens).removesuffix("e") for f in found]
    assert any(f.tokens[-1] == ord("e") for f in found)


def test_a_stop_string_over_several_tokens() -> None:
    model, tokenizer = letters("abcdefgh"), get_tokenizer("bytes")
    rules: dict[str, Any] = {"num_beams": 4, "num_return": 4, "max_new_tokens": 20, "length_penalty": 0.5}
    (free,) = (text[3:] for text in beam_texts(model, tokenizer, "abc", **{**rules, "num_return": 1}))
    stop = free[4:7]
    found = beam_search(model, list(b"abc"), **rules, stopped=lambda new: bytes(new).endswith(stop.encode()))
    texts = beam_texts(model, tokenizer, "abc", **rules, stop=["nothing", stop])
    assert texts == ["abc" + tokenizer.decode(hypothesis.tokens).removesuffix(stop) for hypothesis in found]
    assert len({len(text) for text in texts}) > 1
    free = "".join(contrastive_stream(model, tokenizer, "abc", max_new_tokens=20))
    stop = free[4:7]
    cut = "".join(contrastive_stream(model, tokenizer, "abc", max_new_tokens=20, stop=["nothing", stop]))
    assert cut == free[: free.index(stop)]


def test_a_token_without_text_ends_a_text() -> None:
    """A vocabulary may be padded beyond the tokenizer's."""
    model, tokenizer = decided_model(replace(WRITER, vocab_size=300)), get_tokenizer("bytes")
    favoured = Sampling(temperature=0, logit_bias={290: 1000.0})
    assert beam_texts(model, tokenizer, "abc", num_beams=1, sampling=favoured, stop=["x"]) == ["abc"]
    assert list(contrastive_stream(model, tokenizer, "abc", penalty_alpha=0.1, sampling=favoured)) == []


@pytest.mark.parametrize("stop", [[""], "text"])
def test_texts_without_a_tokenizer_or_with_an_impossible_stop_are_one_line(stop: Any) -> None:
    model, tokenizer = pair(0, 0)[0], get_tokenizer("bytes")
    for search in (beam_texts, contrastive_stream):
        with pytest.raises(UserError, match="has no tokenizer"):
            list(search(model, None, "a"))
        with pytest.raises(UserError, match="stop string"):
            list(search(model, tokenizer, "a", stop=stop))
