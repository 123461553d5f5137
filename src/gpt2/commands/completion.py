"""gpt2 completion bash|zsh|..."""

import argparse
from collections.abc import Iterator
from typing import Any

from gpt2.cli import COMMANDS, Parser, command_module
from gpt2.errors import missing_extra

PATH_METAVARS = (
    *("FILE", "FOLDER", "MODEL", "SOURCE", "OUT", "CHART", "DUMP", "RUN"),
    *("RECIPE|FILE", "NAME|FOLDER", "NAME|FILE"),
)
SHELLS = ("bash", "zsh", "tcsh", "fish")


def main(argv: list[str]) -> None:
    """Run `gpt2 completion`: a script for the shell, on standard output."""
    args = make_parser().parse_args(argv)
    try:
        import shtab
    except ImportError as error:
        raise missing_extra("shtab", "completion", "gpt2 completion") from error
    print(shtab.complete(whole_parser(), args.shell))


def make_parser() -> Parser:
    """The parser of `gpt2 completion`."""
    parser = Parser(
        prog="gpt2 completion",
        description="Print a script that completes the commands and flags of gpt2 in a shell.",
        examples=('eval "$(gpt2 completion bash)"', "gpt2 completion zsh > ~/.zfunc/_gpt2"),
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """One parser with all commands and their subcommands; values that are paths are completed as such."""
    import shtab

    parser = argparse.ArgumentParser(prog="gpt2")
    parser.add_argument("--version", action="store_true", help="print the version")
    made: Any = lambda prog, **_: command_module(prog.split()[-1]).make_parser()  # noqa: E731
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=made)
    for verb, about in COMMANDS.items():
        commands.add_parser(verb, help=about)
    for action in (action for one in subcommand_parsers(parser) for action in one._actions):
        if action.metavar in PATH_METAVARS:
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return parser


def subcommand_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its subcommands, at any depth."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from subcommand_parsers(child)
