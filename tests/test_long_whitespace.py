"""Long runs of whitespace, which tiktoken cannot match by itself, have the tokens of GPT-2's pattern."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2 import vocabulary
from gpt2.byte_level import GPT2Tokenizer, encode_pieces
from gpt2.vocabulary import split_long_words
from tests.helpers.tokenizer_samples import gpt2_tokenizer


@pytest.mark.parametrize("space", [" ", "\n\t "])
def test_a_million_spaces(space: str, gpt2_vocabulary: None) -> None:
    text = "x" + space * 1_000_002 + "x"  # tiktoken alone panics here
    tokenizer = gpt2_tokenizer()
    assert isinstance(tokenizer, GPT2Tokenizer)
    tokens, short = tokenizer.encode_batch([text, "a b"])
    assert tokens == tokenizer._backend.encode(text, add_special_tokens=False).ids
    assert tokens == encode_pieces(tokenizer, [text]).tolist()
    assert short == [64, 275]


@given(text=st.text(alphabet="ab1'! \n\r\t\x0b\x1c\x85\xa0\u2028\u3000é字", max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_of_long_whitespace(text: str, gpt2_vocabulary: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = gpt2_tokenizer()
    monkeypatch.setattr(vocabulary, "MAX_WHITESPACE_LENGTH", 10**6)
    expected = tokenizer.encode(text)
    monkeypatch.setattr(vocabulary, "MAX_WHITESPACE_LENGTH", 2)
    assert tokenizer.encode_batch([text, text]) == [expected, expected]


def test_many_long_runs_of_spaces_are_scanned_once(gpt2_vocabulary: None) -> None:
    """With a quadratic scan this takes a minute, in which no other thread runs."""
    text = (" " * 100_000 + "x") * 10
    tokenizer = gpt2_tokenizer()
    start = time.process_time()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - start < 10
    pieces = list(split_long_words((" " * 999 + "x") * 1000))
    assert pieces == [(" " * 999 + "x") * 1000]
