"""gpt2 export MODEL OUT: the old name of `gpt2 convert`, which writes a model folder unless --to says otherwise."""

from gpt2.cli import Parser
from gpt2.commands import convert

EXAMPLES = ("gpt2 export runs/quickstart my-model", "gpt2 export gpt2 small --dtype float16")


def main(argv: list[str]) -> None:
    """Run `gpt2 export`: write a model folder and print its path."""
    convert.run(make_parser(), argv)


def make_parser() -> Parser:
    """The parser of `gpt2 export`."""
    return convert.make_parser("gpt2 export", EXAMPLES, default_format="hf")
