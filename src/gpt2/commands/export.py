"""gpt2 export MODEL OUT: the old name of `gpt2 convert`, which writes a model folder unless --to says otherwise."""

from gpt2.commands import convert


def main(argv: list[str]) -> None:
    convert.main(argv, prog="gpt2 export", default="hf")
