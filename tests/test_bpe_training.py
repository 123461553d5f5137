"""Training a BPE tokenizer: bounded memory for new words, long words in pieces."""

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpt2.tokenizer as tokenizing
from gpt2.tokenizer import train_bpe
from gpt2.vocabulary import split_long_words


def test_words_after_the_limit_do_not_count_unless_they_are_known(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["the cat  sat\n on é mat ", " the mat sat the", "xyzxyz the dog xyzxyz sat", "the  xyzxyz"]
    monkeypatch.setattr(tokenizing, "_MAX_WORD_BYTES", 18)
    bounded = train_bpe(texts, 280)
    assert "the first 8 different words: 4 occurrences of others were left out" in caplog.text
    monkeypatch.setattr(tokenizing, "_MAX_WORD_BYTES", 1 << 20)
    assert bounded.fingerprint == train_bpe([*texts[:2], "the sat", "the "], 280).fingerprint
    assert bounded.fingerprint != train_bpe(texts, 280).fingerprint


WORDS = """
import random, sys
import gpt2.tokenizer as tokenizing
tokenizing._MAX_WORD_BYTES = int(sys.argv[1])
rng = random.Random(1)
letters = "abcdefghijklmnopqrstuvwxyz"
tokenizing.train_bpe(["a b"], 257)
status = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
before = status()
tokenizing.train_bpe((" ".join("".join(rng.choices(letters, k=8)) for _ in range(10_000)) for _ in range(20)), 300)
print(status() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_the_memory_of_training_on_new_words_is_bounded() -> None:
    command = [sys.executable, "-c", WORDS, "200000"]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak < 60_000  # kB, for 1.8 MB of text; without a limit 180,000


def test_training_on_a_very_long_word_is_fast() -> None:
    def seconds(length: int) -> float:
        rng = random.Random(0)
        text = "".join(rng.choice("abcdefgh") for _ in range(length))
        began = time.process_time()
        assert train_bpe([text], 300).vocab_size == 300
        return time.process_time() - began

    assert seconds(200_000) < 10  # as one word it would take minutes


@pytest.mark.parametrize("text", ["a" * 5000, " " * 5000, "_-" * 2500, "字" * 5000, "x " * 2000 + "1" * 3500 + " y\n"])
def test_very_long_words_are_split_without_loss(text: str) -> None:
    pieces = list(split_long_words(text))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert max(map(len, re.findall(r"\w+|\s+|(?:[^\w\s]|_)+", max(pieces, key=len)))) <= 1000


@given(st.text(alphabet="ab1_-'! \n\t\u3000é字😀", max_size=300))
def test_ordinary_words_are_not_split(text: str) -> None:
    assert list(split_long_words(text)) == [text]
