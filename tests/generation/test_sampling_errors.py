"""Sampling settings that are not supported raise RequestError with the field, in one line."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpt2.errors import RequestError
from gpt2.generation.filters import History
from gpt2.generation.sampling import Sampling, logits_to_probs, make_generator, sample_tokens

INF = math.inf


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": INF}, "temperature must be 0 or more"),
        ({"top_k": -1}, "top-k must be 0"),
        ({"top_k": 1.5}, "top-k must be 0 .* whole, not 1.5"),
        ({"top_p": 0.0}, "top-p must be over 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top-p must be over 0 and at most 1"),
        ({"min_p": 1.5}, "min-p must be 0 or more and at most 1"),
        ({"typical_p": 0}, "typical-p must be over 0"),
        ({"epsilon_cutoff": 1.0}, "epsilon-cutoff must be 0 or more and under 1"),
        ({"eta_cutoff": -0.1}, "eta-cutoff must be 0 or more and under 1"),
        ({"repetition_penalty": 0.0}, "repetition-penalty must be over 0"),
        ({"presence_penalty": INF}, "presence-penalty must be at most"),
        ({"frequency_penalty": -INF}, "frequency-penalty must be at most"),
        ({"no_repeat_ngram_size": -2}, "no-repeat-ngram-size must be 0 or more"),
        ({"min_new_tokens": -2}, "min-new-tokens must be 0 or more"),
        ({"logit_bias": {-1: 1.0}}, "logit-bias .* not -1: 1.0"),
        ({"logit_bias": {3: INF}}, "logit-bias .* not 3: inf"),
        ({"logit_bias": {3: math.nan}}, "logit-bias .* not 3: nan"),
        ({"logit_bias": {"the": 1.0}}, "logit-bias must give a number for each token id"),
        ({"logit_bias": 7}, "logit-bias must give a number for each token id"),
        ({"bad_words": [[1], []]}, r"bad-words .* one token id or more, each 0 or more, not \[\]"),
        ({"bad_words": [[-1]]}, r"bad-words .* not \[-1\]"),
        ({"bad_words": [5]}, "bad-words must be sequences"),
    ],
)
def test_unsupported_settings_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        Sampling(**values)
    assert "\n" not in str(error.value)
    assert error.value.field == next(iter(values))


FLOATS = ["temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"]


@pytest.mark.parametrize("name", [*FLOATS, "repetition_penalty", "presence_penalty", "frequency_penalty", "top_k"])
def test_nan_is_refused(name: str) -> None:
    values: dict[str, Any] = {name: math.nan}
    with pytest.raises(RequestError, match=r"must be .*, not nan"):
        Sampling(**values)


def test_sampling_is_hashable_and_normalizes_its_fields() -> None:
    one = Sampling(logit_bias={"5": 2, 3: -1.5}, bad_words=[[1, 2], [3]])  # type: ignore[dict-item]
    assert one.logit_bias == ((3, -1.5), (5, 2.0))
    assert one.bad_words == ((1, 2), (3,))
    assert {one: "kept"}[Sampling(logit_bias=[(5, 2.0), (3, -1.5)], bad_words=((1, 2), (3,)))] == "kept"
    assert replace(one, top_k=3).logit_bias == one.logit_bias


def test_ids_outside_the_vocabulary_are_refused() -> None:
    sampling = Sampling(logit_bias={99: 1.0}, bad_words=[[1, 120]])
    sampling.check_token_ids(121)
    with pytest.raises(RequestError, match="bad-words: token 120 is not in the model's vocabulary of 120"):
        sampling.check_token_ids(120)
    with pytest.raises(RequestError, match="logit-bias: token 99 is not"):
        sampling.check_token_ids(99)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(logit_bias={0: -INF, 1: -INF}),
        Sampling(bad_words=[[0], [1]]),
        Sampling(no_repeat_ngram_size=1),
        Sampling(0, min_new_tokens=9),
    ],
)
def test_settings_that_ban_every_token_are_one_line(sampling: Sampling) -> None:
    past = [History([0, 1], 1, end_tokens=(0, 1))]
    with pytest.raises(RequestError, match="together rule out every token"):
        logits_to_probs(torch.zeros(1, 2), sampling, past)
    with pytest.raises(RequestError, match="together rule out every token"):
        sample_tokens(torch.zeros(1, 2), sampling, past, [make_generator(0, 0)])
    assert sample_tokens(torch.zeros(1, 3), sampling, past, [make_generator(0, 0)]).tolist() == [2]


def test_an_error_in_one_row_takes_no_random_number() -> None:
    sampling = Sampling(no_repeat_ngram_size=1)
    past, streams = [History([0])] * 20, [make_generator(0, row) for row in range(21)]
    with pytest.raises(RequestError, match="rule out every token"):
        sample_tokens(torch.zeros(21, 2), sampling, [*past, History([0, 1])], streams)
    assert torch.equal(streams[0].get_state(), make_generator(0, 0).get_state())


def test_settings_that_depend_on_histories_require_them() -> None:
    assert not Sampling(top_k=3, logit_bias={1: 1.0}).needs_history
    for sampling in (Sampling(repetition_penalty=1.1), Sampling(min_new_tokens=1), Sampling(bad_words=[[1]])):
        with pytest.raises(ValueError, match="histories"):
            logits_to_probs(torch.zeros(1, 2), sampling)
