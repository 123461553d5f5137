"""The words of the documentation, the help texts and the error messages are the field's: see the glossary page."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BANNED = {  # phrase: say this
    r"by heart": "overfitting",
    r"knows nothing": "uniform baseline",
    r"only counts": "unigram baseline",
    r"given up\b": "early stopping",
    r"cut batch": "gradient accumulation",
    r"\bcompute twice": "activation checkpointing",
    r"those who speak": "sequences",
    r"what is said": "new tokens",
    r"reads? the prompt\b": "prefill",
    r"what it leaves behind": "artifact",
    r"went bad": "non-finite",
    r"culprit": "module of origin",
    r"how fast it writes": "throughput",
    r"the one currency": "format",
    r"\brungs?\b": "ladder step",
    r"(?<![\"'])\blanes?\b": "variant",
    r"cannot be had": "is not supported",
    r"tells of\b": "returns",
    r"what came of it": "result",
    r"its peers beside it": "compared with peers",
    r"\bwants\b": "requires",
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "src" / "gpt2").rglob("*.py"))


def banned_in(text: str) -> list[str]:
    """The banned phrases in a text, each with what to say instead."""
    return [f"{found[0]!r}: say {say}" for phrase, say in BANNED.items() if (found := re.search(phrase, text))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages(path: Path) -> None:
    assert banned_in(" ".join(path.read_text(encoding="utf-8").split())) == []


def test_strings_of_the_source() -> None:
    """Help texts, errors, log lines and docstrings are all strings."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:  # not a key
                found += [(path.name, node.lineno, phrase) for phrase in banned_in(" ".join(node.value.split()))]
    assert found == []


def test_finds_a_phrase() -> None:
    assert banned_in("The model knows nothing.") == ["'knows nothing': say uniform baseline"]
