"""gpt2 export MODEL OUT"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.cli import Parser
from gpt2.commands.generation_args import MODEL_HELP, add_adapter_flag
from gpt2.errors import ConfigError, UserError
from gpt2.files import RUN_FOLDER_FILES, expand_path, known_folder_kind
from gpt2.terminal import path_for_stream

if TYPE_CHECKING:
    from gpt2.model import GPT


def main(argv: list[str]) -> None:
    """Run `gpt2 export`: write a model folder and print its path."""
    parser = Parser(
        prog="gpt2 export",
        description="Write a model in a format that other programs read.",
        examples=("gpt2 export runs/quickstart my-model", "gpt2 export gpt2 small --dtype float16"),
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_flag("format", default="hf", help="hf: for transformers, llama.cpp and vLLM [hf]")
    parser.add_flag("dtype", default=None, help="float32, bfloat16 or float16 [the model's own]")
    parser.add_flag("overwrite", action="store_true", help="replace the model that OUT holds")
    add_adapter_flag(parser)
    args = parser.parse_args(argv)
    if args.format != "hf":
        raise ConfigError(f"--format '{args.format}' is not one of hf", field="format")
    from gpt2.resolve import resolve_model
    from gpt2.runtime import parse_dtype
    from gpt2.weights import save

    out = expand_path(args.out)
    dtype = parse_dtype(args.dtype) if args.dtype else None
    source = resolve_model(args.model, args.adapter)
    _check_output_folder(out, source.folder)
    model, tokenizer = source.load(dtype=dtype)
    if not args.overwrite and (out / "config.json").is_file() and not _holds_same_model(out, model):
        raise UserError(f"{out} holds another model: --overwrite replaces it")
    print(path_for_stream(save(model, tokenizer, out, template=source.template), sys.stdout))


def _check_output_folder(out: Path, source: Path) -> None:
    """Raise UserError for a folder that holds anything but an earlier export."""
    if out.resolve() == source.resolve():
        raise UserError(f"{out} is the model itself: name another folder")
    for folder in (out.resolve(), *out.resolve().parents):
        if known_folder_kind([name for name in RUN_FOLDER_FILES if (folder / name).exists()]):
            raise UserError(f"{out} is in the run folder {folder}, which training writes: name a folder elsewhere")
    if out.is_dir() and any(out.iterdir()) and not _is_gpt2_folder(out):
        raise UserError(f"{out} is not empty and holds no exported model: name a new folder")


def _holds_same_model(folder: Path, model: "GPT") -> bool:
    """Return whether the folder's weights are those of `model`, in the coarser of the two dtypes."""
    import torch

    from gpt2.weights import load

    try:
        found, _ = load(folder, dtype=None)
    except UserError:
        return False
    new, old = model.state_dict(), found.state_dict()
    dtypes = {next(one.parameters()).dtype for one in (model, found)}
    if dtypes == {torch.float16, torch.bfloat16}:  # neither has the other's values
        return False
    dtype = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    same_shapes = {name: t.shape for name, t in new.items()} == {name: t.shape for name, t in old.items()}
    return same_shapes and all(torch.equal(new[name].to(dtype), old[name].to(dtype)) for name in new)


def _is_gpt2_folder(folder: Path) -> bool:
    """Return whether the folder's `config.json` describes a GPT-2."""
    from gpt2.weights import read_config

    try:
        return (folder / "config.json").is_file() and read_config(folder) is not None
    except UserError:
        return False
