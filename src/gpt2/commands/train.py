"""gpt2 train [RECIPE|FILE] [--flags]"""

import argparse
import sys
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from gpt2.cli import FlagRule, Parser, is_help, reject_unused_flags
from gpt2.config import FINETUNING_FIELDS, TrainConfig, config_for_resume, run_name, to_toml, with_overrides
from gpt2.errors import ConfigError
from gpt2.files import expand_path
from gpt2.progress import print_status
from gpt2.terminal import path_for_stream, single_line
from gpt2.train.recipes import RECIPES, load_recipe

SECTIONS = {  # the first setting of each group of flags in the help
    "name": "data and run folder",
    "n_layer": "model",
    "freeze": "partial and LoRA training",
    "batch_size": "batch and length of the run",
    "optimizer": "optimizer",
    "seed": "device and precision",
    "eval_every": "validation, checkpoints and logs",
}
NEWEST_RUN = "newest"  # the value of --resume without one
METAVARS = {
    "data": "SOURCE",
    "out_dir": "FOLDER",
    "init_from": "MODEL",
    "resume": "RUN",
    "template": "NAME|FILE",
    "tokenizer": "NAME|FOLDER",
    "add_tokens": "LIST",
    "lora_targets": "LIST",
    "columns": "COLUMNS",
    "sample_prompt": "TEXT",
    "wandb": "PROJECT",
}
RECIPE_HELP = "a recipe by name, or a TOML file [quickstart]"
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
GPU_RECIPES = ("shakespeare", "shakespeare-bpe", "gpt2-124m", "gpt2-124m-1gpu")
RULES = (
    FlagRule(("lora_alpha", "lora_targets", "lora_dropout"), lambda c: c.lora_rank > 0, "{} needs --lora-rank"),
    FlagRule(("decay_steps",), lambda c: c.schedule == "wsd", "{} needs --schedule wsd"),
    FlagRule(("min_lr",), lambda c: c.schedule != "constant", "--schedule constant keeps --lr: {} has no effect"),
    FlagRule(("beta2",), lambda c: c.optimizer != "sgd", "--optimizer sgd has one beta: {} has no effect"),
    FlagRule(("sample_prompt",), lambda c: c.sample_tokens > 0, "{} needs --sample-tokens over 0"),
)


def main(argv: list[str]) -> int:
    """Run `gpt2 train`: the run folder on standard output, progress on standard error."""
    parser = make_parser()
    if is_help(argv):
        parser.parse_args(argv)
    from gpt2.commands.training import broadcast_config, make_evaluator, make_sampler
    from gpt2.distributed.process_group import process_group
    from gpt2.runtime import pick_device
    from gpt2.train.non_finite import replay_dump
    from gpt2.train.trainer import Interrupted, train

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
        if base in GPU_RECIPES and config.data and ranks.is_main_process and pick_device(config.device).type == "cpu":
            print_status(f"{base} is a recipe for a GPU and takes days on a CPU: see shakespeare-cpu")
        try:
            folder = train(config, make_sampler(config), ranks, make_evaluator(config, ranks))
        except Interrupted as stop:
            if ranks.is_main_process:
                print(f"gpt2: {single_line(stop)}", file=sys.stderr)
            return stop.exit_code
        if ranks.is_main_process:
            print(path_for_stream(folder, sys.stdout))
    return 0


def make_parser() -> Parser:
    """The parser of `gpt2 train`."""
    parser = Parser(
        prog="gpt2 train",
        description="Train a GPT-2 and write a run folder: weights, metrics, loss plot, samples, checkpoints.",
        epilog=f"recipes: {', '.join(RECIPES)}; by default quickstart. A recipe is a set of values for these flags; "
        "the defaults in brackets apply to flags that the recipe does not set (--print-config shows all values).",
        examples=("gpt2 train quickstart", "gpt2 train --data my-notes/ --tokenizer bpe:1024 --max-steps 2000"),
    )
    parser.add_argument("recipe", nargs="?", default="quickstart", metavar="RECIPE|FILE", help=RECIPE_HELP)
    parser.add_flag("print-config", action="store_true", help="print the settings as TOML and exit")
    parser.add_flag(
        "replay", metavar="DUMP", help="recompute a step of RUN/dumps/ and find the first non-finite module"
    )
    add_training_flags(parser)
    return parser


