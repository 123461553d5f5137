"""Text from outside (names, messages, generated text) as it may be printed: it must not control the terminal."""

import re
from pathlib import Path
from typing import TextIO

# Characters that move the cursor, change colors, end a line or reverse the text direction; not newline and tab.
UNSAFE_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str) -> str:
    """`text` with control characters as escapes; newlines and tabs are kept."""
    return UNSAFE_CHARACTERS.sub(lambda match: ascii(match[0])[1:-1], text)


def escape_for_terminal(text: str, stream: TextIO | None) -> str:
    """`text` as it may be written to `stream`: with control characters escaped if it is a terminal."""
    return escape_controls(text) if stream is not None and stream.isatty() else text


def single_line(text: object) -> str:
    """`text` as a part of a line: whitespace is a space, and other characters that are not printable are escapes."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in str(text))


def shorten(text: object, limit: int = 100) -> str:
    """`single_line` of `text` in at most `limit` characters: of a longer one, the start and the end around "..."."""
    return _cut(single_line(_cut(str(text), limit)), limit)  # cut twice: escapes take time, and have more characters


def _cut(text: str, limit: int) -> str:
    tail = (limit - 3) // 4
    return text if len(text) <= limit else f"{text[: limit - 3 - tail]}...{text[len(text) - tail :]}"


def path_for_stream(path: Path, stream: TextIO | None) -> str:
    """A path that is a command's result: on a terminal a single line; unchanged for a program that reads it."""
    return single_line(path) if stream is not None and stream.isatty() else str(path)
