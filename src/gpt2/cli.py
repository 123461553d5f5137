"""The command line: one subcommand per verb. Nothing heavy is imported until a verb is chosen."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

from gpt2.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from gpt2.train.config import TrainConfig


class Parser(argparse.ArgumentParser):
    """argparse that takes --batch-size and --batch_size alike, and says what is wrong in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def flag(self, name: str, **kwargs: Any) -> None:
        """Add ``--name-with-dashes``, and its spelling with underscores out of sight of the help."""
        dashed, underscored = f"--{name}", f"--{name.replace('-', '_')}"
        action = self.add_argument(dashed, **kwargs)
        if underscored != dashed:
            for option in [o for o in action.option_strings if "-" in o.strip("-")]:
                prefix = "--no-" if option.startswith("--no-") else "--"
                spelled = prefix + option.removeprefix(prefix).replace("-", "_")
                self._option_string_actions[spelled] = action

    def error(self, message: str) -> NoReturn:
        name = message.removeprefix("unrecognized arguments: ")
        if name != message:
            unknown = name.split()[0].partition("=")[0]
            known = [flag for flag in self._option_string_actions if flag.startswith("--") and "_" not in flag]
            message = f"there is no {unknown}{did_you_mean(unknown.replace('_', '-'), known)}"
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `gpt2 VERB ...` and exit: 0 done, 2 a user's mistake in one line, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    exit_after(lambda: _run(arguments))


def exit_after(program: Callable[[], int | None]) -> NoReturn:
    """Run a program and exit with its code; what the user did wrong becomes one line on standard error and code 2."""
    logging.basicConfig(format="gpt2: %(message)s", level=logging.WARNING)
    try:
        code = program() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        _fail(str(error))
    except MemoryError:
        _fail("this needs more memory than there is")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except OSError as error:  # a full disk, a name too long: the system says what is wrong, and with which file
        _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None))


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split("\n")).encode("utf-8", "backslashreplace").decode()
    print(f"gpt2: {line}", file=sys.stderr)
    sys.exit(2)


def _run(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return None
    if arguments[0] == "--version":
        from gpt2 import __version__

        print(f"gpt2 {__version__}")
        return None
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"there is no command '{verb}'{did_you_mean(verb, VERBS)}: see gpt2 --help")
    return VERBS[verb][0](rest)


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {about}" for verb, (_, about) in VERBS.items())
    return f"""GPT-2 in plain PyTorch.

usage: gpt2 COMMAND ...

{verbs}

A MODEL is a run folder, a model folder, or a name on the hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name.
gpt2 COMMAND --help says more."""


