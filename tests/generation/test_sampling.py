"""Sampling is a pure function of logits, a history and a generator; whole chains equal those of transformers."""

import math
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2.generation import filters
from gpt2.generation.candidates import gpu_candidates
from gpt2.generation.filters import History
from gpt2.generation.sampling import (
    Sampling,
    gather_logprobs,
    logits_to_probs,
    make_generator,
    sample_from_probs,
    sample_tokens,
)
from tests.helpers.sampling_inputs import histories, make_histories, random_logits, seeds, tokens

GREEDY = Sampling(temperature=0)
INF = math.inf


# All settings in their order equal transformers


def test_a_bias_is_added_and_minus_infinity_bans() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, -INF]])
    sampling = Sampling(logit_bias={2: -INF, 0: 10.0})
    assert filters.bias_logits(logits, sampling.logit_bias).tolist() == [[11, 2, -INF], [10, 5, -INF]]  # type: ignore[arg-type]
    assert logits_to_probs(logits, sampling)[:, 2].tolist() == [0, 0]
    assert torch.equal(logits_to_probs(logits, sampling)[0, :2], torch.tensor([11.0, 2.0]).softmax(-1))


def transformers_processors(s: Sampling, prompt_length: int, end_tokens: tuple[int, ...], nudge: float) -> Any:
    """The processors of `transformers`, in its order; probability thresholds are multiplied by `nudge`."""
    import transformers as t

    bias: Any = [[[token], bias] for token, bias in dict(s.logit_bias).items()]
    words: Any = [list(word) for word in s.bad_words]
    processors = [
        (bias, lambda: t.SequenceBiasLogitsProcessor(bias)),
        (s.repetition_penalty != 1, lambda: t.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)),
        (s.no_repeat_ngram_size, lambda: t.NoRepeatNGramLogitsProcessor(s.no_repeat_ngram_size)),
        (words, lambda: t.NoBadWordsLogitsProcessor(words)),
        (
            s.min_new_tokens,
            lambda: t.MinNewTokensLengthLogitsProcessor(prompt_length, s.min_new_tokens, list(end_tokens)),
        ),
        (s.temperature != 1, lambda: t.TemperatureLogitsWarper(s.temperature)),
        (s.top_k, lambda: t.TopKLogitsWarper(s.top_k)),
        (s.top_p < 1, lambda: t.TopPLogitsWarper(s.top_p * nudge)),
        (s.min_p, lambda: t.MinPLogitsWarper(s.min_p * nudge)),
        (s.typical_p < 1, lambda: t.TypicalLogitsWarper(s.typical_p * nudge)),
        (s.epsilon_cutoff, lambda: t.EpsilonLogitsWarper(s.epsilon_cutoff * nudge)),
        (s.eta_cutoff, lambda: t.EtaLogitsWarper(s.eta_cutoff * nudge)),
    ]
    return t.LogitsProcessorList([make() for on, make in processors if on])


