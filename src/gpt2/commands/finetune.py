"""gpt2 finetune MODEL --data SOURCE [--lora-rank 8] [--flags]"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.cli import Parser, is_help
from gpt2.commands.train import add_training_flags, resolve_config
from gpt2.config import TrainConfig, read_toml, to_toml, with_overrides
from gpt2.errors import ConfigError
from gpt2.progress import shows_progress
from gpt2.terminal import escape_controls, path_for_stream, single_line
from gpt2.train.recipes import RECIPES

if TYPE_CHECKING:
    from gpt2.train.trainer import Sampler

DEFAULT_LORA_LR = 5e-4  # ten times that of full fine-tuning: adapters start at zero
KEPT = "a fine-tuned model keeps the shape of MODEL"
EXCLUDED_FLAGS = ("init_from", "n_layer", "n_head", "n_embd")  # these come from MODEL


def main(argv: list[str]) -> int:
    """`gpt2 finetune`: the run folder on standard output, what it changed on standard error."""
    parser = make_parser()
    if is_help(argv):
        parser.parse_args(argv)
    from gpt2.commands.training import broadcast_config, make_evaluator, make_sampler
    from gpt2.distributed.process_group import process_group
    from gpt2.train.trainer import Interrupted, train

    with process_group() as ranks:
        with ranks.raise_on_all_ranks():
            given = vars(parser.parse_args(argv))
            print_only = given.pop("print_config")
            given = finetune_settings(given.pop("model"), given)
            requested = with_overrides(RECIPES["finetune"], given, "the command line")
        config = broadcast_config(ranks, requested, lambda: finetune_config(given))
        if print_only:
            if ranks.is_main_process:
                print(to_toml(config), end="")
            return 0
        sampler = make_sampler(config)
        try:
            folder = train(config, sampler, ranks, make_evaluator(config, ranks))
        except Interrupted as stop:
            if ranks.is_main_process:
                print(f"gpt2: {single_line(stop).replace('gpt2 train', 'gpt2 finetune')}", file=sys.stderr)
            return stop.exit_code
        with ranks.raise_on_all_ranks():
            if ranks.is_main_process:
                comparison = append_comparison(folder, sampler)
                if shows_progress():
                    print(escape_controls(comparison), file=sys.stderr)
                print(path_for_stream(folder, sys.stdout))
    return 0


def make_parser() -> Parser:
    """The parser of `gpt2 finetune`."""
    parser = Parser(
        prog="gpt2 finetune",
        description="Fine-tune a model on text, or on prompts and answers (JSONL, CSV, Parquet), and compare it with "
        "its base. Writes a run folder, as gpt2 train does.",
        epilog="gpt2 data inspect SOURCE shows which tokens would be trained on. --resume RUN resumes a run.",
        examples=(
            "gpt2 finetune gpt2 --data questions.jsonl --lora-rank 8",
            "gpt2 finetune runs/quickstart --data my-notes/ --epochs 1",
        ),
        advice={f"--{name.replace('_', '-')}": KEPT for name in EXCLUDED_FLAGS[1:]} | {"--init-from": "name the MODEL"},
        stray="use --data {}",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model folder, a run folder, or a hub name")
    parser.add_flag("print-config", action="store_true", help="print the settings as TOML and exit")
    add_training_flags(parser, RECIPES["finetune"], exclude=EXCLUDED_FLAGS, hidden=())
    return parser


def append_comparison(folder: Path, sampler: "Sampler") -> str:
    """Compare the fine-tuned model with its base, at the end of the run's report. Returns that section."""
    from gpt2.train.comparison import compare

    comparison = compare(read_toml(folder / "config.toml"), folder, sampler).markdown()
    with (folder / "report.md").open("a", encoding="utf-8") as report:
        report.write(f"\n{comparison}")
    return comparison


def finetune_config(settings: dict[str, Any]) -> TrainConfig:
    """The config of the run. Raises ConfigError for a run to resume that `gpt2 train` made."""
    config = resolve_config("finetune", settings)
    if config.init_from is None:
        folder = Path(config.out_dir, str(config.name))
        raise ConfigError(f"{folder} was made by gpt2 train: gpt2 train --resume {folder}", field="resume")
    return config


def finetune_settings(model: str | None, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of `gpt2 finetune` with the settings that follow from them. Raises UserError for what is missing."""
    if flags.get("resume", "never") in ("never", "auto"):
        if model is None:
            raise ConfigError("gpt2 finetune needs a MODEL to start from: a model folder, a run folder, or a hub name")
        flags = {"init_from": model, **flags}
        if flags.get("lora_rank"):
            flags = {"lr": DEFAULT_LORA_LR, **flags}
        if "data" not in flags:
            raise ConfigError("gpt2 finetune needs --data SOURCE: text, or rows of prompts and answers", field="data")
    elif model is not None:
        raise ConfigError("--resume uses the run's own model: leave MODEL out", field="resume")
    return flags
