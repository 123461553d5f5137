"""gpt2 finetune MODEL --data SOURCE [--lora-rank 8] [--flags]"""

import sys
from pathlib import Path
from typing import Any

from gpt2.cli import Parser
from gpt2.commands.train import add_training_flags, broadcast_config, make_sampler, resolve_config
from gpt2.config import read_toml, to_toml, with_overrides
from gpt2.distributed.process_group import process_group
from gpt2.errors import UserError
from gpt2.train.comparison import compare
from gpt2.train.recipes import RECIPES
from gpt2.train.trainer import Interrupted, Sampler, train

DEFAULT_LORA_LR = 5e-4  # adapters begin as nothing, and bear ten times what the weights do
EXCLUDED_FLAGS = ("init_from", "n_layer", "n_head", "n_embd")  # the model says


def main(argv: list[str]) -> int:
    """`gpt2 finetune`: the run folder on standard output, what it changed on standard error."""
    parser = Parser(
        prog="gpt2 finetune",
        description="Teach a model your text, or your prompts and answers (JSONL, CSV, Parquet), and see what it "
        "gained and forgot. Leaves a run folder, as gpt2 train does.",
        epilog="gpt2 data inspect SOURCE shows what would be learned. --resume RUN goes on with a run that stopped.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model folder, a run folder, or a hub name")
    parser.add_flag("print-config", action="store_true", help="print the settings as TOML and do nothing")
    add_training_flags(parser, RECIPES["finetune"], exclude=EXCLUDED_FLAGS, hidden=())
    with process_group() as ranks:
        with ranks.raise_on_all_ranks():
            given = vars(parser.parse_args(argv))
            print_only = given.pop("print_config")
            given = finetune_settings(given.pop("model"), given)
            asked = with_overrides(RECIPES["finetune"], given, "the command line")
        config = broadcast_config(ranks, asked, lambda: resolve_config("finetune", given))
        if print_only:
            if ranks.is_main_process:
                print(to_toml(config), end="")
            return 0
        sampler = make_sampler(config)
        try:
            folder = train(config, sampler, ranks)
        except Interrupted as stop:
            if ranks.is_main_process:
                print(f"gpt2: {str(stop).replace('gpt2 train', 'gpt2 finetune')}", file=sys.stderr)
            return stop.exit_code
        with ranks.raise_on_all_ranks():
            if ranks.is_main_process:
                _report_comparison(folder, sampler)
    return 0


def _report_comparison(folder: Path, sampler: Sampler) -> None:
    """What a run that is over has changed, in its report and on standard error; and where it is."""
    told = compare(read_toml(folder / "config.toml"), folder, sampler).markdown()
    with (folder / "report.md").open("a", encoding="utf-8") as report:
        report.write(f"\n{told}")
    print(told, file=sys.stderr)
    print(folder)


def finetune_settings(model: str | None, flags: dict[str, Any]) -> dict[str, Any]:
    """What the flags of `gpt2 finetune` come to, over its recipe's values or a resumed run's."""
    if flags.get("resume", "never") in ("never", "auto"):
        if model is None:
            raise UserError("gpt2 finetune needs a MODEL to begin with: a model folder, a run folder, or a hub name")
        flags = {"init_from": model, **flags}
        if flags.get("lora_rank"):
            flags = {"lr": DEFAULT_LORA_LR, **flags}
        if "max_steps" in flags:
            flags = {"epochs": 0.0, **flags}
        if "data" not in flags:
            raise UserError("gpt2 finetune needs --data SOURCE: text, or rows of prompts and answers")
    elif model is not None:
        raise UserError("--resume goes on with a run's own model: leave MODEL out")
    return flags
