"""What the benchmark commands share: flags, result files, and how numbers are printed."""

import math
from argparse import Namespace
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console

from gpt2.bench.common import CONTEXT_LENGTH, environment
from gpt2.bench.decode import DecodeWorkload
from gpt2.bench.ladder_chart import check_chart_path
from gpt2.commands.bench_args import SHAPE_FIELDS
from gpt2.errors import ConfigError, UserError, did_you_mean
from gpt2.files import expand_path
from gpt2.hardware import GiB, device_name
from gpt2.model import OPENAI_CONFIGS, GPTConfig


def check_outputs(args: Namespace) -> None:
    """Raise UserError, before anything is measured, if --json or --chart cannot be written."""
    for path in (None if args.json is None else expand_path(args.json), args.chart):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise UserError(f"{path} is a folder: name a file")
    if args.chart is not None:
        check_chart_path(args.chart)


def openai_config(flag: str, name: str) -> GPTConfig:
    """The config of an OpenAI model by name. Raises UserError that names `flag`."""
    if name not in OPENAI_CONFIGS:
        hint = did_you_mean(name, OPENAI_CONFIGS)
        raise ConfigError(f"{flag} {name} is not one of {', '.join(OPENAI_CONFIGS)}{hint}", field=flag.strip("-"))
    return OPENAI_CONFIGS[name]


def random_model_config(args: Namespace, sequence_length: int) -> GPTConfig:
    """The shape of random weights that the flags ask for, with a context of at least GPT-2's."""
    given = {name: getattr(args, name) for name in SHAPE_FIELDS if getattr(args, name) is not None}
    block_size = max(CONTEXT_LENGTH, sequence_length)
    return replace(openai_config("--shape", args.shape or "gpt2"), block_size=block_size, **given)


def parse_counts(flag: str, text: str, maximum: int) -> tuple[int, ...]:
    """Parse a comma-separated list of integers, without duplicates. Raises UserError that names `flag`."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and len(word) < 8 and 1 <= int(word) <= maximum for word in words):
        message = f"{flag} must be integers from 1 to {maximum:,}, such as 1,8,32, not {text}"
        raise ConfigError(message, field=flag.strip("-"))
    return tuple(dict.fromkeys(map(int, words)))


def new_decode_result(kind: str, workload: DecodeWorkload) -> dict[str, Any]:
    """The beginning of a result file: its kind, this environment and device, and the workload."""
    record = asdict(workload)
    config = record.pop("config")
    record = {name: config[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")} | record
    name = device_name(torch.device(workload.device))
    return {"kind": kind, **environment(), "device": workload.device, "name": name, "workload": record}


def wide_console() -> Console:
    """A console on standard output for tables: 160 columns wide if it is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console


def format_quartiles(values: dict[str, float]) -> tuple[str, str]:
    """A median, and its quartiles as "low-high", with about three significant digits."""
    median = values["median"]
    digits = 0 if median >= 1000 else 1 if median >= 10 else 2
    if 0 < median < 1:
        digits = 2 - math.floor(math.log10(median))
    return f"{values['median']:,.{digits}f}", f"{values['low']:,.{digits}f}-{values['high']:,.{digits}f}"


def format_gib(num_bytes: int) -> str:
    """Bytes as GiB."""
    return f"{num_bytes / GiB:,.2f} GiB"
