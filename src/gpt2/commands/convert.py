"""gpt2 convert SOURCE OUT --to FORMAT"""

import sys
from pathlib import Path

from gpt2.cli import Parser
from gpt2.commands.generation_args import MODEL_HELP, add_adapter_flag
from gpt2.errors import ConfigError
from gpt2.files import expand_path
from gpt2.progress import print_status
from gpt2.terminal import path_for_stream

DESCRIPTION = """Write a model in a format that other programs read, and check that both compute the same.

The last line on standard error is the parity report. A result that differs by more than the tolerance is not kept.
"""
EXAMPLES = (
    "gpt2 convert runs/quickstart model.gguf --to gguf --dtype q8_0",
    "gpt2 convert out/ckpt.pt my-model --to hf",
    "gpt2 convert --list",
)


def main(argv: list[str]) -> None:
    """Run `gpt2 convert`: write a model in another format and print its path."""
    run(make_parser(), argv)


def make_parser(
    prog: str = "gpt2 convert", examples: tuple[str, ...] = EXAMPLES, default_format: str | None = None
) -> Parser:
    """The parser of a command that converts. default_format: that of --to; None if --to is required."""
    parser = Parser(prog=prog, description=DESCRIPTION, examples=examples)
    parser.add_argument("source", metavar="SOURCE", nargs="?", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="the folder or file to write")
    shown = "" if default_format is None else f" [{default_format}]"
    parser.add_flag("to", "format", default=default_format, metavar="FORMAT", help=f"one of --list{shown}")
    parser.add_flag("list", action="store_true", help="list the formats that are read and written, and stop")
    parser.add_flag(
        "dtype", default=None, metavar="NAME", help="of the weights: one that --list names for the format [the model's]"
    )
    parser.add_flag("max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file, as 500MB [5GB]")
    parser.add_flag("overwrite", action="store_true", help="replace the model that OUT holds")
    parser.add_flag("push", default=None, metavar="OWNER/NAME", help="upload the model folder with a model card")
    add_adapter_flag(parser)
    return parser


def run(parser: Parser, argv: list[str]) -> None:
    """Run a command that converts."""
    args = parser.parse_args(argv)
    if args.list:
        print(list_formats())
        return
    if args.source is None or args.out is None:
        parser.error("SOURCE and OUT are required")
    if args.to is None:
        raise ConfigError("--to is required: gpt2 convert --list names the formats", field="to")
    _check_shard_size(args.max_shard_size)
    if args.push is not None and args.to != "hf":
        raise ConfigError(f"--push uploads a model folder: it needs --to hf, not {args.to}", field="push")
    from gpt2.conversion import Job, check_output, check_replaceable, convert, dtype_for, target_of
    from gpt2.model_card import check_repository_name, push, write_model_card
    from gpt2.resolve import resolve_model

    target, out = target_of(args.to), expand_path(args.out)
    if args.dtype is not None:
        dtype_for(target, args.dtype)
    if args.push is not None:
        check_repository_name(args.push)
    source = resolve_model(args.source, args.adapter)
    check_output(target, out, source.folder)
    model, tokenizer = source.load(dtype=None)
    if not args.overwrite:
        check_replaceable(out, model)
    job = Job(model, tokenizer, source.template, dtype_for(target, args.dtype, model), args.max_shard_size)
    parity = convert(target, job, out)
    print_status(f"{target.name}, {job.dtype}: {parity}")
    if args.push is not None:
        run = source.folder.parent if (source.folder.parent / "config.toml").is_file() else None
        write_model_card(out, args.push, run)
        print(push(out, args.push))
        return
    print(path_for_stream(out, sys.stdout))


def list_formats() -> str:
    """The formats that are read, and those that are written with their dtypes, as text."""
    from gpt2.conversion import TARGETS
    from gpt2.formats.table import READERS

    lines = ["read:"]
    lines += [f"  {each.name:12} {each.about}" for each in READERS]
    lines += ["written:"]
    lines += [f"  {each.name:12} {each.about} ({', '.join(each.tolerances)})" for each in TARGETS.values()]
    return "\n".join(lines)


def _check_shard_size(text: str) -> None:
    """Raise ConfigError for a text that is no size."""
    number = text.upper().removesuffix("B").rstrip("KMGT")
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--max-shard-size '{text}' is no size such as 500MB or 5GB", field="max_shard_size")
