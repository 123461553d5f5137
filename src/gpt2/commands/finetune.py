"""gpt2 finetune MODEL --data SOURCE [--lora-rank 8] [--flags]"""

import sys
from typing import Any

from gpt2.cli import Parser
from gpt2.commands.train import add_training_flags, sampler_of, training_config
from gpt2.errors import UserError
from gpt2.train.comparison import compare
from gpt2.train.config import TrainConfig, read_toml, to_toml
from gpt2.train.recipes import RECIPES
from gpt2.train.trainer import Interrupted, train

LORA_LR = 5e-4  # adapters begin as nothing, and bear ten times what the weights do
NOT_OURS = ("init_from", "n_layer", "n_head", "n_embd")  # the model says


def main(argv: list[str]) -> int:
    """`gpt2 finetune`: the run folder on standard output, what it changed on standard error."""
    parser = Parser(
        prog="gpt2 finetune",
        description="Teach a model your text, or your prompts and answers (JSONL, CSV, Parquet), and see what it "
        "gained and forgot. Leaves a run folder, as gpt2 train does.",
        epilog="gpt2 data inspect SOURCE shows what would be learned. --resume RUN goes on with a run that stopped.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model folder, a run folder, or a hub name")
    parser.flag("print-config", action="store_true", help="print the settings as TOML and do nothing")
    add_training_flags(parser, RECIPES["finetune"], without=NOT_OURS, quiet=())
    given = vars(parser.parse_args(argv))
    print_only = given.pop("print_config")
    config = tuning_config(given.pop("model"), given).check()
    if print_only:
        print(to_toml(config), end="")
        return 0
    sampler = sampler_of(config)
    try:
        folder = train(config, sampler)
    except Interrupted as stop:
        print(f"gpt2: {str(stop).replace('gpt2 train', 'gpt2 finetune')}", file=sys.stderr)
        return stop.exit_code
    told = compare(read_toml(folder / "config.toml"), folder, sampler).markdown()
    with (folder / "report.md").open("a", encoding="utf-8") as report:
        report.write(f"\n{told}")
    print(told, file=sys.stderr)
    print(folder)
    return 0


def tuning_config(model: str | None, given: dict[str, Any]) -> TrainConfig:
    """What `gpt2 finetune` should do: the recipe's values under the flags given, or a resumed run's."""
    if given.get("resume", "never") in ("never", "auto"):
        if model is None:
            raise UserError("gpt2 finetune needs a MODEL to begin with: a model folder, a run folder, or a hub name")
        given = {"init_from": model, **given}
        if given.get("lora_rank"):
            given = {"lr": LORA_LR, **given}
        if "max_steps" in given:
            given = {"epochs": 0.0, **given}
        if "data" not in given:
            raise UserError("gpt2 finetune needs --data SOURCE: text, or rows of prompts and answers")
    elif model is not None:
        raise UserError("--resume goes on with a run's own model: leave MODEL out")
    return training_config("finetune", given)
