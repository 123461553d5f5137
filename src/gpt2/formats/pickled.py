"""PyTorch's pickles, read with `weights_only=True` and no other way."""

import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2.errors import ModelFilesError
from gpt2.files import check_regular_file
from gpt2.formats.stored import Stored, copied_out

_log = logging.getLogger("gpt2")


class Settings:
    """What stands for a dataclass of the program that wrote a checkpoint, `GPTConfig` for one: attributes, no code."""


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote. Tensors stay in the file where it can be mapped.

    Raises ModelFilesError for a file that is broken, or that needs more than weights_only=True allows.
    """
    check_regular_file(path)
    try:
        mapped = zipfile.is_zipfile(path)
        if mapped and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("its entries are compressed, as torch never writes them")
        with torch.serialization.safe_globals(_settings_in(path) if mapped else []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise ModelFilesError(f"there is no {path}") from None
    except Exception as error:  # torch and pickle raise anything for a broken file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "WeightsUnpickler error" in line), lines[0])
        reason = reason.rpartition("WeightsUnpickler error: ")[2].strip()[:160]
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it calls for {unsafe[1]}"
            raise ModelFilesError(f"{path} holds more than weights, which is not read: {reason}") from error
        raise ModelFilesError(f"{path} is no whole PyTorch checkpoint: {reason}") from error


def _settings_in(path: Path) -> list[Any]:
    """The classes called GPTConfig that a checkpoint mentions, each of which becomes `Settings`."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(Settings, name) for name in names if name.rpartition(".")[2] == "GPTConfig"]


def stored_tensors(state: Any, path: Path) -> list[Stored]:
    """The tensors of a state dict that `read_pickle` read. Raises ModelFilesError for what is none."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ModelFilesError(f"{path} is no state dict: names and tensors")
    mapped = zipfile.is_zipfile(path)
    return [_stored(key, tensor, path, mapped) for key, tensor in state.items() if isinstance(tensor, Tensor)]


def _stored(key: str, tensor: Tensor, path: Path, mapped: bool) -> Stored:
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ModelFilesError(f"{path}: {key} is not a plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ModelFilesError(f"{path}: {key} is larger than the numbers it is made of")
    read = (lambda: copied_out(tensor)) if mapped and tensor.is_contiguous() else tensor.clone
    return Stored(key, tuple(tensor.shape), read)
