"""What the benchmarks' commands share: progress, files for results, and how numbers are printed."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from gpt2.bench.ladder_chart import check_chart_path
from gpt2.errors import UserError
from gpt2.hardware import GiB


def print_progress(line: str) -> None:
    """Tell on standard error how far we are; also from a benchmark's own process."""
    print(f"gpt2: {line}", file=sys.stderr, flush=True)


def check_outputs(result: Path | None, chart: Path | None) -> None:
    """What could not be written at the end is better known before. Raises UserError."""
    for path in (result, chart):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise UserError(f"{path} is a folder: give the name of a file")
    if chart is not None:
        check_chart_path(chart)


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, if it was asked for."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def wide_console() -> Console:
    """Standard output, for tables: 160 columns where it is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console


def format_quartiles(values: dict[str, float]) -> tuple[str, str]:
    """A median, and the quartiles about it, with as many digits as tell something."""
    digits = 0 if values["median"] >= 1000 else 1 if values["median"] >= 10 else 2
    return f"{values['median']:,.{digits}f}", f"{values['low']:,.{digits}f}-{values['high']:,.{digits}f}"


def format_gib(num_bytes: int) -> str:
    """Bytes as GiB."""
    return f"{num_bytes / GiB:,.2f} GiB"
