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
from gpt2.config import FINETUNING_FIELDS, TrainConfig, config_for_resume, run_name, to_toml, with_overrides
from gpt2.data.resolve import find_shards
from gpt2.distributed.process_group import ProcessGroup, max_restarts, process_group
from gpt2.errors import ConfigError
from gpt2.files import expand_path
from gpt2.generation.text import generate
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from gpt2.train.non_finite import replay_dump
from gpt2.train.recipes import RECIPES, load_recipe
from gpt2.train.trainer import Interrupted, Sampler, train


def main(argv: list[str]) -> int:
    """Run `gpt2 train`: the run folder on standard output, progress on standard error."""
    parser = Parser(
        prog="gpt2 train",
        description="Train a GPT-2 and write a run folder: weights, metrics, loss plot, samples, checkpoints.",
        epilog=f"recipes: {', '.join(RECIPES)}; by default quickstart. A recipe is a set of values for these flags; "
        "the defaults in brackets apply to flags that the recipe does not set (--print-config shows all values).",
    )
    parser.add_argument("recipe", nargs="?", default="quickstart", metavar="RECIPE|FILE.toml")
    parser.add_flag("print-config", action="store_true", help="print the settings as TOML and exit")
    parser.add_flag(
        "replay", metavar="DUMP", help="recompute a step of RUN/dumps/ and find the first non-finite module"
    )
    add_training_flags(parser)
    with process_group() as ranks:
        with ranks.raise_on_all_ranks():
            given = vars(parser.parse_args(argv))
            dump, base, print_only = (given.pop(name) for name in ("replay", "recipe", "print_config"))
            requested = with_overrides(load_recipe(base), given, "the command line")
        if dump is not None:
            if ranks.is_main_process:
                print(replay_dump(expand_path(dump)))
            return 0
        config = broadcast_config(ranks, requested, lambda: resolve_config(base, given))
        if print_only:
            if requested.name is None:  # the generated name is for a run that starts now
                config = replace(config, name=None)
            if ranks.is_main_process:
                print(to_toml(config), end="")
            return 0
        try:
            folder = train(config, make_sampler(config), ranks)
        except Interrupted as stop:
            if ranks.is_main_process:
                print(f"gpt2: {stop}", file=sys.stderr)
            return stop.exit_code
        if ranks.is_main_process:
            print(folder)
    return 0


def broadcast_config(
    ranks: ProcessGroup, requested: TrainConfig, make_config: Callable[[], TrainConfig]
) -> TrainConfig:
    """Broadcast the config that the main process makes: it alone looks at the run folders.

    Raises UserError where the ranks were given different flags, and for a run that torchrun could not restart.
    """
    versions = {"torch": torch.__version__, "gpt2": gpt2.__version__}
    flags = {f"--{name.replace('_', '-')}": value for name, value in asdict(requested).items()}
    ranks.assert_same_on_all_ranks(versions | flags, "start every rank with the same command")

    def make_and_check() -> TrainConfig:
        if max_restarts() and requested.resume == "never":
            raise ConfigError("torchrun --max-restarts needs --resume auto, so that a restarted run resumes")
        config = make_config().check()
        if max_restarts() and config.max_minutes:
            raise ConfigError("torchrun --max-restarts treats the end by --max-minutes as a failure: use only one")
        return config

    return ranks.broadcast_from_main(make_and_check)


def make_sampler(config: TrainConfig) -> Sampler:
    """The function with which a run generates its samples."""

    def sampler(model: GPT, tokenizer: Tokenizer, prompt: str, length: int) -> str:
        return generate(model, tokenizer, prompt, max_new_tokens=length, top_k=50, seed=config.seed)[0]

    return sampler


def resolve_config(base_recipe: str, flags: dict[str, Any]) -> TrainConfig:
    """The config of `gpt2 train`: the flags over the recipe's values, or over those of a resumed run."""
    resume = flags.get("resume", "never")
    if resume not in ("never", "auto"):
        folder = expand_path(resume)
        if not (folder / "config.toml").is_file():
            raise ConfigError(f"--resume {folder}: there is no run in that folder", field="resume")
        return config_for_resume(folder, flags)
    if "data" in flags and find_shards(flags["data"]) is not None:
        flags = {"tokenizer": None, **flags}  # the shards' own, not the recipe's
    shape = next((name for name in ("n_layer", "n_head", "n_embd") if name in flags and flags.get("init_from")), None)
    if shape is not None:
        raise ConfigError(f"--init-from keeps that model's shape: leave --{shape.replace('_', '-')} out", field=shape)
    config = with_overrides(load_recipe(base_recipe), flags, "the command line")
    if "warmup_steps" not in flags and config.warmup_steps > config.max_steps:  # the recipe's, in a shorter run
        config = replace(config, warmup_steps=config.max_steps // 10)
    if config.name is None:
        stem = Path(base_recipe).stem
        config = with_overrides(config, {"name": run_name(config.out_dir, stem, resume=resume == "auto")}, base_recipe)
    folder = expand_path(config.out_dir) / str(config.name)
    if resume == "auto" and (folder / "config.toml").is_file():
        return config_for_resume(folder, flags)
    return config


def add_training_flags(
    parser: Parser,
    base: TrainConfig | None = None,
    *,
    exclude: Collection[str] = (),
    hidden: Collection[str] = FINETUNING_FIELDS,
) -> None:
    """Add a flag for every field of TrainConfig. The parsed result has only those that were given.

    base:    source of the defaults in the help.
    exclude: fields that have no flag.
    hidden:  fields whose flag is not in the help.
    """
    types = get_type_hints(TrainConfig)
    for f in fields(TrainConfig):
        if f.name in exclude:
            continue
        text, annotation, default = f.metadata["help"], types[f.name], getattr(base or TrainConfig(), f.name)
        kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if annotation in (bool, bool | None):
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            allowed = (annotation, *getattr(annotation, "__args__", ()))
            kind = next(kind for kind in (int, float, str) if kind in allowed)
            kwargs |= {"type": _number_or_word(kind, f.metadata["words"]), "metavar": kind.__name__.upper()}
            if default is not None and default != "":
                kwargs["help"] = f"{text} [{default}]"
        if f.name in hidden:
            kwargs["help"] = argparse.SUPPRESS
        parser.add_flag(*(name.replace("_", "-") for name in (f.name, *f.metadata["aliases"])), **kwargs)


def _number_or_word(kind: type, words: dict[str, Any]) -> Callable[[str], Any]:
    """An argparse type that parses `kind`, or one of the words that stand for a value."""

    def parse(text: str) -> Any:
        return words[text] if text in words else kind(text)

    parse.__name__ = kind.__name__  # for argparse's message "invalid int value"
    return parse
