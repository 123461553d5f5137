"""Beam search and contrastive search: their errors, and their text functions."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from gpt2.errors import UserError
from gpt2.generation.beam_search import beam_search, beam_search_texts
from gpt2.generation.contrastive_search import contrastive_search, contrastive_stream
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT
from gpt2.tokenizer import get_tokenizer
from tests.helpers.search_helpers import BYTE_CONFIG, CONFIGS, assert_same_hypotheses, model_pair, peaked_model
from tests.helpers.transformers_reference import random_model


def test_dropout_is_off_during_search_and_the_mode_is_restored() -> None:
    model = peaked_model(replace(CONFIGS[0], dropout=0.5))
    beams = beam_search(model, [1], num_beams=3, max_new_tokens=10)
    words = list(contrastive_search(model, [1], top_k=3, penalty_alpha=0.5, max_new_tokens=10))
    model.train()
    assert beam_search(model, [1], num_beams=3, max_new_tokens=10) == beams
    assert list(contrastive_search(model, [1], top_k=3, penalty_alpha=0.5, max_new_tokens=10)) == words
    assert model.training


def test_the_prompt_is_not_changed() -> None:
    model, _ = model_pair(0, 0)
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
        ({"diversity_penalty": 1.0}, "diversity-penalty needs num-beam-groups of 2 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, not -1"),
        ({"sampling": Sampling(logit_bias={99: 1.0})}, "token 99 is not in the model's vocabulary"),
        ({"prompt_ids": []}, "the prompt has no tokens"),
        ({"prompt_ids": [1] * 31}, "31 tokens do not fit the model's context of 30"),
        ({"prompt_ids": [31]}, "outside the model's vocabulary of 31"),
    ],
)
def test_unsupported_beam_search_settings_are_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        beam_search(model_pair(0, 0)[0], **{"prompt_ids": [1, 2], **BEAMS, **wrong})
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
def test_unsupported_contrastive_search_settings_are_one_line_before_iteration(
    wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        contrastive_search(model_pair(0, 0)[0], **{"prompt_ids": [1, 2], **CONTRAST, **wrong})
    assert "\n" not in str(error.value)


def test_non_finite_logits_raise() -> None:
    model = random_model(CONFIGS[0])
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="nan or inf"):
        beam_search(model, [1], **BEAMS)
    with pytest.raises(UserError, match="nan or inf"):
        list(contrastive_search(model, [1], **CONTRAST))


def test_bans_of_every_token_raise() -> None:
    model, nothing = model_pair(0, 0)[0], Sampling(bad_words=[(token,) for token in range(31)])
    with pytest.raises(UserError, match="rule out every token"):
        beam_search(model, [1], **BEAMS, sampling=nothing)
    with pytest.raises(UserError, match="rule out every token"):
        list(contrastive_search(model, [1], **CONTRAST, sampling=nothing))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_results_equal_cpu_results() -> None:
    model, _ = model_pair(0, 0)
    there = peaked_model(CONFIGS[0], 0).cuda()
    groups: dict[str, Any] = {"num_beam_groups": 2, "diversity_penalty": 1.0, "num_return": 4, "end_tokens": range(4)}
    penalized = Sampling(temperature=0, repetition_penalty=1.2, no_repeat_ngram_size=3)
    assert_same_hypotheses(
        beam_search(there, [1, 2], **BEAMS, **groups, sampling=penalized),
        beam_search(model, [1, 2], **BEAMS, **groups, sampling=penalized),
    )
    assert list(contrastive_search(there, [1, 2], **CONTRAST)) == list(contrastive_search(model, [1, 2], **CONTRAST))


# Text


def model_of_letters(text: str) -> GPT:
    """A model that generates only the letters of `text`."""
    model, allowed = peaked_model(BYTE_CONFIG), list(text.encode())
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 50
        model.lm_head.weight[:, 0] = torch.tensor([float(token in allowed) for token in range(257)])
    return model


def test_texts_contain_the_prompt_and_are_sorted_best_first() -> None:
    model, tokenizer = model_of_letters("abcdefgh"), get_tokenizer("bytes")
    texts = beam_search_texts(model, tokenizer, "Hello", num_beams=4, num_return=3, max_new_tokens=10)
    found = beam_search(
        model, list(b"Hello"), num_beams=4, num_return=3, max_new_tokens=10, end_tokens=[tokenizer.end_of_text]
    )
    assert texts == ["Hello" + tokenizer.decode(x for x in f.tokens if x != tokenizer.end_of_text) for f in found]
    assert len(set(texts)) == 3
    tokens = contrastive_search(model, list(b"Hello"), top_k=4, penalty_alpha=0.6, max_new_tokens=10)
    assert "".join(contrastive_stream(model, tokenizer, "Hello", max_new_tokens=10)) == tokenizer.decode(tokens)


def test_an_empty_prompt_is_the_end_of_text_token() -> None:
    model, tokenizer = peaked_model(BYTE_CONFIG), get_tokenizer("bytes")
    (text,) = beam_search_texts(model, tokenizer, "", num_beams=2, max_new_tokens=5)
    assert text == beam_search_texts(model, tokenizer, "<|endoftext|>", num_beams=2, max_new_tokens=5)[0][13:]
    assert "".join(contrastive_stream(model, tokenizer, "", max_new_tokens=5))


def test_a_stop_string_ends_a_beam_like_an_end_token_and_is_removed() -> None:
    model, tokenizer = model_of_letters("abcdefgh"), get_tokenizer("bytes")
    rules: dict[str, Any] = {"num_beams": 4, "num_return": 4, "max_new_tokens": 20, "length_penalty": 0.5}
    found = beam_search(model, list(b"abc"), **rules, end_tokens=[ord("e")])
    texts = beam_search_texts(model, tokenizer, "abc", **rules, stop=["e"])
    assert texts == ["abc" + tokenizer.decode(f.tokens).removesuffix("e") for f in found]
    assert any(f.tokens[-1] == ord("e") for f in found)


def test_a_stop_string_over_several_tokens() -> None:
    model, tokenizer = model_of_letters("abcdefgh"), get_tokenizer("bytes")
    rules: dict[str, Any] = {"num_beams": 4, "num_return": 4, "max_new_tokens": 20, "length_penalty": 0.5}
    (free,) = (text[3:] for text in beam_search_texts(model, tokenizer, "abc", **{**rules, "num_return": 1}))
    stop = free[4:7]
    found = beam_search(model, list(b"abc"), **rules, stopping_criterion=lambda new: bytes(new).endswith(stop.encode()))
    texts = beam_search_texts(model, tokenizer, "abc", **rules, stop=["nothing", stop])
    assert texts == ["abc" + tokenizer.decode(hypothesis.tokens).removesuffix(stop) for hypothesis in found]
    assert len({len(text) for text in texts}) > 1
    free = "".join(contrastive_stream(model, tokenizer, "abc", max_new_tokens=20))
    stop = free[4:7]
    cut = "".join(contrastive_stream(model, tokenizer, "abc", max_new_tokens=20, stop=["nothing", stop]))
    assert cut == free[: free.index(stop)]


def test_a_token_without_text_ends_a_text() -> None:
    """The vocabulary of the model may be padded beyond that of the tokenizer."""
    model, tokenizer = peaked_model(replace(BYTE_CONFIG, vocab_size=300)), get_tokenizer("bytes")
    favoured = Sampling(temperature=0, logit_bias={290: 1000.0})
    assert beam_search_texts(model, tokenizer, "abc", num_beams=1, sampling=favoured, stop=["x"]) == ["abc"]
    assert list(contrastive_stream(model, tokenizer, "abc", penalty_alpha=0.1, sampling=favoured)) == []


@pytest.mark.parametrize("stop", [[""], "text"])
def test_a_missing_tokenizer_or_an_empty_stop_string_is_one_line(stop: Any) -> None:
    model, tokenizer = model_pair(0, 0)[0], get_tokenizer("bytes")
    for search in (beam_search_texts, contrastive_stream):
        with pytest.raises(UserError, match="has no tokenizer"):
            list(search(model, None, "a"))
        with pytest.raises(UserError, match="stop string"):
            list(search(model, tokenizer, "a", stop=stop))
