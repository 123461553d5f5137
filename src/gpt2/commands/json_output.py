"""--json FILE, which is the same for all commands."""

import json
import sys
from pathlib import Path
from typing import Any

from gpt2.cli import Parser
from gpt2.files import expand_path, write_error

_STANDARD_OUTPUT = "-"


def add_json_flag(parser: Parser, what: str) -> None:
    """Add --json FILE."""
    parser.add_flag("json", metavar="FILE", help=f"write {what} as JSON; - prints it instead of the text")


def prints_json(file: str | None) -> bool:
    """Whether --json replaces the text on standard output."""
    return file == _STANDARD_OUTPUT


def write_json(file: str | None, result: Any, *, partial: bool = False) -> None:
    """Write what a command found, if --json was given.

    partial: this is not all yet; a file has it nevertheless, standard output does not.

    Raises DataError for a file that cannot be written.
    """
    if file is None or (partial and prints_json(file)):
        return
    if prints_json(file):
        print(json.dumps(result, ensure_ascii=sys.stdout.isatty(), indent=2, allow_nan=False))
        return
    path = expand_path(Path(file))
    try:
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise write_error(path, error) from None