def resolve_config(base_recipe: str, flags: dict[str, Any]) -> TrainConfig:
    """The config of `gpt2 train`: the flags over the recipe's values, or over those of a resumed run."""
    if flags.get("epochs") and "max_steps" in flags:
        raise ConfigError("--epochs and --max-steps both give the length of the run: use one", field="epochs")
    config = merge_flags(base_recipe, flags)
    reject_unused_flags(flags, config, RULES)
    _check_given_model(config, flags)
    check_rows(config)
    return config


def merge_flags(base_recipe: str, flags: dict[str, Any]) -> TrainConfig:
    """The values of the recipe or of the resumed run, with the flags over them; reads no model and no data."""
    resume = flags.get("resume", "never")
    if resume not in ("never", "auto"):
        out_dir = flags.get("out_dir", TrainConfig.out_dir)
        folder = newest_run(out_dir) if resume == NEWEST_RUN else expand_path(resume)
        if not (folder / "config.toml").is_file():
            raise ConfigError(f"--resume {folder}: there is no run in that folder", field="resume")
        return config_for_resume(folder, flags)
    if "max_steps" in flags:  # it replaces the recipe's epochs
        flags = {"epochs": 0.0, **flags}
    from gpt2.data.resolve import find_shards

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


def newest_run(out_dir: str) -> Path:
    """The run folder in `out_dir` that was written last. Raises ConfigError if there is none."""
    runs = list(expand_path(out_dir).glob("*/config.toml"))
    if not runs:
        raise ConfigError(f"--resume: there is no run in {out_dir}", field="resume")
    return max(runs, key=lambda path: (max(p.stat().st_mtime for p in (path, path.parent)), path)).parent


def check_rows(config: TrainConfig) -> None:
    """Raise ConfigError for rows of prompts and answers with a tokenizer that would have to be trained on text."""
    from gpt2.data.resolve import Rows, resolve_data

    trained, is_file = (config.tokenizer or "").startswith("bpe:"), Path(config.data).suffix in ROW_SUFFIXES
    if trained and is_file and isinstance(resolve_data(config.data, config.columns, config.bad_rows), Rows):
        problem = f"{config.data} has prompts and answers, and --tokenizer {config.tokenizer} is trained on text"
        raise ConfigError(
            f"{problem}: use gpt2 finetune MODEL --data {config.data}, or --tokenizer bytes", field="data"
        )


def _check_given_model(config: TrainConfig, flags: dict[str, Any]) -> None:
    """Raise ConfigError for flags that the model to start from does not allow."""
    given = [name for name in ("tokenizer", "block_size", "lora_rank") if flags.get(name)]
    if not config.init_from or not given:
        return
    from gpt2.resolve import resolve_model

    model = resolve_model(config.init_from)
    shape, own = model.config, model.tokenizer if "tokenizer" in given else None
    if own is not None and own.name != flags["tokenizer"]:
        raise ConfigError(f"{config.init_from} has its own tokenizer: leave --tokenizer out", field="tokenizer")
    if flags.get("block_size", 0) > shape.block_size:
        problem = f"--block-size {flags['block_size']} is more than the model's context of {shape.block_size}"
        raise ConfigError(problem, field="block_size")
    if flags.get("lora_rank", 0) > shape.n_embd:
        problem = f"--lora-rank {flags['lora_rank']} is more than the model's width of {shape.n_embd}"
        raise ConfigError(problem, field="lora_rank")


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
        if f.name in SECTIONS:
            parser.section(SECTIONS[f.name])
        if f.name in exclude:
            continue
        text, annotation, default = f.metadata["help"], types[f.name], getattr(base or TrainConfig(), f.name)
        kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if annotation in (bool, bool | None):
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            allowed = (annotation, *getattr(annotation, "__args__", ()))
            kind = next(kind for kind in (int, float, str) if kind in allowed)
            kwargs |= {"type": _number_or_word(kind, f.metadata["words"]), "metavar": METAVARS.get(f.name)}
            kwargs["metavar"] = kwargs["metavar"] or {int: "INT", float: "FLOAT", str: "NAME"}[kind]
            if f.name == "resume":
                kwargs |= {"nargs": "?", "const": NEWEST_RUN}
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
