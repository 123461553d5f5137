"""Invertible de-tokenizers: the artifacts of a corpus's tokenization are removed, and could be put back.

The GPT-2 paper (section 3.1) evaluates on corpora of which "large scale ... pre-processing artifacts" were removed by
invertible de-tokenizers, which OpenAI did not publish. These remove spaces around punctuation and contractions, and
the marks that stand for characters. Each removal is recorded, so `restore` gives back the very text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

Rule = tuple[re.Pattern[str], str]
"""A pattern, and what a match becomes: a template as in `re.sub`."""


class Edit(NamedTuple):
    """One replacement: from where in the new text, how long it is there, and what stood there before."""

    start: int
    length: int
    before: str


@dataclass(frozen=True)
class Detokenized:
    """A text without artifacts, and the edits of each rule in turn that made it."""

    text: str
    edits: list[list[Edit]]


def restore(detokenized: Detokenized) -> str:
    """The original text."""
    text = detokenized.text
    for edits in reversed(detokenized.edits):
        parts, end = [], 0
        for start, length, before in edits:
            parts += [text[end:start], before]
            end = start + length
        text = "".join([*parts, text[end:]])
    return text


def apply_rules(text: str, rules: list[Rule]) -> Detokenized:
    """Each rule in turn, everywhere it matches."""
    history: list[list[Edit]] = []
    for pattern, template in rules:
        parts: list[str] = []
        edits: list[Edit] = []
        end = size = 0
        for match in pattern.finditer(text):
            new = match.expand(template)
            parts += [text[end : match.start()], new]
            size += match.start() - end
            edits.append(Edit(size, len(new), match[0]))
            size += len(new)
            end = match.end()
        text = "".join([*parts, text[end:]])
        history.append(edits)
    return Detokenized(text, history)


def _rules(*pairs: tuple[str, str]) -> list[Rule]:
    return [(re.compile(pattern), template) for pattern, template in pairs]


_PUNCTUATION = _rules(
    (r" (?=[,.;:!?](?:[ \n\"]|$))", ""), (r" (?=\.\.\.)", ""), (r"(?<=[(\[]) ", ""), (r" (?=[)\]])", "")
)
_CONTRACTIONS = _rules((r" (?=n't\b)", ""), (r" (?='(?:s|re|ve|ll|d|m|t)\b)", ""), (r"(?<=s) (?=' )", ""))
_LATEX_QUOTES = _rules((r"`` ?", '"'), (r" ?''", '"'), (r"` ", "'"))
_PLAIN_QUOTES = _rules((r'(?<![^ \n])" ([^"\n]*?) "(?![^ \n.,;:!?)])', r'"\1"'))
_MONEY = _rules((r"(?<=[$£#]) (?=\d)", ""), (r"(?<=\d) (?=%)", ""))
_BRACKETS = _rules((r"-LRB- ?", "("), (r" ?-RRB-", ")"), (r"-LSB- ?", "["), (r" ?-RSB-", "]"))

WIKITEXT = [
    *_rules((r" @([-,.])@ ", r"\1")),
    *_PUNCTUATION,
    *_CONTRACTIONS,
    *_PLAIN_QUOTES,
    *_MONEY,
    *_rules((r"(?<=[^ \n]) (?=\n)", ""), (r"(?<=\n) (?=[^ \n])", ""), (r"(?<=\d) (?=°)", "")),
]
PTB = [
    *_LATEX_QUOTES,
    *_PUNCTUATION,
    *_CONTRACTIONS,
    *_MONEY,
    *_rules((r"(?<=\n) ", ""), (r" (?=\n)", ""), (r"^ ", "")),
]
ONE_BILLION_WORD = [*_PUNCTUATION, *_CONTRACTIONS, *_PLAIN_QUOTES, *_MONEY]
LAMBADA = [*_LATEX_QUOTES, *_PUNCTUATION, *_CONTRACTIONS, *_MONEY]
CBT = [*_BRACKETS, *_LATEX_QUOTES, *_PUNCTUATION, *_CONTRACTIONS]

Detokenizer = Callable[[str], Detokenized]


def detokenize_wikitext(text: str) -> Detokenized:
    """WikiText: ` @-@ `, ` @,@ ` and ` @.@ ` become characters again, spaces before punctuation go."""
    return apply_rules(text, WIKITEXT)


def detokenize_ptb(text: str) -> Detokenized:
    """Penn Treebank as Mikolov prepared it: lower case, N for numbers, <unk>; these stay, spaces go."""
    return apply_rules(text, PTB)


def detokenize_1bw(text: str) -> Detokenized:
    """One Billion Word: spaces around punctuation, quotes and contractions go."""
    return apply_rules(text, ONE_BILLION_WORD)


def detokenize_lambada(text: str) -> Detokenized:
    """The original LAMBADA: lower case, ``quotes'' and contractions."""
    return apply_rules(text, LAMBADA)


def detokenize_cbt(text: str) -> Detokenized:
    """Children's Book Test: brackets and quotes by name."""
    return apply_rules(text, CBT)


def harness_wikitext(page: str) -> str:
    """The de-tokenizer of lm-evaluation-harness's task wikitext (version 2), which cannot be undone.

    Rules as there, in its order, oddities included: they are part of its protocol.
    """
    page = re.sub(r"/' [0-9]/", r"/'[0-9]/", page.replace("s '", "s'"))
    for mark in "-,.":
        page = page.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    for opening, closing in (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")):
        inner = rf"\s*([^{re.escape(closing)}]*?)\s*"
        page = re.sub(re.escape(opening) + inner + re.escape(closing), rf"{opening}\1{closing}", page)
    for before, after in (
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" ° ", "°"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ):
        page = page.replace(before, after)
    return page