def default_or(none: Any, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.just(none) | values


samplings = st.builds(
    Sampling,
    temperature=default_or(1.0, st.floats(0.3, 3)),
    top_k=default_or(0, st.integers(1, 80)),
    top_p=default_or(1.0, st.floats(0.1, 0.99)),
    min_p=default_or(0.0, st.floats(0.01, 0.5)),
    typical_p=default_or(1.0, st.floats(0.1, 0.99)),
    epsilon_cutoff=default_or(0.0, st.floats(0.001, 0.1)),
    eta_cutoff=default_or(0.0, st.floats(0.001, 0.1)),
    repetition_penalty=default_or(1.0, st.floats(0.5, 2)),
    no_repeat_ngram_size=default_or(0, st.integers(1, 3)),
    logit_bias=default_or((), st.dictionaries(tokens, st.floats(-5, 5), min_size=1)),
    bad_words=default_or((), st.lists(st.lists(tokens, min_size=1, max_size=2), min_size=1, max_size=3)),
    min_new_tokens=default_or(0, st.integers(1, 30)),
)


@settings(deadline=None, max_examples=200)
@given(seeds, samplings, histories, st.integers(10, 1500), st.integers(0, 25))
def test_whole_chains_equal_transformers(
    seed: int, sampling: Sampling, rows: list[list[int]], size: int, prompt_length: int
) -> None:
    logits, prompt_length = random_logits(seed, len(rows), size), min(prompt_length, len(rows[0]))
    below, theirs, above = [
        transformers_processors(sampling, prompt_length, (1, 2), nudge)(torch.tensor(rows), logits.clone())
        for nudge in (0.9999, 1.0, 1.0001)
    ]
    assume(torch.equal(below, above))
    given = logits.clone()
    ours = logits_to_probs(logits, sampling, make_histories(rows, prompt_length, (1, 2)))
    assert torch.equal(logits, given)
    assert torch.equal(ours > 0, theirs.softmax(-1) > 0)
    assert torch.allclose(ours, theirs.softmax(-1), atol=1e-6)
    greedy = replace(sampling, temperature=0)
    warpers_left_out = transformers_processors(
        Sampling(
            repetition_penalty=sampling.repetition_penalty,
            no_repeat_ngram_size=sampling.no_repeat_ngram_size,
            logit_bias=sampling.logit_bias,
            bad_words=sampling.bad_words,
            min_new_tokens=sampling.min_new_tokens,
        ),
        prompt_length,
        (1, 2),
        1.0,
    )
    likeliest = warpers_left_out(torch.tensor(rows), logits.clone()).argmax(-1)
    assert torch.equal(sample_tokens(logits, greedy, make_histories(rows, prompt_length, (1, 2)), []), likeliest)


# Candidate selection equals the filters on whole rows

KINDS = [
    Sampling(),
    Sampling(0.7),
    Sampling(top_k=1),
    Sampling(0.8, top_k=50),
    Sampling(top_k=50, top_p=0.9),
    Sampling(top_p=0.9),
    Sampling(1.3, top_p=0.5),
    Sampling(top_p=1e-6),
    Sampling(min_p=0.05),
    Sampling(1.5, top_p=0.95, min_p=0.02),
    Sampling(typical_p=0.5),
    Sampling(epsilon_cutoff=3e-4),
    Sampling(eta_cutoff=3e-3),
    Sampling(0.9, 100, 0.9, 0.01, 0.9, 1e-3, 1e-3),
]


def sampling_id(sampling: Sampling) -> str:
    return " ".join(f"{k}={v}" for k, v in asdict(sampling).items() if v != getattr(Sampling(), k)) or "plain"


def mixed_rows(size: int, coarse: bool) -> Tensor:
    """Rows from sharp to flat, so that few or many tokens are kept; if coarse, with many equal logits."""
    spreads = torch.tensor([[8.0], [4.0], [2.0], [1.0], [0.5], [0.01]])
    logits = random_logits(0, 6, size, 1.0, 0.1) * spreads
    logits[3, : size // 2] = -INF
    logits[4, 7:] = -INF  # fewer than top-k keeps
    if coarse:
        logits[2] = logits[2].round()
        return logits.bfloat16().float()
    return logits


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("size", [60, 6001])
@pytest.mark.parametrize("sampling", KINDS, ids=sampling_id)
def test_candidate_selection_equals_the_filters_one_by_one(sampling: Sampling, size: int, coarse: bool) -> None:
    logits = mixed_rows(size, coarse)
    plain = logits / sampling.temperature
    plain = filters.keep_top_k(plain, sampling.top_k) if sampling.top_k else plain
    plain = filters.keep_top_p(plain, sampling.top_p) if sampling.top_p < 1 else plain
    plain = filters.keep_min_p(plain, sampling.min_p) if sampling.min_p else plain
    plain = filters.keep_typical(plain, sampling.typical_p) if sampling.typical_p < 1 else plain
    plain = filters.keep_epsilon(plain, sampling.epsilon_cutoff) if sampling.epsilon_cutoff else plain
    plain = filters.keep_eta(plain, sampling.eta_cutoff) if sampling.eta_cutoff else plain
    probs = logits_to_probs(logits, sampling)
    assert torch.equal(probs > 0, plain.softmax(-1) > 0)
    assert torch.allclose(probs, plain.softmax(-1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(
    ("top_p", "min_p"), [(0.9, 0.0), (0.5, 0.0), (0.03, 0.0), (0.999, 0.0), (1.0, 0.05), (0.95, 0.02)]
)
def test_gpu_candidates_contain_all_kept_tokens(top_p: float, min_p: float, coarse: bool) -> None:
    logits = mixed_rows(6001, coarse)
    logits[5] = 0.0  # all equal
    shares = logits.softmax(-1) if top_p < 1 else None
    plain = filters.keep_min_p(filters.keep_top_p(logits, top_p) if top_p < 1 else logits, min_p)
    widths = set()
    for part in gpu_candidates(logits, shares, top_p, min_p):
        assert part.ids is not None
        left = filters.keep_top_p(part.logits, top_p, part.probs) if top_p < 1 else part.logits
        whole = torch.full_like(plain[part.rows], -INF).scatter(-1, part.ids, filters.keep_min_p(left, min_p))
        assert torch.equal(whole, plain[part.rows])
        widths.add(part.ids.size(-1))
    assert len(widths) > 1  # more than one candidate count was tried


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, *KINDS], ids=sampling_id)
def test_sample_tokens_equals_sample_from_probs_of_logits_to_probs(sampling: Sampling, coarse: bool) -> None:
    logits = mixed_rows(6001, coarse)
    probs = logits_to_probs(logits, sampling)
    for seed in range(20):
        chosen = sample_tokens(logits, sampling, None, [make_generator(seed, row) for row in range(6)])
        assert torch.equal(chosen, sample_from_probs(probs, [make_generator(seed, row) for row in range(6)]))
        assert (probs.gather(-1, chosen.unsqueeze(-1)) > 0).all()


@pytest.mark.parametrize("size", [60, 6001, 50257])
@pytest.mark.parametrize("sampling", [GREEDY, *KINDS], ids=sampling_id)
def test_sampling_is_batch_invariant(sampling: Sampling, size: int) -> None:
    logits = mixed_rows(size, coarse=size == 6001)
    sampling = replace(sampling, repetition_penalty=1.1, frequency_penalty=0.2)
    past = [History([row, 1, 2, 2, 3, 3, 3, 4], prompt_length=2) for row in range(6)]
    together = logits_to_probs(logits, sampling, past)
    chosen = sample_tokens(logits, sampling, past, [make_generator(9, row) for row in range(6)])
    for row in range(6) if size < 50257 else (2, 3):
        alone = logits[row : row + 1], sampling, past[row : row + 1]
        assert torch.equal(logits_to_probs(*alone), together[row : row + 1])
        assert sample_tokens(*alone, [make_generator(9, row)]).item() == chosen[row]


# Temperature and random numbers


def test_temperature() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert logits_to_probs(logits, Sampling(0)).tolist() == [[0, 1, 0]]
    assert torch.equal(logits_to_probs(logits, Sampling(0.5)), (logits * 2).softmax(-1))
    assert logits_to_probs(logits, Sampling(1e-4)).argmax() == 1
    assert logits_to_probs(logits, Sampling(1e4))[0] == pytest.approx([1 / 3] * 3, abs=1e-3)


@pytest.mark.parametrize("temperature", [1e-310, 1e-40, 1e-21])
def test_the_lowest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, -INF, 2.999999], [-4e4, 2.0, 2.0, 1.0]])
    assert torch.equal(logits_to_probs(logits, Sampling(temperature)), logits_to_probs(logits, GREEDY))
    cold = Sampling(temperature, top_k=2, top_p=0.5)
    assert torch.equal(logits_to_probs(logits, cold), logits_to_probs(logits, GREEDY))


