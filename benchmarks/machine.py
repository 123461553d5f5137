"""What a benchmark leaves behind: its numbers in results/, with the machine, date and commit they were made on."""

import json
from pathlib import Path
from typing import Any

import torch

from gpt2.bench.common import environment
from gpt2.hardware import device_name

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """What to write beside a measurement."""
    gpu = device_name(torch.device("cuda")) if torch.cuda.is_available() else "none"
    return {**environment(), "cpu": device_name(torch.device("cpu")), "gpu": gpu}


def write_result(name: str, command: str, found: dict[str, Any]) -> dict[str, Any]:
    """Write results/NAME.json: the command, this machine, and what was found. Returns what was written."""
    result = {"command": command, "machine": describe_machine(), **found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result
