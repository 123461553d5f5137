"""What a de-tokenizer removes, it can put back."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.evaluation.detokenize import (
    Detokenized,
    detokenize_1bw,
    detokenize_cbt,
    detokenize_lambada,
    detokenize_ptb,
    detokenize_wikitext,
    restore,
)
from tests.evaluation.task_rows import EVAL_DATA

ALL = [detokenize_wikitext, detokenize_ptb, detokenize_1bw, detokenize_lambada, detokenize_cbt]
pieces = st.sampled_from(
    [
        "``",
        "''",
        "`",
        "'",
        '"',
        "@-@",
        "@,@",
        ".",
        ",",
        "...",
        "n't",
        "'s",
        "-LRB-",
        "-RRB-",
        "$",
        "5",
        "%",
        "(",
        ")",
        "word",
        "it",
        "<unk>",
        " ",
        "  ",
        "\n",
        "°",
        "é",
        "boys",
        "=",
    ]
)
texts = st.lists(pieces, max_size=30).flatmap(lambda some: st.sampled_from([" ".join(some), "".join(some)])) | st.text()


@pytest.mark.parametrize("detokenize", ALL)
@given(text=texts)
def test_the_original_comes_back(detokenize: Callable[[str], Detokenized], text: str) -> None:
    assert restore(detokenize(text)) == text


@pytest.mark.parametrize(
    ("detokenize", "before", "after"),
    [
        (detokenize_wikitext, "a well @-@ known 1 @,@ 000 @.@ 5 film ( 2004 ) .", "a well-known 1,000.5 film (2004)."),
        (detokenize_wikitext, 'He said " no " , did n\'t he ?', 'He said "no", didn\'t he?'),
        (detokenize_ptb, "it 's $ N a share , the u.s. said", "it's $ N a share, the u.s. said"),
        (detokenize_1bw, "They 're here ( now ) .", "They're here (now)."),
        (detokenize_lambada, "`` not going to happen , '' replied helen", '"not going to happen," replied helen'),
        (detokenize_cbt, "-LRB- he said -RRB- `` well ! '' ,", '(he said) "well!",'),
    ],
)
def test_artifacts_go(detokenize: Callable[[str], Detokenized], before: str, after: str) -> None:
    assert detokenize(before).text == after


@pytest.mark.parametrize(
    ("detokenize", "file"),
    [
        (detokenize_wikitext, "wikitext/wiki.test.raw"),
        (detokenize_1bw, "one-billion-word/test.head2000.tokens"),
        (detokenize_lambada, "lambada/lambada_test_plain_text.head200.txt"),
    ],
)
def test_real_text_comes_back(detokenize: Callable[[str], Detokenized], file: str) -> None:
    path = EVAL_DATA / file
    if not path.is_file():
        pytest.skip(f"no {path}")
    text = path.read_text(encoding="utf-8")
    found = detokenize(text)
    assert len(found.text) < len(text)
    assert restore(found) == text
