"""A Griffe extension: turns the parameter lists of this project's docstrings into the sections that mkdocstrings knows.

The docstrings list parameters as lines `name:   description`, with further lines indented. Here such a list becomes a
section `Args:` (of a function) or `Attributes:` (of a class) in Google style.
"""

import re
from typing import Any

import griffe

ITEM = re.compile(r"^(\w+(?:, \w+)*): +(\S.*)$")


class ParameterLists(griffe.Extension):
    """Rewrites the docstring of every function and class before it is parsed."""

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        _rewrite(func, "Args:", {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        init = cls.members.get("__init__")
        parameters = {p.name for p in init.parameters} if isinstance(init, griffe.Function) else set()
        names = {name for name, member in cls.members.items() if member.is_attribute} | parameters
        _rewrite(cls, "Attributes:", names)


def _rewrite(item: griffe.Object, title: str, names: set[str]) -> None:
    if item.docstring is None:
        return
    paragraphs = item.docstring.value.split("\n\n")
    item.docstring.value = "\n\n".join(_convert(paragraph, title, names) for paragraph in paragraphs)


def _convert(paragraph: str, title: str, names: set[str]) -> str:
    lines = paragraph.split("\n")
    first = ITEM.match(lines[0])
    if first is None or first[1].split(", ")[0] not in names:
        return paragraph
    converted = [title]
    for line in lines:
        match = ITEM.match(line)
        converted.append(f"    {match[1]}: {match[2]}" if match else f"        {line.strip()}")
    return "\n".join(converted)
