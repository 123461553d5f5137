"""The reference pages that are generated from the code: commands, settings, Python API, HTTP API, OpenAPI schema."""

import argparse
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import gpt2
from gpt2 import cli
from gpt2.config import CHOICES, TrainConfig
from gpt2.errors import UserError


def generated_pages() -> dict[str, str]:
    """{path under docs/: text} of every generated page."""
    pages = {f"reference/commands/{verb}.md": command_page(verb) for verb in cli.COMMANDS}
    pages["reference/commands/index.md"] = commands_index()
    pages["reference/settings.md"] = settings_page()
    pages["reference/python.md"] = python_page()
    schema = openapi_schema()
    pages["reference/http.md"] = http_page(schema)
    pages["reference/openapi.json"] = json.dumps(schema, indent=1)
    return pages


def command_page(verb: str) -> str:
    """The page of one command: usage, arguments, flags by section, examples; those of its subcommands follow."""
    parts = [_front_matter(f"gpt2 {verb}", f"Every flag of gpt2 {verb}: {cli.COMMANDS[verb]}."), f"# gpt2 {verb}"]
    parser = cli.command_module(verb).make_parser()
    parts += _parser_parts(parser, 2)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, child in action.choices.items():
                parts += [f"## gpt2 {verb} {name}", f"{(helps.get(name) or '').capitalize()}."]
                parts += _parser_parts(child, 3)
    return "\n\n".join(parts) + "\n"


def _parser_parts(parser: cli.Parser, level: int) -> list[str]:
    usage = textwrap.fill(" ".join(parser.format_usage().split()), 84, subsequent_indent="    ", break_on_hyphens=False)
    parts = [_prose(parser.description or ""), f"```console\n$ {usage.removeprefix('usage: ')}\n```"]
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._SubParsersAction)
        ]
        if not actions or all(isinstance(action, argparse._HelpAction) for action in actions):
            continue
        title = {"positional arguments": "arguments", "options": "flags"}.get(group.title or "", group.title or "")
        rows = [f"| `{_spelling(action, parser)}` | {_cell(_help(action, parser))} |" for action in actions]
        parts += [f"{'#' * level} {title.capitalize()}", "\n".join(["| name | meaning |", "| --- | --- |", *rows])]
    if parser.epilog:
        notes, _, examples = parser.epilog.partition("examples:\n")
        parts.append(_prose(notes.strip()))
        if examples:
            lines = "\n".join(f"$ {line.strip()}" for line in examples.strip().split("\n"))
            parts += [f"{'#' * level} Examples", f"```console\n{lines}\n```"]
    return [part for part in parts if part]


def _spelling(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    if not action.option_strings:
        return str(action.metavar or action.dest)
    value = "" if action.nargs == 0 else " " + parser._get_formatter()._format_args(action, action.dest.upper())
    return (", ".join(action.option_strings) + value).replace("|", "\\|")


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = (action.help or "") % {"default": action.default, "prog": parser.prog} if action.help else ""
    choices = ", ".join(map(str, action.choices)) if action.choices else ""
    return f"{text} ({choices})" if choices and choices not in text else text


def commands_index() -> str:
    """The list of commands."""
    rows = [f"| [`gpt2 {verb}`]({verb}.md) | {description} |" for verb, description in cli.COMMANDS.items()]
    return "\n\n".join(
        [
            _front_matter("Commands", "The commands of gpt2, generated from their parsers."),
            "# Commands",
            "These pages are generated from the parsers: they have every flag. `--batch-size` and `--batch_size` are "
            'the same flag. A value in brackets is the default. `eval "$(gpt2 completion bash)"` completes commands '
            "and flags in the shell. `gpt2 --version` prints the version and, in a clone, "
            "the commit. [Exit codes](../exit-codes.md) and [environment variables](../environment.md) have their "
            "own pages.",
            "\n".join(["| command | does |", "| --- | --- |", *rows]),
        ]
    )


def settings_page() -> str:
    """Every field of TrainConfig: the keys of config.toml and of a recipe."""
    rows = []
    for field in fields(TrainConfig):
        words = {value: word for word, value in field.metadata.get("words", {}).items()}
        default = field.default if field.default is not MISSING else None
        shown = words.get(default, default) if isinstance(default, int | str | float) else default
        choices = f" ({', '.join(CHOICES[field.name])})" if field.name in CHOICES else ""
        notes = "yes" if field.metadata.get("fixed") else ""
        kind = (field.type.__name__ if isinstance(field.type, type) else str(field.type)).replace("|", "\\|")
        help_text = _cell(field.metadata.get("help", "") + choices)
        rows.append(f"| `{field.name}` | `{kind}` | `{_toml(shown)}` | {notes} | {help_text} |")
    return "\n\n".join(
        [
            _front_matter("Settings", "Every setting of a training run, generated from TrainConfig."),
            "# Settings",
            "Every key of a run's `config.toml`, which is also a flag of `gpt2 train` with dashes: `max_steps` is "
            "`--max-steps`. `gpt2 train RECIPE --print-config` prints them all as TOML. A resumed run must keep the "
            "settings that are marked as fixed.",
            "\n".join(["| key | type | default | fixed | meaning |", "| --- | --- | --- | --- | --- |", *rows]),
        ]
    )


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value)


