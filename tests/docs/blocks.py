"""The fenced blocks of a Markdown page, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("gpt2", "torchrun", "python", "pip", "make", "git", "curl", "docker", "cd", "lm_eval", "export", "sky")
SHELL = ("sh", "bash", "console")
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>\S.*\S) -->")
FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\S*)[^\n]*\n(?P<code>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, where it is, and why it is not run ("" if it is)."""

    language: str
    code: str
    where: str
    not_run: str


def blocks_of(page: Path, root: Path) -> list[Block]:
    """The blocks of a page in order. A comment in the line before a block says why it is not run."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        above = text[: match.start()].rstrip("\n").rsplit("\n", 1)[-1]
        mark = NOT_RUN.fullmatch(above)
        line = text.count("\n", 0, match.start()) + 1
        language, code = match["language"], match["code"]
        if not language and code.split(maxsplit=1)[:1] and code.split(maxsplit=1)[0] in COMMANDS:
            language = "sh"
        blocks.append(Block(language, code, f"{page.relative_to(root)}:{line}", mark["reason"] if mark else ""))
    return blocks


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a shell block as words: without comments and prompts, continued lines joined."""
    code = block.code.replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in code.splitlines()]
    commands = [part for line in lines for part in _split_at_semicolons(shlex.split(line, comments=True))]
    return [command for command in commands if command]


def gpt2_arguments(command: list[str]) -> list[str] | None:
    """The arguments of a `gpt2` command, alone or under torchrun; None for another command."""
    words = command
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["gpt2"]:
        return words[1:]
    if words[:1] == ["torchrun"] and "-m" in words and words[words.index("-m") + 1] == "gpt2":
        return words[words.index("-m") + 2 :]
    return None


def _split_at_semicolons(words: list[str]) -> list[list[str]]:
    commands: list[list[str]] = [[]]
    for word in words:
        commands[-1] += [word.removesuffix(";")] if word != ";" else []
        if word.endswith(";"):
            commands.append([])
    return commands
