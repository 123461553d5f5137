"""Run the Python code of a documentation page, block after block, and compare or update the printed output.

    python docs/hooks/run_page.py docs/learn/01-tokens.md     # rewrites its output blocks and pictures

A ```python block may be followed by a ```text block with what it prints. Numbers there must agree to 3%, other text
exactly. A ```text block with a title, such as a machine, shows a timing and is not compared. A picture that the code
saves under its name in the page is copied to the images/ folder beside the page.
"""

import io
import os
import re
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text(?P<title>[^\n]*)\n(?P<output>.*?)```\n)?", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")


def run_page(page: Path, *, update: bool = False) -> list[str]:
    """Run a page in the current folder. Returns the differences from its output blocks; `update` rewrites them."""
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": f"page_{page.stem.replace('-', '_')}"}
    differences, parts, position = [], [], 0
    if str(page.parent) not in sys.path:
        sys.path.insert(0, str(page.parent))  # chapters import gpt2_from_scratch
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        code = compile("\n" * line + match["code"], str(page), "exec")
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        output, block = printed.getvalue(), match[0]
        if match["output"] is None:
            if output.strip():
                differences.append(f"{page.name}:{line}: prints {output!r}, and the page has no text block for it")
        elif not match["title"].strip() and not _same(match["output"], output):
            differences.append(f"{page.name}:{line}: prints {output!r}, not {match['output']!r}")
        if update and match["output"] is not None:
            start, end = match.start("output") - match.start(), match.end("output") - match.start()
            block = block[:start] + output.rstrip() + "\n" + block[end:]
        parts += [text[position : match.start()], block]
        position = match.end()
    if update:
        page.write_text("".join([*parts, text[position:]]), encoding="utf-8")
    return differences


def _same(expected: str, found: str) -> bool:
    """Whether two outputs have the same words, and numbers that agree to 3%."""
    if NUMBER.sub("#", expected).split() != NUMBER.sub("#", found).split():
        return False
    pairs = zip(NUMBER.findall(expected), NUMBER.findall(found), strict=True)
    return all(_close(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= max(0.03 * max(abs(a), abs(b)), 1e-4)


def main(pages: list[str]) -> None:
    """Update pages and their pictures."""
    for name in pages:
        page = Path(name).resolve()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            print(page.name, *run_page(page, update=True), sep="\n  ")
            for picture in Path(folder).glob("*.png"):
                shutil.copyfile(picture, page.parent / "images" / picture.name)
            os.chdir(page.parent)


if __name__ == "__main__":
    main(sys.argv[1:])
