"""Added tokens: words that are encoded as one token in any text."""

import pickle
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.templates import get_template
from gpt2.tokenizer import Tokenizer, load_tokenizer, with_added_tokens, with_special_tokens
from tests.helpers.tokenizer_samples import SENTENCES

TEXT = "In BRCA1 and<go>, not in BRCA. <|endoftext|>"


def test_added_tokens_are_matched_in_text(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    size, end = any_tokenizer.vocab_size, any_tokenizer.end_of_text
    tokenizer = with_added_tokens(any_tokenizer, ["BRCA1", "<go>"])
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (size + 2, end)
    assert tokenizer.fingerprint != any_tokenizer.fingerprint
    parts = ["In ", " and", ", not in BRCA. <|endoftext|>"]
    first, second, third = map(any_tokenizer.encode, parts)
    ids = [*first, size, *second, size + 1, *third]
    assert tokenizer.encode(TEXT) == tokenizer.encode_batch([TEXT])[0] == ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.special_tokens == any_tokenizer.special_tokens  # added tokens are not special
    assert tokenizer.encode(TEXT, allow_special=True)[-1] == end
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    for other in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert (other.fingerprint, other.encode(TEXT)) == (tokenizer.fingerprint, ids)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("In BRCA1 and<go>") == ids[: len(first) + len(second) + 2]


def test_text_without_added_tokens_is_unchanged(any_tokenizer: Tokenizer) -> None:
    tokenizer = with_added_tokens(any_tokenizer, ["BRCA1"])
    assert [tokenizer.encode(text) for text in SENTENCES] == [any_tokenizer.encode(text) for text in SENTENCES]


def test_in_a_message_added_tokens_match_and_special_tokens_do_not(any_tokenizer: Tokenizer) -> None:
    chatml = get_template("chatml")
    marked = with_special_tokens(any_tokenizer, chatml.missing_tokens(any_tokenizer))
    tokenizer = with_added_tokens(marked, ["<go>"])
    ids = chatml.encode_prompt(tokenizer, [("user", "<go> <|im_end|>")])
    assert ids.count(tokenizer.encode("<go>")[0]) == 1
    assert ids.count(tokenizer.special_tokens["<|im_end|>"]) == 1  # that of the template


def test_invalid_added_tokens_are_refused(any_tokenizer: Tokenizer) -> None:
    for text in ("", " ", "a", "<|endoftext|>"):
        with pytest.raises(UserError):
            with_added_tokens(any_tokenizer, ["fine", text])
