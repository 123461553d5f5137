"""gpt2 export MODEL OUT"""

from pathlib import Path

from gpt2.cli import Parser
from gpt2.commands.generation_args import add_adapter_flag, template_from_args
from gpt2.errors import UserError
from gpt2.files import RUN_FOLDER_FILES, expand_path, known_folder_kind
from gpt2.runtime import parse_dtype
from gpt2.weights import find_model_folder, load, read_config, save


def main(argv: list[str]) -> None:
    parser = Parser(prog="gpt2 export", description="Write a model where other programs can read it.")
    parser.add_argument("model", metavar="MODEL", help="a run folder, a model folder, or a hub name")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_flag("format", default="hf", help="hf: what transformers, llama.cpp and vLLM read [hf]")
    parser.add_flag("dtype", default=None, help="float32, bfloat16 or float16; by default what the model has")
    add_adapter_flag(parser)
    args = parser.parse_args(argv)
    if args.format != "hf":
        raise UserError(f"--format '{args.format}' is not one of hf")
    out = expand_path(args.out)
    dtype = parse_dtype(args.dtype) if args.dtype else None
    _check_output_folder(out, find_model_folder(args.model))
    model, tokenizer = load(args.model, dtype=dtype, adapter=args.adapter)
    print(save(model, tokenizer, out, template=template_from_args(args, args.model)))


def _check_output_folder(out: Path, source: Path) -> None:
    """Refuse to write over what is no earlier export."""
    if out.resolve() == source.resolve():
        raise UserError(f"{out} is the model itself: name another folder")
    for folder in (out.resolve(), *out.resolve().parents):
        if known_folder_kind([name for name in RUN_FOLDER_FILES if (folder / name).exists()]):
            raise UserError(f"{out} is in the run folder {folder}, which training writes: name a folder elsewhere")
    if out.is_dir() and any(out.iterdir()) and not _is_gpt2_folder(out):
        raise UserError(f"{out} has something else in it: name a new folder")


def _is_gpt2_folder(folder: Path) -> bool:
    """Does its `config.json` describe a GPT-2, and not the settings of something else?"""
    try:
        return (folder / "config.json").is_file() and read_config(folder) is not None
    except UserError:
        return False