def test_low_temperatures_give_distributions() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [3e4, 3e4, -3e4]])
    for temperature in (1e-19, 1e-10, 1e-6):
        probs = logits_to_probs(logits, Sampling(temperature))
        assert probs.tolist() == [[0, 1, 0], [0.5, 0.5, 0]]


@pytest.mark.parametrize("temperature", [1e-19, 1.0, 1e6])
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_largest_settings_give_a_distribution(temperature: float, size: float) -> None:
    extreme = Sampling(
        temperature,
        repetition_penalty=size,
        frequency_penalty=-1e6,
        presence_penalty=1e6,
        logit_bias={0: 1e6, 1: -1e6},
    )
    logits = torch.tensor([[3e4, -3e4, 1.0, -INF]])
    probs = logits_to_probs(logits, extreme, [History([0, 1, 1, 3])])
    assert probs.sum() == pytest.approx(1)
    assert probs[0, 3] == 0


def test_half_precision_logits_are_converted_to_float32() -> None:
    logits = random_logits(0, 2, 50).bfloat16()
    probs = logits_to_probs(logits, Sampling(logit_bias={3: 1.0}))
    assert probs.dtype == torch.float32
    assert torch.equal(probs, logits_to_probs(logits.float(), Sampling(logit_bias={3: 1.0})))


