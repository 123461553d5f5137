"""Adapters in PEFT's format: the settings and the tensors of a LoRA, read with every value checked."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2.errors import ModelFilesError
from gpt2.files import safetensors_header
from gpt2.terminal import shorten

TARGET_MODULES = ("c_attn", "c_proj", "c_fc")  # c_proj is in the attention and in the MLP
LORA_A, LORA_B = ".lora_A", ".lora_B"

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names, from its wrapper classes
_LAYER_PATTERN = re.compile(r"transformer\.h\.[0-9]+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
MAX_NUMBER = 1e30  # JSON's integers have no bound
_SUPPORTED_INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base
_UNSUPPORTED_SETTINGS = (  # of PEFT, each with the one value that means plain pairs of A and B
    *(("use_dora", False), ("bias", "none"), ("lora_bias", False), ("use_qalora", False)),
    *((name, None) for name in ("modules_to_save", "trainable_token_indices", "layer_replication")),
    *((name, None) for name in ("target_parameters", "alora_invocation_tokens", "arrow_config", "use_bdlora")),
    *((name, None) for name in ("velora_config", "monteclora_config", "kasa_config")),
)


def matches_target(name: str, target: str) -> bool:
    """Whether PEFT matches `target` to the module of this name."""
    return name == target or name.endswith(f".{target}")


def alpha_by_layer(settings: dict[str, Any], layers: list[str]) -> dict[str, float]:
    """The alpha of each layer: `lora_alpha`, or that of the first name in `alpha_pattern` which ends the layer's name.

    Raises ValueError for a pattern that is more than a name, and for a value that is no number over 0.
    """
    pattern = settings.get("alpha_pattern") or {}
    for name, value in pattern.items() if isinstance(pattern, dict) else [("", pattern)]:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_NUMBER
        if not is_number or not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"alpha_pattern={shorten(json.dumps(pattern))} is not supported: merge it with PEFT first")
    return {
        layer: next((alpha for name, alpha in pattern.items() if matches_target(layer, name)), settings["lora_alpha"])
        for layer in layers
    }


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's `adapter_config.json`. Raises ModelFilesError for anything but plain LoRA."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else None
        raise ModelFilesError(f"{path} has the peft_type {shorten(kind)}: only LORA is supported")
    for key, plain in _UNSUPPORTED_SETTINGS:
        if raw.get(key) and raw[key] != plain:
            raise ModelFilesError(
                f"{path}: {key}={shorten(json.dumps(raw[key]))} is not supported: merge it with PEFT first"
            )
    if raw.get("init_lora_weights") not in _SUPPORTED_INITS:
        init = shorten(raw["init_lora_weights"])
        raise ModelFilesError(f"{path}: init_lora_weights={init} changes the base: merge it with PEFT")
    kinds: dict[str, type | tuple[type, ...]] = {
        "r": int,
        "lora_alpha": (int, float),
        "lora_dropout": (int, float),
        "use_rslora": bool,
        "target_modules": (list, str),
    }
    for key, kind in kinds.items():
        value = raw.get(key)
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        wrong = wrong or (isinstance(value, int | float) and not abs(value) < MAX_NUMBER)
        missing = value is None and key in ("lora_dropout", "use_rslora")
        if (wrong and not missing) or (isinstance(value, list) and not all(isinstance(each, str) for each in value)):
            raise ModelFilesError(f"{path}: {key} cannot be {shorten(json.dumps(value))}")
    return {key: value for key, value in raw.items() if value is not None}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32 by the names of this program, and the file's metadata."""
    if not path.is_file():
        hint = "; pickled weights are not loaded" if path.with_suffix(".bin").is_file() else ""
        raise ModelFilesError(f"{path.parent} has no {path.name}{hint}")
    safetensors_header(path)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                name = key.removeprefix(PREFIX).removesuffix(".weight")
                if not name.endswith((LORA_A, LORA_B)):
                    raise ModelFilesError(
                        f"{path}: {shorten(key)} is neither a lora_A nor a lora_B of a linear layer: merge it with PEFT"
                    )
                name = f"transformer.{name}" if name.startswith("h.") else name  # saved from a model without head
                tensors[name] = file.get_tensor(key).to(torch.float32, copy=True)
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelFilesError(f"{path} is not a complete safetensors file: {error}") from error


def check_lora_pairs(folder: Path, layers: list[str], tensors: dict[str, Tensor], rank: int | None) -> None:
    """Raise ModelFilesError unless every layer can have an adapter, and has an A (rank, in) and a B (out, rank).

    rank: None if every layer has its own.
    """
    if not layers:
        raise ModelFilesError(f"{folder}: it has no tensors")
    for layer in layers:
        if not _LAYER_PATTERN.fullmatch(layer):
            modules = ", ".join(TARGET_MODULES)
            raise ModelFilesError(
                f"{folder}: {shorten(layer)} cannot have an adapter, {modules} can: merge it with PEFT"
            )
        names = (layer + LORA_A, layer + LORA_B)
        for name in names:
            if name not in tensors:
                raise ModelFilesError(f"{folder}: it lacks {shorten(name)}")
        a, b = (tuple(tensors[name].shape) for name in names)
        expected = a[0] if rank is None and len(a) == 2 else rank
        for name, shape, rank_dim in ((names[0], a, 0), (names[1], b, 1)):
            if len(shape) != 2 or shape[rank_dim] != expected or expected == 0:
                raise ModelFilesError(f"{folder}: {name} is {shape}, which is not of rank {expected}")
