"""Result files of benchmarks: results/NAME.json, with the machine, date and commit of the measurement."""

import json
from pathlib import Path
from typing import Any

import torch

from gpt2.bench.common import environment
from gpt2.hardware import device_name

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """The software environment, CPU and GPU of a measurement."""
    gpu = device_name(torch.device("cuda")) if torch.cuda.is_available() else "none"
    return {**environment(), "cpu": device_name(torch.device("cpu")), "gpu": gpu}


def write_result(name: str, command: str, found: dict[str, Any]) -> dict[str, Any]:
    """Write results/NAME.json: the command, this machine, and the results in `found`. Return its content."""
    result = {"command": command, "machine": describe_machine(), **found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result
