"""A search over settings: trials with seeded random values, each a run of its own, resumable.

The method is random search (Bergstra and Bengio 2012, "Random Search for Hyper-Parameter Optimization").
"""

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import get_type_hints

from gpt2.config import TrainConfig, to_toml
from gpt2.errors import ConfigError, UserError
from gpt2.files import expand_path
from gpt2.reporting.metrics import read_metrics

SWEEP_NAME, TRIALS_NAME = "sweep.json", "trials.jsonl"
NUMERIC_FIELDS = tuple(
    name
    for name, kind in get_type_hints(TrainConfig).items()
    if kind in (int, float, int | None, float | None) and name not in ("seed", "max_minutes", "rank_timeout")
)


@dataclass(frozen=True)
class Trial:
    """One finished trial.

    number:   counted from 1.
    values:   the values drawn for the searched settings, by name.
    val_loss: validation loss in nats per token of the weights that the run publishes; None if the loss diverged.
    """

    number: int
    values: dict[str, float]
    val_loss: float | None


def parse_range(name: str, text: str) -> tuple[float, float]:
    """The two ends of ``"1e-3..3e-2"``, the lower first. Raises ConfigError for anything else."""
    flag = "--" + name.replace("_", "-")
    try:
        low, high = (float(end) for end in text.split(".."))
    except ValueError:
        raise ConfigError(f"{flag} {text}: a range is LOW..HIGH, such as 1e-3..3e-2", field=name) from None
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"{flag} {text}: the first number of a range must be below the second", field=name)
    return low, high


def draw_values(ranges: Mapping[str, tuple[float, float]], seed: int, number: int) -> dict[str, float]:
    """The values of trial `number`, a pure function of the arguments, rounded to three significant digits.

    Uniform in the logarithm if both ends are positive, else uniform. Settings that are integers stay integers.
    """
    types, values = get_type_hints(TrainConfig), {}
    for name, (low, high) in ranges.items():
        fraction = random.Random(f"{seed}/{number}/{name}").random()
        value = low * (high / low) ** fraction if low > 0 else low + (high - low) * fraction
        value = min(max(float(f"{value:.3g}"), low), high)
        values[name] = round(value) if types[name] in (int, int | None) else value
    return values


def run_sweep(
    config: TrainConfig,
    ranges: Mapping[str, tuple[float, float]],
    trials: int,
    train_trial: Callable[[TrainConfig], Path],
) -> list[Trial]:
    """Run the trials that are not finished yet, and return all of them in order.

    config:      the settings that all trials share; its name is that of the sweep's folder under `out_dir`, where
                 trial 1 is the run folder `trial-01`.
    train_trial: trains one config, resuming its run if there is one, and returns the run folder.

    An exception of `train_trial` ends the sweep, and the same call resumes it; a loss that is not finite is a result.
    Raises ConfigError if the folder has a sweep with other settings.
    """
    folder = expand_path(config.out_dir) / str(config.name)
    _check_same_sweep(folder, config, ranges)
    finished = {trial.number: trial for trial in read_trials(folder)}
    for number in range(1, trials + 1):
        if number in finished:
            continue
        values = draw_values(ranges, config.seed, number)
        trial_config = replace(config, **values, out_dir=str(folder), name=f"trial-{number:02d}", resume="auto")
        try:
            loss = published_loss(train_trial(trial_config.check()), keep_best=config.keep_best)
        except UserError as error:
            if error.code != "non_finite_loss":
                raise
            loss = None
        finished[number] = Trial(number, values, loss)
        _write(folder / TRIALS_NAME, "".join(json.dumps(asdict(trial)) + "\n" for trial in finished.values()))
    return [finished[number] for number in range(1, trials + 1)]


def read_trials(folder: Path) -> list[Trial]:
    """The finished trials of the sweep in `folder`."""
    path = folder / TRIALS_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Trial(**json.loads(line)) for line in lines]


def published_loss(folder: Path, *, keep_best: bool) -> float:
    """The validation loss of the weights that the run in `folder` published: its last one, or with `keep_best` its
    lowest. Raises ConfigError if the run has none."""
    losses = [record["val_loss"] for record in read_metrics(folder / "metrics.jsonl") if "val_loss" in record]
    if not losses:
        raise ConfigError(f"{folder} has no validation loss: the data has no validation split", field="data")
    return min(losses) if keep_best else losses[-1]


def best_trial(trials: list[Trial]) -> Trial:
    """The trial with the lowest loss. Raises UserError if all diverged."""
    sound = [trial for trial in trials if trial.val_loss is not None]
    if not sound:
        raise UserError(f"all {len(trials)} trials diverged: search lower learning rates")
    return min(sound, key=lambda trial: (trial.val_loss, trial.number))


def write_best(config: TrainConfig, best: Trial, folder: Path) -> Path:
    """Write `best.toml`: the settings of the best trial, as a recipe for `gpt2 train`. Returns its path."""
    defaults = TrainConfig()
    recipe = replace(config, **best.values, name=None, out_dir=defaults.out_dir, resume="never")
    path = folder / "best.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    return path


def format_table(trials: list[Trial]) -> str:
    """The trials as a Markdown table, the lowest loss first and diverged trials last."""
    names = list(trials[0].values)
    header = ["trial", *(name.replace("_", "-") for name in names), "validation loss"]
    ranked = sorted(trials, key=lambda trial: (trial.val_loss is None, trial.val_loss, trial.number))
    rows = [
        [
            str(t.number),
            *(f"{t.values[name]:g}" for name in names),
            "diverged" if t.val_loss is None else f"{t.val_loss:.4f}",
        ]
        for t in ranked
    ]
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _check_same_sweep(folder: Path, config: TrainConfig, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Write the settings of a new sweep; raise ConfigError if those of the one in `folder` differ."""
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "resume"}
    wanted = {"ranges": {name: list(ends) for name, ends in ranges.items()}, "settings": settings}
    path = folder / SWEEP_NAME
    if not path.exists():
        if folder.exists() and any(each.name != _partial(path).name for each in folder.iterdir()):
            raise ConfigError(f"{folder} is not a sweep: choose another --name", field="name")
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(wanted, indent=1) + "\n")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for group in wanted:
        for name in sorted(wanted[group].keys() | found[group].keys()):
            was, value = found[group].get(name), wanted[group].get(name)
            if was != value:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{folder} has a sweep with {flag} {was}, not {value}: choose another --name", field=name
                )


def _write(path: Path, text: str) -> None:
    """Write a file that is whole whenever the process is killed."""
    _partial(path).write_text(text, encoding="utf-8")
    _partial(path).replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
