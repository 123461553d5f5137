"""gpt2 export MODEL OUT"""

from pathlib import Path

from gpt2.cli import Parser
from gpt2.errors import UserError
from gpt2.runtime import parse_dtype
from gpt2.weights import load, save


def main(argv: list[str]) -> None:
    parser = Parser(prog="gpt2 export", description="Write a model where other programs can read it.")
    parser.add_argument("model", metavar="MODEL", help="a run folder, a model folder, or a hub name")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.flag("format", default="hf", help="hf: what transformers, llama.cpp and vLLM read [hf]")
    parser.flag("dtype", default=None, help="float32, bfloat16 or float16; by default what the model has")
    args = parser.parse_args(argv)
    if args.format != "hf":
        raise UserError(f"--format '{args.format}' is not one of hf")
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / "config.json").exists():
        raise UserError(f"{args.out} has something else in it: name a new folder")

    dtype = parse_dtype(args.dtype) if args.dtype else None
    model, tokenizer = load(args.model, dtype=dtype)
    print(save(model, tokenizer, args.out))
