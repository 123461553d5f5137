"""gpt2 convert SOURCE OUT --to FORMAT"""

import sys
from pathlib import Path

from gpt2.cli import Parser
from gpt2.commands.generation_args import add_adapter_flag
from gpt2.errors import ConfigError, UserError
from gpt2.files import RUN_FOLDER_FILES, expand_path, known_folder_kind

DESCRIPTION = """Write a model for other programs, and check that they compute the same.

The last line on standard error is the parity report. A conversion that is not equal within its tolerance is not kept.
"""


def main(argv: list[str], prog: str = "gpt2 convert", default: str | None = None) -> None:
    parser = Parser(prog=prog, description=DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="a MODEL: of any format in --list, or a hub name")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="the folder or file to write")
    parser.add_argument("--to", "--format", default=default, help="the format to write: see --list")
    parser.add_flag("list", action="store_true", help="list the formats that are read and written, and stop")
    parser.add_flag("dtype", default=None, help="of the weights, as --list has them; by default what the model has")
    parser.add_flag("max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file, as 500MB [5GB]")
    parser.add_flag("overwrite", action="store_true", help="replace a model that is in OUT")
    add_adapter_flag(parser)
    args = parser.parse_args(argv)
    if args.list:
        print(formats())
        return
    if args.source is None or args.out is None:
        raise UserError(f"{prog} needs SOURCE and OUT (see {prog} --help)")
    if args.to is None:
        raise UserError("--to is missing: gpt2 convert --list names the formats")
    from gpt2.conversion import Job, check_free, convert, dtype_for, target_of
    from gpt2.resolve import resolve_model

    target, out = target_of(args.to), expand_path(args.out)
    check_shard_size(args.max_shard_size)
    source = resolve_model(args.source, args.adapter)
    _check_place(out, source.folder)
    check_free(target, out, args.overwrite)
    if args.dtype is not None and args.dtype not in target.tolerances:
        raise ConfigError(
            f"{target.name} has no dtype '{args.dtype}': there are {', '.join(target.tolerances)}", field="dtype"
        )
    model, tokenizer = source.load(dtype=None)
    job = Job(model, tokenizer, source.template, dtype_for(target, args.dtype, model), args.max_shard_size)
    parity = convert(target, job, out)
    print(f"{target.name}, {job.dtype}: {parity}", file=sys.stderr)
    print(out)


def formats() -> str:
    """The formats that are read, and those that are written with their dtypes, as text."""
    from gpt2.conversion import TARGETS
    from gpt2.formats.table import READERS

    lines = ["read:"]
    lines += [f"  {each.name:12} {each.about}" for each in READERS]
    lines += ["written:"]
    lines += [f"  {each.name:12} {each.about} ({', '.join(each.tolerances)})" for each in TARGETS.values()]
    return "\n".join(lines)


def check_shard_size(text: str) -> None:
    """Raise UserError for what is no size."""
    number = text.upper().removesuffix("B").rstrip("KMGT")
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"--max-shard-size '{text}' is no size such as 500MB or 5GB")


def _check_place(out: Path, source: Path) -> None:
    """Refuse to write over the source, or into a run folder."""
    if out.resolve() == source.resolve():
        raise UserError(f"{out} is the model itself: name another folder")
    for folder in (out.resolve(), *out.resolve().parents):
        if known_folder_kind([name for name in RUN_FOLDER_FILES if (folder / name).exists()]):
            raise UserError(f"{out} is in the run folder {folder}, which training writes: name a folder elsewhere")