def train_command(argv: list[str]) -> int:
    """gpt2 train [RECIPE|FILE.toml] [--flags]"""
    from gpt2.train.config import RECIPES, recipe, to_toml

    parser = Parser(
        prog="gpt2 train",
        description="Train a GPT-2 and leave a run folder: weights, metrics, loss plot, samples, checkpoints.",
        epilog=f"recipes: {', '.join(RECIPES)}; by default quickstart. A recipe is nothing but values for these flags; "
        "what stands in brackets above holds where a recipe says nothing (--print-config shows all).",
    )
    parser.add_argument("recipe", nargs="?", default="quickstart", metavar="RECIPE|FILE.toml")
    parser.flag("print-config", action="store_true", help="print the settings as TOML and do nothing")
    _add_training_flags(parser)
    given = vars(parser.parse_args(argv))
    base, print_only = given.pop("recipe"), given.pop("print_config")
    config = training_config(base, given).check()
    if print_only:
        if "name" not in given and recipe(base).name is None:  # one was only made up for a run that begins now
            config = replace(config, name=None)
        print(to_toml(config), end="")
        return 0

    from gpt2.generation.engine import generate
    from gpt2.train.trainer import Interrupted, train

    def sampler(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
        return generate(model, tokenizer, prompt, max_new_tokens=length, top_k=50, seed=config.seed)[0]

    try:
        folder = train(config, sampler)
    except Interrupted as stop:
        print(f"gpt2: {stop}", file=sys.stderr)
        return 128 + stop.signal_number
    print(folder)
    return 0


def training_config(base: str, given: dict[str, Any]) -> "TrainConfig":
    """What `gpt2 train` should do: the recipe's values under the flags given, or a resumed run's."""
    from gpt2.data.shards import holds_shards
    from gpt2.train.config import recipe, resumed, run_name, with_values

    resume = given.get("resume", "never")
    if resume not in ("never", "auto"):
        folder = Path(resume)
        if not (folder / "config.toml").is_file():
            raise UserError(f"--resume {folder}: there is no run in that folder")
        return resumed(folder, given)
    if "data" in given and holds_shards(Path(given["data"])):
        given = {"tokenizer": None, **given}  # shards know their own: a recipe's does not speak against it
    config = with_values(recipe(base), given, "the command line")
    if "warmup_steps" not in given and config.warmup_steps > config.max_steps:  # the recipe's, in a run cut short
        config = replace(config, warmup_steps=config.max_steps // 10)
    if config.name is None:
        stem = Path(base).stem
        config = with_values(config, {"name": run_name(config.out_dir, stem, resume=resume == "auto")}, base)
    folder = Path(config.out_dir) / str(config.name)
    if resume == "auto" and (folder / "config.toml").is_file():
        return resumed(folder, given)
    return config


def _add_training_flags(parser: Parser) -> None:
    """A flag for every field of TrainConfig; only those given end up in the parsed result."""
    from gpt2.train.config import TrainConfig

    types = get_type_hints(TrainConfig)
    for f in fields(TrainConfig):
        text, annotation = f.metadata["help"], types[f.name]
        kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if annotation == bool | None:
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kind = next(
                kind for kind in (int, float, str) if kind in (annotation, *getattr(annotation, "__args__", ()))
            )
            kwargs |= {"type": kind, "metavar": kind.__name__.upper()}
            if f.default is not None and f.default != "":
                kwargs["help"] = f"{text} [{f.default}]"
        parser.flag(f.name.replace("_", "-"), **kwargs)


def sample_command(argv: list[str]) -> None:
    """gpt2 sample MODEL --prompt TEXT"""
    parser = Parser(prog="gpt2 sample", description="Continue a prompt, on standard output.")
    parser.add_argument("model", metavar="MODEL", help="a run folder, a model folder, or a hub name")
    parser.flag("prompt", default="", help="what to continue; - reads it from standard input; empty starts a new text")
    parser.flag("num-samples", type=int, default=1, help="how many continuations [1]")
    parser.flag("max-new-tokens", type=int, default=200, help="length of each at most [200]")
    parser.flag("temperature", type=float, default=1.0, help="0 takes the most likely token, always [1]")
    parser.flag("top-k", type=int, default=50, help="choose among the k most likely; 0 for all [50]")
    parser.flag("top-p", type=float, default=1.0, help="choose among the most likely that sum to p [1]")
    parser.flag("seed", type=int, default=None, help="the same seed, the same text")
    parser.flag("device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    parser.flag("dtype", default="float32", help="float32, bfloat16 or float16 [float32]")
    args = parser.parse_args(argv)
    prompt = _read_prompt(args.prompt)

    from gpt2.generation.engine import stream
    from gpt2.generation.sampling import Sampling
    from gpt2.runtime import parse_dtype, pick_device
    from gpt2.weights import load

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    dtype = parse_dtype(args.dtype)
    model, tokenizer = load(args.model, device=pick_device(args.device), dtype=dtype)
    pieces = stream(
        model,
        tokenizer,
        prompt,
        sampling,
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    _print_in_order(pieces, prompt, args.num_samples)


def _read_prompt(text: str) -> str:
    """The prompt itself, or for "-" what stands on standard input."""
    try:
        if text == "-":
            return sys.stdin.buffer.read().decode() if sys.stdin is not None else ""
        return text.encode().decode()
    except UnicodeError:
        raise UserError("the prompt is not UTF-8 text") from None


def _print_in_order(pieces: Any, prompt: str, num_samples: int) -> None:
    """Show the first sample as it grows and the others after it, with a line between them."""
    texts, shown = {0: prompt}, 0
    for sample, piece in pieces:
        texts[sample] = texts.get(sample, prompt) + piece
        if sample == 0:
            print(texts[0][shown:], end="", flush=True)
            shown = len(texts[0])
    print(texts[0][shown:])
    for sample in range(1, num_samples):
        print(f"---\n{texts.get(sample, prompt)}")


def export_command(argv: list[str]) -> None:
    """gpt2 export MODEL OUT"""
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

    from gpt2.runtime import parse_dtype
    from gpt2.weights import load, save

    dtype = parse_dtype(args.dtype) if args.dtype else None
    model, tokenizer = load(args.model, dtype=dtype)
    print(save(model, tokenizer, args.out))


def data_command(argv: list[str]) -> None:
    """gpt2 data list | prepare SOURCE OUT | inspect FOLDER"""
    parser = Parser(prog="gpt2 data", description="Text to token shards, and what is in them.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|prepare|inspect", parser_class=Parser)
    verbs.add_parser("list", help="the corpora that have a name")
    prepare_parser = verbs.add_parser("prepare", help="tokenize a corpus into a folder of shards")
    prepare_parser.add_argument("source", metavar="SOURCE", help="a name, a text file, or a folder of them")
    prepare_parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    prepare_parser.flag("tokenizer", default="gpt2", help="gpt2, bytes, bpe:N or a folder [gpt2]")
    prepare_parser.flag("val-fraction", type=float, default=0.1, help="how much is held out [0.1]")
    inspect_parser = verbs.add_parser("inspect", help="check a folder of shards and show how it begins")
    inspect_parser.add_argument("folder", metavar="FOLDER", type=Path)
    args = parser.parse_args(argv)

    from gpt2.data.sources import SOURCES

    if args.verb == "list":
        for name, about in SOURCES.items():
            print(f"{name:24}{about}")
    elif args.verb == "prepare":
        from gpt2.data.prepare import prepare, tokenizer_for
        from gpt2.data.sources import open_source

        source = open_source(args.source)
        tokenizer = tokenizer_for(source, args.tokenizer, args.val_fraction)
        meta = prepare(source, tokenizer, args.out, val_fraction=args.val_fraction)
        for split, counts in meta.splits.items():
            print(f"{split}: {counts.tokens:,} tokens of {counts.bytes:,} bytes in {counts.documents} document(s)")
    else:
        from gpt2.data.prepare import describe_shards

        print(describe_shards(args.folder))


VERBS: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
    "train": (train_command, "train a model on text, from nothing or from another model"),
    "sample": (sample_command, "continue a prompt"),
    "export": (export_command, "write a model for other programs"),
    "data": (data_command, "prepare token shards, and look into them"),
}
