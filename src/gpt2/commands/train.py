"""gpt2 train [RECIPE|FILE.toml] [--flags]"""

import argparse
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch

import gpt2
from gpt2.cli import Parser
from gpt2.config import TUNING, TrainConfig, resumed, run_name, to_toml, with_values
from gpt2.data.prepare import named_shards
from gpt2.distributed.process_group import Ranks, joined, restarts
from gpt2.errors import UserError
from gpt2.files import path_of
from gpt2.generation.text import generate
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from gpt2.train.non_finite import replay
from gpt2.train.recipes import RECIPES, recipe
from gpt2.train.trainer import Interrupted, Sampler, train


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="gpt2 train",
        description="Train a GPT-2 and leave a run folder: weights, metrics, loss plot, samples, checkpoints.",
        epilog=f"recipes: {', '.join(RECIPES)}; by default quickstart. A recipe is nothing but values for these flags; "
        "what stands in brackets above holds where a recipe says nothing (--print-config shows all).",
    )
    parser.add_argument("recipe", nargs="?", default="quickstart", metavar="RECIPE|FILE.toml")
    parser.flag("print-config", action="store_true", help="print the settings as TOML and do nothing")
    parser.flag("replay", metavar="DUMP", help="compute a step of RUN/dumps/ again: what went bad first?")
    add_training_flags(parser)
    with joined() as ranks:
        with ranks.together():
            given = vars(parser.parse_args(argv))
            dump, base, print_only = (given.pop(name) for name in ("replay", "recipe", "print_config"))
            asked = with_values(recipe(base), given, "the command line")
        if dump is not None:
            if ranks.main:
                print(replay(path_of(dump)))
            return 0
        config = agreed_config(ranks, asked, lambda: training_config(base, given))
        if print_only:
            if asked.name is None:  # one was only made up for a run that begins now
                config = replace(config, name=None)
            if ranks.main:
                print(to_toml(config), end="")
            return 0
        try:
            folder = train(config, sampler_of(config), ranks)
        except Interrupted as stop:
            if ranks.main:
                print(f"gpt2: {stop}", file=sys.stderr)
            return stop.exit_code
        if ranks.main:
            print(folder)
    return 0


def agreed_config(ranks: Ranks, asked: TrainConfig, make: Callable[[], TrainConfig]) -> TrainConfig:
    """What rank 0 makes of what all were asked, once it is the same: it alone looks at the run folders.

    Raises UserError where ranks were asked different things, and for a run that torchrun could not start anew.
    """
    versions = {"torch": torch.__version__, "gpt2": gpt2.__version__}
    flags = {f"--{name.replace('_', '-')}": value for name, value in asdict(asked).items()}
    ranks.same(versions | flags, "start every rank with the same command")

    def make_and_check() -> TrainConfig:
        if restarts() and asked.resume == "never":
            raise UserError("torchrun --max-restarts starts the run again: give --resume auto, so that it goes on")
        config = make().check()
        if restarts() and config.max_minutes:
            raise UserError(
                "torchrun --max-restarts takes what --max-minutes ends for a failure: leave one of them out"
            )
        return config

    return ranks.first(make_and_check)


def sampler_of(config: TrainConfig) -> Sampler:
    """How a run lets its model talk."""

    def sampler(model: GPT, tokenizer: Tokenizer, prompt: str, length: int) -> str:
        return generate(model, tokenizer, prompt, max_new_tokens=length, top_k=50, seed=config.seed)[0]

    return sampler


def training_config(base: str, given: dict[str, Any]) -> TrainConfig:
    """What `gpt2 train` should do: the recipe's values under the flags given, or a resumed run's."""
    resume = given.get("resume", "never")
    if resume not in ("never", "auto"):
        folder = path_of(resume)
        if not (folder / "config.toml").is_file():
            raise UserError(f"--resume {folder}: there is no run in that folder")
        return resumed(folder, given)
    if "data" in given and named_shards(given["data"]) is not None:
        given = {"tokenizer": None, **given}  # shards know their own: a recipe's does not speak against it
    own = next((name for name in ("n_layer", "n_head", "n_embd") if name in given and given.get("init_from")), None)
    if own is not None:
        raise UserError(f"--init-from keeps that model's own shape: leave --{own.replace('_', '-')} out")
    config = with_values(recipe(base), given, "the command line")
    if "warmup_steps" not in given and config.warmup_steps > config.max_steps:  # the recipe's, in a run cut short
        config = replace(config, warmup_steps=config.max_steps // 10)
    if config.name is None:
        stem = Path(base).stem
        config = with_values(config, {"name": run_name(config.out_dir, stem, resume=resume == "auto")}, base)
    folder = path_of(config.out_dir) / str(config.name)
    if resume == "auto" and (folder / "config.toml").is_file():
        return resumed(folder, given)
    return config


def add_training_flags(
    parser: Parser, base: TrainConfig | None = None, *, without: Collection[str] = (), quiet: Collection[str] = TUNING
) -> None:
    """A flag for every field of TrainConfig; only those given end up in the parsed result.

    base:    where the defaults in the help come from.
    without: fields that have no flag.
    quiet:   fields whose flag the help does not tell of.
    """
    types = get_type_hints(TrainConfig)
    for f in fields(TrainConfig):
        if f.name in without:
            continue
        text, annotation, default = f.metadata["help"], types[f.name], getattr(base or TrainConfig(), f.name)
        kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if annotation in (bool, bool | None):
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kind = next(
                kind for kind in (int, float, str) if kind in (annotation, *getattr(annotation, "__args__", ()))
            )
            kwargs |= {"type": _or_word(kind, f.metadata["words"]), "metavar": kind.__name__.upper()}
            if default is not None and default != "":
                kwargs["help"] = f"{text} [{default}]"
        if f.name in quiet:
            kwargs["help"] = argparse.SUPPRESS
        parser.flag(f.name.replace("_", "-"), **kwargs)


def _or_word(kind: type, words: dict[str, Any]) -> Callable[[str], Any]:
    """A parser of `kind` for argparse that takes the words that stand for a value, too."""

    def parse(text: str) -> Any:
        return words[text] if text in words else kind(text)

    parse.__name__ = kind.__name__  # what argparse calls it in "invalid int value"
    return parse