def python_page() -> str:
    """The public names of `gpt2`, documented by mkdocstrings, and the settings and errors that they use."""
    names = dict(sorted(gpt2._LAZY_IMPORTS.items(), key=lambda item: (item[0][0].isupper(), item[0].lower())))
    entries = [f"::: {module}.{name}\n    options:\n      heading_level: 2" for name, module in names.items()]
    errors = [kind.__name__ for kind in UserError.__subclasses__() if kind.__module__ == "gpt2.errors"]
    others = [f"::: gpt2.errors.{name}\n    options:\n      heading_level: 3" for name in errors]
    return "\n\n".join(
        [
            _front_matter("Python API", "The public Python API of gpt2, generated from its docstrings."),
            "# Python API",
            "`import gpt2` gives these names; each is imported on first use. Shapes: B rows, T positions, C channels.",
            *entries,
            "## Errors",
            "A mistake of the user raises one of these, with a message of one line.",
            *others,
        ]
    )


def openapi_schema() -> dict[str, Any]:
    """The schema that `gpt2 serve` sends at /openapi.json."""
    from gpt2.serve.app import create_app

    return create_app({}).openapi()


def http_page(schema: dict[str, Any]) -> str:
    """The routes of the server, and every field of their requests."""
    parts = [
        _front_matter("HTTP API", "The routes of gpt2 serve and every field of their requests."),
        "# HTTP API",
        "`gpt2 serve` follows OpenAI's API. This page is generated from the [OpenAPI schema](openapi.json), which a "
        "server sends at `/openapi.json`. [Running the server](../serving.md) has examples, limits and errors.",
    ]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts.append(f"## {method.upper()} {path}")
            parts.append(operation.get("description") or operation.get("summary", ""))
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if reference := content.get("schema", {}).get("$ref"):
                parts.append(_fields_table(schema["components"]["schemas"][reference.rsplit("/", 1)[1]]))
    return "\n\n".join(part for part in parts if part)


def _fields_table(model: dict[str, Any]) -> str:
    rows = []
    for name, prop in model.get("properties", {}).items():
        limits = {**prop, **{k: v for option in prop.get("anyOf", []) for k, v in option.items() if k in _BOUNDS}}
        bounds = [f"{word} {limits[key]}" for key, word in _BOUNDS.items() if key in limits]
        text = ". ".join(part for part in (prop.get("description", ""), ", ".join(bounds)) if part)
        default = json.dumps(prop["default"]) if "default" in prop else ""
        shown = f"`{default}`" if default else "required" if name in model.get("required", []) else ""
        rows.append(f"| `{name}` | {_cell(_type_name(prop))} | {_cell(shown)} | {_cell(text)} |")
    return "\n".join(["| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "maxLength": "length at most",
    "maxItems": "items at most",
}


def _type_name(prop: dict[str, Any]) -> str:
    if "anyOf" in prop:
        return " or ".join(
            dict.fromkeys(_type_name(option) for option in prop["anyOf"] if option.get("type") != "null")
        )
    if "enum" in prop or "const" in prop:
        return ", ".join(json.dumps(value) for value in prop.get("enum", [prop.get("const")]))
    if "$ref" in prop:
        return prop["$ref"].rsplit("/", 1)[1]
    if prop.get("type") == "array":
        return f"list of {_type_name(prop.get('items', {}))}"
    return str(prop.get("type", "any"))


def _front_matter(title: str, description: str) -> str:
    return f"---\ntitle: {json.dumps(title)}\ndescription: {json.dumps(description)}\n---"


_CODE = re.compile(r"(?<![`\w])(--[a-z][\w-]*|\$[A-Z][A-Z0-9_]+|<\|[^|]+\|>)")


def _prose(text: str) -> str:
    """Text of a help as Markdown: flags, variables and special tokens are code."""
    return _outside_code(text, lambda part: _CODE.sub(r"`\1`", part.replace("<", "&lt;") if "<|" not in part else part))


def _cell(text: str) -> str:
    """The same for the cell of a table."""
    return _prose(" ".join(text.split())).replace("|", "\\|").replace("\\\\|", "\\|")


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    parts = text.split("`")
    return "`".join(change(part) if i % 2 == 0 else part for i, part in enumerate(parts))
