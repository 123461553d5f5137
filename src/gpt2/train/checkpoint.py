"""A checkpoint is whole or it is not there.

`step-N/` holds `model/` (a model folder like any other: `gpt2 sample RUN/checkpoints/step-N` works), the optimizer's
state and the random state in safetensors, and `state.json`, which is written last and knows every file's checksum.
All of it is written to a hidden folder, synced to disk, and renamed into place.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from gpt2.errors import UserError
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from gpt2.weights import load, save

log = logging.getLogger("gpt2")


def save_checkpoint(
    folder: Path, step: int, model: GPT, tokenizer: Tokenizer | None, optimizers: Sequence[Optimizer], keep: int
) -> Path:
    """Write the state after update `step` as `folder/step-N` and drop all but the newest `keep`."""
    final, unfinished = folder / f"step-{step}", folder / f".step-{step}.unfinished"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save(model, tokenizer, unfinished / "model")
        save_file(_optimizer_tensors(model, optimizers), unfinished / "optimizer.safetensors")
        save_file(_random_state(), unfinished / "random.safetensors")
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        sums = {str(path.relative_to(unfinished)): _sha256(path) for path in files}
        (unfinished / "state.json").write_text(json.dumps({"step": step, "sha256": sums}, indent=2) + "\n")
        _sync([*files, unfinished / "state.json", unfinished / "model", unfinished])
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _sync([folder])
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {final}: {error}") from error
    later = [other for other in _steps(folder) if other > step]  # broken, or this run would have begun there
    for old in later + sorted(other for other in _steps(folder) if other <= step)[:-keep]:
        shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint under `folder` whose files are all as they were written; a broken one is passed over."""
    for step in sorted(_steps(folder), reverse=True):
        path = folder / f"step-{step}"
        broken = _first_broken_file(path)
        if broken is None:
            return path
        log.warning("checkpoint %s is broken (%s): looking for an older one", path, broken)
    return None


def load_checkpoint(path: Path, model: GPT, optimizers: Sequence[Optimizer]) -> int:
    """Put the state of a checkpoint into `model`, `optimizers` and torch's random state; returns its step."""
    weights, _ = load(path / "model", dtype=None)
    model.load_state_dict(weights.state_dict())
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        kind, name = key.split(".", 1)
        state.setdefault(name, {})[kind] = tensor
    for optimizer in optimizers:
        names = _names(model, optimizer)
        own = {index: state[name] for index, name in enumerate(names) if name in state}
        optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
    random = load_file(path / "random.safetensors")
    torch.set_rng_state(random.pop("cpu"))
    for device, tensor in random.items():
        torch.cuda.set_rng_state(tensor, device)
    return _read_state(path)[0]


def _optimizer_tensors(model: GPT, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state under names like `exp_avg.transformer.wte.weight`."""
    tensors: dict[str, Tensor] = {}
    for optimizer in optimizers:
        state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
        for index, name in enumerate(_names(model, optimizer)):
            for kind, value in state.get(index, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{kind}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def _names(model: GPT, optimizer: Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in the order of its state."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        state[f"cuda:{index}"] = torch.cuda.get_rng_state(index)
    return state


def _steps(folder: Path) -> list[int]:
    names = (re.fullmatch(r"step-([0-9]+)", path.name) for path in folder.glob("step-*"))
    return [int(match[1]) for match in names if match]


def _read_state(path: Path) -> tuple[int, dict[str, str]]:
    """The step of a checkpoint and the checksums of its files; a ValueError when `state.json` is not whole."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        step, sums = state["step"], dict(state["sha256"])
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error
    if type(step) is not int or path.name != f"step-{step}" or not sums:
        raise ValueError("it is another checkpoint's")
    return step, sums


def _first_broken_file(path: Path) -> str | None:
    """The first file of a checkpoint that is missing or changed, None when it is whole."""
    try:
        _, sums = _read_state(path)
    except ValueError:
        return "state.json"
    for name, expected in sums.items():
        if not (path / name).is_file() or _sha256(path / name) != expected:
            return name
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(paths: list[Path]) -> None:
    """Ask the disk to keep what was written to these files and folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