def chi_square(counts: Counter[int], probs: list[float]) -> float:
    total = sum(counts.values())
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(probs) if p)


def test_sample_from_probs_has_the_given_distribution() -> None:
    probs = torch.tensor([[0.5, 0.0, 0.3, 0.2]])
    own = make_generator(1, 0)
    counts = Counter(int(sample_from_probs(probs, [own])) for _ in range(4000))
    assert counts[1] == 0
    assert chi_square(counts, probs[0].tolist()) < 13.8  # 2 degrees of freedom: p = 0.001


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.8, top_k=5, top_p=0.9), Sampling(top_p=0.7)], ids=sampling_id
)
def test_sample_tokens_has_the_distribution_of_logits_to_probs(sampling: Sampling) -> None:
    logits = random_logits(3, 1, 1000, scale=0.1)
    logits[0, 990:] += 6
    probs = logits_to_probs(logits, sampling)
    own = make_generator(2, 0)
    counts = Counter(int(sample_tokens(logits, sampling, None, [own])) for _ in range(3000))
    coarse = Counter({i: counts[990 + i] for i in range(10)}) + Counter({10: sum(counts[i] for i in range(990))})
    expected = [*probs[0, 990:].tolist(), float(probs[0, :990].sum())]
    assert sum(coarse.values()) == 3000
    assert chi_square(coarse, expected) < 29.6  # at most 10 degrees of freedom


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**63), st.integers(0, 5), st.sampled_from([6, 255, 256, 700, 1024]))
def test_a_token_of_probability_zero_is_never_sampled(seed: int, alive: int, size: int) -> None:
    probs = torch.zeros(1, size)
    probs[0, -1 - alive] = 1e-30
    assert int(sample_from_probs(probs, [make_generator(seed, 0)])) == size - 1 - alive


@pytest.mark.parametrize("size", [100, 600, 1024])
@pytest.mark.parametrize(("number", "expected"), [(0.0, 5), (1 - 2**-53, -7), (1.0, -7)])
def test_extreme_random_numbers_sample_tokens_of_positive_probability(
    number: float, expected: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    probs = random_logits(0, 1, size).softmax(-1)
    probs[0, :5], probs[0, size - 6 :] = 0.0, 0.0
    monkeypatch.setattr(torch, "rand", lambda *_, dtype, **__: torch.tensor(number, dtype=dtype))
    assert sample_from_probs(probs, [make_generator(0, 0)]).item() == expected % size


@settings(deadline=None)
@given(seeds, st.integers(1, 3000))
def test_sample_from_probs_inverts_the_cumulative_probabilities(seed: int, size: int) -> None:
    probs = random_logits(seed, 1, size, masked_fraction=0.5).softmax(-1)
    number = torch.rand((), generator=make_generator(seed, 0), dtype=torch.float64)
    cdf = probs[0].double().cumsum(-1)
    assert sample_from_probs(probs, [make_generator(seed, 0)]).item() == int((cdf <= number * cdf[-1]).sum())


def test_greedy_takes_the_first_of_equals_without_a_random_number() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -INF]])
    own = make_generator(0, 0)
    before = own.get_state()
    assert sample_tokens(logits, GREEDY, None, [own]).tolist() == [1]
    assert torch.equal(own.get_state(), before)
    sample_tokens(logits, Sampling(top_k=1), None, [own])
    assert not torch.equal(own.get_state(), before)


def test_gather_logprobs_equals_log_softmax() -> None:
    logits = random_logits(0, 3, 5000, masked_fraction=0.1)
    ids = torch.tensor([0, 17, 4999])
    expected = logits.log_softmax(-1)
    own, best, theirs = gather_logprobs(logits, ids, 5)
    assert torch.equal(own, expected[[0, 1, 2], ids])
    assert torch.equal(theirs, expected.topk(5).values)
    assert torch.equal(best, expected.topk(5).indices)
    assert gather_logprobs(logits, ids)[1].shape == (3, 0)
    assert gather_logprobs(logits[:, :3], ids[:1].expand(3), 20)[1].shape == (3, 3)
