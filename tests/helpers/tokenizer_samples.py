"""Texts that are hard to tokenize, and one tokenizer of each kind."""

from collections.abc import Callable
from functools import cache

from gpt2.tokenizer import END_OF_TEXT, ByteTokenizer, GPT2Tokenizer, Tokenizer, train_bpe

SENTENCES = [
    "A quick brown fox jumps over the lazy dog; it wasn't the first time, and they'll say it isn't the last.",
    "The lazy dog wasn't amused. It'd seen 1024 foxes and 2048 foxes, and in 1999 it'd had enough of foxes!",
    "So the dog said to the foxes: the first fox that jumps over this dog will be the last that jumps.",
]
HARD_TEXTS = [
    "",
    "Hello, I'm a language model,",
    "naïve café, Ελληνικά, русский, 日本語, العربية, हिन्दी, e\u0301 o\u0308",
    "🙂 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "a  b   c\n\n\n   d\t\te \r\n\r\n f  \u00a0 \u2003\u3000 \x85 \x1c \x1f end   ",
    "".join(map(chr, range(32))) + "\x7f\x80\x9f\xad\xa0",
    "x" * 1000 + " " * 1000 + "\n" * 100,
    "def f(x):\n    return x**2  # 3.14159, 1e-5, 0x7f\n",
    "it's IT'S don't DON'T we're ’tis I'dve 'sx",
    "a" + END_OF_TEXT + " b" + END_OF_TEXT + END_OF_TEXT,
    "<|endoftext <|endoftext|",
]


@cache
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer, cached; for tests that use the fixture `gpt2_vocabulary`."""
    return GPT2Tokenizer()


TOKENIZER_FACTORIES: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": gpt2_tokenizer,
    "bytes": ByteTokenizer,
    "bpe": lambda: train_bpe(SENTENCES, 300),
}
