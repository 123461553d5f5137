"""gpt2 sweep [RECIPE|FILE] --lr 1e-3..3e-2 --trials 12"""

import os
import sys
from pathlib import Path

from gpt2.cli import Parser, is_help, positive_int
from gpt2.commands.train import RECIPE_HELP, add_training_flags, resolve_config
from gpt2.config import FINETUNING_FIELDS, TrainConfig
from gpt2.errors import ConfigError
from gpt2.files import expand_path
from gpt2.progress import print_status
from gpt2.terminal import escape_controls, path_for_stream, single_line
from gpt2.train.recipes import RECIPES

EXCLUDED = ("resume", "wandb", "tensorboard", "profile")


def main(argv: list[str]) -> int:
    """Run `gpt2 sweep`: the table and the path of best.toml on standard output, progress on standard error."""
    parser = make_parser()
    if is_help(argv):
        parser.parse_args(argv)
    from gpt2.commands.training import make_evaluator, make_sampler
    from gpt2.distributed.process_group import SINGLE_PROCESS
    from gpt2.reporting.sweep_plot import plot_sweep
    from gpt2.train.sweep import NUMERIC_FIELDS, best_trial, format_table, parse_range, run_sweep, write_best
    from gpt2.train.trainer import Interrupted, train

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("gpt2 sweep runs its trials in one process: start it without torchrun")
    found, rest = split_ranges(argv, NUMERIC_FIELDS)
    given = vars(parser.parse_args(rest))
    base, trials = given.pop("recipe"), given.pop("trials")
    ranges = {name: parse_range(name, text) for name, text in found.items()}
    if not ranges:
        raise ConfigError("gpt2 sweep needs a range to search, such as --lr 1e-3..3e-2")
    given.setdefault("name", f"{Path(base).stem}-sweep")
    config = resolve_config(base, given)
    folder = expand_path(config.out_dir) / str(config.name)

    def train_trial(trial: TrainConfig) -> Path:
        values = ", ".join(f"{name.replace('_', '-')} {getattr(trial, name):g}" for name in ranges)
        print_status(f"{trial.name} of {trials}: {values}")
        return train(trial, make_sampler(trial), SINGLE_PROCESS, make_evaluator(trial, SINGLE_PROCESS))

    try:
        done = run_sweep(config, ranges, trials, train_trial)
    except Interrupted as stop:
        print(f"gpt2: {single_line(stop)}; the same command resumes the sweep", file=sys.stderr)
        return stop.exit_code
    table, best = format_table(done), best_trial(done)
    (folder / "report.md").write_text(f"# {config.name}\n\n{table}\n", encoding="utf-8")
    points = [(trial.values, trial.val_loss) for trial in done]
    plot_sweep(folder / "sweep.png", str(config.name), points, {name: low > 0 for name, (low, _) in ranges.items()})
    print(f"{escape_controls(table)}\n\n{path_for_stream(write_best(config, best, folder), sys.stdout)}")
    return 0


def split_ranges(argv: list[str], numeric: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The flags of numeric settings whose value is a range ``A..B``, by setting, and the other arguments."""
    ranges, rest, words = {}, [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in numeric:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if ".." in value:
            ranges[name] = value
        else:
            rest += [flag, value]
    return ranges, rest


def make_parser() -> Parser:
    """The parser of `gpt2 sweep`."""
    parser = Parser(
        prog="gpt2 sweep",
        description="Search for the best settings: seeded random values from the given ranges, a short run for each, "
        "one table, one picture (sweep.png), and the best settings as a recipe (best.toml). The same command resumes.",
        epilog="A flag with a number takes a range LOW..HIGH: the values are log-uniform if both ends are positive, "
        f"else uniform. All other flags are those of gpt2 train. recipes: {', '.join(RECIPES)}.",
        examples=(
            "gpt2 sweep quickstart --lr 1e-3..3e-2 --trials 12",
            "gpt2 sweep shakespeare-cpu --lr 1e-3..1e-1 --weight-decay 0..0.2 --max-steps 200 --trials 16",
        ),
    )
    parser.add_argument("recipe", nargs="?", default="quickstart", metavar="RECIPE|FILE", help=RECIPE_HELP)
    parser.add_flag("trials", type=positive_int, default=12, help="number of trials in all [12]")
    add_training_flags(parser, exclude=EXCLUDED, hidden=FINETUNING_FIELDS)
    return parser
